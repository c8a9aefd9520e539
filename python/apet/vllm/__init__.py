"""A vLLM plugin: vLLM compresses the visual tokens of its own models if `apet_keep` is set (docs/engines.md).

vLLM finds `register` by itself, as an entry point of the group `vllm.general_plugins`, in every one of its processes.
"""

from __future__ import annotations

import logging

# Models are registered by name: vLLM inspects them in a separate process, and imports only the one that it serves.
MODELS = {
    "Gemma3ForConditionalGeneration": "gemma3:Gemma3",
    "Gemma4ForConditionalGeneration": "gemma4:Gemma4",
    "Glm4vForConditionalGeneration": "glm4v:Glm4v",
    "Glm4vMoeForConditionalGeneration": "glm4v:Glm4vMoe",
    "Idefics3ForConditionalGeneration": "idefics3:Idefics3",
    "InternVLChatModel": "internvl:InternVL",
    "InternVLForConditionalGeneration": "internvl:InternVLHF",
    "Llama4ForConditionalGeneration": "llama4:Llama4",
    "LlavaForConditionalGeneration": "llava:Llava",
    "LlavaNextForConditionalGeneration": "llava_next:LlavaNext",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision:LlavaOnevision",
    "MiniCPMV4_6ForConditionalGeneration": "minicpmv4_6:MiniCPMV4_6",
    "Mistral3ForConditionalGeneration": "mistral3:Mistral3",
    "Qwen2VLForConditionalGeneration": "qwen2_vl:Qwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_vl:Qwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "qwen3_vl:Qwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl:Qwen3VLMoe",
    "Qwen3_5ForConditionalGeneration": "qwen3_vl:Qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_vl:Qwen3_5Moe",
    "SmolVLMForConditionalGeneration": "idefics3:SmolVLM",
}


def register() -> None:
    """Registers subclasses of vLLM's models in their place; without `apet_keep` they behave as before.

    Into a vLLM that lacks something of `versions.USED` it registers nothing, and logs what is missing: an error would
    end engines that do not use this plugin.
    """
    from ..engines.versions import check
    from . import versions

    try:
        check("vLLM", versions.USED)
    except RuntimeError as error:
        logging.getLogger("vllm.apet").error("%s. The plugin is off, and apet_keep has no effect.", error)
        return
    from vllm import ModelRegistry

    from . import budget, unsupported

    budget.count_whole_items()
    budget.check_whole_items()
    unsupported.check_options()
    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, f"apet.vllm.{model}")

"""A vLLM plugin: vLLM compresses the visual tokens of its own models if `apet_keep` is set (docs/engines.md).

vLLM finds `register` by itself, as an entry point of the group `vllm.general_plugins`, in every one of its processes.
"""

from __future__ import annotations

# By name: vLLM inspects models in a separate process, and imports only the one that it serves.
MODELS = {
    "LlavaForConditionalGeneration": "apet.vllm.llava:Llava",
    "LlavaNextForConditionalGeneration": "apet.vllm.llava_next:LlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "apet.vllm.qwen2_5_vl:Qwen2_5_VL",
}


def register() -> None:
    """Registers subclasses of vLLM's models in their place; without `apet_keep` they behave as before."""
    from vllm import ModelRegistry

    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)

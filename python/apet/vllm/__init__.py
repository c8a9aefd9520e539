"""A vLLM plugin: vLLM compresses the visual tokens of its own models when it is asked to. docs/engines.md.

vLLM finds `register` by itself, as an entry point of the group `vllm.general_plugins`, in every one of its processes.
"""

from __future__ import annotations

# Named, not imported: vLLM reads what a model can do in a process of its own, and imports the one that it serves.
MODELS = {
    "LlavaForConditionalGeneration": "apet.vllm.llava:Llava",
    "LlavaNextForConditionalGeneration": "apet.vllm.llava_next:LlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "apet.vllm.qwen2_5_vl:Qwen2_5_VL",
}


def register() -> None:
    """Puts subclasses of vLLM's models in their places; without `apet_keep` they are what they were."""
    from vllm import ModelRegistry

    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)

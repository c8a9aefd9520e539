"""Models of lmms-eval with compression, as a plugin that it finds by itself (entry point group `lmms_eval.models`):

    lmms-eval --model apet_llava_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf,preset=paper-64 --tasks gqa,pope

`apet_X` is the model X of lmms-eval, patched once it is loaded. It also takes the options of `apet.patch` as arguments.
"""

from __future__ import annotations

from typing import Any

import apet

# The models of lmms-eval whose `model` is a class of transformers that `apet.patch` takes, or has one as its thinker
# (Qwen's omni models); `huggingface` is any class.
MODELS = (
    *("aria", "fuyu", "gemma3", "gemma4", "glm4v", "huggingface", "idefics2", "internvl_hf", "lfm2_5_vl"),
    *("llama4_scout", "llava_hf", "mistral3_vl", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_omni"),
    *("qwen3_vl", "video_llava"),
)
OPTIONS = (
    "keep",
    "basis",
    "layout",
    "select",
    "blend",
    "refine",
    "share",
    "relevance",
    "distinct",
    "guard",
    "guard_limit",
    "positions",
    "llm_layer",
    "llm_keep",
    "preset",
)


def manifests() -> list[Any]:
    """Returns the models to register. lmms-eval calls it while it imports its models."""
    from lmms_eval.models import AVAILABLE_CHAT_TEMPLATE_MODELS, AVAILABLE_SIMPLE_MODELS
    from lmms_eval.models.registry_v2 import ModelManifest

    kinds = {"simple": AVAILABLE_SIMPLE_MODELS, "chat": AVAILABLE_CHAT_TEMPLATE_MODELS}
    found = []
    for name in MODELS:
        paths = {f"{kind}_class_path": f"{__name__}.{kind}_{name}" for kind, known in kinds.items() if name in known}
        if paths:
            found.append(ModelManifest(model_id=f"apet_{name}", **paths))
    return found


def __getattr__(attribute: str) -> type:
    """Makes the classes `chat_X` and `simple_X` of lmms-eval's model X on demand, since importing X needs its
    packages."""
    kind, _, name = attribute.partition("_")
    if kind not in ("chat", "simple") or name not in MODELS:
        raise AttributeError(f"module '{__name__}' has no attribute '{attribute}'")
    from lmms_eval.models import get_model

    base = get_model(name, force_simple=kind == "simple")

    class Compressed(base):
        """lmms-eval's model, which also takes the options of `apet.patch` as arguments."""

        def __init__(self, **arguments: Any):
            options = {option: arguments.pop(option) for option in OPTIONS if option in arguments}
            super().__init__(**arguments)
            apet.patch(getattr(self.model, "thinker", self.model), **options)

    Compressed.__name__ = Compressed.__qualname__ = f"Apet{base.__name__}"
    return Compressed

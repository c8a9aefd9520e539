"""Makes tiny configurations and models."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from .fields import LIMIT, PAD, VOCABULARY
from .shrink import name_tokens, put, shrink
from .special import SPECIAL


def config(source: PretrainedConfig | str, decoder: str | None = None) -> PretrainedConfig:
    """Returns a tiny configuration of the same type.

    source: the configuration of a model, or the name of a type for its default configuration; decoder: the `model_type`
    of another decoder to use, for types that take any.
    """
    default = isinstance(source, str)
    if isinstance(source, str):
        source = transformers.AutoConfig.for_model(source)
    given = source.to_dict()
    if decoder is not None:
        given["text_config"] = transformers.AutoConfig.for_model(decoder).to_dict()
    for path, value in SPECIAL.get(source.model_type, {}).items():
        if path.startswith("+") and default:
            put(given, path[1:], value)
    chosen = shrink(given, "text" if "text_config" not in given else "")
    for path, value in SPECIAL.get(source.model_type, {}).items():
        if not path.startswith("+"):
            put(chosen, path, value)
    name_tokens(chosen)
    chosen["tie_word_embeddings"] = False
    made = type(source).from_dict(chosen)
    if source.model_type in TOWERS:
        object.__setattr__(made, "vision_config", TOWERS[source.model_type](made))  # past the check of its type
    return made


def _convolutions(made: PretrainedConfig) -> PretrainedConfig:
    """Returns the configuration of an encoder that gives a feature map [B, 32, 6, 6], as timm's convolutional encoders
    do."""
    tower = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", downsample_in_first_stage=False
    )
    for name in ("vocab_offset", "rms_norm_eps"):
        setattr(tower, name, getattr(made.vision_config, name, None))
    tower.hidden_size, tower.vocab_size = 32, VOCABULARY
    return tower


def _tokens(made: PretrainedConfig) -> PretrainedConfig:
    """Returns the configuration of an encoder that gives tokens [B, 1 + 36, 32]; the first one is of the whole
    image."""
    tower = transformers.CLIPVisionConfig(**shrink(transformers.CLIPVisionConfig().to_dict(), "encoder"))
    tower.model_args = {"embed_dim": 32}
    return tower


# Replacements for encoders of timm: a check of the hooks of a decoder must not need that package.
TOWERS = {"fast_vlm": _convolutions, "gemma3n": _convolutions, "perception_lm": _tokens}


def build(cls: Any, settings: PretrainedConfig, attention: str | None = None, seed: int = 0) -> nn.Module:
    """Builds a model of a class of transformers with random weights, which are the same for the same seed.

    The weights are large (standard deviation 0.15), so that a wrong position, mask or token moves the logits by far
    more than rounding does. attention: None means sdpa, or eager if a part of the model has no sdpa.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = None
        for each in ["sdpa", "eager"] if attention is None else [attention]:
            chosen: Any = each
            if settings.model_type in TOWERS:  # convolutions take "eager" only
                chosen = {"": each, "text_config": each, "audio_config": each, "vision_config": "eager"}
            try:
                with torch.device("meta"):  # no memory is allocated for it
                    size = sum(p.numel() for p in cls._from_config(settings, attn_implementation=chosen).parameters())
                if size > LIMIT:
                    raise MemoryError(f"a tiny {cls.__name__} has {size / 1e6:.0f} million parameters")
                model = cls._from_config(settings, attn_implementation=chosen)
                break
            except ValueError as error:
                if each != "sdpa" or attention is not None or "attention implementation" not in str(error):
                    raise
        torch.manual_seed(seed)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.15)
            elif parameter.ndim == 1:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    if model.can_generate():  # classifiers do not
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
    model.eval()
    return model

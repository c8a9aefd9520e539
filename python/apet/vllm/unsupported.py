"""Makes options of ApET raise an error with models that the plugin does not have, since vLLM would ignore them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vllm.multimodal.processing import InputProcessingContext

from ..engines import options


def check_options() -> None:
    """Patches vLLM's context of input processing, which every model's processor gets its options from. A second call
    does nothing."""
    merge = InputProcessingContext.get_merged_mm_kwargs
    if hasattr(merge, "__wrapped__"):
        return

    @functools.wraps(merge)
    def merged(self: Any, kwargs: Mapping[str, object], **supported: Any) -> dict[str, Any]:
        found: dict[str, Any] = merge(self, kwargs, **supported)
        if not getattr(self, "has_apet", False) and (wanted := options.of(found)):
            raise ValueError(
                f"apet_keep={wanted.keep}: apet does not compress {self.model_config.architecture}; docs/engines.md "
                "lists the models that it does"
            )
        return found

    InputProcessingContext.get_merged_mm_kwargs = merged

"""GLM-4.1V, 4.5V and 4.6V in vLLM (`Glm4vForConditionalGeneration`, `Glm4vMoeForConditionalGeneration`).

Modifications: those of `mrope`; the time stamps between the frames of a video stay.
"""

from __future__ import annotations

from vllm.model_executor.models import glm4_1v

from . import processing
from .mrope import Info, MRope, Steps


@processing.serve(Steps, Info)
class Glm4v(MRope, glm4_1v.Glm4vForConditionalGeneration):
    """vLLM's GLM-4.1V, with compression between merger and language model."""


@processing.serve(Steps, Info)
class Glm4vMoe(MRope, glm4_1v.Glm4vMoeForConditionalGeneration):
    """vLLM's GLM-4.5V and other GLM-V models with experts, with compression between merger and language model."""

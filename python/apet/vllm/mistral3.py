"""Mistral 3 in the format of transformers in vLLM (`Mistral3ForConditionalGeneration`). Modifications: those of
`rows`."""

from __future__ import annotations

from vllm.model_executor.models import mistral3

from . import processing
from .rows import RowEnds, Rows


@processing.serve(Rows)
class Mistral3(RowEnds, mistral3.Mistral3ForConditionalGeneration):
    """vLLM's Mistral 3, with compression between projector and language model."""

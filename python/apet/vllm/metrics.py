"""Counts the tokens of shortened images and videos, before and after, with counters beside vLLM's own at `/metrics`."""

from __future__ import annotations

from prometheus_client import Counter

TOKENS = {
    when: Counter(
        f"apet:visual_tokens_{when}", f"Tokens of shortened images and videos, {when} compression", ["modality"]
    )
    for when in ("before", "after")
}


def count(modality: str, before: int, after: int) -> None:
    """Adds an image or a video of a request, whether it comes from a cache or not."""
    TOKENS["before"].labels(modality).inc(before)
    TOKENS["after"].labels(modality).inc(after)

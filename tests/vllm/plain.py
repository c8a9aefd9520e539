"""Prints as JSON the tokens that vLLM generates without the plugin.

    VLLM_PLUGINS= python tests/vllm/plain.py NAME FOLDER

NAME is the model's, as in tiny_models.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import engines
from engines import picture, prompt, video


def requests(name: str) -> list[dict[str, Any]]:
    """Returns requests with images of different sizes, several in one, text alone, and videos if the model takes
    them."""
    one, two, three = picture(112, 112), picture(90, 300, 1), picture(260, 130, 2)
    made = [prompt(name, one), prompt(name, two, text="why?"), prompt(name, one, three, two), prompt(name)]
    if name in engines.VIDEO:
        made += [prompt(name, videos=[video(6, 56, 84)]), prompt(name, one, videos=[video(4, 84, 84, 3)])]
    return made


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    served = engines.Served(name, Path(folder))
    assert type(served.model).__module__.startswith("vllm."), f"{type(served.model)} is not vLLM's own"
    print("\n" + json.dumps(served.ids(*requests(name))))

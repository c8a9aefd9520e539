"""Prints as JSON the tokens that each of two ranks kept of the images of one request, and the answer.

python tests/vllm/parallel.py NAME FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from engines import Served, picture, prompt


def note(worker: Any) -> None:
    """Runs in every rank: records which rows the kernel kept."""
    from apet.engines import batch

    kernel, worker.kept = batch.apet_kernels.compress_packed, []

    def noting(*args: Any, **kwargs: Any) -> Any:
        tokens, indices = kernel(*args, **kwargs)
        worker.kept.append(indices.tolist())
        return tokens, indices

    batch.apet_kernels.compress_packed = noting


def kept(worker: Any) -> list[list[int]]:
    return worker.kept


def answer(served: Served) -> dict[str, Any]:
    """Returns the answer about two images: tokens, and the log-probability of the best one at every step."""
    from vllm import SamplingParams

    request = prompt(served.name, picture(90, 300), picture(260, 130, 1), apet_keep=12)
    greedy = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=8)
    (output,) = served.llm.generate([request], greedy, use_tqdm=False)
    (said,) = output.outputs
    scores = [{str(token): score.logprob for token, score in step.items()} for step in said.logprobs]
    return {"ids": list(said.token_ids), "scores": scores}


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    served = Served(name, folder, {"apet_keep": 1.0}, **two)
    served.llm.collective_rpc(note)
    print("\n" + json.dumps({**answer(served), "kept": served.llm.collective_rpc(kept)}))

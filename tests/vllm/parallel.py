"""Prints as JSON what every rank of a tensor-parallel engine kept of the images of one request, and what it answered.

python tests/vllm/parallel.py FOLDER RANKS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import engines
from engines import picture, prompt


def note(worker: Any) -> None:
    """In every rank: remembers which rows the kernel kept."""
    from apet.vllm import compress

    import apet_kernels

    kernel, worker.kept = apet_kernels.compress_varlen, []

    def noting(*args: Any, **kwargs: Any) -> Any:
        tokens, indices = kernel(*args, **kwargs)
        worker.kept.append(indices.tolist())
        return tokens, indices

    compress.apet_kernels.compress_varlen = noting


def told(worker: Any) -> list[list[int]]:
    return worker.kept


if __name__ == "__main__":
    from vllm import SamplingParams

    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    name = next(n for n in engines.MODELS if folder.name.rstrip("0123456789") == n)
    parallel = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
    served = engines.Served(name, folder, {"apet_keep": 12}, **parallel)
    served.llm.collective_rpc(note)
    request = prompt(name, picture(90, 300), picture(260, 130, 1))
    greedy = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=8)
    (answer,) = served.llm.generate([request], greedy, use_tqdm=False)
    (said,) = answer.outputs
    scores = [{token: score.logprob for token, score in step.items()} for step in said.logprobs]
    print("\n" + json.dumps({"kept": served.llm.collective_rpc(told), "ids": list(said.token_ids), "scores": scores}))

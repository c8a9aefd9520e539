"""Models with M-RoPE under vLLM's model runner v2, which needs a GPU: the part of it that corrects positions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import Served, picture, prompt

ROW = 2  # of the request, among those that the runner holds


class Staged:
    """The positions of requests as runner v2 holds them: int32, a few rows for each, longer than any prompt."""

    def __init__(self, positions: torch.Tensor):
        self.held = torch.full((4, 3, positions.shape[1] + 7), 99, dtype=torch.int32)
        self.held[ROW, :, : positions.shape[1]] = positions
        self.delta = 0

    def read_prefill_positions(self, row: int, length: int) -> torch.Tensor:
        return self.held[row, :, :length]

    def update_prefill_positions(self, row: int, positions: torch.Tensor, delta: int) -> None:
        self.held[row, :, : positions.shape[1]] = positions
        self.delta = delta


@pytest.mark.parametrize("served", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_positions_are_those_of_runner_v1(served: Served, monkeypatch: pytest.MonkeyPatch):
    """For every chunk of a prompt, v2's own class gets the same positions and embeddings from the model as runner v1,
    which the tests run: it gives the ids as a tensor with room after them, and positions of another dtype."""
    pruning = pytest.importorskip("vllm.v1.worker.gpu.model_states.mm_pruning")
    model, calls = served.model, []
    runner = served.llm.llm_engine.model_executor.driver_worker.model_runner
    recompute = model.recompute_mrope_positions

    def note(**given):
        (request,) = runner.requests.values()
        before = {**given, "mrope_positions": given["mrope_positions"].clone()}
        calls.append((before, request.mm_features, recompute(**given)))
        return calls[-1][2]

    monkeypatch.setattr(model, "recompute_mrope_positions", note)
    ids, *_ = served.read(prompt(served.name, picture(112, 112), picture(90, 300, 1), apet_keep=7))
    monkeypatch.undo()
    with_rows = [call for call in calls if call[0]["multimodal_embeddings"]]
    assert with_rows
    first, features, _ = with_rows[0]
    assert (first["mrope_positions"] < 0).any()

    staged = Staged(first["mrope_positions"])
    tokens = torch.zeros(4, len(ids) + 7, dtype=torch.int32)
    tokens[ROW, : len(ids)] = torch.tensor(ids)
    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=tokens))
    cache = SimpleNamespace(mm_features={"request": features})
    pruner = pruning.MultiModalPruner(model, staged, cache, model.language_model.config.hidden_size)
    ends = [call[0]["num_computed_tokens"] for call in calls[1:]] + [len(ids)]
    for (given, _, (rows, positions, delta)), end in zip(calls, ends, strict=True):
        if not given["multimodal_embeddings"]:
            continue
        begin = given["num_computed_tokens"]
        batch = SimpleNamespace(
            req_ids=["request"],
            idx_mapping_np=np.array([ROW]),
            prefill_len_np=np.array([len(ids)]),
            num_computed_prefill_tokens_np=np.array([begin]),
            num_scheduled_tokens=np.array([end - begin]),
        )
        cleaned = pruner.recompute(list(given["multimodal_embeddings"]), batch, states)
        assert all(map(torch.equal, cleaned, rows))
        assert torch.equal(staged.held[ROW, :, : len(ids)], positions.int())
        assert staged.delta == delta
    assert (staged.held[ROW] >= 0).all()
    assert (staged.held[[0, 1, 3]] == 99).all()

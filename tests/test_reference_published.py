"""layout="overwrite" and "append" against the published algorithm, transcribed step by step from arXiv 2602.19870.

The transcription is slow and shares no code with the package: a loop for farthest-point sampling, `torch.linalg.solve`
on the normal equations, a broadcast cosine similarity, one Python loop per merged token. The authors start at a random
token, which is an argument here.
"""

import pytest
import torch
from torch import Tensor

from tests.data import tokens


def published(x: Tensor, keep: int, basis: int, start: int, ridge: float = 1e-5) -> dict[str, Tensor]:
    """Returns, for one image x [N, D]: X in float64, positions sampled [M] in order, and ranked [K], largest residual
    first."""
    X = x.double()
    sampled = [start]
    while len(sampled) < basis:
        distances = torch.stack([(X - X[s]).norm(dim=1) for s in sampled])  # [m, N]
        sampled.append(int(distances.min(0).values.argmax()))
    S = X[sampled]  # [M, D]
    W = torch.linalg.solve(S @ S.T + ridge * torch.eye(basis, dtype=X.dtype), S @ X.T)  # [M, N]
    residual = (X - W.T @ S).norm(dim=1)  # [N]
    ranked = residual.topk(keep).indices  # [K]
    return {"X": X, "sampled": torch.tensor(sampled), "ranked": ranked}


def merged_into(X: Tensor, receivers: Tensor, dropped: Tensor) -> dict[int, Tensor]:
    """Returns, for each receiver, position -> the mean of it and of the dropped tokens most similar to it."""
    similarity = torch.cosine_similarity(X[dropped][:, None], X[receivers][None], dim=-1)  # [n, R]
    target = similarity.argmax(1)  # [n]
    result = {}
    for j, r in enumerate(receivers.tolist()):
        mine = dropped[target == j]
        result[r] = (X[r] + X[mine].sum(0)) / (1 + len(mine))
    return result


def not_in(N: int, positions: Tensor) -> Tensor:
    return torch.tensor([n for n in range(N) if n not in set(positions.tolist())])


CASES = [(40, 24, 16, 5, 0, 1), (64, 17, 12, 4, 9, 2), (90, 48, 30, 10, 33, 3)]  # N, D, K, M, start, seed


@pytest.mark.parametrize(("N", "D", "K", "M", "start", "seed"), CASES)
@pytest.mark.parametrize("blend", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["normal", "clustered"])
def test_encoder_stage(backend, N, D, K, M, start, seed, blend, kind):
    """The basis overwrites the M lowest kept slots, in picking order into ascending slots; Qwen2.5-VL blends half."""
    x = tokens(N, D, kind=kind, seed=seed)
    p = published(x, K, M, start)
    X, low, high = p["X"], p["ranked"][K - M :].sort().values, p["ranked"][: K - M]
    rows = merged_into(X, high, not_in(N, p["ranked"]))
    for slot, sampled in zip(low.tolist(), p["sampled"].tolist(), strict=True):
        rows[slot] = blend * X[sampled] + (1 - blend) * X[slot]
    kept = p["ranked"].sort().values

    got, indices = backend.compress(x[None], K, M, layout="overwrite", start=start, blend=blend)
    assert indices[0].tolist() == kept.tolist()
    expected = torch.stack([rows[k] for k in kept.tolist()])
    torch.testing.assert_close(got[0].double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("N", "D", "K", "M", "start", "seed"), CASES)
def test_video_llava(backend, N, D, K, M, start, seed):
    """K tokens by residual, all of them targets, then the basis; the authors' rank order is not reproduced."""
    x = tokens(N, D, seed=seed)
    p = published(x, K, M, start)
    rows = merged_into(p["X"], p["ranked"], not_in(N, p["ranked"]))
    got, indices = backend.compress(x[None], K, M, layout="append", start=start)
    assert indices[0].tolist() == sorted(rows) + p["sampled"].tolist()
    expected = torch.stack([rows[k] for k in sorted(rows)] + [p["X"][s] for s in p["sampled"].tolist()])
    torch.testing.assert_close(got[0].double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("N", "D", "K", "M", "start", "seed"), CASES)
def test_paper_text(backend, N, D, K, M, start, seed):
    """The basis and the largest residuals of the others, each at its own position, all of them targets."""
    x = tokens(N, D, seed=seed)
    p = published(x, N, M, start)
    others = [n for n in p["ranked"].tolist() if n not in set(p["sampled"].tolist())]
    kept = torch.tensor(sorted(p["sampled"].tolist() + others[: K - M]))
    rows = merged_into(p["X"], kept, not_in(N, kept))
    got, indices = backend.compress(x[None], K, M, layout="inplace", start=start)
    assert indices[0].tolist() == kept.tolist()
    torch.testing.assert_close(got[0].double(), torch.stack([rows[k] for k in kept.tolist()]), rtol=2e-6, atol=2e-6)

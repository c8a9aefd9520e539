"""Records the calls of the op that a piece of code makes, with their inputs and results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apet_kernels.options import FEW, Options


@dataclass(frozen=True)
class RecordedCall:
    """One call of `torch.ops.apet.compress_varlen`."""

    x: Tensor  # [T, D], the images one after another
    lengths: list[int]  # tokens of each image
    keeps: list[int]  # tokens that each image keeps
    tokens: Tensor  # [R, D], the result
    indices: Tensor  # [R] int64, the result
    options: dict[str, Any]  # the fields of apet_kernels.Options
    weights: Tensor | None = None  # [T]

    @property
    def flops(self) -> int:
        """2 D (M N + (N - K) T) for each image: a dot product of every token with each of M basis tokens, and of every
        dropped token with each of T merge targets (K; "overwrite": K - M). A basis that is picked in rounds takes 2 D M
        N: its products are those with the merge targets. Medoid steps are not counted, since their number of products
        depends on the data."""
        options = Options(**self.options)
        overwritten = options.basis_of(0) if options.layout == "overwrite" else 0
        macs = 0
        for n, k in zip(self.lengths, self.keeps, strict=True):
            basis = options.basis_of(k)
            known = basis if options.in_rounds and basis > FEW else 0  # targets whose products are known
            macs += basis * n + (n - k) * max(k - overwritten - known, 0)
        return 2 * self.x.shape[1] * macs


class Recorder(TorchDispatchMode):
    """Records every call in a with block: `with Recorder() as recorder:` fills `recorder.calls` and keeps their tensors
    alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.apet.compress_varlen.default:
            wanted = func._schema.arguments  # arguments at their defaults are left out of args and kwargs
            given = {a.name: a.default_value for a in wanted if a.has_default_value()}
            given |= dict(zip((a.name for a in wanted), args, strict=False)) | kwargs
            lengths, keeps = (given.pop(name).diff().tolist() for name in ("cu_seqlens", "cu_keep"))
            x = given.pop("x")
            for name in ("total_keep", "max_seqlen", "max_keep"):
                del given[name]
            weights = given.pop("weights")
            self.calls.append(RecordedCall(x, lengths, keeps, *result, given, weights))
        return result

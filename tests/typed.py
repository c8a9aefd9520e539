"""The types of the public names: `make lint` runs the type checker on this file, which is not imported or run."""

from collections.abc import Callable
from typing import Any

import apet
import torch
from torch import Tensor
from typing_extensions import assert_type

import apet_kernels

x = torch.empty(2, 20, 8)
cu = torch.zeros(3, dtype=torch.int32)
layout: apet_kernels.Layout = "append"

tokens, indices = apet_kernels.compress(x, 8, layout=layout)
assert_type(tokens, Tensor)
assert_type(indices, Tensor)
assert_type(apet_kernels.compress(x, 8), apet_kernels.Compressed)
assert_type(apet_kernels.compress_packed(x[0], [9, 11], [4, 5]), apet_kernels.Compressed)
assert_type(apet_kernels.compress_varlen(x[0], cu, cu, 9, 11, 5, layout=layout), apet_kernels.Compressed)
assert_type(apet_kernels.score(x).residual, Tensor)
assert_type(apet_kernels.merge(x, indices), Tensor)
assert_type(apet_kernels.plan(x, 8).backend, apet_kernels.Backend)
assert_type(apet_kernels.available_backends(), tuple[apet_kernels.Backend, ...])
assert_type(apet_kernels.why_unavailable("cpu"), str | None)
assert_type(apet_kernels.build_info(), dict[str, Any])

apet_kernels.compress(x, 8, layout="sideways")  # type: ignore[arg-type]
apet_kernels.compress(x, 8, backend="abacus")  # type: ignore[arg-type]
apet_kernels.compress_varlen(x[0], cu, [4, 5], 9, 11, 5)  # type: ignore[call-overload]

patch: Callable[..., object] = apet.patch
apet.patch(torch.nn.Identity(), keep="many")  # type: ignore[arg-type]
apet.patch(torch.nn.Identity(), layout="sideways")  # type: ignore[arg-type]
apet.ptch  # type: ignore[attr-defined]  # noqa: B018
apet_kernels.compres  # type: ignore[attr-defined]  # noqa: B018

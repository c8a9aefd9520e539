"""The cases of the measurements: shapes, dtypes and the values of the tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

BASIS = 10  # M, the paper's
SELECT = "fps"  # the paper's
RIDGE = 1e-5  # the paper's
Layout = Literal["overwrite", "inplace"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# [B, N, D] keep: LLaVA-1.5 at two budgets, LLaVA-NeXT, Video-LLaVA, Qwen2.5-VL at two resolutions, a large image.
SHAPES = (
    (1, 576, 1024, 64),
    (1, 576, 1024, 192),
    (5, 576, 1024, 160),
    (8, 256, 4096, 22),
    (1, 1280, 3584, 384),
    (1, 5120, 3584, 512),
    (1, 16384, 1280, 1638),
)
# The shapes and budgets of the paper (arXiv 2602.19870): LLaVA-1.5 at two budgets and in a batch of 64 images,
# LLaVA-NeXT, LLaVA-1.5 inside the LLM, Video-LLaVA, Qwen2.5-VL from small to very large images.
PAPER_SHAPES = (
    (1, 576, 1024, 96),
    (1, 576, 1024, 288),
    (64, 576, 1024, 96),
    (5, 576, 1024, 192),
    (1, 288, 4096, 96),
    (8, 256, 4096, 22),
    (1, 1024, 3584, 307),
    (1, 4096, 3584, 1229),
    (1, 16384, 3584, 4915),
)


@dataclass(frozen=True)
class Case:
    """One call: x [B, N, D] in `dtype`, `keep` tokens of each image, M = `basis`. The layout determines the first basis
    token."""

    B: int
    N: int
    D: int
    keep: int
    dtype: torch.dtype
    layout: Layout
    basis: int = BASIS

    @property
    def start(self) -> int:
        """The first basis token: for "overwrite" 0, as the published code may have it; for "inplace" the op's
        default."""
        return 0 if self.layout == "overwrite" else -1

    @property
    def targets(self) -> int:
        """The number of rows that can receive dropped tokens: the T of the similarity [N-K, T]."""
        return self.keep - self.basis if self.layout == "overwrite" else self.keep

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a baseline, without the tokens."""
        return {"keep": self.keep, "basis": self.basis, "layout": self.layout, "start": self.start, "ridge": RIDGE}

    @property
    def op_arguments(self) -> dict[str, Any]:
        """The arguments of the op, without the tokens: the paper's rule, which the baselines compute."""
        return {**self.arguments, "select": SELECT}

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def shape(self) -> str:
        return f"{self.B}x{self.N}x{self.D} keep {self.keep}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        basis = "" if self.basis == BASIS else f" basis {self.basis}"
        return f"{self.shape} {self.dtype_name} {self.layout}{basis}"

    def fields(self) -> dict[str, Any]:
        """Returns the fields that JSON holds; `of` makes them a case again."""
        return {**asdict(self), "dtype": self.dtype_name}

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Case:
        """Returns the case that has these `fields`; other fields are ignored."""
        known = {name: fields[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "dtype": getattr(torch, known["dtype"])})


def cases(smoke: bool = False) -> list[Case]:
    """Returns every shape, dtype and layout; with smoke two tiny ones that run everything once."""
    if smoke:
        return [Case(2, 96, 64, 24, torch.float32, "overwrite"), Case(1, 97, 64, 12, torch.bfloat16, "inplace")]
    layouts: tuple[Layout, ...] = ("overwrite", "inplace")
    return [Case(*shape, dtype, layout) for layout in layouts for shape in SHAPES for dtype in DTYPES]


def gpu_cases(smoke: bool = False) -> list[Case]:
    """Returns the cases that are measured on a GPU and whose floors are computed: the shapes of the paper and those
    above, in the published layout and bfloat16; those above also in float32. With smoke two tiny ones that run
    everything once."""
    if smoke:  # small enough for Triton's interpreter, which has no bfloat16
        return [Case(2, 20, 12, 12, torch.float32, "overwrite"), Case(1, 24, 16, 14, torch.float16, "overwrite")]
    half = [Case(*shape, torch.bfloat16, "overwrite") for shape in dict.fromkeys(PAPER_SHAPES + SHAPES)]
    return half + [Case(*shape, torch.float32, "overwrite") for shape in SHAPES]


def tokens(case: Case, seed: int) -> Tensor:
    """Returns x [B, N, D] like encoder features: 32 clusters an image, noise as large as their spread, uneven
    channels, and one token in 128 of six times the norm (the "registers" that vision transformers make). No two
    tokens are equal."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(case.B, 32, case.D, generator=generator)
    label = torch.randint(32, (case.B, case.N), generator=generator)
    x = torch.randn(case.B, case.N, case.D, generator=generator)
    x += centre.gather(1, label[..., None].expand_as(x))
    x *= torch.empty(case.D).log_normal_(0, 0.5, generator=generator)
    x[:, 127::128] *= 6
    return x.to(case.dtype)

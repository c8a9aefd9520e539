"""Positions with gaps: tokens keep their positions in a decoder that counts them along one axis.

After compression a row has positions such as 0, 1, 4, 7, 8. The decoder makes its rotary embeddings from these. But its
layers get positions 0, 1, 2, ...: attention needs none, and flash attention would take a row with gaps for packed
sequences, which see no keys in a cache. M-RoPE has a row of positions for that; here the hooks of the layers replace
them. This is right only if no layer reads positions itself, so the code of the layers is searched for it when a model
is patched.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .calling import NAMES, SCALES, Rotary, versions
from .config import Options
from .mask_functions import KINDS, attention_types, implementation

PLAIN = ("eager", "sdpa", "flex_attention")  # implementations of attention that never read positions
PASSES = ("attention_interface", "_flash_attention_forward")  # functions that layers pass their positions to
COUNTS = ("get_seq_length", "get_query_offset")  # methods of a cache that say in which column a token is
ROUNDING = 0.02  # of cosines and sines: above that of bfloat16, 0.004, and far below the change by one position
CANNOT = "positions='keep' cannot be used"


def chosen(adapter: Adapter, options: Options, model_type: str) -> str:
    """Returns what tokens do with their positions, "keep" or "renumber", from the options and a fitted adapter.

    Raises ValueError if the family cannot do what the options say.
    """
    if options.positions == "keep" and options.layout == "append" and adapter.projector is not None:
        raise ValueError(
            f"{CANNOT} with layout='append' and {model_type}: its basis tokens are projected at the places of other "
            "tokens, so their own positions are lost"
        )
    if options.positions == "renumber" and adapter.positions == "keep":
        raise ValueError(
            f"positions='renumber' cannot be used with {model_type}: its adapter keeps positions, as those of M-RoPE, "
            "which cannot be renumbered; leave it out, or give positions='keep'"
        )
    return options.positions or str(adapter.positions)


@dataclass(frozen=True)
class Gaps:
    """How the layers of a decoder use positions, if its tokens keep theirs along one axis."""

    scales: bool  # they multiply queries by a function of the position, so they need the positions with gaps
    first: int  # the first layer that attends to tokens

    @classmethod
    def of(cls, decoder: nn.Module, layers: Iterable[nn.Module]) -> Gaps:
        """Raises ValueError if positions with gaps would not mean what they do without compression."""
        layers, owner = list(layers), type(decoder).__name__
        if Rotary.of(decoder, layers, CANNOT) is None:
            raise ValueError(
                f"{CANNOT} with {owner}: its layers take no rotary embeddings, so it does not tell by positions where "
                "a token is"
            )
        if getattr(decoder.config, "attn_temperature_tuning", None):
            raise ValueError(f"{CANNOT} with {owner}: its layers scale attention by the number of earlier tokens")
        scales, modules = False, defaultdict[type, list[nn.Module]](list)
        for module in (module for layer in layers for module in layer.modules()):
            modules[type(module)].append(module)
        for kind, alike in modules.items():
            found = _Search.of(kind, alike)
            if found.why is not None:
                raise ValueError(f"{CANNOT} with {owner}: {kind.__name__} {found.why} ({versions()})")
            scales |= found.scales
        kinds = attention_types(decoder.config)
        gaps = cls(scales, next((i for i, kind in enumerate(kinds) if kind in KINDS), 0))
        gaps.check_attention(decoder)
        return gaps

    def check_attention(self, decoder: nn.Module) -> None:
        """Raises ValueError if the attention may read the positions that the layers need, and take them for packed
        sequences."""
        name = implementation(decoder.config)
        again = getattr(decoder, "gradient_checkpointing", False) and decoder.training and torch.is_grad_enabled()
        if again and name not in PLAIN:  # layers run again after the call, where nothing replaces their positions
            raise ValueError(
                f"{CANNOT} with gradient checkpointing and attn_implementation='{name}': use {', '.join(PLAIN)}"
            )
        if self.scales and name not in PLAIN:
            raise ValueError(
                f"{CANNOT} with {type(decoder).__name__} and attn_implementation='{name}': its layers need positions, "
                f"and this attention would read their gaps as packed sequences; use {', '.join(PLAIN)}"
            )


def check_rotary(decoder: Any, positions: Tensor, x: Tensor, kind: str, owner: str, given: Any) -> None:
    """Raises ValueError if a layer's rotary embedding is not that of its positions [B, L]: then the decoder has counted
    its tokens itself. x [B, L, ...]: for its dtype and device; kind: of the layer."""
    parts = list(given) if isinstance(given, tuple | list) else [given]
    if all(isinstance(part, Tensor) for part in parts):
        like = x.to(parts[0].dtype) if parts[0].dtype.is_floating_point else x
        for made in _made(decoder, like, positions.to(x.device), kind):
            ours = list(made) if isinstance(made, tuple | list) else [made]
            if len(ours) == len(parts) and all(map(_same, ours, parts)):
                return
    raise ValueError(
        f"{CANNOT}: {owner} was called with another rotary embedding than {type(decoder).__name__}'s rotary_emb makes "
        f"for the positions of the tokens that remain ({versions()})"
    )


def _made(decoder: Any, x: Tensor, positions: Tensor, kind: str) -> Iterator[Any]:
    """Yields the rotary embeddings that a decoder may make: some (Molmo2) have two modules for it."""
    for child in decoder.children():
        parameters = list(inspect.signature(child.forward).parameters)
        if parameters[:2] == ["x", "position_ids"]:
            yield child(x, positions, kind) if parameters[2:] == ["layer_type"] else child(x, positions)


def _same(ours: Tensor, given: Tensor) -> bool:
    """Whether two cosines or sines are of the same positions. A compiled decoder rounds them otherwise; one position
    more changes the fastest angle by 1."""
    if ours.shape[1:] != given.shape[1:]:
        return False
    a, b = (torch.view_as_real(t) if t.is_complex() else t.float() for t in (ours.to(given.device), given))
    return bool(((a - b).abs() <= ROUNDING * b.abs().amax().clamp(min=1)).all())


def _takes(part: nn.Module, at: int | str | None) -> bool:
    """Whether the argument of a module's forward at this place, or of this name, is known to be positions."""
    names = list(inspect.signature(part.forward).parameters)
    name = at if not isinstance(at, int) else names[at] if at < len(names) else None
    return name in NAMES["positions"]


class _Search(ast.NodeVisitor):
    """Searches the code of modules of one class, in layers, for uses of positions other than passing them on."""

    def __init__(self, kind: type, modules: list[nn.Module]):
        self.modules = modules
        self.scales = kind.__name__ in SCALES
        self.why: str | None = None  # the reason why positions with gaps cannot be used

    @classmethod
    def of(cls, kind: type, modules: list[nn.Module]) -> _Search:
        search = cls(kind, modules)
        for function in () if search.scales else _functions(kind, modules):
            try:
                source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
                if any(name in source for name in (*NAMES["positions"], *COUNTS)):
                    search.visit(ast.parse(source))
            except (OSError, TypeError, SyntaxError):
                search.why = "has code that cannot be read, so it is not known what it does with positions"
        return search

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in COUNTS:
            self.why = "counts earlier tokens itself"
        self.visit(node.func)
        # Not all layers may have the same parts.
        parts = [part for module in self.modules if isinstance(part := getattr(module, name, None), nn.Module)]
        above = name == "forward" and ast.unparse(node.func).startswith("super(")  # this is searched, too
        for at, value in (*enumerate(node.args), *((keyword.arg, keyword.value) for keyword in node.keywords)):
            passed = above or name in (*PASSES, *SCALES) or (parts and all(_takes(part, at) for part in parts))
            if passed and isinstance(value, ast.Name) and value.id in NAMES["positions"]:
                self.scales |= name in SCALES
            else:
                self.visit(value)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in NAMES["positions"] and isinstance(node.ctx, ast.Load):
            self.why = "reads positions itself, perhaps as places of keys"

    def visit_Constant(self, node: ast.Constant) -> None:
        if node.value in NAMES["positions"]:  # kwargs["position_ids"]
            self.why = "reads positions itself, perhaps as places of keys"


def _functions(kind: type, modules: list[nn.Module]) -> Iterator[Callable[..., Any]]:
    """Yields the functions of a class, without those of torch, and functions that replace `forward` of its modules."""
    replaced = (inspect.unwrap(vars(module)["forward"]) for module in modules if "forward" in vars(module))
    yield from {getattr(function, "__func__", function) for function in replaced}
    for base in kind.__mro__:
        if base.__module__.split(".")[0] not in ("torch", "builtins"):
            yield from (value for value in vars(base).values() if inspect.isfunction(value))

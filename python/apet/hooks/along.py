"""Shortens the other arguments of a module that run along the sequence, besides embeddings, mask and positions.

An argument is one of
- [B or 1, L, ...], with the sequence behind the batch (token types, inputs of each layer, ids), or [.., B or 1, L] with
  it at the end: its entries are gathered. Whole numbers [B, L, k] are excepted, since they may be indices of other
  tokens (of an indexer), and so are numbers that count up by one, as positions do;
- a mask [B, L] or [B, L, 1] bool of visual tokens, and features [N, ...] of its N true entries, row after row
  (deepstack), in lists or by layer: the entries of the tokens that stay are kept in both;
- anything that has no dimension of either length: it is not changed.
Any other argument with such a length raises an error, since tokens would have to be removed from it, too. So does an
attribute of a module along the sequence that the model has set in the same call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import parts
from .calling import NAMES, PACKED, Arguments, tensors, versions
from .sequence import Packing


@dataclass(frozen=True)
class Sequence:
    """The lengths by which an argument is recognised as running along the sequence or along the visual tokens."""

    batch: int
    length: int  # tokens of a row, padding included
    visual: int  # visual tokens of all rows


def shorten(roles: Arguments, call: dict[str, Any], at: Sequence, packing: Packing) -> dict[str, Any]:
    """Returns the arguments of a module's call, with every argument that has no role (`calling.NAMES`) shortened."""
    others = dict(_others(roles, call))
    masks = {name: value for name, value in others.items() if _is_visual_mask(value, at)}
    features = {name: value for name, value in others.items() if name not in masks and _features_of(value, masks, at)}
    shorter: dict[str, Any] = {}
    for name, value in others.items():
        if name in features:
            shorter[name] = _mapped(value, lambda t: t[_rows(_mask_of(t, masks), packing).to(t.device)])
        elif name in masks:
            stays = packing.along(value, 1) & packing.valid.view(*packing.valid.shape, *(1,) * (value.dim() - 2))
            shorter[name] = stays if features else packing.along(value, 1)
        else:
            shorter[name] = _mapped(value, lambda t, name=name: _gathered(roles.owner, name, t, at, packing))
    return call | shorter


def added_layers(roles: Arguments, call: Mapping[str, Any], at: Sequence) -> int:
    """Returns the number of first layers after which features of visual tokens are added again (deepstack)."""
    others = dict(_others(roles, call))
    masks = {name: value for name, value in others.items() if _is_visual_mask(value, at)}
    last = 0
    for name, value in others.items():
        if name not in masks and _features_of(value, masks, at):
            last = max(last, 1 + max(value) if isinstance(value, Mapping) else len(tuple(tensors(value))))
    return last


@dataclass(frozen=True)
class Start:
    """The arguments of a decoder with features by layer, and with the mask [B, L] or [B, L, 1] of their tokens."""

    features: str
    mask: str


def move_in(roles: Arguments, call: dict[str, Any], at: Sequence) -> tuple[dict[str, Any], Start | None]:
    """Returns the arguments with visual tokens at their places among the embeddings, if those are zeros there since a
    decoder adds the features before its first layer; `move_out` puts them back. Raises ValueError if only later layers
    add features to zeros."""
    others = dict(_others(roles, call))
    masks = {name: value for name, value in others.items() if _is_visual_mask(value, at)}
    for name, value in others.items():
        if name in masks or not isinstance(value, Mapping) or not _features_of(value, masks, at):
            continue
        mask, embeds = _mask_of(next(iter(value.values())), masks), roles.get("embeds", call)
        if mask.any() and not embeds[mask].any():
            if 0 not in value:
                raise ValueError(f"{roles.owner} cannot be compressed: {parts.starts_empty({*value})}")
            x = embeds.clone()
            x[mask] = value[0].to(x)
            later = {layer: features for layer, features in value.items() if layer != 0}
            start = Start(name, next(n for n, m in masks.items() if torch.equal(m.flatten(1), mask)))
            return roles.replace(call, embeds=x) | {name: later}, start
    return call, None


def move_out(roles: Arguments, call: dict[str, Any], start: Start) -> dict[str, Any]:
    """Returns the arguments with visual tokens among the features for the first layer again, and zeros as
    embeddings."""
    x, mask = roles.get("embeds", call), call[start.mask].flatten(1)
    features = {0: x[mask], **call[start.features]}
    return roles.replace(call, embeds=x.masked_fill(mask[..., None], 0)) | {start.features: features}


def attributes(module: nn.Module) -> dict[int, Tensor]:
    """Returns the tensors that a module and its parts have as attributes, by their ids. Parameters and buffers are no
    such attributes."""
    return {id(t): t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor)}


def check_attributes(module: nn.Module, before: Mapping[int, Tensor], at: Sequence) -> None:
    """Raises ValueError for an attribute [B or 1, L, ...] of a module that the model has set in this call: it holds
    tokens that the module's arguments no longer have. before: the attributes when the call began."""
    for part in module.modules():
        for name, value in vars(part).items():
            if not isinstance(value, Tensor) or id(value) in before or value.dim() < 2:
                continue
            if value.shape[1] == at.length and value.shape[0] in (at.batch, 1):
                raise ValueError(
                    f"{type(part).__name__} got an attribute {name} of shape {tuple(value.shape)} in this call, one of "
                    "which is the number of tokens. This attribute is not supported: tokens cannot be dropped from it "
                    f"({versions()})"
                )


def _others(roles: Arguments, call: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yields the arguments of a call that have no role."""
    known = {"input_ids", *(n for role in NAMES if (n := roles.name(role, call)) is not None)}
    for name, value in call.items():
        if name in PACKED and value is not None:
            raise ValueError(f"{name} is given: packed sequences with images cannot be compressed")
        if name not in known and any(True for _ in tensors(value)):
            yield name, value


def _is_visual_mask(value: Any, at: Sequence) -> bool:
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        return False
    return value.shape[:2] == (at.batch, at.length) and all(n == 1 for n in value.shape[2:])


def _features_of(value: Any, masks: Mapping[str, Tensor], at: Sequence) -> bool:
    """Returns whether a tensor, or every tensor in a list or mapping, has one row for each true entry of a mask."""
    if not masks or (isinstance(value, Tensor) and value.shape[:2] == (at.batch, at.length)):
        return False
    counts = {int(mask.sum()) for mask in masks.values()}
    return all(t.dim() >= 2 and len(t) in counts for t in tensors(value))


def _mask_of(features: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """Returns the mask [B, L] whose true entries correspond to the rows of features [N, ...]."""
    return next(m for m in masks.values() if int(m.sum()) == len(features)).flatten(1)


def _rows(mask: Tensor, packing: Packing) -> Tensor:
    """Returns the rows of features [N, ...], one for each true entry of mask [B, L], that belong to tokens that
    stay."""
    mask = mask.to(packing.index.device)
    number = (mask.flatten().cumsum(0) - 1).view_as(mask)  # [B, L]
    stays = packing.along(mask, 1) & packing.valid  # [B, L2]
    return packing.along(number, 1)[stays]


def _gathered(owner: str, name: str, x: Tensor, at: Sequence, packing: Packing) -> Tensor:
    if x.dim() >= 2 and x.shape[1] == at.length and x.shape[0] in (at.batch, 1) and not _counts(x):
        return packing.along(x, 1)
    if x.dim() >= 3 and x.shape[-1] == at.length and x.shape[-2] in (at.batch, 1):
        return packing.along(x, -1)
    rows = next((n for n in x.shape if n != 1), 0)  # features [N, D] or [1, N, D]
    found = "tokens" if at.length in x.shape else "visual tokens" if at.visual == rows else None
    if found is not None and rows:
        raise ValueError(
            f"{owner} was called with {name} of shape {tuple(x.shape)}, one of which is the number of {found}. This "
            f"argument is not supported: tokens cannot be dropped from it ({versions()})"
        )
    return x


def _counts(x: Tensor) -> bool:
    """Returns whether the values of x [B, L, ...] may refer to tokens, so that they would have to change, too: indices
    of other tokens [B, L, k], or positions [B, L], which increase by one except in padding."""
    if x.dtype not in (torch.int32, torch.int64):
        return False
    steps = x.diff(dim=1)
    return x.dim() > 2 or bool(((steps == 0) | (steps == 1)).all() and x.max() > 1)


def _mapped(value: Any, change: Any) -> Any:
    """Applies `change` to a tensor, or to every tensor in lists and mappings."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(one, change) for one in value)
    return value

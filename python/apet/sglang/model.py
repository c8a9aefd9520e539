"""In SGLang's scheduler process: compresses the rows of items that have a plan, before SGLang caches and places them.

The rows of all items that SGLang encodes together are compressed in one call of the kernel, if their options are the
same. The tokens that stay keep their M-RoPE positions, which are corrected here. (Drafts of speculative decoding get
uncorrected ones: they may be accepted less often.)
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engines import plan
from ..engines.batch import Batch
from .request import POSITIONS, places

REMEMBERED = 64 << 20  # bytes of kept rows that are remembered; they are where the model is


class Kept(OrderedDict[int, Tensor]):
    """By an item's hash the rows that it keeps, ascending, int32. The oldest are forgotten."""

    size = 0  # bytes

    def remember(self, key: int, rows: Tensor) -> None:
        if (before := self.pop(key, None)) is not None:
            self.size -= before.nbytes
        self[key] = rows.int()
        self.size += self[key].nbytes
        while self.size > REMEMBERED and len(self) > 1:
            self.size -= self.popitem(last=False)[1].nbytes


_kept = Kept()


def planned(mm_inputs: Any) -> list[Any]:
    """Returns the items of a request that have a plan."""
    return [] if mm_inputs is None else [i for i in mm_inputs.mm_items if plan.FIELD in i.model_specific_data]


def embed(original: Callable[..., Any], mm_inputs_list: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs SGLang's `embed_mm_inputs` with encoders whose rows are compressed."""
    if not any(map(planned, mm_inputs_list or ())):
        return original(mm_inputs_list, *args, **kwargs)
    from sglang.srt.managers import mm_schedule
    from sglang.srt.managers.schedule_batch import Modality

    model, deepstack = kwargs.get("multimodal_model"), kwargs.get("use_deepstack") or {}
    encoders = dict(kwargs.get("data_embedding_func_mapping") or {})
    for modality in (Modality.IMAGE, Modality.VIDEO):
        for mm_inputs in mm_inputs_list:  # where it is not known which rows were kept, no embedding may be a cached one
            items = [item for item in mm_inputs.mm_items if item.is_modality(modality)]
            if any(POSITIONS in i.model_specific_data and i.hash not in _kept for i in items):
                hashes = [item.hash for item in items]
                for key in (*hashes, mm_schedule.MultiModalStaticCache.combine_hashes(hashes)):
                    mm_schedule.embedding_cache.free(key, None)
        encode = encoders.get(modality) or getattr(model, f"get_{modality.name.lower()}_feature")
        levels = len(model.deepstack_visual_indexes) if deepstack.get(modality) else 0
        encoders[modality] = functools.partial(_encode, encode, levels)
    return original(mm_inputs_list, *args, **{**kwargs, "data_embedding_func_mapping": encoders})


def _encode(encode: Callable[[list[Any]], Any], levels: int, items: list[Any]) -> list[Tensor]:
    """Encodes items, and compresses those that have a plan. Returns the rows of each.

    levels: how many deepstack features follow the embedding in each row; those of kept rows stay as they are.
    """
    plans = [plan.unpack(data) if (data := i.model_specific_data.get(plan.FIELD)) is not None else None for i in items]
    counts = [len(places(i)) if p is None else len(p.units) for i, p in zip(items, plans, strict=True)]
    rows = encode(items)
    if not isinstance(rows, (Tensor, list)):
        raise RuntimeError(f"the encoder gave {type(rows).__name__}: apet_keep does not work with SGLang's own pruning")
    if isinstance(rows, Tensor):
        rows = rows.reshape(-1, rows.shape[-1])
        if len(rows) != sum(counts):
            raise RuntimeError(f"the encoder gave {len(rows)} rows for {sum(counts)} placeholders")
        rows = rows.split(counts)
    rows = [of_item.reshape(-1, of_item.shape[-1]) for of_item in rows]
    if [len(of_item) for of_item in rows] != counts:
        raise RuntimeError(f"the encoder gave {[len(of_item) for of_item in rows]} rows for {counts} placeholders")
    chosen = [n for n, made in enumerate(plans) if made is not None]
    if not chosen:
        return rows
    batch = Batch([made for made in plans if made is not None])
    width = rows[0].shape[-1] // (1 + levels) if levels else None
    short = batch.shorten([rows[n] for n in chosen], width)
    assert batch.left is not None
    start = 0
    for n, fewer, left in zip(chosen, short, batch.left.split([len(s) for s in short]), strict=True):
        rows[n] = fewer
        _kept.remember(items[n].hash, left - start)
        start += counts[n]
    return rows


def prepare(original: Callable[..., Any], input_ids: Tensor, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs SGLang's `prepare_mm_inputs`, and corrects the positions of the tokens of compressed items."""
    requests = forward_batch.mm_inputs
    result = original(input_ids, forward_batch, *args, **kwargs)
    if requests is None or forward_batch.mm_inputs is not None or forward_batch.mrope_positions is None:
        return result  # there was nothing to embed, or there is one position for each token
    start = 0
    lengths = zip(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True)
    for mm_inputs, (prefix, length) in zip(requests, lengths, strict=True):
        for item in planned(mm_inputs):
            at = places(item)
            here = (at >= prefix) & (at < prefix + length)
            if here.any():
                positions = forward_batch.mrope_positions
                kept = _kept[item.hash][here.to(_kept[item.hash].device)]
                whole = item.model_specific_data[POSITIONS].to(kept.device)
                positions[:, (start - prefix + at[here]).to(kept.device)] = whole[:, kept].to(positions.dtype)
        start += length
    return result

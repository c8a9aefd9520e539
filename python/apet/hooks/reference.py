"""Reference results for a patched model: the states that its decoder must return, computed by the unpatched decoder.

This module shares no code with the hooks. A patched tiny model generates, and recording.py records the rows that enter
its decoder, the rows that enter layer `llm_layer` and the decoder's output for each new token. Then the unpatched
decoder runs on one prompt at a time, without padding and without a cache. Its input is the recorded rows, followed by
the generated tokens. Its other arguments are those that the model computes for the whole prompt; those along the
sequence are gathered for the kept columns. Masks are built again over the kept columns, since windows and chunks count
these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from .recording import Decoder, Generation, Row, bound, first_features, hidden, visual_mask
from .tiny import IMAGE, VIDEO


class DecoderReached(Exception):
    """Ends a call of a model when it reaches its decoder, so that the rest of the model does not run."""


@dataclass
class Whole:
    """The arguments with which the unpatched model calls its decoder for a whole prompt and the tokens after it."""

    arguments: dict[str, Any]
    length: int  # L: tokens of the prompt and after it
    new: int  # tokens after the prompt
    windows: tuple[int, ...]  # sizes of sliding windows
    chunks: tuple[int, ...]  # sizes of attention chunks
    keep: bool  # whether tokens keep their positions also if these are consecutive numbers

    @classmethod
    def of(cls, model: nn.Module, decoder: Decoder, row: Row, tokens: Tensor, keep: bool) -> Whole:
        """Records the arguments for the prompt `row`, followed by the generated tokens [N]."""
        longer = dict(row)
        for name, value in row.items():
            if name == "input_ids":
                longer[name] = torch.cat([value, tokens[None]], dim=1)
            elif isinstance(value, Tensor) and value.shape == row["input_ids"].shape:  # a mask, or types of tokens
                # Token types that are all 0 mark the prompt as a prefix: generated tokens have type 1.
                follows = name == "attention_mask" or (name == "token_type_ids" and not value.any())
                filler = value.new_full((1, len(tokens)), int(follows))
                longer[name] = torch.cat([value, filler], dim=1)
        seen: list[dict[str, Any]] = []

        def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(bound(module, args, kwargs))
            if len(seen) == decoder.calls:
                raise DecoderReached

        with decoder.module.register_forward_pre_hook(listen, with_kwargs=True), suppress(DecoderReached):
            if decoder.calls == 1:
                model(**longer, use_cache=False)
            else:
                model.generate(**longer, max_new_tokens=1, do_sample=False)
        arguments = {name: _joined(name, [call.get(name) for call in seen], seen) for name in seen[0]}
        config = decoder.module.config
        sizes = [getattr(config, n, None) for n in ("sliding_window", "sliding_window_size")]
        chunk = getattr(config, "attention_chunk_size", None)
        windows = tuple(size for size in sizes if isinstance(size, int))
        length = longer["input_ids"].shape[1]
        if length == arguments["inputs_embeds"].shape[-1]:
            raise ValueError(f"a prompt of {length} tokens is as long as its embeddings are wide: take another length")
        return cls(arguments, length, len(tokens), windows, (chunk,) if isinstance(chunk, int) else (), keep)

    @property
    def keeps_positions(self) -> bool:
        """Whether tokens keep their positions: always, or because these are not consecutive numbers."""
        if self.keep:
            return True
        given = self.arguments.get("position_ids")
        return given is not None and bool((given.diff(dim=-1) != 1).any())

    def gathered(self, columns: Tensor) -> dict[str, Any]:
        """Returns the arguments except the embeddings, for these columns [n] of the prompt and the tokens after it."""
        columns = torch.cat([columns, torch.arange(self.length - self.new, self.length)])
        chosen: dict[str, Any] = {}
        for name, value in self.arguments.items():
            if name in ("inputs_embeds", "input_ids", "use_cache") or value is None or isinstance(value, Cache):
                continue
            if name == "attention_mask":
                chosen[name] = self._mask(value, columns)
            elif name == "position_ids" and not self.keeps_positions:
                continue
            else:
                chosen[name] = self._along(name, value, columns)
        chosen.setdefault("attention_mask", torch.ones(1, len(columns), dtype=torch.long))
        chosen.setdefault("position_ids", (columns if self.keep else torch.arange(len(columns)))[None])
        return chosen

    def _along(self, name: str, value: Any, columns: Tensor) -> Any:
        """Gathers the columns of a value along the sequence, or along the visual tokens; other values are unchanged."""
        if isinstance(value, Mapping):
            return {key: self._along(name, one, columns) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self._along(name, one, columns) for one in value])
        if not isinstance(value, Tensor):
            return value
        dims = [d for d, size in enumerate(value.shape) if size == self.length]
        if len(dims) > 1:
            raise ValueError(f"{name} of shape {tuple(value.shape)} has two dimensions of {self.length} tokens")
        if dims:
            return value.index_select(dims[0], columns)
        visual = self._visual()
        if visual is not None and value.dim() and len(value) == int(visual.sum()):
            rank = visual.cumsum(0) - 1
            return value[rank[columns][visual[columns]]]
        return value

    def _visual(self) -> Tensor | None:
        """Returns which tokens are visual, [L] bool, if an argument of the decoder contains that."""
        for value in self.arguments.values():
            if isinstance(value, Tensor) and value.dtype == torch.bool and value.numel() == self.length:
                return value.flatten()
        return None

    def _mask(self, value: Any, columns: Tensor) -> Any:
        if isinstance(value, Mapping):
            return {kind: self._mask(one, columns) for kind, one in value.items()}
        if value is None:
            return None
        if value.dim() == 2:
            if not value.bool().all():
                raise ValueError("a prompt without padding has a mask with gaps")
            return value.new_ones(1, len(columns))
        if value.dim() != 4 or value.shape[1] != 1:
            raise ValueError(f"the decoder is given a mask of shape {tuple(value.shape)}")
        seen = value[0, 0] if value.dtype == torch.bool else value[0, 0] == 0  # [L, L]
        ahead = seen & ~torch.ones_like(seen).tril()
        blocks = ahead | ahead.T  # pairs of tokens of an image that attend to each other
        every = torch.arange(self.length)
        rule = next((rule for rule in self._rules() if torch.equal(rule(every, blocks), seen)), None)
        if rule is None:
            raise ValueError(f"the decoder is given a mask of shape {tuple(value.shape)} that no rule explains")
        blocks = blocks[columns][:, columns].clone()
        blocks[len(columns) - self.new :] = False  # generated tokens come one by one
        blocks[:, len(columns) - self.new :] = False
        made = rule(torch.arange(len(columns)), blocks)[None, None]
        if value.dtype == torch.bool:
            return made
        return torch.zeros(made.shape).masked_fill(~made, torch.finfo(value.dtype).min).to(value.dtype)

    def _rules(self) -> Iterator[Any]:
        """Yields functions that build a mask [L, L] from columns [L] and the pairs [L, L] that attend to each other."""

        def back(at: Tensor) -> Tensor:
            return at[:, None] - at[None]

        yield lambda at, blocks: (back(at) >= 0) | blocks
        for w in self.windows:
            yield lambda at, blocks, w=w: ((back(at) >= 0) | blocks) & (back(at) < w)
            yield lambda at, blocks, w=w: ((back(at) >= 0) & (back(at) < w)) | blocks
        for c in self.chunks:
            yield lambda at, blocks, c=c: ((back(at) >= 0) & (at[:, None] // c == at[None] // c)) | blocks


def _joined(name: str, values: Sequence[Any], calls: Sequence[Mapping[str, Any]]) -> Any:
    """Returns an argument of the decoder for a whole prompt, from its values in the calls that prefill it in parts."""
    first, last = values[0], values[-1]
    if len(values) == 1 or isinstance(last, Cache):
        return last
    if all(isinstance(value, Tensor) for value in values):
        counts = [call["inputs_embeds"].shape[1] for call in calls]
        if name == "attention_mask" and last.dim() == 2 and last.shape[1] == sum(counts):
            return last
        for d in range(first.dim()):
            if [value.shape[d] for value in values] == counts:
                return torch.cat([*values], dim=d)
        if all(value.shape == first.shape and torch.equal(value, first) for value in values):
            return first
    elif not any(isinstance(value, Tensor) for value in values) and all(value == first for value in values):
        return first
    raise ValueError(f"the decoder is given other values of {name} in the {len(values)} calls of one prefill")


def expected_states(
    model: nn.Module,
    decoder: Decoder,
    row: Row,
    generation: Generation,
    b: int,
    columns: Sequence[Tensor],
    llm_layer: int | None,
    keep: bool = False,
) -> Tensor:
    """Returns the expected states [N, D] of row b, from the rows that entered the decoder and layer `llm_layer`.

    columns: the kept columns of the prompt after each stage; keep: whether their positions are kept, too. Raises
    ValueError if a text token has changed.
    """
    tokens = generation.tokens[b]
    whole = Whole.of(model, decoder, row, tokens[:-1], keep)
    embeds = whole.arguments["inputs_embeds"][0]  # [L, D]
    new = len(tokens) - 1
    rows = generation.entered[0][b, -len(columns[0]) :]
    if len(rows) != len(columns[0]):
        raise ValueError(f"{len(columns[0])} tokens should be kept, but {len(rows)} entered the decoder")
    _check_text(row, rows, embeds, columns[0])
    x = torch.cat([rows, embeds[whole.length - new :]])[None]
    arguments = {"inputs_embeds": x, **whole.gathered(columns[0])}
    name = first_features(whole.arguments)
    if name is not None:
        mask = visual_mask(arguments)
        added = {**arguments[name], 0: x[mask]}
        arguments |= {"inputs_embeds": x.masked_fill(mask[..., None], 0), name: added}
    if llm_layer is None:
        states: Tensor = decoder.module(**arguments, use_cache=False)[0]
        return states[0, -new - 1 :]
    with _watching(decoder.layers[llm_layer]) as seen:
        decoder.module(**arguments, use_cache=False)
    late, batch = generation.entered[1], len(generation.tokens)
    axis = 1 if late.dim() == 4 and late.shape[0] != batch else 0  # some models have several streams [S, B, L, D]
    late = late.select(axis, b).narrow(axis, late.shape[axis + 1] - len(columns[1]), len(columns[1]))
    tail = seen[0].select(axis, 0).narrow(axis, seen[0].shape[axis + 1] - new, new)
    late = torch.cat([late, tail], dim=axis).unsqueeze(axis)
    places = torch.cat([torch.isin(columns[0], columns[1]).nonzero().flatten(), torch.arange(-new, 0) + x.shape[1]])
    with _given(decoder.layers[llm_layer], late):  # replaces the output of the layers before it
        states = decoder.module(inputs_embeds=x[:, places], **whole.gathered(columns[1]), use_cache=False)[0]
    return states[0, -new - 1 :]


def columns(row: Row, kept: Mapping[str, Sequence[tuple[int, Sequence[Tensor]]]], stages: int) -> list[Tensor]:
    """Returns the columns of a prompt that remain after each stage.

    kept: for each modality, and each of its images or videos in the prompt, the number of its placeholders, and the
    positions that remain after each stage. Raises ValueError if a stage has dropped no token.
    """
    places = {m: visual(row, m).nonzero().flatten() for m in ("image", "video")}
    text = (~visual(row)).nonzero().flatten()
    found = []
    for stage in range(stages):
        remaining = [text]
        for modality, visuals in kept.items():
            start = 0
            for tokens, after in visuals:
                if len(after) != stages:
                    raise ValueError(f"{len(after)} stages dropped tokens of an {modality}, where {stages} should have")
                remaining.append(places[modality][start + after[stage]])
                start += tokens
            if start != len(places[modality]):
                raise ValueError(
                    f"{start} placeholders of modality '{modality}' were found, of {len(places[modality])}"
                )
        found.append(torch.cat(remaining).sort().values)
        if len(found[-1]) >= (len(found[-2]) if stage else row["input_ids"].shape[1]):
            raise ValueError(f"stage {stage + 1} dropped no token")
    return found


def _check_text(row: Row, rows: Tensor, embeds: Tensor, columns: Tensor) -> None:
    """Checks that text tokens enter the decoder unchanged. Image tokens change: others are merged into them."""
    text = ~visual(row)[columns]
    if not torch.equal(rows[text], embeds[columns][text]):
        raise ValueError("text tokens did not enter the decoder unchanged: the kept columns are wrong")


def visual(row: Row, modality: str | None = None) -> Tensor:
    """Returns which tokens of a tiny prompt are placeholders of images, of videos, or of either: [L] bool."""
    ids, types = row["input_ids"][0], row.get("mm_token_type_ids")
    found = {"image": ids == IMAGE, "video": ids == VIDEO}
    # Some models use the image token as placeholder for the frames of a video.
    if types is not None:
        found = {"image": types[0] == 1, "video": types[0] == 2}
    elif "pixel_values_videos" in row and not found["video"].any():
        found = {"image": found["video"], "video": found["image"]}
    either: Tensor = found["image"] | found["video"]
    return either if modality is None else found[modality]


@contextmanager
def _watching(layer: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda _, a, k: seen.append(hidden(a, k)), with_kwargs=True):
        yield seen


def _given(layer: nn.Module, rows: Tensor) -> RemovableHandle:
    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((rows, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": rows})

    return layer.register_forward_pre_hook(give, with_kwargs=True)

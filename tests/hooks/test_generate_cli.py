"""`apet generate`: the answer is the patched model's, then come the numbers, and every fault is one message."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub.errors
import pytest
import torch
import transformers
from apet import hub, models
from families import FAMILIES, build
from PIL import Image
from processors import Processor, answer, llava_folder
from test_picture import scene
from transformers import PreTrainedModel

from tests.command import failed, invoke, said

NEW = 4


def generated(*words: object) -> str:
    return said("generate", *words, "--max-new-tokens", NEW)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / "one.png", folder / "two.png"]
    Image.fromarray(scene(80, 60)).save(paths[0])
    Image.fromarray(scene(50, 70)[::-1]).save(paths[1])
    return paths


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import av

    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(12):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(scene(96, 64)[:, :: (-1) ** i].copy(), format="rgb24")))
        file.mux(stream.encode(None))
    return path


def test_answer_and_report(llava: Path, photos: list[Path]) -> None:
    text = generated("--model", llava, "--image", photos[0], "--prompt", "w3 w4", "--keep", 12)
    assert text.splitlines()[0] == answer(llava, photos[:1], "<image>\nw3 w4", NEW, keep=12)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "LlavaForConditionalGeneration: 36 visual tokens in 1 row" in lines
    assert "tokens of a row, layers 1 to 4 38 14 2.71" in lines
    assert sum("time to" in line for line in lines) == 2
    assert "Without compression" not in text


def test_both_stages_compared_and_drawn(llava: Path, photos: list[Path], tmp_path: Path) -> None:
    options = ("--keep", "50%", "--llm-layer", 2, "--llm-keep", 11, "--layout", "overwrite", "--basis", 10)
    options += ("--dtype", "float32")
    words = ("--model", llava, "--image", photos[0], "--image", photos[1], "--prompt", "w5", *options)
    text = generated(*words, "--compare", "--out", tmp_path / "pictures", "--device", "cpu")
    lines = text.splitlines()
    chosen = {"keep": 0.5, "llm_layer": 2, "llm_keep": 11, "layout": "overwrite", "basis": 10}
    assert lines[0] == answer(llava, photos, "<image>\n<image>\nw5", NEW, **chosen)
    assert lines[3] == answer(llava, photos, "<image>\n<image>\nw5", NEW)
    assert lines[2] == "Without compression:"
    tokens = [re.sub(" +", " ", line).strip() for line in lines if "tokens of a row" in line]
    assert tokens == ["tokens of a row, layers 1 to 2 73 37 1.97", "tokens of a row, layers 3 to 4 73 23 3.17"]
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["one.apet.png", "two.apet.png"]
    for path in (tmp_path / "pictures").iterdir():
        assert min(Image.open(path).size) > 400


def test_options_of_the_first_stage(llava: Path, photos: list[Path]) -> None:
    options = ("--keep", 12, "--distinct", 2, "--positions", "keep", "--dtype", "float32", "--device", "cpu")
    text = generated("--model", llava, "--image", photos[0], "--prompt", "w3 w4", *options)
    chosen = {"keep": 12, "distinct": 2.0, "positions": "keep"}
    assert text.splitlines()[0] == answer(llava, photos[:1], "<image>\nw3 w4", NEW, **chosen)


def test_chat_template(llava: Path, photos: list[Path], tmp_path: Path) -> None:
    """If the processor has one, it formats the prompt, and sets the place of the image."""
    folder = shutil.copytree(llava, tmp_path / "chat")
    template = (
        "{% for m in messages %}w9 {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }} "
        "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}w8{% endif %}"
    )
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.chat_template = template
    processor.save_pretrained(folder)
    text = generated("--model", folder, "--image", photos[0], "--prompt", "w3", "--keep", 9)
    assert text.splitlines()[0] == answer(folder, photos[:1], "w9 <image> w3 w8", NEW, keep=9)


def test_a_template_that_writes_the_first_token(llava: Path, photos: list[Path]) -> None:
    """Then the tokenizer must not add it again."""
    from tokenizers.processors import TemplateProcessing

    model, processor = models.load(str(llava), [{"keep": 9}], "auto", "cpu")
    processor.tokenizer.bos_token = "<s>"
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    picture = Image.open(photos[0]).convert("RGB")
    plain = models.question(model, processor, "w3", [picture])["input_ids"][0].tolist()
    processor.chat_template = "{{ bos_token }} <image> {{ messages[0].content[-1].text }} w8"
    formatted = models.question(model, processor, "w3", [picture])["input_ids"][0].tolist()
    assert plain.count(1) == formatted.count(1) == 1
    assert (plain[0], formatted[0], formatted[-2:]) == (1, 1, [3, 8])


def test_an_answer_is_not_lost_with_its_picture(llava: Path, photos: list[Path], tmp_path: Path) -> None:
    words = ("--model", llava, "--image", photos[0], "--prompt", "w3", "--max-new-tokens", NEW)
    # This drops nothing of 36 tokens, so there is nothing to draw.
    result = invoke("generate", *words, "--out", tmp_path / "p.png", "--keep", 64, "--json")
    assert result.exit_code == 2
    assert "nothing to draw" in result.stderr
    found = json.loads(result.stdout)
    assert found["answer"] == answer(llava, photos[:1], "<image>\nw3", NEW)
    assert found["pictures"] == []


def test_keep_is_64_unless_something_is_said(llava: Path, photos: list[Path]) -> None:
    words = ("--model", llava, "--image", photos[0], "--prompt", "w3")
    assert "keep=64" in generated(*words)
    assert "keep=None" in generated(*words, "--llm-layer", 1, "--llm-keep", 12)


def test_tiles(photos: list[Path], tmp_path: Path) -> None:
    folder = llava_folder(tmp_path / "next", "llava_next")
    out = tmp_path / "tiles.png"
    text = generated("--model", folder, "--image", photos[0], "--prompt", "w3", "--keep", 9, "--out", out)
    assert "LlavaNextForConditionalGeneration" in text
    assert Image.open(out).size[1] > Image.open(out).size[0]  # a contact sheet of five tiles


@pytest.mark.parametrize(
    ("name", "kind", "tokens"),
    [("qwen2_5_vl", "image", 80), ("video_llava", "image", 36), ("video_llava", "video", 111)],
)
def test_other_families(
    name: str, kind: str, tokens: int, photos: list[Path], clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged images, and a clip. Their processors need torchvision, so the tests use replacements."""
    build(name).save_pretrained(tmp_path / name)
    processor = Processor(FAMILIES[name])
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    source = photos[0] if kind == "image" else clip
    words = ("--model", tmp_path / name, f"--{kind}", source, "--prompt", "w3 w4", "--keep", 9)
    text = generated(*words, "--frames", 3, "--out", tmp_path / "p.png")
    assert f"{tokens} visual tokens in 1 row" in text
    assert (tmp_path / "p.png").stat().st_size > 50_000


def test_a_clip_keeps_its_times(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor gets the time of each frame, and must not choose frames; an animation is also a clip."""
    build("video_llava").save_pretrained(tmp_path / "model")
    processor = Processor(FAMILIES["video_llava"])
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    first, *rest = [Image.fromarray(scene(96, 64)[:, :: (-1) ** i].copy()) for i in range(4)]
    first.save(tmp_path / "clip.gif", save_all=True, append_images=rest, duration=[100, 100, 800, 2000])
    words = ("--model", tmp_path / "model", "--prompt", "w3", "--keep", 9, "--frames", 3, "--json")
    for source, times, seconds in ((clip, [0.2, 0.6, 1.0], 1.2), (tmp_path / "clip.gif", [0.2, 1.0, 2.5], 3.0)):
        found = json.loads(generated(*words, "--video", source))
        assert found["read"] == [{"file": str(source), "times": times, "notes": []}]
        assert not processor.named.pop("do_sample_frames")
        (told,) = processor.named.pop("video_metadata")
        assert not processor.named
        assert [index / told["fps"] for index in told["frames_indices"]] == times
        assert told["total_num_frames"] / told["fps"] == told["duration"] == seconds
        assert (told["width"], told["height"]) == (96, 64)


def test_json_and_quiet(llava: Path, photos: list[Path], tmp_path: Path) -> None:
    words = ("--model", llava, "--image", photos[0], "--prompt", "w3 w4", "--keep", 12, "--compare")
    found = json.loads(generated(*words, "--json", "--out", tmp_path / "p.png"))
    assert found["answer"] == answer(llava, photos[:1], "<image>\nw3 w4", NEW, keep=12)
    assert found["answer without compression"] == answer(llava, photos[:1], "<image>\nw3 w4", NEW)
    assert found["pictures"] == [str(tmp_path / "p.png")]
    report = found["report"]
    assert (report["visual_tokens"], report["options"]["keep"], report["compressed"]["lengths"]) == (36, 12, [14] * 4)
    lines = generated(*words, "--quiet").splitlines()
    assert [line for line in lines if line] == [
        found["answer"],
        "Without compression:",
        found["answer without compression"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--keep", 100],
            "keep=100 drops nothing: it counts per image, and the largest has 36 tokens; keep=35 or less",
        ),
        (["--keep", 9, "--llm-layer", 2, "--llm-keep", 20], "llm_keep=20 drops nothing: it counts per image, and the"),
        (
            ["--keep", 30, "--basis", 10, "--layout", "append"],
            "has 36 tokens, and layout='append' adds 10 basis tokens; keep=25 or less",
        ),
    ],
)
def test_a_budget_that_drops_nothing_is_told_once(options: list, message: str, llava: Path, photos: list[Path]) -> None:
    words = ("generate", "--model", llava, "--image", photos[0], "--prompt", "w3", "--max-new-tokens", 2, *options)
    result = invoke(*words)
    assert result.stderr.startswith("apet: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert invoke(*words, "--quiet").stderr == ""


def test_all_of_it_is_no_budget_that_drops_nothing(llava: Path, photos: list[Path]) -> None:
    words = ("--model", llava, "--image", photos[0], "--prompt", "w3", "--keep", "100%", "--max-new-tokens", 2)
    assert invoke("generate", *words).stderr == ""


# --- errors ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0"], "'--keep': 0 is neither a count from 1 nor a share"),
        (["--keep", ""], "'--keep': '' is neither a count from 1 nor a share"),
        (["--llm-layer", "2", "--llm-keep", "150%"], "'--llm-keep': 150% is neither a count from 1 nor a share"),
        (["--llm-layer", "2"], "llm_layer=2 and llm_keep=None must be given together"),
        (["--llm-layer", "9", "--llm-keep", "4"], "llm_layer=9 is outside 1..3"),
        (["--layout", "sideways"], "'sideways' is not one of 'inplace', 'overwrite', 'append'"),
        (["--layout", "overwrite", "--basis", "10", "--keep", "5"], "layout='overwrite' needs keep > basis"),
        (["--distinct", "2", "--guard", "warn"], "guard='warn' cannot be used with distinct=2.0"),
        (["--positions", "keep", "--layout", "append", "--basis", "4"], "positions='keep' cannot be used with layout"),
        (["--preset", "paper-65"], "preset='paper-65' is not known for llava; its presets are: paper-192"),
        (["--preset", "paper-64"], "llm_layer=16 is outside 1..3"),
        (["--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["--frames", "0"], "Invalid value for '--frames'"),
        (["--dtype", "float8"], "'float8' is not one of 'auto', 'float32'"),
        (["--device", "toaster"], "device='toaster' is not a device of torch"),
        (["--device", "cuda:99"], "device='cuda:99' is not available"),
        (["--out", "picture.doc"], "cannot write a picture as 'picture.doc'"),
        (["--out", "nowhere/picture.png"], "no such folder: nowhere"),
        (["--video", __file__], "give either photos (--image, repeatable) or one clip (--video)"),
        (["--image", "missing.png"], "'missing.png' does not exist"),
    ],
)
def test_wrong_options(
    words: list[str], message: str, llava: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are rejected before any weights are read."""
    monkeypatch.delattr(transformers.PreTrainedModel, "from_pretrained")
    assert message in failed("generate", "--model", llava, "--image", photos[0], "--prompt", "w3", *words)


def test_wrong_files(llava: Path, photos: list[Path], clip: Path) -> None:
    words = ("--model", llava, "--prompt", "w3")
    assert "give either photos" in failed("generate", *words)
    assert "is a clip: give it as --video" in failed("generate", *words, "--image", clip)
    assert "is a photo: give it as --image" in failed("generate", *words, "--video", photos[0])
    assert "this model takes no clips" in failed("generate", *words, "--video", clip)
    assert "Missing option '--prompt'" in failed("generate", "--model", llava, "--image", photos[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["CLIPVisionModel"]}, "with no generate()"),
        ({"architectures": None}, "names no class (architectures)"),
        ({"architectures": ["NoSuchModel"]}, "class NoSuchModel is not known to transformers"),
        (
            {"architectures": ["NoSuchModel"], "transformers_version": "99.0"},
            "the model was made with 99.0: pip install",
        ),
        ({"architectures": ["NoSuchModel"], "auto_map": {"AutoModel": "x.Y"}}, "code of its own authors"),
        ({"architectures": ["LlamaForCausalLM"]}, "cannot make a LlamaForCausalLM from the config.json"),
        ({"model_type": "no_such_type"}, "model_type 'no_such_type' is not known to transformers"),
        ({"model_type": "no_such_type", "transformers_version": "99.0"}, "the model was made with 99.0: pip install"),
        ({"model_type": "no_such_type", "auto_map": {"AutoConfig": "x.Y"}}, "code of its own authors"),
        ({"model_type": None}, "names no model_type"),
        ({"text_config": 7}, "its config.json is broken"),
    ],
)
def test_wrong_configurations(change: dict, message: str, llava: Path, photos: list[Path], tmp_path: Path) -> None:
    config = json.loads((llava / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert message in failed("generate", "--model", tmp_path, "--image", photos[0], "--prompt", "w3")


def test_folders_without_a_config(photos: list[Path], tmp_path: Path) -> None:
    rest = ("--image", photos[0], "--prompt", "w3")
    assert "it has no config.json" in failed("generate", "--model", tmp_path, *rest)
    assert "there is no such folder" in failed("generate", "--model", tmp_path / "nowhere", *rest)
    (tmp_path / "config.json").write_text('{"model_type": "llava",')
    assert "its config.json is broken: Expecting" in failed("generate", "--model", tmp_path, *rest)
    (tmp_path / "config.json").write_text("[]")
    assert "names no model_type" in failed("generate", "--model", tmp_path, *rest)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "GatedRepoError",
            "it is gated: accept its terms on https://huggingface.co/some/model, then run hf auth login",
        ),
        ("RepositoryNotFoundError", "no such model on https://huggingface.co: check its name"),
        ("LocalEntryNotFoundError", "it is not downloaded, and https://huggingface.co cannot be reached"),
        ("HFValidationError", "neither a folder nor a name of the form owner/model"),
    ],
)
def test_what_the_hub_says(kind: str, message: str, photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's error is inside an OSError of transformers, whose message names another cause."""

    def cached_file(*_: object, **__: object) -> None:
        error = getattr(huggingface_hub.errors, kind)
        try:
            raise error.__new__(error)
        except error as cause:
            raise OSError("You are not connected, or this is no folder, or ...") from cause

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    found = failed("generate", "--model", "some/model", "--image", photos[0], "--prompt", "w3")
    assert "cannot load model 'some/model': " in found
    assert message in found


def test_wrong_models(llava: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)
    rest = ("--image", photos[0], "--prompt", "w3")
    assert "cannot load model 'no/such-model'" in failed("generate", "--model", "no/such-model", *rest)

    text = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], hidden_size=64, num_hidden_layers=2)
    text.save_pretrained(tmp_path / "text")
    assert "LlamaForCausalLM takes no images" in failed("generate", "--model", tmp_path / "text", *rest)

    folder = shutil.copytree(llava, tmp_path / "no-processor")
    for path in (*folder.glob("*processor*"), *folder.glob("*token*")):
        path.unlink()
    assert "cannot load the processor of model" in failed("generate", "--model", folder, *rest)

    folder = shutil.copytree(llava, tmp_path / "no-weights")
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert "cannot load the weights of model" in failed("generate", "--model", folder, *rest)

    folder = shutil.copytree(llava, tmp_path / "fewer-weights")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    weights = {name: weight for name, weight in model.state_dict().items() if "layers.1." not in name}
    model.save_pretrained(folder, state_dict=weights)
    assert re.search(r"lacks \d+ of its weights", failed("generate", "--model", folder, *rest))


def test_no_memory_is_one_message(llava: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(self: PreTrainedModel, **_: object) -> None:
        raise torch.OutOfMemoryError("out of memory: tried to allocate 9 GiB\nand a long list of advice")

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "generate", generate)
    message = failed("generate", "--model", llava, "--image", photos[0], "--prompt", "w3")
    assert message == "apet: out of memory: tried to allocate 9 GiB\n"

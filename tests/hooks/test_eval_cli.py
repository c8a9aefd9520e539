"""`apet eval`: the answers are the model's, no question is lost or asked twice, and every fault is one error.

The tests use real photographs, and a tiny random LLaVA with the processor of transformers, in the format of the hub.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import fcntl
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import apet
import pytest
import torch
import transformers
from apet.evaluation import questions, run
from apet.evaluation.answers import Answers
from families import FAMILIES, build
from PIL import Image
from processors import Processor, answer, llava_folder

from tests.command import failed, invoke, said

NEW = 4
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "coins.png", "camera.png")


def records(out: Path) -> list[dict]:
    """Returns every line but the first."""
    return [json.loads(line) for line in out.read_text().splitlines()[1:]]


def write(folder: Path, entries: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def entry(number: int, **more: object) -> dict:
    photo = PHOTOS[number % len(PHOTOS)]
    return {"id": number, "image": photo, "question": f"w{3 + number} w7", "answers": ["w5"], **more}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight questions about six photographs."""
    shipped = Path(importlib.util.find_spec("skimage").submodule_search_locations[0], "data")
    folder = write(tmp_path / "data", [entry(i) for i in range(8)])
    for name in PHOTOS:
        shutil.copy(shipped / name, folder)
    return folder


def test_answers_tokens_and_table(llava: Path, data: Path, tmp_path: Path) -> None:
    words = ("--model", llava, "--keep", 12, "--keep", "25%", "--max-new-tokens", NEW)
    said("eval", *words, "--data", data, "--out", tmp_path / "first.jsonl")
    done = {(r["id"], r["variant"]): r for r in records(tmp_path / "first.jsonl")}
    assert len(done) == len(records(tmp_path / "first.jsonl")) == 8 * 3
    for name, options, tokens in (
        ("uncompressed", {}, 36),
        ("keep=12", {"keep": 12}, 12),
        ("keep=0.25", {"keep": 0.25}, 9),
    ):
        for i in (0, 3):
            record = done[str(i), name]
            assert record["answer"] == answer(llava, [data / PHOTOS[i]], f"<image>\nw{3 + i} w7", NEW, **options)
            assert record["visual tokens"] == tokens
            assert 0 < record["prefill"] <= record["total"]
            assert record["length"] == NEW

    # Three of eight answers are right, one of them with a capital letter and a full stop.
    plain = [done[str(i), "uncompressed"]["answer"] for i in range(8)]
    right = [[plain[0]], ["w5", plain[1]], [plain[2].title() + "."], *[["w5 w5 w5 w5 w5"]] * 5]
    write(data, [entry(i, answers=right[i]) for i in range(8)])
    text = said("eval", *words, "--data", data, "--out", tmp_path / "second.jsonl")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["uncompressed"][:5] == ["8", "37.50%", "37.50%", "100.00%", "36.0"]
    same = sum(done[str(i), "keep=12"]["answer"] == plain[i] for i in range(8))
    hits = sum(done[str(i), "keep=12"]["answer"] == plain[i] for i in range(3))
    assert rows["keep=12"][:5] == ["8", f"{hits / 8:.2%}", f"{hits / 8:.2%}", f"{same / 8:.2%}", "12.0"]
    assert rows["keep=0.25"][4] == "9.0"
    assert same < 8


def test_layout_is_part_of_the_variant(llava: Path, data: Path, tmp_path: Path) -> None:
    write(data, [entry(0)])
    text = said(
        "eval", "--model", llava, "--data", data, "--out", tmp_path / "out.jsonl", "--keep", 12,
        "--layout", "overwrite", "--basis", 10, "--max-new-tokens", NEW,
    )  # fmt: skip
    assert "keep=12, overwrite, basis=10" in text
    expected = answer(llava, [data / PHOTOS[0]], "<image>\nw3 w7", NEW, keep=12, layout="overwrite", basis=10)
    assert records(tmp_path / "out.jsonl")[1]["answer"] == expected


def test_options_of_all_budgets(llava: Path, data: Path, tmp_path: Path) -> None:
    write(data, [entry(0)])
    text = said(
        "eval", "--model", llava, "--data", data, "--out", tmp_path / "out.jsonl", "--keep", 12,
        "--distinct", 2, "--positions", "keep", "--max-new-tokens", NEW,
    )  # fmt: skip
    assert "keep=12, distinct=2.0, positions=keep" in " ".join(text.split())
    expected = answer(llava, [data / PHOTOS[0]], "<image>\nw3 w7", NEW, keep=12, distinct=2.0, positions="keep")
    assert records(tmp_path / "out.jsonl")[1]["answer"] == expected


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_visual_tokens_of_both_stages(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over layers is that of `apet.kept` after a prefill, in layers before and after the second stage."""
    if name == "llava_next":
        folder = llava_folder(tmp_path / name, name)
    else:
        build(name).save_pretrained(tmp_path / name)
        folder, processor = tmp_path / name, Processor(FAMILIES[name])
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    both = {"keep": 12, "llm_layer": 1, "llm_keep": 11}
    settings = run.Settings(str(folder), {"uncompressed": None, "both": both}, NEW, "auto", "cpu")
    found = questions.read(write(data, [entry(0)]))
    kept, patched = [], apet.hooks.patched
    monkeypatch.setattr(run.hooks, "patched", lambda model, **o: _Watched(patched(model, **o), model, kept))
    done = run.evaluate(found, tmp_path / "out.jsonl", settings, lambda *_: None)
    (visual,) = kept[0].visuals
    assert done["0", "uncompressed"]["visual tokens"] == visual.tokens > 36
    first, second = (len(left) for left in visual.remaining)
    assert done["0", "both"]["visual tokens"] == (first + 3 * second) / 4
    assert second < first < visual.tokens


class _Watched:
    """A context manager that records the kept tokens when it ends."""

    def __init__(self, context, model: torch.nn.Module, notes: list):
        self.context, self.model, self.notes = context, model, notes

    def __enter__(self):
        return self.context.__enter__()

    def __exit__(self, *error):
        self.notes.append(apet.kept(self.model))
        return self.context.__exit__(*error)


def test_clips(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question about a clip uses as many frames as --frames."""
    build("video_llava").save_pretrained(tmp_path / "model")
    processor = Processor(FAMILIES["video_llava"])
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    photos = [Image.open(data / name).convert("RGB").resize((60, 40)) for name in PHOTOS]
    photos[0].save(data / "clip.gif", save_all=True, append_images=photos[1:], duration=500)
    write(
        data,
        [
            {"id": 1, "video": "clip.gif", "question": "w3", "answers": ["w5"]},
            entry(0),
            {**entry(2), "image": "clip.gif"},
        ],
    )
    words = ("--model", tmp_path / "model", "--data", data, "--out", tmp_path / "out.jsonl", "--max-new-tokens", 2)
    result = json.loads(said("eval", *words, "--keep", 9, "--frames", 3, "--json", code=1).partition("apet: ")[0])
    assert result["asked"] == 3
    assert [row["questions"] for row in result["rows"]] == [2, 2]
    (wrong,) = result["failed"]
    assert "line 3: " in wrong
    assert "is a clip, not a photo" in wrong
    done = {(r["id"], r["variant"]): r for r in records(tmp_path / "out.jsonl") if "failed" not in r}
    assert done["1", "uncompressed"]["visual tokens"] == 3 * 37
    assert done["1", "keep=9"]["visual tokens"] == 3 * (9 + 1)
    assert done["0", "uncompressed"]["visual tokens"] == 36
    assert "was made with frames=3, this run has 2" in failed("eval", *words, "--frames", 2)


def test_a_budget_that_drops_nothing_is_told_once(llava: Path, data: Path, tmp_path: Path) -> None:
    write(data, [entry(i) for i in range(3)])
    words = ("--model", llava, "--data", data, "--max-new-tokens", 1, "--keep", 36, "--keep", 50, "--keep", 35)
    result = invoke("eval", *words, "--out", tmp_path / "out.jsonl")
    told = [line for line in result.stderr.splitlines() if "drops nothing" in line]
    assert [line.split()[1] for line in told] == ["keep=36", "keep=50"]
    assert invoke("eval", *words, "--out", tmp_path / "quiet.jsonl", "--quiet").output == ""


# --- continuing a run ---


def test_goes_on_where_it_was_cut_off(llava: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    words = ("--model", llava, "--data", data, "--out", out, "--keep", 12, "--max-new-tokens", NEW)
    said("eval", *words)
    lines = out.read_bytes().splitlines(keepends=True)
    whole = records(out)
    out.write_bytes(b"".join(lines[:6]) + lines[6][:-20])  # five records, and an incomplete one

    said("eval", *words)
    again = records(out)
    assert [(r["id"], r["variant"], r["answer"]) for r in again] == [
        (r["id"], r["variant"], r["answer"]) for r in whole
    ]
    assert out.read_bytes().startswith(b"".join(lines[:6]))

    # For another budget only its questions are asked. If no question remains, the model is not loaded.
    said("eval", *words, "--keep", 9)
    assert [r["variant"] for r in records(out)[16:]] == ["keep=9"] * 8
    monkeypatch.delattr(transformers.PreTrainedModel, "from_pretrained")
    assert re.search(r"keep=9 +8 ", said("eval", *words, "--keep", 9))
    assert len(records(out)) == 24


def test_what_does_not_fit_the_folder(llava: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ("--model", llava, "--data", data, "--out", out)
    write(data, [entry(0)])
    said("eval", *words, "--keep", 12, "--max-new-tokens", NEW)
    made = f"{out} was made with "
    assert f"{made}max_new_tokens=4, this run has 5: give another --out" in failed(
        "eval", *words, "--max-new-tokens", 5
    )
    assert f"{made}dtype='auto', this run has 'float32'" in failed(
        "eval", *words, "--max-new-tokens", NEW, "--dtype", "float32"
    )
    write(data, [entry(1)])
    assert f"{made}questions=" in failed("eval", *words, "--max-new-tokens", NEW)

    write(data, [entry(0)])
    header, *rest = out.read_bytes().splitlines(keepends=True)
    for damage, message in (
        (b"nonsense\n", "line 2: this line is damaged"),
        (b"[]\n", "line 2: this line is damaged"),
        (b"{}\n", "line 2: this is not an answer of a run"),
        (rest[0], "line 3: question '0' was answered before with uncompressed"),
    ):
        out.write_bytes(header + damage + b"".join(rest))
        assert message in failed("eval", *words, "--max-new-tokens", NEW)


def test_what_has_changed_since(llava: Path, data: Path, tmp_path: Path) -> None:
    """Answers of other weights, or about another image, are not put beside new ones."""
    folder, out = shutil.copytree(llava, tmp_path / "model"), tmp_path / "out.jsonl"
    write(data, [entry(0), entry(1)])
    words = ("--model", folder, "--data", data, "--out", out, "--max-new-tokens", NEW)
    said("eval", *words, "--keep", 12)
    shutil.copy(data / PHOTOS[2], data / PHOTOS[1])
    assert re.search(rf"line 2: .*{PHOTOS[1]} has changed since .*: give another --out", failed("eval", *words))
    write(data, [entry(0)])
    out.unlink()
    said("eval", *words, "--keep", 12)
    (weights,) = folder.glob("*.safetensors")
    os.utime(weights, ns=(1, 1))
    assert f"{out} was made with weights=" in failed("eval", *words, "--keep", 12)


def test_answers_beside_the_model(llava: Path, data: Path, tmp_path: Path) -> None:
    """They are no files of the model, and neither are notes or a repository around it."""
    folder = shutil.copytree(llava, tmp_path / "model")
    write(data, [entry(0)])
    words = ("--model", folder, "--data", data, "--out", folder / "out.jsonl", "--max-new-tokens", 1, "--keep", 12)
    said("eval", *words)
    (folder / ".git").mkdir()
    (folder / ".git/config.json").write_text("{}")
    (folder / "README.md").write_text("a model")
    said("eval", *words, "--keep", 9)
    assert len(records(folder / "out.jsonl")) == 3


def test_another_image_at_an_address(llava: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noticed when it is read again, for another budget; the same image is asked about."""
    write(data, [{**entry(0), "image": "https://example.org/cam.png"}])
    words = ("--model", llava, "--data", data, "--out", tmp_path / "out.jsonl", "--max-new-tokens", 1)
    shown = [data / PHOTOS[0], data / PHOTOS[0], data / PHOTOS[1]]
    read = run.media.read
    monkeypatch.setattr(run.media, "read", lambda source, frames: read(shown.pop(0), frames))
    said("eval", *words, "--keep", 12)
    said("eval", *words, "--keep", 9)
    assert len(records(tmp_path / "out.jsonl")) == 3
    assert re.search(
        r"line 1: https://example.org/cam.png has changed since .*: give another --out",
        failed("eval", *words, "--keep", 8),
    )


def test_what_was_skipped_of_a_clip_is_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llava: Path
) -> None:
    """Once for each question, also from a run before."""
    write(data, [entry(0), entry(1)])
    read = run.media.read
    monkeypatch.setattr(
        run.media,
        "read",
        lambda source, frames: dataclasses.replace(
            read(source, frames), notes=["the file is cut off"] if source.name == PHOTOS[1] else []
        ),
    )
    words = ("--model", llava, "--data", data, "--out", tmp_path / "out.jsonl", "--max-new-tokens", 1, "--keep", 12)
    for _ in range(2):
        told = invoke("eval", *words, "--json")
        assert told.exit_code == 0
        (note,) = json.loads(told.stdout)["notes"]
        assert note.endswith("line 2: the file is cut off")
        assert told.stderr.count("the file is cut off") == 1


def test_a_path_that_is_none_fails_its_question_only(llava: Path, data: Path, tmp_path: Path) -> None:
    """It is longer than a path may be."""
    write(data, [entry(0), {**entry(1), "image": "data:image/png;base64," + "A" * 5000}])
    words = ("--model", llava, "--data", data, "--out", tmp_path / "out.jsonl", "--max-new-tokens", 1)
    told = said("eval", *words, code=1)
    assert "line 2: cannot read" in told
    assert "1 of 2 questions failed" in told


def test_file_in_use_or_not_to_be_written(llava: Path, data: Path, tmp_path: Path) -> None:
    words = ("--model", llava, "--data", data, "--out", tmp_path / "out.jsonl")
    with Answers(tmp_path / "out.jsonl", {}):
        assert "another run is writing" in failed("eval", *words)
    (tmp_path / "file").touch()
    assert "cannot write" in failed("eval", *words[:-1], tmp_path / "file" / "out.jsonl")


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(apet.Notice, match=r"out\.jsonl has no locks \(Function not implemented\)"):
        Answers(tmp_path / "out.jsonl", {})


def test_bad_images_lose_nothing_else(llava: Path, data: Path, tmp_path: Path) -> None:
    (data / "torn.jpg").write_bytes((data / "rocket.jpg").read_bytes()[:3000])
    (data / "text.png").write_text("no picture")
    bad = ("missing.png", "torn.jpg", "text.png", "../data")
    write(data, [*(entry(i, image=image) for i, image in enumerate(bad)), *(entry(i) for i in range(4, 7))])
    words = ("--model", llava, "--data", data, "--out", tmp_path / "out.jsonl", "--keep", 12, "--max-new-tokens", NEW)
    text = said("eval", *words, code=1)
    for line, image in enumerate(bad, 1):
        assert re.search(rf"questions\.jsonl, line {line}: .*{re.escape(image)}", text), image
    assert "4 of 7 questions failed and do not count" in text
    assert re.search(r"uncompressed +3 ", text)
    count = collections.Counter((r["variant"], "failed" in r) for r in records(tmp_path / "out.jsonl"))
    assert count == {
        (name, failed): 4 if failed else 3 for name in ("uncompressed", "keep=12") for failed in (True, False)
    }

    for image in bad[:3]:
        shutil.copy(data / "camera.png", data / image)
    assert "1 of 7 questions failed" in said("eval", *words, code=1)
    fine = [r for r in records(tmp_path / "out.jsonl") if "failed" not in r]
    assert len(fine) == len({(r["id"], r["variant"]) for r in fine}) == 2 * 6
    assert len([r for r in records(tmp_path / "out.jsonl") if "failed" in r]) == 2 * (4 + 1)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])  # of a GPU; of the CPU
@pytest.mark.parametrize("where", ["the answer", "the inputs"])
def test_no_memory_for_one_question(
    kind: type[Exception], where: str, llava: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(data, [entry(i) for i in range(3)])
    module, name, bad = (run, "_answer", 2) if where == "the answer" else (run.models, "question", 1)
    asked, calls = getattr(module, name), iter(range(99))

    def once(*arguments: object) -> dict:
        if next(calls) == bad:  # of question 1, uncompressed
            raise kind("out of memory: tried to allocate 9 GiB\nadvice")
        return asked(*arguments)

    monkeypatch.setattr(module, name, once)
    text = said(
        "eval", "--model", llava, "--data", data, "--out", tmp_path / "out.jsonl", "--keep", 12,
        "--max-new-tokens", NEW, code=1,
    )  # fmt: skip
    assert "line 2: out of memory: tried to allocate 9 GiB" in text
    assert "1 of 3 questions failed" in text
    answered = ["0", "0", *(["1"] if where == "the answer" else []), "2", "2"]
    assert [r["id"] for r in records(tmp_path / "out.jsonl") if "failed" not in r] == answered
    assert re.search(r"keep=12 +2 ", text)  # compared on the same questions


# --- errors ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0"], "0 is neither a count from 1 nor a share"),
        (["--keep", "12", "--keep", "12"], "keep=12 is given twice"),
        (["--preset", "paper-64"], "llm_layer=16 is outside 1..3"),
        (["--keep", "12", "--preset", "paper-65"], "preset='paper-65' is not known for llava"),
        (["--layout", "outside"], "'outside' is not one of 'inplace', 'overwrite', 'append'"),
        (["--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["--dtype", "int8"], "'int8' is not one of 'auto', "),
        (["--device", "abacus"], "device='abacus' is not a device of torch"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
        (["--model", "nowhere"], "cannot load model 'nowhere'"),
    ],
)
def test_rejected_options(
    words: list[str], message: str, llava: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are rejected before any weights are read and any question is asked."""
    monkeypatch.setattr("apet.hub.reachable", lambda: False)
    monkeypatch.delattr(transformers.PreTrainedModel, "from_pretrained")
    assert message in failed("eval", "--model", llava, "--data", data, "--out", tmp_path / "out.jsonl", *words)
    assert not (tmp_path / "out.jsonl").exists() or (tmp_path / "out.jsonl").read_bytes() == b""

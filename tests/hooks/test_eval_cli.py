"""`apet eval`: the answers are the model's, none is lost or asked twice, and what is wrong is one sentence.

Real photographs, and a tiny random LLaVA with the processor of transformers, saved as on the hub.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import apet
import pytest
import torch
import transformers
from apet.evaluation import processes, questions, run
from command import refused, said
from families import FAMILIES, build
from processors import Processor, answer, llava_folder

NEW = 4
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "coins.png", "camera.png")
ALONE = processes.Processes(0, 1, 0)


def records(out: Path) -> list[dict]:
    """Every line of every process but headers, in the order of the files."""
    lines = [json.loads(line) for path in sorted(out.iterdir()) for line in path.read_text().splitlines()]
    return [line for line in lines if "id" in line]


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
    said("eval", *words, "--data", data, "--out", tmp_path / "first")
    done = {(r["id"], r["variant"]): r for r in records(tmp_path / "first")}
    assert len(done) == len(records(tmp_path / "first")) == 8 * 3
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

    # Three of eight right, one of them answered with a capital and a full stop.
    plain = [done[str(i), "uncompressed"]["answer"] for i in range(8)]
    right = [[plain[0]], ["w5", plain[1]], [plain[2].title() + "."], *[["w5 w5 w5 w5 w5"]] * 5]
    write(data, [entry(i, answers=right[i]) for i in range(8)])
    text = said("eval", *words, "--data", data, "--out", tmp_path / "second")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["uncompressed"][:5] == ["8", "37.50%", "100.0%", "100.00%", "36.0"]
    same = sum(done[str(i), "keep=12"]["answer"] == plain[i] for i in range(8))
    hits = sum(done[str(i), "keep=12"]["answer"] == plain[i] for i in range(3))
    assert rows["keep=12"][:5] == ["8", f"{hits / 8:.2%}", f"{hits / 3:.1%}", f"{same / 8:.2%}", "12.0"]
    assert rows["keep=0.25"][4] == "9.0"
    assert same < 8


def test_layout_is_part_of_the_variant(llava: Path, data: Path, tmp_path: Path) -> None:
    write(data, [entry(0)])
    text = said(
        "eval", "--model", llava, "--data", data, "--out", tmp_path / "out", "--keep", 12, "--layout", "overwrite",
        "--max-new-tokens", NEW,
    )  # fmt: skip
    assert "keep=12, overwrite" in text
    expected = answer(llava, [data / PHOTOS[0]], "<image>\nw3 w7", NEW, keep=12, layout="overwrite")
    assert records(tmp_path / "out")[1]["answer"] == expected


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_visual_tokens_of_both_stages(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the layers is that of what a prefill keeps, by `apet.kept`, in layers before and after the second."""
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
    done = run.evaluate(found, tmp_path / "out", settings, ALONE, lambda *_: None)
    (visual,) = kept[0].visuals
    assert done["0", "uncompressed"]["visual tokens"] == visual.tokens > 36
    first, second = (len(left) for left in visual.left)
    assert done["0", "both"]["visual tokens"] == (first + 3 * second) / 4
    assert second < first < visual.tokens


class _Watched:
    """A context manager that notes what was kept when it ends."""

    def __init__(self, context, model: torch.nn.Module, notes: list):
        self.context, self.model, self.notes = context, model, notes

    def __enter__(self):
        return self.context.__enter__()

    def __exit__(self, *error):
        self.notes.append(apet.kept(self.model))
        return self.context.__exit__(*error)


# --- going on ---


def test_goes_on_where_it_was_cut_off(llava: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    words = ("--model", llava, "--data", data, "--out", out, "--keep", 12, "--max-new-tokens", NEW)
    said("eval", *words)
    path = out / "answers-00000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    whole = records(out)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:-20])  # five records, and one cut short

    said("eval", *words)
    again = records(out)
    assert [(r["id"], r["variant"], r["answer"]) for r in again] == [
        (r["id"], r["variant"], r["answer"]) for r in whole
    ]
    assert path.read_bytes().startswith(b"".join(lines[:6]))

    # Another budget asks for itself alone; where nothing is left to ask, not even the model is read.
    said("eval", *words, "--keep", 9)
    assert [r["variant"] for r in records(out)[16:]] == ["keep=9"] * 8
    monkeypatch.delattr(transformers.PreTrainedModel, "from_pretrained")
    assert re.search(r"keep=9 +8 ", said("eval", *words, "--keep", 9))
    assert len(records(out)) == 24


def test_what_does_not_fit_the_folder(llava: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--model", llava, "--data", data, "--out", out)
    write(data, [entry(0)])
    said("eval", *words, "--keep", 12, "--max-new-tokens", NEW)
    made = f"{out} was made with "
    assert f"{made}max_new_tokens=4, this run has 5: give another --out" in refused(
        "eval", *words, "--max-new-tokens", 5
    )
    assert f"{made}dtype='auto', this run has 'float32'" in refused(
        "eval", *words, "--max-new-tokens", NEW, "--dtype", "float32"
    )
    write(data, [entry(1)])
    assert f"{made}questions=" in refused("eval", *words, "--max-new-tokens", NEW)

    write(data, [entry(0)])
    path = out / "answers-00000.jsonl"
    header, *rest = path.read_bytes().splitlines(keepends=True)
    for damage, sentence in (
        (b"nonsense\n", "line 2: this line is damaged"),
        (b"[]\n", "line 2: this line is damaged"),
        (b"{}\n", "line 2: this is no line of a run"),
        (rest[0], "line 3: question '0' was answered before with uncompressed"),
    ):
        path.write_bytes(header + damage + b"".join(rest))
        assert sentence in refused("eval", *words, "--max-new-tokens", NEW)


def test_folder_in_use_or_not_to_be_written(llava: Path, data: Path, tmp_path: Path) -> None:
    from apet.evaluation.journal import Journal

    words = ("--model", llava, "--data", data, "--out", tmp_path / "out")
    journal = Journal(tmp_path / "out", 0, {})
    assert "another run is writing" in refused("eval", *words)
    journal.close()
    (tmp_path / "file").touch()
    assert "cannot write" in refused("eval", *words[:-1], tmp_path / "file")


def test_bad_images_lose_nothing_else(llava: Path, data: Path, tmp_path: Path) -> None:
    (data / "torn.jpg").write_bytes((data / "rocket.jpg").read_bytes()[:3000])
    (data / "text.png").write_text("no picture")
    bad = ("missing.png", "torn.jpg", "text.png", "../data")
    write(data, [*(entry(i, image=image) for i, image in enumerate(bad)), *(entry(i) for i in range(4, 7))])
    words = ("--model", llava, "--data", data, "--out", tmp_path / "out", "--keep", 12, "--max-new-tokens", NEW)
    text = said("eval", *words, code=1)
    for line, image in enumerate(bad, 1):
        assert re.search(rf"questions\.jsonl, line {line}: .*{re.escape(image)}", text), image
    assert "4 of 7 questions failed and do not count" in text
    assert re.search(r"uncompressed +3 ", text)
    count = collections.Counter((r["variant"], "failed" in r) for r in records(tmp_path / "out"))
    assert count == {
        (name, failed): 4 if failed else 3 for name in ("uncompressed", "keep=12") for failed in (True, False)
    }

    for image in bad[:3]:
        shutil.copy(data / "camera.png", data / image)
    assert "1 of 7 questions failed" in said("eval", *words, code=1)
    fine = [r for r in records(tmp_path / "out") if "failed" not in r]
    assert len(fine) == len({(r["id"], r["variant"]) for r in fine}) == 2 * 6
    assert len([r for r in records(tmp_path / "out") if "failed" in r]) == 2 * (4 + 1)


def test_no_memory_for_one_question(llava: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(data, [entry(i) for i in range(3)])
    asked, calls = run._answer, iter(range(99))

    def once(*arguments: object) -> dict:
        if next(calls) == 2:  # of question 1, uncompressed
            raise torch.OutOfMemoryError("out of memory: tried to allocate 9 GiB\nadvice")
        return asked(*arguments)

    monkeypatch.setattr(run, "_answer", once)
    text = said(
        "eval", "--model", llava, "--data", data, "--out", tmp_path / "out", "--keep", 12, "--max-new-tokens", NEW,
        code=1,
    )  # fmt: skip
    assert "line 2: out of memory: tried to allocate 9 GiB" in text
    assert "1 of 3 questions failed" in text
    assert [r["id"] for r in records(tmp_path / "out") if "failed" not in r] == ["0", "0", "1", "2", "2"]
    assert re.search(r"keep=12 +2 ", text)  # compared on the same questions


# --- several processes ---


def launch(count: int, *words: object) -> subprocess.Popen:
    """`accelerate launch`: "--multi_gpu" is what it calls several processes on a machine, with GPUs or without."""
    options = ("--multi_gpu", "--num_processes", count, "--num_machines", 1, "--mixed_precision", "no")
    options += ("--dynamo_backend", "no", "--main_process_port", 0, "-m", "apet", "eval")
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *words]
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_processes_die_and_others_go_on(llava: Path, data: Path, tmp_path: Path) -> None:
    """Two processes, one of which is killed at work; then one process; then two again that have a budget to add."""
    write(data, [entry(i) for i in range(60)])
    out = tmp_path / "out"
    words = ("--model", llava, "--data", data, "--out", out, "--max-new-tokens", 8)
    both = launch(2, *words, "--keep", 12)
    second = out / "answers-00001.jsonl"
    deadline = time.monotonic() + 120
    while not second.exists() or second.read_bytes().count(b"\n") < 4:
        if both.poll() is not None or time.monotonic() > deadline:
            both.terminate()
            pytest.fail(both.communicate()[0])
        time.sleep(0.005)
    os.kill(json.loads(second.read_text().splitlines()[0])["by"]["pid"], signal.SIGKILL)
    both.communicate(timeout=120)
    assert both.returncode != 0
    before = len([line for path in out.iterdir() for line in path.read_bytes().splitlines() if b'"answer"' in line])
    assert 0 < before < 120
    assert {path.name for path in out.iterdir()} == {"answers-00000.jsonl", "answers-00001.jsonl"}

    assert re.search(r"uncompressed +60 ", said("eval", *words, "--keep", 12))
    third = launch(2, *words, "--keep", 12, "--keep", 9)
    text = third.communicate(timeout=120)[0]
    assert third.returncode == 0, text
    assert text.count("agreement") == 1  # one of them speaks
    done = []
    for path in sorted(out.iterdir()):
        lines = [line for line in path.read_bytes().splitlines() if line.endswith(b"}")]
        done.append([json.loads(line) for line in lines if b'"answer"' in line])
    keys = collections.Counter((r["id"], r["variant"]) for part in done for r in part)
    names = ("uncompressed", "keep=12", "keep=9")
    assert keys == {(str(i), name): 1 for i in range(60) for name in names}
    shares = [sum(r["variant"] == "keep=9" for r in part) for part in done]
    assert shares == [30, 30]
    alone = {r["id"]: r["answer"] for part in done for r in part if r["variant"] == "keep=9"}
    settings = run.Settings(str(llava), {"keep=9": {"keep": 9}}, 8, "auto", None)
    found = questions.read(write(data, [entry(i) for i in range(20, 26)]))
    fresh = run.evaluate(found, tmp_path / "fresh", settings, ALONE, lambda *_: None)
    assert {key: record["answer"] for (key, _), record in fresh.items()} == {
        str(i): alone[str(i)] for i in range(20, 26)
    }


def test_processes_that_were_asked_otherwise(llava: Path, data: Path, tmp_path: Path) -> None:
    """Machines with other questions or options would split the work by different rules."""

    class Two(processes.Processes):
        def gather(self, value):
            return [value, (value[0] | {"questions": "other"}, value[1])]

    settings = run.Settings(str(llava), {"uncompressed": None}, NEW, "auto", None)
    with pytest.raises(apet.Refused, match=r"process 0 was asked .*, process 1 .*'questions': 'other'"):
        run.evaluate(questions.read(data), tmp_path / "out", settings, Two(0, 2, 0), lambda *_: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_all_processes_are_refused_the_same(llava: Path, data: Path, tmp_path: Path) -> None:
    """What only one of three can see: its file is in use. One sentence, and nobody waits for ever."""
    from apet.evaluation.journal import Journal

    journal = Journal(tmp_path / "out", 2, {})
    three = launch(3, "--model", llava, "--data", data, "--out", tmp_path / "out")
    text = three.communicate(timeout=120)[0]
    journal.close()
    assert three.returncode != 0
    assert text.count("apet: another run is writing") == 1
    assert records(tmp_path / "out") == []


# --- refusals ---


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--keep", "0"], "keep=0 is neither a count from 1 nor a share"),
        (["--keep", "12", "--keep", "12"], "keep=12 is given twice"),
        (["--preset", "paper-64"], "llm_layer=16 is outside 1..3"),
        (["--keep", "12", "--preset", "paper-65"], "preset='paper-65' is not known for llava"),
        (["--layout", "outside"], "layout='outside' is none of"),
        (["--metric", "bleu"], "metric='bleu' is none of exact, vqa, pope"),
        (["--metric", "pope"], "questions.jsonl, line 1: metric pope knows no answer 'w5'"),
        (["--metric", "vqa"], "questions.jsonl, line 1: metric vqa needs at least 4 answers, this question has 1"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 is less than 1"),
        (["--dtype", "int8"], "dtype='int8' is none of"),
        (["--device", "abacus"], "device='abacus' is no device of torch"),
        (["--data", "nowhere"], "cannot read nowhere/questions.jsonl: No such file or directory"),
        (["--model", "nowhere"], "cannot load model 'nowhere'"),
    ],
)
def test_refused_options(
    words: list[str], sentence: str, llava: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any weights are read, and nothing is asked."""
    monkeypatch.setattr("apet.models.hub_answers", lambda: False)
    monkeypatch.delattr(transformers.PreTrainedModel, "from_pretrained")
    assert sentence in refused("eval", "--model", llava, "--data", data, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists() or records(tmp_path / "out") == []


def test_models_of_lmms_eval(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin against a stand-in with lmms-eval's registry calls: options go to `patch`, the rest to its model."""
    package = tmp_path / "lmms_eval" / "models"
    package.mkdir(parents=True)
    (tmp_path / "lmms_eval" / "__init__.py").touch()
    (package / "__init__.py").write_text(
        "import transformers\n"
        "AVAILABLE_SIMPLE_MODELS = {'llava_hf': 'LlavaHf', 'qwen2_vl': 'Qwen2_VL', 'other': 'Other'}\n"
        "AVAILABLE_CHAT_TEMPLATE_MODELS = {'llava_hf': 'LlavaHf'}\n"
        "class LlavaHf:\n"
        "    is_simple = True\n"
        "    def __init__(self, pretrained, batch_size=1):\n"
        "        self.batch_size = batch_size\n"
        "        self._model = transformers.LlavaForConditionalGeneration.from_pretrained(pretrained)\n"
        "    @property\n"
        "    def model(self):\n"
        "        return self._model\n"
        "class Chat(LlavaHf):\n"
        "    is_simple = False\n"
        "def get_model(name, force_simple=False):\n"
        "    assert name == 'llava_hf'\n"
        "    return LlavaHf if force_simple else Chat\n"
    )
    (package / "registry_v2.py").write_text("def ModelManifest(**fields):\n    return fields\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from apet import lmms

    assert lmms.manifests() == [
        {
            "model_id": "apet_llava_hf",
            "simple_class_path": "apet.lmms.simple_llava_hf",
            "chat_class_path": "apet.lmms.chat_llava_hf",
        },
        {"model_id": "apet_qwen2_vl", "simple_class_path": "apet.lmms.simple_qwen2_vl"},
    ]
    made = lmms.chat_llava_hf(pretrained=llava, keep=12, layout="overwrite", batch_size=3)
    assert (type(made).__name__, made.is_simple, made.batch_size) == ("ApetChat", False, 3)
    options = apet.options(made.model)
    assert (options.keep, options.layout) == (12, "overwrite")
    assert lmms.simple_llava_hf.is_simple
    with pytest.raises(AttributeError, match="no attribute 'simple_other'"):
        _ = lmms.simple_other

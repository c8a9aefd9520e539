"""`apet eval` without a model: the files that are read and written, the scores of answers, and the table."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from apet import ApetError, hub, media, models
from apet.evaluation import questions, summary
from apet.evaluation.answers import Answers
from PIL import Image


def question(*answers: str, name: str = "1") -> questions.Question:
    return questions.Question(name, Path("a.png"), False, "What?", answers, "questions.jsonl, line 1")


def lines(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


# --- questions ---

GOOD = {"id": 7, "image": "a.png", "question": "What?", "answers": ["dog"]}


def test_questions_are_read(tmp_path: Path) -> None:
    text = json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "id": "8", "answers": ["né", "x"]}, ensure_ascii=False)
    (tmp_path / "questions.jsonl").write_text(text, "utf-8")
    first, second = questions.read(tmp_path).items
    assert (first.id, first.source, first.is_clip) == ("7", tmp_path / "a.png", False)
    assert (first.text, first.answers) == ("What?", ("dog",))
    assert (second.id, second.answers) == ("8", ("né", "x"))
    assert second.where == f"{tmp_path / 'questions.jsonl'}, line 3"
    lines(tmp_path / "questions.jsonl", [without("image") | {"video": "a.mp4"}])
    (clip,) = questions.read(tmp_path).items
    assert (clip.source, clip.is_clip) == (tmp_path / "a.mp4", True)
    lines(tmp_path / "questions.jsonl", [{**GOOD, "image": "https://x.org/a.png"}])
    assert questions.read(tmp_path).items[0].source == "https://x.org/a.png"
    (tmp_path / "questions.jsonl").write_text(text, "utf-8")
    before = questions.read(tmp_path).digest
    (tmp_path / "questions.jsonl").write_text(text.replace("x", "y"), "utf-8")
    assert questions.read(tmp_path).digest != before


def without(key: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != key}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        *((without(key), f"line 2: the key '{key}' is missing") for key in ("id", "question", "answers")),
        (without("image"), "line 2: give one of the keys 'image' and 'video'"),
        ({**GOOD, "id": 8, "video": "a.mp4"}, "line 2: give one of the keys 'image' and 'video'"),
        ({**GOOD, "id": 8, "answer": "dog"}, "line 2: the key 'answer' is none of id, image, video, question"),
        (GOOD, "line 2: the id '7' is that of line 1, too"),
        ({**GOOD, "id": "7"}, "line 2: the id '7' is that of line 1, too"),
        ({**GOOD, "id": 8, "answers": []}, "line 2: answers is empty"),
        ({**GOOD, "id": 8, "answers": ["dog", " "]}, "line 2: ' ' among the answers is empty or not text"),
        ({**GOOD, "id": 8, "answers": [3]}, "line 2: 3 among the answers is empty or not text"),
        ({**GOOD, "id": 8, "answers": "dog"}, "line 2: answers='dog' is of the wrong kind"),
        ({**GOOD, "id": True}, "line 2: id=True is of the wrong kind"),
        ({**GOOD, "id": 8, "image": ""}, "line 2: image is empty"),
        ({**GOOD, "id": 8, "group": "a"}, "line 2: the key 'group' is none of id, image, video, question"),
        ([GOOD], r"line 2: \[.*\] is not a JSON object"),
    ],
)
def test_lines_that_are_rejected(second: object, message: str, tmp_path: Path) -> None:
    lines(tmp_path / "questions.jsonl", [GOOD, second])
    with pytest.raises(ApetError, match=f"questions.jsonl, {message}"):
        questions.read(tmp_path)


def test_files_that_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    with pytest.raises(ApetError, match=r"cannot read .*questions.jsonl: No such file"):
        questions.read(tmp_path)
    for content, message in (
        (b"\n", "holds no question"),
        (b"{", "line 1: this is not JSON"),
        (b'{"id": "\xff"}', "line 1: this is not JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(ApetError, match=message):
            questions.read(tmp_path)


# --- answers ---

MADE = {"model": "m"}


def written(path: Path, records: list[dict]) -> bytes:
    with Answers(path, MADE) as answers:
        for record in records:
            answers.add(record)
    return path.read_bytes()


def test_every_cut_is_survived(tmp_path: Path) -> None:
    """The file is cut at every byte: complete lines stay, the run continues, and no lines are joined."""
    records = [{"id": str(i), "variant": "keep=64", "answer": "é" * i} for i in range(3)]
    path = tmp_path / "new" / "answers.jsonl"
    data = written(path, records)
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = max(data[:cut].count(b"\n") - 1, 0)
        with Answers(path, MADE) as again:
            assert list(again.records.values()) == records[:whole]
            for record in records[whole:]:
                again.add(record)
        assert path.read_bytes() == data


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """The next run removes the part of a line that was written."""
    path = tmp_path / "answers.jsonl"
    data = written(path, [{"id": "0", "variant": "v", "answer": ""}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Answers(path, MADE) as answers:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) + 10, before[1]))
            for _ in range(2):  # a part of the line, then nothing
                with pytest.raises(ApetError, match=f"cannot write {path}: (No space|File too large)"):
                    answers.add({"id": "1", "variant": "v", "answer": "long enough"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.stat().st_size == len(data) + 10
    assert written(path, []) == data


def test_answers_replace_failures(tmp_path: Path) -> None:
    failed, answered = ({"id": "1", "variant": "v", key: "x"} for key in ("failed", "answer"))
    for number, order in enumerate(([failed, answered], [answered, failed], [failed, failed, answered])):
        path = tmp_path / f"{number}.jsonl"
        written(path, order)
        with Answers(path, MADE) as answers:
            assert answers.records == {("1", "v"): answered}


@pytest.mark.parametrize("content", [b"notes without a line end", b"[]\n", b"\xff\n"])
def test_another_file_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(ApetError, match="is not a file of `apet eval` answers"):
        Answers(tmp_path / "notes", MADE)
    assert (tmp_path / "notes").read_bytes() == content


def test_a_run_without_answers_binds_no_other(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"made with": {"model": "other"}}\n')
    written(path, [{"id": "1", "variant": "v", "answer": ""}])
    with pytest.raises(ApetError, match="was made with model='m', this run has 'other'"):
        Answers(path, {"model": "other"})


# --- the table ---


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Dog.", "dog"),
        ("  a\tdog \n", "a dog"),
        ("Yes, it is!", "yes it is"),
        ("3.5", "3.5"),
        ("(red) / blue", "red / blue"),
        ("?", "?"),
        ("**Yes**", "yes"),
        ("[B]", "b"),
        ("`B`.", "b"),
        ("yes \u2013 no", "yes no"),
        ("“Yes”", "yes"),
        ("是。", "是"),
        ("cafe\u0301", "café"),
        ("Straße", "strasse"),
        ("50%", "50%"),
        ("-5", "-5"),
        ("C#", "c#"),
    ],
)
def test_words(text: str, normal: str) -> None:
    assert summary.words(text) == normal


def record(name: str, variant: str, answer: str, **more: object) -> tuple[tuple[str, str], dict]:
    times = {"visual tokens": 36.0, "prefill": 0.1, "total": 0.2}
    return (name, variant), {"id": name, "variant": variant, "answer": answer, **times, **more}


def test_summary_and_failures() -> None:
    asked = [question("dog", "Puppy", name=str(i)) for i in range(5)]
    variants = ["uncompressed", "keep=9"]
    records = dict(
        [
            *(record(str(i), variants[0], text) for i, text in enumerate(("Dog.", "dogs", "a puppy", "", "dog"))),
            *(record(str(i), variants[1], text) for i, text in enumerate(("dog", "cat", "it is a dog", "", "dog"))),
        ]
    )
    records["0", "keep=9"] |= {"visual tokens": 9.0, "prefill": 0.01}
    records["4", "keep=9"] = {"id": "4", "variant": "keep=9", "failed": "line 5: no"}
    result = summary.summarise(asked, variants, records)
    assert (result.failed, result.asked, result.answered) == (["line 5: no"], 5, 4)
    plain, compressed = result.rows
    assert (plain.questions, plain.exact, plain.contains, plain.agreement) == (4, 1 / 4, 2 / 4, 1)
    assert (compressed.questions, compressed.exact, compressed.contains, compressed.agreement) == (
        4,
        1 / 4,
        2 / 4,
        2 / 4,
    )
    assert compressed.visual_tokens == (9 + 3 * 36) / 4
    assert (compressed.prefill, compressed.total) == (0.1, 0.2)
    assert len(result.table().columns) == 8
    assert summary.summarise(asked[4:], variants, records).rows == []
    assert result.notes == []
    for variant in variants:
        records["1", variant] |= {"notes": ["2 damaged packets skipped"]}
        records["4", variant] |= {"notes": ["of a question that failed"]}
    assert summary.summarise(asked, variants, records).notes == [f"{asked[1].where}: 2 damaged packets skipped"]


@pytest.mark.parametrize(
    ("endpoint", "proxies", "port"),
    [
        ("https://huggingface.co", {}, 443),
        ("http://mirror.local", {}, 80),
        ("http://mirror.local:8080", {}, 8080),
        ("https://huggingface.co", {"no": "localhost"}, 443),
        ("https://huggingface.co", {"https": "http://proxy:3128"}, None),
    ],
)
def test_where_the_hub_is_looked_for(
    endpoint: str, proxies: dict[str, str], port: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a proxy nowhere."""
    constants = pytest.importorskip("huggingface_hub").constants
    asked = []

    def connect(address: tuple[str, int], timeout: float) -> None:
        asked.append(address[1])
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(hub.socket, "create_connection", connect)
    assert hub.reachable() == (port is None)
    assert asked == ([] if port is None else [port])


@pytest.mark.parametrize(
    ("inputs", "steps"),
    [
        ({"pixel_values_videos": torch.zeros(1, 6, 3, 8, 8)}, 6),  # LLaVA-NeXT-Video, LLaVA-OneVision, Video-LLaVA
        ({"pixel_values": torch.zeros(6, 3, 8, 8)}, 6),  # InternVL
        ({"pixel_values": torch.zeros(1, 6, 3, 8, 8)}, 6),  # SmolVLM
        ({"pixel_values_videos": torch.zeros(96, 48), "video_grid_thw": torch.tensor([[3, 4, 8]])}, 3),  # Qwen
        ({"pixel_values_videos": torch.zeros(6, 32, 48), "video_grids": torch.tensor([[6, 4, 8]])}, 6),  # Molmo 2
        ({"pixel_values_videos": torch.zeros(6, 630, 48), "num_frames_per_video": [6]}, 6),  # Gemma 4
        ({"pixel_values_videos": torch.zeros(1, 3, 14, 99), "target_sizes_videos": torch.ones(6, 2)}, 6),  # MiniCPM-V
        ({"pixel_values_videos": torch.zeros(1, 3, 14, 99), "target_sizes_videos": torch.ones(18, 2)}, 6),  # in slices
        ({"pixel_values_videos": torch.zeros(1, 3, 14, 99), "target_sizes_videos": torch.ones(4, 2)}, 4),
        ({"pixel_values_videos": torch.zeros(6, 630, 48)}, None),
        ({"input_ids": torch.zeros(1, 4)}, None),
    ],
)
def test_frames_in_the_inputs_of_a_clip(inputs: dict, steps: int | None) -> None:
    """In the forms of the processors of transformers, which tests/hooks/test_clips.py calls where torchvision is."""
    assert models._frames_of(inputs, 6) == steps
    clip = media.Media("clip", [Image.new("RGB", (8, 8))] * 6, [float(i) for i in range(6)], 60, 6.0)
    processor = SimpleNamespace(video_processor=SimpleNamespace(temporal_patch_size=2))
    if steps is None:
        with pytest.raises(ApetError, match="SimpleNamespace makes of a clip do not show how many frames it took"):
            models._check_frames(processor, inputs, clip)
    elif steps == 4:
        with pytest.raises(ApetError, match="made 4 steps of 6 frames, where 6 are right"):
            models._check_frames(processor, inputs, clip)
    else:
        models._check_frames(processor, inputs, clip)


def test_another_commit_of_a_model_of_the_hub(tmp_path: Path) -> None:
    """Its files change between two runs if the hub has newer ones."""
    model = tmp_path / "hub/models--owner--model"
    told = []
    for commit in ("0" * 40, "1" * 40):
        snapshot = model / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text('{"model_type": "llava"}')
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs/main").write_text(commit)
        code = "from apet import models; print(models.digest('owner/model'))"
        told.append(
            subprocess.run(
                [sys.executable, "-c", code],
                env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        )
    assert told == ["0" * 40, "1" * 40]

"""`apet eval` without a model: what answers are worth, the files that are read and written, and the table."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from apet import Refused
from apet.evaluation import journal, metrics, official, processes, questions, summary
from apet.evaluation.metrics import METRICS
from hypothesis import given
from hypothesis import strategies as st

from tests.command import invoke


def question(*answers: str, group: str = "", name: str = "1") -> questions.Question:
    return questions.Question(name, Path("a.png"), "What?", answers, group, "questions.jsonl, line 1")


def lines(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


# --- what an answer is worth ---


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two dogs", "2 dogs"),
        ("None", "0"),
        ("a theater", "theater"),
        ("1,000", "1000"),
        ("1, 2", "1 2"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("coca-cola", "coca cola"),
        ("stop!", "stop"),
        ("what?!", "what"),
        ("1,000-2", "10002"),  # with a comma in a number all punctuation goes without a trace
        ("dont", "don't"),
        ("couldntve", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("ill", "ill"),
        ("were", "were"),
        ("a", ""),
        ("", ""),
        ("  Many\tspaces\n", "many spaces"),
    ],
)
def test_normalised_as_in_the_vqa_challenge(text: str, normal: str) -> None:
    assert metrics.consensus(text) == normal


@pytest.mark.parametrize(("same", "worth"), [(0, 0), (1, 3 / 10), (2, 6 / 10), (3, 9 / 10), (4, 1), (10, 1)])
def test_worth_by_how_many_of_ten_agree(same: int, worth: float) -> None:
    """The VQA challenge's well-known 0.3, 0.6, 0.9, 1."""
    people = question(*["Yes"] * same, *["no"] * (10 - same))
    assert METRICS["vqa"].worth("yes.", people) == pytest.approx(worth)


@given(st.lists(st.sampled_from("pqr"), min_size=4, max_size=12), st.sampled_from("pqrs"))
def test_worth_by_leaving_one_out(people: list[str], answer: str) -> None:
    rounds = [people[:i] + people[i + 1 :] for i in range(len(people))]
    expected = sum(min(1, others.count(answer) / 3) for others in rounds) / len(rounds)
    assert METRICS["vqa"].worth(answer, question(*people)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "right"), [("Dog", 1), ("dog.", 1), (" a  dog ", 0), ("puppy ", 1), ("dogs", 0), ("", 0)]
)
def test_exact(text: str, right: float) -> None:
    assert METRICS["exact"].worth(text, question("dog", "Puppy")) == right


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a dog. Yes", "no"),
        ("Yes. There is no cat", "yes"),
        ("nothing", "yes"),
        ("snow", "yes"),
        ("", "yes"),
        ("Yes", "yes"),
    ],
)
def test_yes_or_no_as_pope_reads_it(text: str, meant: str) -> None:
    assert metrics.yes_or_no(text) == meant
    assert METRICS["pope"].worth(text, question("Yes")) == (meant == "yes")


def test_f1_by_precision_and_recall() -> None:
    for pairs in itertools.product(itertools.product(("yes", "no"), repeat=2), repeat=4):
        answered, right = zip(*pairs, strict=True)
        hits = sum(a == r == "yes" for a, r in pairs)
        if hits:
            precision, recall = hits / answered.count("yes"), hits / right.count("yes")
            assert metrics.f1(answered, right) == pytest.approx(2 * precision * recall / (precision + recall))
        else:
            assert metrics.f1(answered, right) == 0


@pytest.mark.parametrize(
    ("metric", "answers", "sentence"),
    [
        ("pope", ("maybe",), "metric pope knows no answer 'maybe'"),
        ("pope", ("yes", "yes"), "metric pope wants one answer, not 2"),
        ("vqa", ("a", "b", "c"), "metric vqa needs at least 4 answers, this question has 3"),
    ],
)
def test_questions_that_cannot_be_scored(metric: str, answers: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(Refused, match=f"questions.jsonl, line 1: {sentence}"):
        METRICS[metric].check([question(*answers)])


# --- questions ---

GOOD = {"id": 7, "image": "a.png", "question": "What?", "answers": ["dog"]}


def test_questions_are_read(tmp_path: Path) -> None:
    text = json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "id": "8", "answers": ["né", "x"]}, ensure_ascii=False)
    (tmp_path / "questions.jsonl").write_text(text, "utf-8")
    first, second = questions.read(tmp_path).items
    assert (first.id, first.image, first.text, first.answers) == ("7", tmp_path / "a.png", "What?", ("dog",))
    assert (second.id, second.answers, second.group) == ("8", ("né", "x"), "")
    assert second.where == f"{tmp_path / 'questions.jsonl'}, line 3"
    before = questions.read(tmp_path).digest
    (tmp_path / "questions.jsonl").write_text(text.replace("x", "y"), "utf-8")
    assert questions.read(tmp_path).digest != before


def without(key: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != key}


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        *((without(key), f"line 2: the key '{key}' is missing") for key in GOOD),
        ({**GOOD, "id": 8, "answer": "dog"}, "line 2: the key 'answer' is none of id, image, question, answers, group"),
        (GOOD, "line 2: the id '7' is that of line 1, too"),
        ({**GOOD, "id": "7"}, "line 2: the id '7' is that of line 1, too"),
        ({**GOOD, "id": 8, "answers": []}, "line 2: answers is empty"),
        ({**GOOD, "id": 8, "answers": ["dog", " "]}, "line 2: ' ' among the answers is no text"),
        ({**GOOD, "id": 8, "answers": [3]}, "line 2: 3 among the answers is no text"),
        ({**GOOD, "id": 8, "answers": "dog"}, "line 2: answers='dog' is of the wrong kind"),
        ({**GOOD, "id": True}, "line 2: id=True is of the wrong kind"),
        ({**GOOD, "id": 8, "image": ""}, "line 2: image is empty"),
        ({**GOOD, "id": 8, "group": "a"}, "line 1: there is no group, but other lines have one"),
        ([GOOD], r"line 2: \[.*\] is no JSON object"),
    ],
)
def test_lines_that_are_refused(second: object, sentence: str, tmp_path: Path) -> None:
    lines(tmp_path / "questions.jsonl", [GOOD, second])
    with pytest.raises(Refused, match=f"questions.jsonl, {sentence}"):
        questions.read(tmp_path)


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    with pytest.raises(Refused, match=r"cannot read .*questions.jsonl: No such file"):
        questions.read(tmp_path)
    for content, sentence in (
        (b"\n", "holds no question"),
        (b"{", "line 1: this is no JSON"),
        (b'{"id": "\xff"}', "line 1: this is no JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(Refused, match=sentence):
            questions.read(tmp_path)


# --- journal ---


def test_every_cut_is_survived(tmp_path: Path) -> None:
    """Cut the file at every byte: the whole lines before it stay, the run goes on, and nothing runs together."""
    records = [{"id": str(i), "variant": "keep=64", "answer": "é" * i} for i in range(3)]
    first = journal.Journal(tmp_path / "a", 0, {"model": "m"})
    first.start({"pid": 1})
    for record in records:
        first.add(record)
    first.close()
    data = first.path.read_bytes()
    for cut in range(len(data) + 1):
        first.path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n") - 1
        again = journal.Journal(tmp_path / "a", 0, {"model": "m"})
        assert list(again.read().values()) == records[: max(whole, 0)]
        again.start({"pid": 2})
        for record in records[max(whole, 0) :]:
            again.add(record)
        again.close()
        assert list(again.read().values()) == records


def test_torn_line_of_another_process(tmp_path: Path) -> None:
    """Nobody goes on with its file; it is read all the same."""
    (tmp_path / "answers-00003.jsonl").write_text('{"id": "1", "variant": "v", "answer": ""}\n{"id": "2", "vari')
    mine = journal.Journal(tmp_path, 0, {})
    assert list(mine.read()) == [("1", "v")]
    mine.close()


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    """And what had room of a line is dropped by the next run."""
    mine = journal.Journal(tmp_path, 0, {})
    mine.start({})
    size = mine.path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        for _ in range(2):  # a part of the line, then nothing
            with pytest.raises(Refused, match=f"cannot write {mine.path}: (No space|File too large)"):
                mine.add({"id": "1", "variant": "v", "answer": "long enough"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    mine.close()
    assert mine.path.stat().st_size == size + 10
    again = journal.Journal(tmp_path, 0, {})
    assert again.path.stat().st_size == size
    again.close()


def test_answers_replace_failures(tmp_path: Path) -> None:
    failed, answered = ({"id": "1", "variant": "v", key: "x"} for key in ("failed", "answer"))
    for order in ([failed, answered], [answered, failed], [failed, failed, answered]):
        lines(tmp_path / "answers-00000.jsonl", order)
        mine = journal.Journal(tmp_path, 1, {})
        assert mine.read() == {("1", "v"): answered}
        mine.close()
    key = ("1", "v")
    assert journal.merged([{key: failed}, {key: answered}, {key: failed}, {}]) == {key: answered}


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_hold_everything_once(items: int, count: int) -> None:
    shares = [processes.Processes(rank, count, rank).share(list(range(items))) for rank in range(count)]
    assert sorted(itertools.chain(*shares)) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def _member(rank: int, port: int, folder: Path, pipe) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with processes.joined() as here:

        def work() -> int:
            if rank == 1:
                raise Refused("one is refused")
            return 5

        try:
            here.together(work)
        except Refused as error:
            problem = str(error)
        own = journal.Journal(folder / str(rank), rank, {})  # on a machine of its own
        own.add({"id": str(rank), "variant": "v", "answer": "x"})
        everything = journal.merged(here.gather(own.read()))
        pipe.send((here, here.gather({rank: "x"}), here.together(lambda: rank), problem, here.device(None), everything))
    assert not torch.distributed.is_initialized()


def test_processes_agree(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    members = [context.Process(target=_member, args=(rank, port, tmp_path, pipes[rank][1])) for rank in range(2)]
    for member in members:
        member.start()
    assert all(receive.poll(60) for receive, _ in pipes)
    said = [receive.recv() for receive, _ in pipes]
    for member in members:
        member.join()
        assert member.exitcode == 0
    for rank, (here, gathered, own, problem, device, everything) in enumerate(said):
        assert (here.rank, here.count, here.first) == (rank, 2, rank == 0)
        assert gathered == [{0: "x"}, {1: "x"}]
        assert own == rank
        assert problem == "one is refused"
        assert device.split(":")[-1] in ("cpu", str(rank))
        assert everything.keys() == {("0", "v"), ("1", "v")}


# --- the official files, in little ---


def converted(folder: Path, *words: object) -> list[dict]:
    result = invoke("eval-data", *words, "--data", folder)
    assert result.exit_code == 0, result.output
    found = questions.read(folder)  # takes what was written
    entries = [json.loads(line) for line in (folder / "questions.jsonl").read_text("utf-8").splitlines()]
    assert result.stdout.startswith(f"{len(found.items)} questions in {folder / 'questions.jsonl'}, ")
    return entries


SHORT = "\nAnswer the question using a single word or phrase."


def test_gqa(tmp_path: Path) -> None:
    entry = {"semantic": [], "entailed": [], "equivalent": ["201307251"], "isBalanced": True, "groups": {}}
    file = tmp_path / "testdev_balanced_questions.json"
    file.write_text(
        json.dumps(
            {
                "201307251": {**entry, "question": "Is it overcast?", "imageId": "n161313", "answer": "no"},
                "201640614": {
                    **entry,
                    "question": "Who is wearing the dress?",
                    "imageId": "n235859",
                    "answer": "woman",
                },
            }
        )
    )
    (tmp_path / "gqa" / "pictures").mkdir(parents=True)
    (tmp_path / "gqa" / "pictures" / "n235859.jpg").touch()
    first, second = converted(tmp_path / "gqa", "gqa", file, "--images", "pictures")
    assert first == {
        "id": "201307251",
        "image": "pictures/n161313.jpg",
        "question": "Is it overcast?" + SHORT,
        "answers": ["no"],
    }
    assert second["answers"] == ["woman"]
    refused = invoke("eval-data", "gqa", file, "--data", tmp_path / "gqa")
    assert refused.exit_code == 2
    assert "questions.jsonl is there already" in refused.stderr
    assert (
        "1 of them without their image"
        in invoke("eval-data", "gqa", file, "--data", tmp_path / "gqa2", "--images", "../gqa/pictures").stdout
    )


def test_pope(tmp_path: Path) -> None:
    entry = {"image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?"}
    files = []
    for name, label in (("random", "yes"), ("popular", "no"), ("adversarial", "no")):
        files.append(lines(tmp_path / f"coco_pope_{name}.json", [{"question_id": 1, **entry, "label": label}]))
    found = converted(tmp_path / "pope", "pope", *files)
    assert [(e["id"], e["group"], e["answers"]) for e in found] == [
        ("random-1", "random", ["yes"]),
        ("popular-1", "popular", ["no"]),
        ("adversarial-1", "adversarial", ["no"]),
    ]
    assert found[0]["image"] == "images/COCO_val2014_000000310196.jpg"
    METRICS["pope"].check(questions.read(tmp_path / "pope").items)


def test_textvqa(tmp_path: Path) -> None:
    answers = ["nokia"] * 8 + ["toshiba", "nokia phone"]
    entries = [
        {"question": "what is the brand of phone?", "image_id": "003a8ae2ef43b901", "question_id": 34602},
        {"question": "What year is it? ", "image_id": "003a8ae2ef43b901", "question_id": 34603},
    ]
    file = tmp_path / "TextVQA_0.5.1_val.json"
    file.write_text(json.dumps({"dataset_name": "textvqa", "data": [{**e, "answers": answers} for e in entries]}))
    plain = converted(tmp_path / "plain", "textvqa", file, "--images", "train_images")
    assert plain[0] == {
        "id": 34602,
        "image": "train_images/003a8ae2ef43b901.jpg",
        "question": "what is the brand of phone?" + SHORT,
        "answers": answers,
    }
    METRICS["vqa"].check(questions.read(tmp_path / "plain").items)

    texts = [
        f"{q}\nReference OCR token: NOKIA, 2007{SHORT}" for q in ("What is the brand of phone?", "What year is it?")
    ]
    prompts = [{"question_id": "003a8ae2ef43b901", "text": t, "category": "default"} for t in texts]
    file2 = lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", prompts)
    read = converted(tmp_path / "ocr", "textvqa", file, "--prompts", file2)
    assert [e["question"] for e in read] == texts
    lines(file2, prompts[:1])
    refused = invoke("eval-data", "textvqa", file, "--prompts", file2, "--data", tmp_path / "less")
    assert refused.exit_code == 2
    assert "has no prompt for question 34603" in refused.stderr
    assert not (tmp_path / "less" / "questions.jsonl").exists()


@pytest.mark.parametrize(
    ("kind", "content", "sentence"),
    [
        ("gqa", "[]", "is no file of gqa"),
        ("gqa", "{}", "hold no question"),
        ("gqa", '{"1": {"question": "What?"}}', "is no file of gqa: KeyError 'imageId'"),
        ("pope", '{"question_id": 1}', "is no file of pope: KeyError"),
        ("pope", "no json", "is no file of pope: JSONDecodeError"),
        ("textvqa", '{"questions": []}', "is no file of textvqa: KeyError 'data'"),
        ("vqav2", "{}", "kind='vqav2' is none of gqa, pope, textvqa"),
    ],
)
def test_official_files_that_are_none(kind: str, content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(Refused, match=sentence):
        official.convert(kind, [tmp_path / "file.json"], tmp_path / "data", "images", None)
    with pytest.raises(Refused, match="--prompts is for textvqa, not for pope"):
        official.convert("pope", [], tmp_path / "data", "images", tmp_path / "file.json")
    assert not (tmp_path / "data").exists()


# --- the table ---


def record(name: str, variant: str, answer: str, **more: object) -> tuple[tuple[str, str], dict]:
    times = {"visual tokens": 36.0, "prefill": 0.1, "total": 0.2}
    return (name, variant), {"id": name, "variant": variant, "answer": answer, **times, **more}


def test_summary_of_groups_and_failures() -> None:
    asked = [question("yes", group="a", name=str(i)) for i in range(3)]
    asked += [question("no", group="b", name="3"), question("yes", group="b", name="4")]
    records = dict(
        [
            *(record(str(i), "uncompressed", text) for i, text in enumerate(("Yes", "No", "Yes", "No", "Yes"))),
            *(record(str(i), "keep=9", text) for i, text in enumerate(("Yes", "Yes", "no", "yes", "Yes"))),
        ]
    )
    records["0", "keep=9"] |= {"visual tokens": 9.0, "prefill": 0.01}
    records["4", "keep=9"] = {"id": "4", "variant": "keep=9", "failed": "line 5: no"}
    result = summary.summarise(asked, ["uncompressed", "keep=9"], records, METRICS["pope"])
    assert (result.failed, result.asked) == (["line 5: no"], 5)
    rows = {(row.variant, row.group): row for row in result.rows}
    assert list(rows) == [(v, g) for v in ("uncompressed", "keep=9") for g in ("a", "b", "mean")]
    assert [row.questions for row in result.rows] == [3, 1, 4] * 2
    a, b, mean = (rows["keep=9", group] for group in ("a", "b", "mean"))
    assert (a.accuracy, b.accuracy, mean.accuracy) == pytest.approx((2 / 3, 0, 1 / 3))
    assert (a.f1, b.f1, mean.f1) == pytest.approx((0.8, 0, 0.4))
    assert (a.agreement, b.agreement, mean.agreement) == pytest.approx((1 / 3, 0, 1 / 6))
    assert a.visual_tokens == pytest.approx((9 + 36 + 36) / 3)
    assert (a.prefill, a.total) == (0.1, 0.2)
    assert rows["uncompressed", "mean"].agreement == 1
    assert len(result.table().columns) == 10

    alone = summary.summarise(asked[:3], ["uncompressed", "keep=9"], records, METRICS["exact"])
    assert [(row.group, row.f1) for row in alone.rows] == [("a", None)] * 2

"""The first minutes on a GPU: tests and times the kernels with the installed software, and writes every result at once.

    python -m benchmarks.gpu_quick --out FOLDER [--seconds 420] [--carried ARCHIVE] [--only TEXT ...] [--rehearse]

Run it in the root of the checkout. It needs torch >= 2.10 and, for Triton's kernels, Triton >= 3.5: no virtual
environment, no pip, no pytest, no network. It builds the CUDA kernels for this GPU if there is an nvcc, or uses
libraries that `python -m benchmarks.gpu_carry` built elsewhere (--carried). It writes into FOLDER: results.jsonl, with
a line for every item as soon as it ends; log.txt, the same for people; a file with the output of each step; and
summary.txt, at most 40 lines, which are also printed last.

Each step is a process with its own time limit. An item that fails, crashes or hangs is recorded as one line, and the
next item runs in a new process. The exit code is the number of lines that are not right, at most 99; an item that the
machine cannot run ("not possible") is not counted. --only: the items whose "STEP: ITEM" contains one of the TEXTs.

--rehearse runs all of it on a CPU, to find mistakes before the first run on a GPU: CUDA paths on the simulated GPU of
tests/simt, Triton interpreted, times from a fake clock. --inject "STEP: ITEM=KIND" makes an item of a rehearsal raise,
crash, hang or differ.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from benchmarks.lib import command
from benchmarks.quick import report
from benchmarks.quick.report import RIGHT

ROOT = Path(__file__).parents[1]
# Step -> the most seconds of the step, and of one of its items. The most informative steps run first.
LIMITS = {
    "card": (60, 40),
    "libraries": (240, 230),
    "selftest": (150, 120),  # Triton compiles five kernels for each of nine D
    "paths": (100, 45),
    "primitives": (60, 45),
    "times": (150, 60),
    "sanitizers": (90, 60),
    "compiler": (60, 45),
    "hooks": (40, 30),
    "tests": (300, 300),
}
FOR_TIMES = 120  # seconds that the steps before `times` leave for it
START = 60  # the most seconds until the first item of a process begins: imports, and the simulation's compiler
MOST_PROCESSES = 12  # of one step
TEARDOWN = 20  # seconds that a process may take to end, once all items are done
PATIENCE = 30  # factor on all limits in a rehearsal, which may share a slow processor
SYNC = 0.1  # seconds for which lines may wait until they are written to the disk: `paths` has hundreds a second
HANG = 10  # seconds after which a rehearsal kills an item that it makes hang


@dataclass
class Recorder:
    """Writes lines to results.jsonl, log.txt and the terminal at once, and to the disk within SYNC seconds."""

    out: Path
    began: float = field(default_factory=time.monotonic)
    lines: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, tuple[str, str]] = field(default_factory=dict)  # group -> the first digest, and its item

    synced: float = 0.0  # when all lines were on the disk
    waiting: bool = False  # whether there are lines that are not

    def __post_init__(self) -> None:
        self._results, self._log = ((self.out / name).open("w") for name in ("results.jsonl", "log.txt"))

    def write(self, **line: Any) -> None:
        self.judge(line)
        line = {"t": round(time.monotonic() - self.began, 2), **line}
        self.lines.append(line)
        self._put(self._results, json.dumps(line))
        self.say(report.readable(line))

        if time.monotonic() - self.synced > SYNC:
            self.sync()

    def say(self, text: str) -> None:
        self._put(self._log, text)
        print(text, flush=True)

    def sync(self) -> None:
        """Writes to the disk what is not there yet."""
        if self.waiting:
            for file in (self._results, self._log):
                os.fsync(file.fileno())
        self.synced, self.waiting = time.monotonic(), False

    def judge(self, line: dict[str, Any]) -> None:
        """Checks that all results of one group have the same bits."""
        group = line.get("group")
        if group is None or line.get("status") != "ok":
            return
        digest, item = self.digests.setdefault(group, (line["digest"], line["item"]))
        if digest != line["digest"]:
            line |= {"status": "differs", "said": f"its bits are not those of {item}"}

    def _put(self, file: IO[str], text: str) -> None:
        file.write(text + "\n")
        file.flush()
        self.waiting = True


@dataclass
class Run:
    """The options of the command line, and the run that they describe."""

    out: Path
    seconds: float
    rehearse: bool
    carried: str
    only: list[str]
    injected: dict[str, str]
    recorder: Recorder

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.recorder.began)

    def environment(self) -> dict[str, str]:
        """Returns the environment of a process, in which the run's own package comes before the checkout's, which may
        have no libraries, or others."""
        folders = [str(self.out / "package"), str(ROOT / "python"), str(ROOT)]
        path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
        found = {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
        if self.rehearse:
            found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        return found

    def step(self, name: str) -> None:
        """Runs all items of a step, in as many processes as it takes."""
        if self.only and all(re.match(r"[a-z]+: ?", text) and not text.startswith(f"{name}:") for text in self.only):
            return
        of_step, of_item = (limit * (PATIENCE if self.rehearse else 1) for limit in LIMITS[name])
        later = FOR_TIMES if list(LIMITS).index(name) < list(LIMITS).index("times") else 0
        ends = time.monotonic() + min(of_step, max(0.0, self.left - later))
        if ends - time.monotonic() < 3:
            self.recorder.write(step=name, item="all", status="not run", said="no time is left")
            return
        done: list[str] = []
        for _ in range(MOST_PROCESSES):
            if not self.process(name, done, ends, of_item):
                return
        self.recorder.write(step=name, item="the rest", status="not run", said=f"{MOST_PROCESSES} processes died")

    def process(self, name: str, done: list[str], ends: float, of_item: float) -> bool:
        """Runs one process of a step. Returns True if items may be left that another process should try."""
        options = {"out": str(self.out), "rehearse": self.rehearse, "carried": self.carried, "only": self.only}
        options |= {"seconds": max(1.0, ends - time.monotonic()), "done": done, "injected": self.injected}
        read, write = os.pipe()
        words = [sys.executable, "-m", "benchmarks.quick.worker", name, "--pipe", str(write)]
        with open(self.out / f"step-{name}.txt", "a") as printed, os.fdopen(read, "rb", buffering=0) as pipe:
            child = subprocess.Popen(
                [*words, "--options", json.dumps(options)],
                cwd=self.out,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                start_new_session=True,  # so that its child processes end with it
            )
            os.close(write)
            before, running, end = len(done), "", "stopped"
            try:
                running, end = self.follow(name, pipe, done, ends, of_item)
            finally:
                try:
                    child.wait(timeout=TEARDOWN if end in ("finished", "died") else 0)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        code = child.returncode
        if end == "finished":
            if code < 0 and code != -signal.SIGKILL:
                self.recorder.write(step=name, item="its end", status="crashed", said=died(code))
            return False
        if end == "step":
            item = running or "the rest"
            self.recorder.write(step=name, item=item, status="not run", said="the time of its step is over")
            return False
        if end == "item":
            said = "killed: it gave no line for too long"
            self.recorder.write(step=name, item=running or "start", status="hung", said=said)
        elif running:
            self.recorder.write(step=name, item=running, status="crashed", said=died(code))
        elif len(done) == before:
            last = (self.out / f"step-{name}.txt").read_text().strip().splitlines()[-1:]
            said = ": ".join([died(code), *last])
            self.recorder.write(step=name, item="start", status="failed", said=said)
        if not running and len(done) == before:
            return False  # another process would end in the same way
        if running:
            done.append(running)
        return True

    def follow(self, name: str, pipe: Any, done: list[str], ends: float, of_item: float) -> tuple[str, str]:
        """Writes the lines of a process until it ends. Returns the item that it was in, and how it ended: "finished",
        "died", or the limit that it exceeded, "item" or "step"."""
        running, rest, due = "", b"", time.monotonic() + of_item + START
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                if now >= min(due, ends):
                    return running, "item" if due < ends else "step"
                if not selector.select(min(due, ends, now + SYNC) - now):
                    self.recorder.sync()
                    continue
                found = os.read(pipe.fileno(), 1 << 16)
                if not found:
                    return running, "died"
                *whole, rest = (rest + found).split(b"\n")
                for text in whole:
                    line = json.loads(text)
                    if "finished" in line:
                        return "", "finished"
                    running = line.get("begin", "")
                    due = time.monotonic() + (HANG if self.injected.get(f"{name}: {running}") == "hang" else of_item)
                    if "end" in line:
                        item = line.pop("end")
                        done.append(item)
                        self.recorder.write(step=name, item=item, **line)


def died(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def injections(words: list[str]) -> dict[str, str]:
    """Parses --inject into {"STEP: ITEM": KIND}. Raises ValueError for other kinds."""
    found = {}
    for word in words:
        item, _, kind = word.rpartition("=")
        if kind not in ("raise", "crash", "hang", "differ"):
            raise ValueError(f"--inject {word}: the kind '{kind}' is none of raise, crash, hang, differ")
        found[item] = kind
    return found


def stopped(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Runs every step, prints the summary, and exits with the number of lines that are not right."""
    parser = command.parser("gpu_quick", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for all results")
    parser.add_argument("--seconds", type=float, default=420, help="for everything (420)")
    parser.add_argument("--carried", type=Path, metavar="ARCHIVE", help="libraries of benchmarks.gpu_carry")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help='items whose "STEP: ITEM" holds a TEXT')
    parser.add_argument("--rehearse", action="store_true", help="on a CPU; no figure means anything")
    parser.add_argument("--inject", nargs="*", default=[], metavar="ITEM=KIND", help="faults, in a rehearsal")
    options = parser.parse_args()
    if options.inject and not options.rehearse:
        parser.error("--inject needs --rehearse")
    if (options.out / "results.jsonl").exists():
        parser.error(f"{options.out} holds the results of another run: name a new folder")
    try:
        injected = injections(options.inject)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    out, carried = options.out.resolve(), str(options.carried.resolve()) if options.carried else ""
    recorder = Recorder(out)
    run = Run(out, options.seconds, options.rehearse, carried, options.only, injected, recorder)
    said = shlex.join(["python", "-m", "benchmarks.gpu_quick", *sys.argv[1:]])
    recorder.write(step="run", item="command", status="ok", said=said, rehearsed=options.rehearse)
    signal.signal(signal.SIGTERM, stopped)
    try:
        for name in LIMITS:
            run.step(name)
            device = [line for line in recorder.lines if (line["step"], line["item"]) == ("card", "device")]
            if name == "card" and device and device[0]["status"] == "failed" and not options.rehearse:
                recorder.write(step="run", item="the rest", status="not run", said="there is no device to run it on")
                break
    except KeyboardInterrupt:
        recorder.write(step="run", item="the rest", status="not run", said="the run was stopped")
    recorder.sync()
    block = report.block(recorder.lines)
    (out / "summary.txt").write_text("\n".join(block) + "\n")
    print(*block, sep="\n", flush=True)
    sys.exit(min(99, sum(line["status"] not in RIGHT for line in recorder.lines)))


if __name__ == "__main__":
    main()

"""The process of one step: it runs the step's items in order, and writes the result of each to a pipe at once.

    python -m benchmarks.quick.worker STEP --pipe FD --options JSON

benchmarks/gpu_quick.py starts it and kills it if an item hangs; if it dies, another process runs the remaining items.
It writes "begin" before an item, then "end" with "ok", "failed", "not possible" or "not run", and "finished" after the
last item.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

from benchmarks.quick import items, steps
from benchmarks.quick.items import Item, NotPossible, NotRun, Options


def main() -> None:
    """Runs one step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=steps.STEPS)
    parser.add_argument("--pipe", type=int, required=True)
    parser.add_argument("--options", type=json.loads, required=True)
    given = parser.parse_args()
    with os.fdopen(given.pipe, "w", buffering=1) as pipe:
        run(given.step, Options(**given.options), lambda line: pipe.write(json.dumps(line) + "\n"))
        pipe.write('{"finished": true}\n')


def run(step: str, options: Options, send: Any) -> None:
    """Runs every item that is wanted and not done."""
    for item in wanted(step, options):
        send({"begin": item.name})
        started = time.perf_counter()
        try:
            inject(options.injected.get(f"{step}: {item.name}"))
            found = item.run() or {}
            if options.injected.get(f"{step}: {item.name}") == "differ":
                found["digest"] = "injected"
            line = {"status": "ok", **found}
        except NotPossible as reason:
            line = {"status": "not possible", "said": str(reason)}
        except NotRun as reason:
            line = {"status": "not run", "said": str(reason)}
        except Exception as error:
            traceback.print_exc()  # goes to the step's own file
            line = {"status": "failed", "said": f"{type(error).__name__}: {first_line(error)}"}
        send({"end": item.name, "seconds": round(time.perf_counter() - started, 3), **line})
        if line["status"] == "failed" and not items.device_works(options):
            sys.exit("the device does not answer any more, as after a fault of a kernel")


def wanted(step: str, options: Options) -> Iterator[Item]:
    done = set(options.done)
    for item in steps.STEPS[step](options):
        label = f"{step}: {item.name}"
        if item.name not in done and (not options.only or any(text in label for text in options.only)):
            yield item


def inject(fault: str | None) -> None:
    """Injects a fault, in a rehearsal, to check that the run continues."""
    if fault == "raise":
        raise RuntimeError("injected")
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "hang":
        time.sleep(3600)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:400]


if __name__ == "__main__":
    main()

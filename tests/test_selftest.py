"""`apet doctor` with the GPU backends; tests/test_cli.py has its other tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from apet import cli, diagnose, selftest
from typer.testing import CliRunner

import apet_kernels
from tests import rule

interpreted = pytest.mark.skipif(
    "triton" not in apet_kernels.available_backends() or torch.cuda.is_available(),
    reason="it is not interpreted",
)


@pytest.fixture(autouse=True)
def own_truths(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clears the reference's results, which are cached by the number of a case: these tests choose other cases."""
    selftest._truth.cache_clear()
    monkeypatch.setattr(diagnose, "_check_hooks", lambda _: {"transformers": None, "error": "not checked here"})
    yield
    selftest._truth.cache_clear()


def doctor() -> str:
    """Runs the doctor; returns its lines, with one space between words."""
    result = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stdout
    return "\n".join(" ".join(line.split()) for line in result.stdout.splitlines())


@pytest.mark.parametrize("case", [c for c in selftest.CASES if c.basis is None], ids=lambda c: c.name)
def test_no_choice_of_the_default_rule_is_near_a_tie(case: selftest.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "SLACK", 4e-5)  # the margin that apet.selftest promises
    for image in case.input():
        kept, sure = rule.kept(image, case.keep)
        assert sure
        if case.options.get("refine"):
            assert all(len(allowed) == 1 for allowed in rule.medoid_step(image, kept))


@interpreted
@pytest.mark.interpreter
def test_interpreted_kernels_are_checked_without_bfloat16(monkeypatch):
    chosen = [case for case in selftest.CASES if case.name in ("float32, nothing to drop", "bfloat16, blend")]
    monkeypatch.setattr(selftest, "CASES", tuple(chosen))
    monkeypatch.setattr(
        apet_kernels, "why_unavailable", lambda name: None if name == "triton" else "there are no kernels"
    )
    text = doctor()
    assert "\ntriton interpreter 1 " in text
    assert "Interpreted: without bfloat16" in text
    assert "cuda no there are no kernels" in text


@interpreted
@pytest.mark.interpreter
def test_an_interpreted_fault_is_found(monkeypatch):
    right = apet_kernels.score
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[3:4])
    monkeypatch.setattr(apet_kernels, "score", lambda *a, **k: (right(*a, **k)[0] + 1, right(*a, **k)[1]))
    outcome = selftest.run("triton")
    assert not outcome.right
    assert "times its error bound" in outcome.faults[0]


def test_the_plan_on_a_gpu_is_shown(monkeypatch):
    real = apet_kernels.plan

    def plan(x: torch.Tensor, keep: int) -> apet_kernels.Plan:
        if x.dtype is torch.bfloat16:
            return apet_kernels.Plan("triton", f"keep={keep}", launches=14, workspace_bytes=2048)
        return real(x, keep)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(apet_kernels, "why_unavailable", lambda name: None if name == "reference" else "not chosen")
    monkeypatch.setattr(apet_kernels, "plan", plan)
    monkeypatch.setattr(diagnose, "_typical", lambda dtype, _: torch.empty(1, 576, 1024, dtype=dtype, device="meta"))
    text = doctor()
    assert "\nGPU bfloat16 triton 14 2\n" in text
    assert "GPU bfloat16: keep=64." in text


@pytest.mark.parametrize("wrong", [False, True])
def test_a_replayed_call_is_compared(monkeypatch, wrong):
    """On a GPU each case is also captured and replayed. Here replaying runs the captured call on the CPU."""
    calls = []

    class Graph:
        def replay(self) -> None:
            _, into = calls[-1]
            into.copy_(calls[-1][0]() + wrong)

    def compress(case: selftest.Case, x: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        def result() -> tuple[torch.Tensor, torch.Tensor]:
            return apet_kernels.compress(x, case.keep, case.basis, **case.options, backend="cpu")

        tokens, kept = result()
        calls.append((lambda: result()[0], tokens))
        return tokens, kept

    monkeypatch.setattr(selftest, "CASES", selftest.CASES[:1])
    monkeypatch.setattr(selftest, "_compress", compress)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph, raising=False)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: x if a[:1] == ("cuda",) else to(x, *a, **k))
    right = {name: getattr(apet_kernels, name) for name in ("score", "compress")}
    for name, function in right.items():
        monkeypatch.setattr(
            apet_kernels,
            name,
            lambda *args, _function=function, **options: _function(*args, **options | {"backend": "cpu"}),
        )
    outcome = selftest.run("cuda")
    assert [("replayed from a graph" in fault) for fault in outcome.faults] == [True] * wrong

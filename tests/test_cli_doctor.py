"""`apet doctor`: it accepts this build, and finds planted faults."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import torch
from apet import diagnose, selftest
from apet.hooks import selfcheck, state, tiny

import apet_kernels
from apet_kernels import testing
from tests.command import invoke, said


@pytest.fixture(scope="module")
def findings() -> dict:
    """Returns the findings of one run of the doctor on one thread. Interpreted kernels take longer than the rest, so
    tests/test_selftest.py runs these."""
    real, threads = apet_kernels.why_unavailable, torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            apet_kernels,
            "why_unavailable",
            lambda name: "not tested here" if name == "triton" and selftest.interpreted(name) else real(name),
        )
        found = json.loads(said("doctor", "--json"))
    torch.set_num_threads(threads)
    return found


def test_doctor_finds_this_build_right(findings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings["right"]
    assert findings["packages"]["torch"] == torch.__version__
    assert [test["isa"] for test in findings["self-test"] if test["backend"] == "cpu"] == testing.cpu_isa()
    assert {family["model_type"] for family in findings["hooks"]["families"]} == set(selfcheck.families())
    monkeypatch.setattr(diagnose, "find", lambda _: findings)
    text = said("doctor")
    for word in ("torch", torch.__version__.split("+")[0], "cpu", "triton", "cuda", "reference"):
        assert word in text
    for isa in testing.cpu_isa():
        assert isa in text
    for name in selfcheck.families():
        assert name in text
    assert "agrees with the float64 reference" in text
    assert "wrong" not in text.replace("above 1 is wrong", "")
    assert said("doctor", "--quiet") == ""


def test_doctor_shows_the_plan(findings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "find", lambda _: findings)
    monkeypatch.setenv("COLUMNS", "200")
    text = said("doctor")
    for dtype in (torch.float32, torch.bfloat16):
        plan = apet_kernels.plan(torch.empty(1, 576, 1024, dtype=dtype, device="meta"), 64)
        (line,) = [x for x in text.splitlines() if x.startswith(f" {str(dtype).removeprefix('torch.')} ")]
        for word in (plan.backend, plan.details.get("isa", ""), f"{plan.workspace_bytes / 1024:.0f}"):
            assert word in line
        assert plan.why in text
        if plan.backend == "cpu":
            assert f"{plan.details['images_in_flight']} x {plan.details['threads_per_image']}" in line


def shifted(tokens: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tokens, (indices + 1) % (indices.max() + 2)


def blurred(tokens: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tokens * 1.02, indices


def crashed(tokens: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise ZeroDivisionError("a planted crash")


@pytest.mark.parametrize(
    ("function", "fault", "message"),
    [
        ("compress", shifted, "the kept tokens are not"),
        ("compress", blurred, "times the allowed error"),
        ("compress", crashed, "a planted crash"),
        ("score", blurred, "times its error bound"),
        ("score", shifted, "the basis is not"),
    ],
)
def test_doctor_finds_a_planted_fault(
    monkeypatch: pytest.MonkeyPatch, function: str, fault: Callable, message: str
) -> None:
    right = getattr(apet_kernels, function)
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[:2])
    monkeypatch.setattr(testing, "cpu_isa", lambda: [])
    monkeypatch.setattr(
        apet_kernels, "why_unavailable", lambda name: None if name == "reference" else "there is no GPU"
    )
    monkeypatch.setattr(apet_kernels, function, lambda *a, **k: fault(*right(*a, **k)))
    monkeypatch.setattr(diagnose, "_check_hooks", lambda _: {"transformers": None, "error": "not checked here"})
    result = invoke("doctor", "--quiet")  # it still prints every fault
    assert result.exit_code == 1
    assert "wrong" in result.stdout
    assert message in " ".join(result.stdout.split())
    assert "there is no GPU" in result.stdout


def test_doctor_sees_an_image_that_depends_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    right = apet_kernels.compress

    def dependent(x: torch.Tensor, *a: object, **k: object) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, indices = right(x, *a, **k)
        return (tokens if len(x) == 1 else tokens.nextafter(tokens + 1)), indices

    monkeypatch.setattr(apet_kernels, "compress", dependent)
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[:1])
    outcome = selftest.run("reference")
    assert outcome.faults == ["float32: the last image alone gives other bits than in its batch"]


def test_doctor_of_a_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apet_kernels", None)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "apet_kernels cannot be imported" in result.stdout
    found = json.loads(said("doctor", "--json", code=1))
    assert not found["right"]
    assert "apet_kernels cannot be imported" in found["error"]


# ---- the hooks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hooks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the tests of backends."""
    monkeypatch.setattr(apet_kernels, "why_unavailable", lambda name: "not tested here")
    monkeypatch.setattr(diagnose, "_plans", list)


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("fault", [ValueError, TypeError, ZeroDivisionError])
def test_doctor_counts_a_family_that_cannot_be_built(
    fault: type[Exception], hooks_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tiny.config

    def broken(name: str) -> object:
        if name == "llava_next":
            raise fault("a planted fault")
        return right(name)

    monkeypatch.setattr(tiny, "config", broken)
    monkeypatch.setattr(selfcheck, "families", lambda: ["llava", "llava_next"])
    result = invoke("doctor", "--quiet")
    assert result.exit_code == 1
    assert "a planted fault" in words(result.stdout)
    assert "The hooks are wrong for 1 families of models." in words(result.stdout)
    families = json.loads(said("doctor", "--json", code=1))["hooks"]["families"]
    assert [(family["model_type"], family["error"] is None) for family in families] == [
        ("llava", True),
        ("llava_next", False),
    ]
    assert f"{fault.__name__}: a planted fault" in families[1]["error"]


def test_doctor_counts_a_family_whose_hooks_are_wrong(hooks_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = state.Part.positions
    monkeypatch.setattr(state.Part, "positions", lambda *args: right(*args) + 1)
    monkeypatch.setattr(selfcheck, "families", lambda: ["llava"])
    result = invoke("doctor", "--quiet")
    assert result.exit_code == 1
    assert "the decoder's output differs from the reference by" in words(result.stdout)


@pytest.mark.parametrize("module", ["transformers", "apet.hooks.selfcheck"])
def test_doctor_counts_hooks_that_cannot_be_imported(
    module: str, hooks_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    if module != "transformers":
        monkeypatch.delattr(sys.modules["apet.hooks"], "selfcheck")
    result = invoke("doctor", "--quiet")
    assert result.exit_code == 1
    assert "the hooks (apet.patch) cannot be used with transformers" in words(result.stdout)


def test_doctor_without_transformers(hooks_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is optional."""
    version = diagnose._version
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(diagnose, "_version", lambda name: None if name == "transformers" else version(name))
    text = words(said("doctor"))
    assert "the hooks (apet.patch) cannot be used: " in text


def test_doctor_counts_a_transformers_without_any_family(hooks_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "NAMES", {})
    result = invoke("doctor", "--quiet")
    assert result.exit_code == 1
    assert "has none of the families of models that the hooks know" in words(result.stdout)

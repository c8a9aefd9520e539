"""The steps that test the kernels: self-tests, every path, sanitizers, the compiler, hooks, tests."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quick.items import Item, NotPossible, NotRun, Options, no_cuda_gpu, prepare, raise_unusable, usable

if TYPE_CHECKING:  # imported where it is needed: the first steps must run even if torch is broken
    from torch import Tensor

    from benchmarks.lib.device import Device

ROOT = Path(__file__).parents[2]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
REHEARSED = 11  # a rehearsal runs one in so many of the ways of all calls
SHORTEST = 20.0  # seconds that every sanitizer has
TESTS_SHARE = 0.95  # of the time of their step that the tests have


# ---- self-tests and paths: every path gives the same bits


def selftests(options: Options) -> Iterator[Item]:
    """Yields the self-tests of `apet doctor`."""
    prepare(options)
    from apet_kernels import available

    for name in ("cuda", "cpu", "triton"):

        def run(name: str = name) -> dict[str, Any]:
            from apet import selftest

            if why := available.why_unavailable(name):
                text = f"{name} is not usable: {why}"
                if name == "cpu" or (name == "cuda" and no_cuda_gpu()):
                    raise NotPossible(text)
                raise RuntimeError(text)
            outcome = selftest.run(name)
            assert outcome.right, "; ".join(outcome.faults)
            return {"cases": outcome.cases, "worst": round(max(outcome.residual, outcome.tokens), 3)}

        yield Item(name, run)


def every_path(options: Options) -> Iterator[Item]:
    prepare(options)
    from apet_kernels import ops, testing
    from benchmarks.lib import paths

    if "cuda" not in usable(options):
        yield Item("any", raise_unusable)
        return
    calls = paths.calls(tiny=options.rehearse)
    for name in placed(options):
        yield Item(f"placed | {name}", functools.partial(_placed, calls[0], name, options.device))
    for call in calls:
        if call.op in ops.LAYOUTS:
            yield Item(f"{call} | float64", functools.partial(_compared, call, options.device))
    # Way by way, so that a run that is cut off has compared some ways of every call, not all ways of some.
    every = itertools.product((testing.CudaPath(), *testing.cuda_paths()), calls)
    # On a CPU a part is enough to find mistakes in this file; a prime step reaches every call and every way.
    for way, call in itertools.islice(every, 0, None, REHEARSED if options.rehearse else 1):
        yield Item(f"{call} | {way}", functools.partial(_one_way, call, way, options.device))


def placed(options: Options) -> list[str]:
    """Returns the paths that the device has to run: clusters exist from compute capability 9.0 on."""
    import torch

    clusters = options.rehearse or torch.cuda.get_device_capability() >= (9, 0)
    return ["cooperative", *(["cluster", "fused"] if clusters else [])]


def _placed(call: Any, name: str, device: str) -> None:
    """Raises RuntimeError if the device cannot run a small call on a path: elsewhere that counts as not possible."""
    from apet_kernels import testing
    from benchmarks.lib import paths

    if paths.forced(call, testing.CudaPath(name, 4), device) is None:
        raise RuntimeError(f"this device runs no call on the path {name} with 4 CTAs an image")


def _compared(call: Any, device: str) -> None:
    call.compared(device)


def _one_way(call: Any, way: Any, device: str) -> dict[str, Any]:
    from benchmarks.lib import paths

    results = paths.forced(call, way, device)
    if results is None:
        raise NotPossible("not on this device")
    return {"group": str(call), "digest": paths.digest(results)}


# ---- sanitizers


def sanitizers(options: Options) -> Iterator[Item]:
    for tool in SANITIZERS:
        yield Item(tool, functools.partial(_sanitize, options, tool))


def _sanitize(options: Options, tool: str) -> dict[str, Any]:
    """Runs benchmarks/sanitized.py under one tool of compute-sanitizer."""
    if options.rehearse and tool == "memcheck":
        _sanitized_on_the_simulated_gpu(options)
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None or options.rehearse:
        raise NotPossible("there is no compute-sanitizer" if program is None else "a rehearsal has no GPU")
    # Every tensor gets its own allocation, so that memcheck sees the end of each.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "benchmarks.sanitized"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, check=False, timeout=max(options.seconds / 3, SHORTEST)
        )
    except subprocess.TimeoutExpired as late:
        reached = (late.stdout or b"").decode().strip().splitlines()[-1:]
        raise NotRun(f"it did not end in {late.timeout:.0f} s; then it ran: {''.join(reached) or 'nothing'}") from None
    said = (done.stdout + done.stderr).decode()
    summary = re.findall(r"^=+ (\w+ SUMMARY: .*)", said, re.MULTILINE)
    if not summary or "Device not supported" in said:
        raise NotPossible(f"compute-sanitizer ended with {done.returncode} and no summary: {said.strip()[-300:]}")
    if done.returncode:
        raise RuntimeError(f"{summary[-1]}; exit code {done.returncode}: {said.strip()[-300:]}")
    return {"said": summary[-1]}


def _sanitized_on_the_simulated_gpu(options: Options) -> None:
    prepare(options)
    import torch

    from benchmarks import sanitized

    torch.Tensor.cuda = lambda t: t  # type: ignore[method-assign]
    faults = [fault for way in sanitized.PATHS[1::2] for fault in sanitized.forced(way, torch.float16)]
    assert not faults, "; ".join(faults)


# ---- callers of the kernels: the compiler, graphs, streams, models, tests


def compiler(options: Options) -> Iterator[Item]:
    clock = prepare(options)
    for name in usable(options):
        yield Item(f"torch.compile {name}", functools.partial(_compiled, options, name))
        yield Item(f"graph {name}", functools.partial(_replayed, options, clock, name))
        yield Item(f"two streams {name}", functools.partial(_streams, options, name))


def _features(options: Options, seed: int) -> Tensor:
    import torch

    from tests.data import tokens

    shape, dtype = ((2, 24, 16), torch.float32) if options.rehearse else ((3, 576, 1024), torch.bfloat16)
    return tokens(*shape, dtype=dtype, kind="clustered", seed=seed).to(options.device)


def _same(got: Any, wanted: Any, what: str) -> None:
    from tests.judge import assert_same

    for a, b in zip(got, wanted, strict=True):
        assert_same(a, b, what)


def _compiled(options: Options, name: str) -> None:
    """Compiles the ops with fullgraph=True; on a GPU they use the backend that is set. (In a rehearsal the op is the
    CPU's.)"""
    import torch

    import apet_kernels

    def layer(x: Tensor) -> Any:
        rows, at = torch.ops.apet.compress(x * 1, 8, 4)
        return rows + 1, at

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if options.rehearse else "inductor")
    with torch.inference_mode(), apet_kernels.use_backend(None if options.rehearse else name):  # type: ignore[arg-type]
        for seed in range(2):
            x = _features(options, seed)
            _same(compiled(x), layer(x), f"seed {seed}")


def _replayed(options: Options, clock: Device, name: str) -> None:
    import apet_kernels

    x = _features(options, 0)
    replay = clock.graphed(lambda: apet_kernels.compress(x, 8, 4, backend=name))  # type: ignore[arg-type]
    for seed in range(1, 3):
        x.copy_(_features(options, seed))
        got = replay()
        wanted = apet_kernels.compress(x, 8, 4, backend=name)  # type: ignore[arg-type]
        if not options.rehearse:
            _same(got, wanted, f"replay {seed}")


def _streams(options: Options, name: str) -> None:
    import torch

    import apet_kernels

    if options.rehearse:
        raise NotPossible("a rehearsal has no streams")
    inputs = [_features(options, seed) for seed in range(2)]
    wanted = [apet_kernels.compress(x, 8, 4, backend=name) for x in inputs]  # type: ignore[arg-type]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(apet_kernels.compress(x, 8, 4, backend=name))  # type: ignore[arg-type]
        torch.cuda.synchronize()
        for a, b in zip(got, wanted, strict=True):
            _same(a, b, "two streams at once")


def hooks(options: Options) -> Iterator[Item]:
    for attention in ("sdpa", "flash_attention_2"):
        for family in ("llava", "qwen2_5_vl"):
            yield Item(f"{family} {attention}", functools.partial(_hooked, options, family, attention))


def _hooked(options: Options, family: str, attention: str) -> dict[str, Any]:
    """Patches a tiny random model, which generates four tokens twice."""
    needs = ["transformers", *(["flash_attn"] if "flash" in attention else [])]
    if lacks := [name for name in needs if importlib.util.find_spec(name) is None]:
        raise NotPossible(f"{' and '.join(lacks)} not installed")
    import apet
    import torch
    import transformers
    from apet.hooks import selfcheck, tiny

    cls = getattr(transformers, selfcheck.NAMES[family])
    dtype = torch.float32 if options.rehearse else torch.bfloat16
    model = tiny.build(cls, tiny.config(family), attention)
    given = tiny.collate([tiny.sample(model, parts, seed) for seed, parts in enumerate(selfcheck.PROMPTS)])
    model.to(options.device, dtype)
    given = {
        k: v.to(options.device, dtype) if v.is_floating_point() else v.to(options.device) for k, v in given.items()
    }
    apet.patch(model, keep=9, basis=4, check=False)
    with torch.inference_mode():
        first, again = (model.generate(**given, max_new_tokens=4, do_sample=False) for _ in range(2))
        logits = model(**given).logits
    assert torch.equal(first, again), "the same prompt gives other tokens the second time"
    assert logits.isfinite().all(), "logits are not finite"
    return {"tokens": first[:, -4:].tolist()}


def suite(options: Options) -> Iterator[Item]:
    yield Item("tests/test_gpu.py", functools.partial(_pytest, options, "tests/test_gpu.py"))


def _pytest(options: Options, file: str) -> dict[str, Any]:
    """Runs the tests that are marked `gpu`, if pytest is installed, on the run's own package: pytest would put the
    checkout's before it, which has no libraries. They raise for a backend that is usable here but not to them."""
    if lacks := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
        raise NotPossible(f"{' and '.join(lacks)} not installed")
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-o", "pythonpath=", "--import-mode=append", str(ROOT / file)]
    environment = {**os.environ, "APET_GPU_BACKENDS": ",".join(usable(options))}
    tests = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    timer = threading.Timer(TESTS_SHARE * options.seconds, tests.kill)
    timer.start()
    said = []
    assert tests.stdout is not None
    for line in tests.stdout:  # printed at once, so that the step's file has it even if the step is cut off
        print(line, end="", flush=True)
        said.append(line.strip())
    code, late = tests.wait(), not timer.is_alive()
    timer.cancel()
    failed = [line for line in said if re.search(r"(^| )(FAILED|ERROR)( |$)", line)]
    last = next((line for line in reversed(said) if line), "")
    if late and not failed:
        passed = sum(" PASSED" in line for line in said)
        raise NotRun(f"the time of the step was over after {passed} tests, none of which failed")
    if code or failed:
        raise RuntimeError(f"{last}: {'; '.join(failed)[:600]}")
    if "passed" not in last:
        raise RuntimeError(f"no test ran: {last}")
    return {"said": last}

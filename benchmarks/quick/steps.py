"""The steps of benchmarks/gpu_quick.py, each a row of items. What an item returns goes into its line."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quick import build

if TYPE_CHECKING:  # imported by the steps that need them: the first steps must run beside a broken torch
    from torch import Tensor

    from benchmarks.lib.cases import Case
    from benchmarks.lib.device import Device

ROOT = Path(__file__).parents[2]
ROUNDS = 5  # samples of every time
BURST = 0.01  # seconds of calls in a graph, if the ring has as many inputs
JUDGED_FLOPS = 3e10  # larger products take the CPU too long in float64; there CUDA and Triton are compared
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


class NotPossible(Exception):
    """The item cannot be run on this machine, through no fault of ours."""


@dataclass(frozen=True)
class Item:
    """A part of a step with a line of its own."""

    name: str
    run: Callable[[], dict[str, Any] | None]


@dataclass(frozen=True)
class Options:
    """What the parent process says."""

    out: str
    rehearse: bool = False
    carried: str = ""
    seconds: float = 600  # that the step has
    only: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    planted: dict[str, str] = field(default_factory=dict)

    @property
    def package(self) -> Path:
        return Path(self.out, "package")

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"


# ---- card: what is here


def card(options: Options) -> Iterator[Item]:
    yield Item("versions", lambda: {"versions": versions()})
    yield Item("device", functools.partial(_device, options))
    yield Item("nvidia-smi", functools.partial(_smi, options))


def versions() -> dict[str, str]:
    """Of everything that can matter."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for name in ("torch", "triton", "numpy", "transformers", "flash_attn", "pytest"):
        if importlib.util.find_spec(name):
            module = importlib.import_module(name) if name in ("torch", "triton", "numpy") else None
            found[name] = getattr(module, "__version__", None) or importlib.metadata.version(name.replace("_", "-"))
        else:
            found[name] = "not installed"
    compiler = build.nvcc()
    found["nvcc"] = build.version(compiler) if compiler else "none"
    for name in ("cmake", "ninja", "g++", "compute-sanitizer"):
        found[name] = shutil.which(name) or "none"
    from benchmarks.lib import machine

    return {**found, "commit": machine.commit()}


def _device(options: Options) -> dict[str, Any]:
    import torch

    if options.rehearse:
        return {"device": {"name": "a rehearsal", "capability": [9, 0], "sms": 16}}
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU here; --rehearse runs this on a CPU")
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": {
            "name": p.name,
            "capability": [p.major, p.minor],
            "sms": p.multi_processor_count,
            "memory": p.total_memory,
            "l2": p.L2_cache_size,
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        }
    }


def _smi(options: Options) -> dict[str, Any]:
    if options.rehearse:
        raise NotPossible("a rehearsal has no GPU")
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,mig.mode.current"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NotPossible(f"nvidia-smi: {error}") from None
    return {"smi": said.strip().splitlines()}


# ---- build: the package that all later steps import


def libraries(options: Options) -> Iterator[Item]:
    yield Item("package", lambda: build.make_package(options.package))
    yield Item("CUDA", functools.partial(_cuda_libraries, options))
    yield Item("CPU", functools.partial(_cpu_libraries, options))


def _cuda_libraries(options: Options) -> dict[str, Any]:
    import torch

    into = options.package / "apet_kernels"
    if torch.version.hip:
        raise NotPossible("an AMD GPU: Triton alone")
    if options.carried:
        return {"built": vars(build.take(Path(options.carried), into))}
    major, minor = (9, 0) if options.rehearse else torch.cuda.get_device_capability()
    return {"built": vars(build.build(into, f"{major}{minor}-real", build.cores()))}


def _cpu_libraries(options: Options) -> dict[str, Any]:
    """Where they were not built or carried just now, those of the checkout serve."""
    into = options.package / "apet_kernels"
    if (into / build.CPU[0]).exists():
        return {"said": "with the CUDA kernels"}
    found = [ROOT / "apet_kernels" / name for name in build.CPU]
    if not all(path.exists() for path in found):
        raise NotPossible("no CPU kernels were built: CPU tensors get the float64 reference")
    for path in found:
        shutil.copy(path, into)
    return {"said": "those of the checkout"}


# ---- the rest imports the package


def _prepare(options: Options) -> Device:
    """The clock of the device; in a rehearsal, stand-ins first."""
    from benchmarks.lib import device
    from benchmarks.quick import rehearsal

    if options.rehearse:
        rehearsal.install()
        return rehearsal.FakeClock()
    return device.gpu()


def device_works(options: Options) -> bool:
    """Whether the device still answers: after an illegal access every later call of its process fails."""
    if options.rehearse or "torch" not in sys.modules:
        return True
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def usable(options: Options) -> list[str]:
    """The backends for tensors on the device."""
    from apet_kernels import dispatch

    return [name for name in ("cuda", "triton") if dispatch.why_unavailable(name) is None]


def selftests(options: Options) -> Iterator[Item]:
    """What `apet doctor` runs."""
    _prepare(options)
    from apet_kernels import dispatch

    for name in ("cuda", "cpu", "triton"):

        def run(name: str = name) -> dict[str, Any]:
            from apet import selftest

            if why := dispatch.why_unavailable(name):
                text = f"{name} is not usable: {why}"
                if name == "cpu" or (name == "cuda" and _no_cuda_gpu()):
                    raise NotPossible(text)
                raise RuntimeError(text)
            outcome = selftest.run(name)
            assert outcome.right, "; ".join(outcome.faults)
            return {"cases": outcome.cases, "worst": round(max(outcome.residual, outcome.tokens), 3)}

        yield Item(name, run)


def _no_cuda_gpu() -> bool:
    import torch

    return torch.version.hip is not None


# ---- paths: every one the same bits


def every_path(options: Options) -> Iterator[Item]:
    _prepare(options)
    from apet_kernels import testing
    from benchmarks.lib import paths

    if "cuda" not in usable(options):
        yield Item("any", _raise_unusable)
        return
    number = 0
    for call in paths.calls(tiny=options.rehearse):
        if call.op in ("inplace", "overwrite", "append"):
            yield Item(f"{call} | float64", functools.partial(_judged, call, options.device))
        for way in (testing.CudaPath(), *testing.cuda_paths()):
            number += 1
            if options.rehearse and number % 12:  # on a CPU one in twelve is enough to find mistakes of this file
                continue
            yield Item(f"{call} | {way}", functools.partial(_one_way, call, way, options.device))


def _raise_unusable() -> None:
    from apet_kernels import dispatch

    if _no_cuda_gpu():
        raise NotPossible("an AMD GPU: Triton alone")
    raise RuntimeError(f"the CUDA kernels are not usable: {dispatch.why_unavailable('cuda')}")


def _judged(call: Any, device: str) -> None:
    call.judged(device)


def _one_way(call: Any, way: Any, device: str) -> dict[str, Any]:
    from benchmarks.lib import paths

    results = paths.forced(call, way, device)
    if results is None:
        raise NotPossible("not on this device")
    return {"group": str(call), "digest": paths.digest(results)}


# ---- primitives: what the estimate of csrc/cuda/plan.cu is made of, each measured alone


def primitives(options: Options) -> Iterator[Item]:
    clock = _prepare(options)
    yield Item("rates", functools.partial(_rates, clock))
    yield Item("L2", functools.partial(_cache_rate, clock, options))
    if "cuda" not in usable(options):
        yield Item("steps", _raise_unusable)
        return
    sms = 16 if options.rehearse else _sms()
    for path, ctas in (("cluster", 4), ("cluster", 8), ("cluster", 16), ("cooperative", 16), ("cooperative", sms)):
        yield Item(f"step {path} {ctas}", functools.partial(_step, clock, options, path, ctas))
    for path in ("cluster", "cooperative"):
        for resident in (-1, 0):
            what = "resident" if resident else "L2"
            yield Item(f"sweep {path} 4 {what}", functools.partial(_sweep, clock, options, path, 4, resident))
    yield Item(f"sweep cooperative {sms} L2", functools.partial(_sweep, clock, options, "cooperative", sms, 0))
    for N in (576, 4096, 16384):
        yield Item(f"s4 {N}", functools.partial(_s4_alone, options, N))
    for N, D, keep, dtype in (
        *((1024, 3584, 307, "bfloat16"), (4096, 3584, 1229, "bfloat16"), (16384, 3584, 4915, "bfloat16")),
        (4096, 1024, 1024, "float32"),
    ):
        for tile in (64, 128):
            yield Item(
                f"s5 {N}x{D} keep {keep} {dtype} tile {tile}",
                functools.partial(_s5_alone, options, N, D, keep, dtype, tile),
            )


def _sms() -> int:
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def _rates(clock: Device) -> dict[str, Any]:
    from benchmarks.lib import rates

    return {"rates": vars(rates.measure(clock))}


def _cache_rate(clock: Device, options: Options) -> dict[str, Any]:
    """Bytes a second from the L2 cache: sums of 8 MiB, again and again."""
    import torch

    x = torch.ones(2**10 if options.rehearse else 2**21, device=options.device)
    out = torch.empty((), device=options.device)
    passes = 20

    def sums() -> None:
        for _ in range(passes):
            torch.sum(x, 0, out=out)

    replay = clock.graphed(sums)
    return {"l2_bytes_per_s": passes * x.nbytes / median(clock, replay)}


def median(clock: Device, call: Callable[[], object]) -> float:
    """Seconds of a call."""
    import statistics

    clock.seconds(call)
    return statistics.median(clock.seconds(call) for _ in range(ROUNDS))


def _score_us(clock: Device, way: Any, x: Tensor, basis: int) -> float:
    """Microseconds of `score`, from a graph of ten."""
    import apet_kernels
    from apet_kernels import testing

    count = 10 if x.is_cuda else 1

    with testing.use_cuda_path(way):

        def calls() -> None:
            for _ in range(count):
                apet_kernels.score(x, basis, backend="cuda")

        return 1e6 / count * median(clock, clock.graphed(calls))


def _forceable(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RuntimeError as error:
        if "cannot run here" in str(error):
            raise NotPossible(str(error)) from None
        raise


def _step(clock: Device, options: Options, path: str, ctas: int) -> dict[str, Any]:
    """A step without work to speak of: t(M) = launch + M * step + M^2 * term, fitted to rows of 8 features."""
    from apet_kernels import testing
    from benchmarks.quick.figures import parabola
    from tests.data import tokens

    basis = (4, 6, 8) if options.rehearse else (4, 16, 32, 48, 64)
    x = tokens(1, 24 if options.rehearse else 4 * max(ctas, 32), 8, kind="normal", seed=ctas).to(options.device)
    way = testing.CudaPath(path, ctas)  # type: ignore[arg-type]
    us = [_forceable(lambda m=m: _score_us(clock, way, x, m)) for m in basis]
    launch, step, term = parabola([float(m) for m in basis], us)
    return {"basis": basis, "us": us, "launch_us": launch, "step_us": step, "term_us": term}


def _sweep(clock: Device, options: Options, path: str, ctas: int, resident: int) -> dict[str, Any]:
    """What a step adds for every row of 1024 bfloat16 features, from shared memory or from L2."""
    import torch

    from apet_kernels import testing
    from tests.data import tokens

    rows, D, basis = (8, 16, (4, 6)) if options.rehearse else (64, 1024, (4, 20))
    way = testing.CudaPath(path, ctas, resident)  # type: ignore[arg-type]
    dtype = torch.float16 if options.rehearse else torch.bfloat16

    def step_us(rows: int) -> float:
        x = tokens(1, rows * ctas, D, dtype=dtype, kind="normal", seed=1).to(options.device)
        few, many = (_forceable(lambda m=m: _score_us(clock, way, x, m)) for m in basis)
        return (many - few) / (basis[1] - basis[0])

    small, large = step_us(rows // 4), step_us(rows)
    return {"rows": rows - rows // 4, "dim": D, "itemsize": 2, "step_us": large - small, "ctas": ctas}


def _kernels_us(options: Options, call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of every kernel of a call, by torch's profiler."""
    if options.rehearse:
        call()
        return {"s1_s4_group": 20.0, "s5_merge": 10.0}
    import torch
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(ROUNDS):
            call()
        torch.cuda.synchronize()
    us: dict[str, float] = {}
    for event in found.key_averages():
        if name := re.search(r"s1_s4_group|s1_s5_cluster|s5_merge", event.key):
            us[name[0]] = us.get(name[0], 0.0) + event.device_time_total / ROUNDS
    if not us:
        raise NotPossible("torch's profiler sees no kernel here")
    return us


def _s4_alone(options: Options, N: int) -> dict[str, Any]:
    """The first launch of compress less that of score."""
    import torch

    import apet_kernels
    from apet_kernels import testing
    from tests.data import tokens

    N = N // 16 if options.rehearse else N
    x = tokens(1, N, 64, dtype=torch.float16, kind="clustered", seed=N).to(options.device)
    path = "cooperative"
    with testing.use_cuda_path(testing.CudaPath(path, 8 if options.rehearse else 0)):
        whole = _kernels_us(options, lambda: apet_kernels.compress(x, N // 9, 4, backend="cuda"))
        part = _kernels_us(options, lambda: apet_kernels.score(x, 4, backend="cuda"))
    return {"tokens": N, "us": whole["s1_s4_group"] - part["s1_s4_group"]}


def _s5_alone(options: Options, N: int, D: int, keep: int, dtype: str, tile: int) -> dict[str, Any]:
    import torch

    import apet_kernels
    from apet_kernels import testing
    from tests.data import tokens

    if options.rehearse:
        N, D, keep, dtype = 40, 24, 12, "float16"
    x = tokens(1, N, D, kind="clustered", seed=N).to(getattr(torch, dtype)).to(options.device)
    with testing.use_cuda_path(testing.CudaPath("cooperative", 4 if options.rehearse else 0, tile=tile)):
        us = _forceable(lambda: _kernels_us(options, lambda: apet_kernels.compress(x, keep, 4, backend="cuda")))
    return {"flops": 2 * (N - keep) * keep * D, "us": us["s5_merge"], "dtype": dtype, "tile": tile}


# ---- times: the paper's shapes, from a graph


def shapes(options: Options) -> list[Case]:
    """Those of the paper, with the smallest and the largest first; in a rehearsal two that are tiny."""
    import torch

    from benchmarks.lib.cases import PAPER_SHAPES, Case

    if options.rehearse:
        return [Case(2, 24, 16, 14, torch.float16, "inplace"), Case(1, 20, 12, 12, torch.float32, "inplace")]
    first = [(1, 576, 1024, 64), (64, 576, 1024, 64), (1, 4096, 3584, 1229), (1, 16384, 3584, 4915)]
    return [Case(*shape, torch.bfloat16, "inplace") for shape in dict.fromkeys([*first, *PAPER_SHAPES])]


def times(options: Options) -> Iterator[Item]:
    clock = _prepare(options)
    from apet_kernels import testing

    have = usable(options)
    for case in shapes(options):
        if "cuda" in have:
            yield Item(f"{case} | plan", functools.partial(_plan, case, options))
            ways = [testing.CudaPath(), *(testing.CudaPath("fused", ctas) for ctas in (4, 8, 16))]
            for tile in (64, 128):
                ways += [testing.CudaPath("cluster", ctas, tile=tile) for ctas in (4, 8, 16)]
                ways += [testing.CudaPath("cooperative", tile=tile)]
            for way in ways:
                call = functools.partial(_cuda, case, way)
                yield Item(f"{case} | cuda {way}", functools.partial(_time, case, clock, options, call, "cuda", way))
        if "triton" in have:
            yield Item(f"{case} | triton", functools.partial(_time, case, clock, options, _triton(case), "triton"))
        if have == ["cuda", "triton"]:
            call = functools.partial(_mix, case)
            yield Item(f"{case} | mix", functools.partial(_time, case, clock, options, call, "mix"))
    for case in shapes(options):  # last: the capture of an eager formulation may fail, and disturb what comes after it
        yield Item(f"{case} | tuned", functools.partial(_time, case, clock, options, _tuned(case), "tuned"))


def _plan(case: Case, options: Options) -> dict[str, Any]:
    import torch

    import apet_kernels

    x = torch.empty(case.B, case.N, case.D, dtype=case.dtype, device=options.device)
    with apet_kernels.use_backend("cuda"):
        plan = apet_kernels.plan(x, **case.arguments)
    return {"case": str(case), "plan": dict(plan.details), "why": plan.why}


def _cuda(case: Case, way: Any, x: Tensor) -> tuple[Tensor, ...]:
    from apet_kernels import dispatch, testing

    with testing.use_cuda_path(way):
        return dispatch.run_cuda("compress", x, **case.arguments)  # type: ignore[no-any-return]


def _triton(case: Case) -> Callable[[Tensor], tuple[Tensor, ...]]:
    from apet_kernels import dispatch

    return lambda x: dispatch.run_triton("compress", x, **case.arguments)


def _mix(case: Case, x: Tensor) -> tuple[Tensor, ...]:
    from benchmarks.lib.mix import compress

    return compress(x, **case.arguments)


def _tuned(case: Case) -> Callable[[Tensor], tuple[Tensor, ...]]:
    from benchmarks.lib import baselines

    return lambda x: baselines.tuned(x, **case.arguments)


@functools.lru_cache(maxsize=1)
def _ring(case: Case, clock: Device) -> list[Tensor]:
    """Inputs, together at least twice the last cache."""
    from benchmarks.lib.cases import tokens
    from benchmarks.lib.compare import ring

    return ring(functools.partial(tokens, case), clock)


def _time(
    case: Case, clock: Device, options: Options, call: Callable[[Tensor], Any], name: str, way: Any = None
) -> dict[str, Any]:
    """Checks a result, then times calls replayed from a graph. Microseconds a call."""
    import torch

    from benchmarks.lib.check import judge
    from benchmarks.lib.paths import digest

    ring = _ring(case, clock)
    found: dict[str, Any] = {"case": str(case), "name": name, "judged": None}
    with torch.inference_mode():
        result = _forceable(lambda: call(ring[0]))
        forced = way is not None and way.path != "best"
        if name == "cuda":
            found |= {"group": f"{case} cuda", "digest": digest(result), "way": str(way)}
        if not forced and 2 * case.B * (case.N - case.keep) * case.targets * case.D <= JUDGED_FLOPS:
            found["judged"] = judge(case, name, ring[0], result)
        once = clock.seconds(lambda: call(ring[0]))
        count = min(len(ring), max(1, int(BURST / once)))
        replay = clock.graphed(lambda: [call(x) for x in ring[:count]])
        samples = [1e6 * clock.seconds(replay) / count for _ in range(ROUNDS + 1)][1:]
    return found | {"us": sorted(samples)[len(samples) // 2], "samples": samples}


# ---- sanitizers, the compiler, hooks, tests


def sanitizers(options: Options) -> Iterator[Item]:
    for tool in SANITIZERS:
        yield Item(tool, functools.partial(_sanitize, options, tool))


def _sanitize(options: Options, tool: str) -> dict[str, Any]:
    """benchmarks/sanitized.py under one tool of compute-sanitizer."""
    if options.rehearse and tool == "memcheck":
        _sanitized_on_the_simulated_gpu(options)
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None or options.rehearse:
        raise NotPossible("there is no compute-sanitizer" if program is None else "a rehearsal has no GPU")
    # Every tensor its own allocation, so that memcheck sees the end of each.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "benchmarks.sanitized"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=max(options.seconds / 3, 20)
        )
    except subprocess.TimeoutExpired as late:
        raise NotPossible(f"it did not end in {late.timeout:.0f} s") from None
    said = done.stdout + done.stderr
    summary = re.findall(r"^=+ (\w+ SUMMARY: .*)", said, re.MULTILINE)
    if not summary or "Device not supported" in said:
        raise NotPossible(f"compute-sanitizer ended with {done.returncode} and no summary: {said.strip()[-300:]}")
    if done.returncode:
        raise RuntimeError(f"{summary[-1]}; exit code {done.returncode}: {said.strip()[-300:]}")
    return {"said": summary[-1]}


def _sanitized_on_the_simulated_gpu(options: Options) -> None:
    _prepare(options)
    import torch

    from benchmarks import sanitized

    torch.Tensor.cuda = lambda t: t  # type: ignore[method-assign]
    faults = sanitized.ragged_and_given(torch.float16)
    assert not faults, "; ".join(faults)


def compiler(options: Options) -> Iterator[Item]:
    clock = _prepare(options)
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
    """fullgraph=True; the ops on a GPU take the backend that is set. (In a rehearsal the op is the CPU's.)"""
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
    """A tiny random model, patched, makes four tokens twice."""
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
    """The tests that are marked `gpu`, where pytest is installed."""
    if lacks := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
        raise NotPossible(f"{' and '.join(lacks)} not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        failed = re.findall(r"^(?:FAILED|ERROR) (.*)", done.stdout, re.MULTILINE)
        raise RuntimeError(f"{last}: {'; '.join(failed)[:600]}")
    return {"said": last}


STEPS: dict[str, Callable[[Options], Iterator[Item]]] = {
    "card": card,
    "libraries": libraries,
    "selftest": selftests,
    "paths": every_path,
    "primitives": primitives,
    "times": times,
    "sanitizers": sanitizers,
    "compiler": compiler,
    "hooks": hooks,
    "tests": suite,
}

"""One binary per kernel, D and dtype, so that an image's neighbours, address and strides cannot change its bits.

By default Triton compiles another binary for an argument that is 1 or divisible by 16, for an aligned pointer, and on
AMD for a tensor of less than 2 GB. Another binary may add in another order. These tests compile for GPUs without one.
"""

import re

import pytest
import torch
from torch import Tensor

from apet_kernels.options import LAYOUTS
from tools import offline

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

TARGETS = ("sm_90a", "gfx942")
BASIS = 3


def shifted(x: Tensor) -> Tensor:
    """Returns x one element further from an aligned address."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    return storage[1:].view(x.shape)


def strided(x: Tensor, more: int) -> Tensor:
    """Returns x with rows `more` elements longer."""
    return torch.empty(*x.shape[:-1], x.shape[-1] + more, dtype=x.dtype)[..., : x.shape[-1]]


def calls(D: int, dtype: torch.dtype, device_class: str) -> dict[str, list]:
    """Returns the launches of every form of call that must not change the binary."""
    from apet_kernels.triton_kernels import launch

    x, cu = torch.empty(2, 37, D, dtype=dtype), torch.empty(3, dtype=torch.int32)
    alone, at = x[:1, :1].clone(), torch.empty(2, 11, dtype=torch.int64)
    huge = torch.empty(2**15, 2**31 // 2**15 // D + 1, D, dtype=dtype, device="meta")
    to = {"device_class": device_class}
    made = {"a call": launch.compress(x, 11, BASIS, **to)}
    for name, other, keep in (
        ("an offset", shifted(x), 11),
        ("odd strides", strided(x, 3), 11),
        ("wide strides", strided(x, 8), 11),
        ("one image of one token", alone, 1),
        ("one image", x[:1], 11),
        ("16 tokens, one kept", x[:, :16].clone(), 1),
        ("everything kept", x, 37),
        ("one image, repeated", x[:1].expand(16, 37, D), 16),
        ("2 GB and more", huge, 11),
    ):
        made[name] = launch.compress(other, keep, BASIS, **to)
    for select in ("fps", "qr"):
        for layout in LAYOUTS:
            options = {"select": select, "layout": layout, "start": 1, "ridge": 1.0}
            made[f"{select}, {layout}"] = launch.compress(x, 11, BASIS, **options, **to)
            made[f"{select}, {layout}, varlen"] = launch.compress_varlen(
                x[0], cu, cu, 16, 16, 1, BASIS, **options, **to
            )
    made["blend"] = launch.compress(x, 11, BASIS, layout="overwrite", blend=0.5, **to)
    made["odd cu"] = launch.compress_varlen(x[0], shifted(cu), cu[:2].repeat(2)[:3], 1, 1, 1, BASIS, **to)
    made["score"] = launch.score(x, BASIS, **to)
    made["merge"] = launch.merge(x, at, **to)
    made["merge, odd indices and targets"] = launch.merge(x, strided(at, 1), targets=shifted(at > 3), **to)
    return {name: call.launches for name, call in made.items()}


def binaries(target: str, D: int, dtype: torch.dtype) -> dict[str, list[str]]:
    """Runs in a process that compiles. Returns kernel -> the calls that needed a binary which no earlier call had
    needed."""
    chosen = offline.TARGETS[target]
    made = calls(D, dtype, target)
    for launch in (launch for launches in made.values() for launch in launches):
        kept(launch.kernel, chosen).clear()
    needed: dict[str, list[str]] = {}
    for name, launches in made.items():
        for launch in launches:
            kernel = launch.kernel
            known = len(kept(kernel, chosen))
            offline.compile_launch(launch, chosen)
            if len(kept(kernel, chosen)) > known:
                needed.setdefault(kernel.__name__, []).append(name)
    return needed


def kept(kernel, target: offline.Target) -> dict:
    """Returns the binaries that a kernel has for a target, by specialisation."""
    triton.runtime.driver.set_active(offline.Driver(target))
    return kernel.device_caches[str(offline.Driver(target).target)][0]


def forms(D: int, dtype: torch.dtype, names: tuple[str, ...]) -> list[dict[str, str]]:
    """Runs in a process that compiles. Returns kernel -> ttgir, compiled again for each of the calls."""
    target = offline.TARGETS["sm_90a"]
    made = calls(D, dtype, "sm_90a")
    triton.knobs.compilation.always_compile = True
    result = []
    for name in names:
        for launch in made[name]:
            kept(launch.kernel, target).clear()
        compiled = {launch.kernel.__name__: offline.compile_launch(launch, target)[0] for launch in made[name]}
        result.append({kernel: binary.asm["ttgir"] for kernel, binary in compiled.items()})
    return result


@pytest.fixture(scope="module")
def compiler():
    with offline.pool(1) as executor:
        yield executor


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("D", "dtype"), [(64, torch.bfloat16), (33, torch.float32)])
def test_one_binary_for_all_calls(compiler, target, D, dtype):
    needed = compiler.submit(binaries, target, D, dtype).result()
    first = ("s1_norms", "s1_s3_sweep", "s4_topk", "s5_assign", "s5_mean")
    assert needed == {**{kernel: ["a call"] for kernel in first}, "s4_given_rows": ["merge"]}


@pytest.mark.slow
def test_one_form_for_all_calls(compiler):
    names = ("a call", "an offset", "one image of one token")
    one, *others = compiler.submit(forms, 64, torch.float16, names).result()
    assert len(one) == 5
    for name, other in zip(names[1:], others, strict=True):
        assert other == one, f"{name} compiles to other code"


@triton.jit
def specialised(x, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


def control() -> int:
    """Runs in a process that compiles. Returns the number of binaries of a kernel with plain triton.jit."""
    from apet_kernels.triton_kernels.call import Launch

    target = offline.TARGETS["sm_90a"]
    x = torch.empty(100)
    for tensor, n in ((x, 37), (x[1:], 37), (x, 1), (x, 16)):
        offline.compile_launch(Launch(specialised, 1, {"x": tensor, "n": n}, {"N": 16}, {}), target)
    return len(kept(specialised, target))


@pytest.mark.slow
def test_the_count_sees_specialisation(compiler):
    assert compiler.submit(control).result() == 4


def sums_over_channels(target: str, D: int, dtype: torch.dtype, Ms: tuple[int, ...]) -> list[list[str]]:
    """Runs in a process that compiles. Returns, for every M, the layouts of the channel sums in s1_s3_sweep."""
    chosen = offline.TARGETS[target]
    result = []
    for M in Ms:
        launch = offline.Problem("compress", D, dtype, M).launches(target)[1]
        assert launch.kernel.__name__ == "s1_s3_sweep"
        ttgir = offline.compile_launch(launch, chosen)[0].asm["ttgir"]
        layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
        shape = f"{launch.constants['BLOCK_N']}x{launch.constants['BLOCK_D']}xf32"
        found = re.findall(rf"\}}\) : \(tensor<{shape}, (#\w+)>\) -> ", ttgir)
        result.append([layouts[name] for name in found])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_sums_over_channels_do_not_depend_on_the_basis(compiler, target):
    """The layout of x.p and ||x - p||^2 sets the order of their sums. M sets the size of other tensors there."""
    one, *others = compiler.submit(sums_over_channels, target, 1024, torch.float16, (1, 2, 10, 64)).result()
    assert len(one) == 2
    assert all(other == one for other in others)

"""Random shapes, dtypes, layouts, strides and contents, compared with float64. Seeded: every run tries the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Backend
from tests.data import DTYPES, offsets, tokens
from tests.judge import assert_same, check, check_merge

FEW = 2  # examples on interpreted kernels, where one takes seconds; with --interpret 0 as many as elsewhere


def on_every_backend(**strategies: st.SearchStrategy) -> Callable:
    """Makes a test from a body that takes `backend`, and values drawn from these strategies."""

    def decorate(body: Callable) -> Callable:
        def test(backend: Backend, request: pytest.FixtureRequest) -> None:
            def example(**values: object) -> None:
                body(backend, **values)

            example.__qualname__ = body.__qualname__
            few = backend.interpreted and request.config.getoption("--interpret")
            settings(max_examples=FEW if few else settings().max_examples)(given(**strategies)(example))()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate


@st.composite
def problems(draw):
    """Draws x [B, N, D] and arguments of compress, mostly small ones and edge cases."""
    N = draw(st.one_of(st.integers(1, 20), st.integers(20, 150)))
    D = draw(st.one_of(st.integers(1, 20), st.integers(20, 150)))
    basis = draw(st.one_of(st.integers(1, 12), st.integers(12, 64)))
    layouts = ["inplace", "append"] + ["overwrite"] * (basis < N - 1)
    layout = draw(st.sampled_from(layouts))
    keep = draw(st.integers(basis + 1 if layout == "overwrite" else 1, N))
    B = draw(st.integers(1, 3))
    x = tokens(
        B,
        N,
        D,
        dtype=draw(st.sampled_from(DTYPES)),
        kind=draw(st.sampled_from(["normal", "clustered", "repeated"])),
        seed=draw(st.integers(0, 2**16)),
    )
    for _ in range(draw(st.integers(0, 3))):
        bad = draw(st.sampled_from([0.0, float("nan"), float("inf"), 1.0]))
        x[draw(st.integers(0, B - 1)), draw(st.integers(0, N - 1))] = bad
    options = {
        "layout": layout,
        "select": draw(st.sampled_from(["fps", "qr"])),
        "start": draw(st.integers(-1, N - 1)),
        "ridge": draw(st.sampled_from([0.0, 1e-5, 1e-2, 3.0])),
        "blend": draw(st.sampled_from([1.0, 0.5, 0.3])) if layout == "overwrite" else 1.0,
    }
    return x, keep, basis, options


@on_every_backend(problem=problems())
def test_compared_with_float64(backend, problem):
    x, keep, basis, options = problem
    check(backend, x, keep, basis, **options)


@pytest.mark.rest_interpreted
@on_every_backend(problem=problems(), padding=st.integers(0, 9), shift=st.integers(0, 9))
def test_strides_do_not_matter(backend, problem, padding, shift):
    x, keep, basis, options = problem
    B, N, D = x.shape
    room = torch.full((N, B, D + padding + shift), float("nan"), dtype=x.dtype)
    view = room[:, :, shift : shift + D].transpose(0, 1).copy_(x)
    for got, expected in zip(
        backend.compress(view, keep, basis, **options), backend.compress(x, keep, basis, **options), strict=True
    ):
        assert_same(got, expected)


@pytest.mark.rest_interpreted
@on_every_backend(data=st.data(), dtype=st.sampled_from(DTYPES), basis=st.integers(1, 12), D=st.integers(1, 70))
def test_packed_or_one_by_one(backend, data, dtype, basis, D):
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    keeps = [data.draw(st.integers(1, n)) for n in lengths]
    layout, select = data.draw(st.sampled_from(["inplace", "append"])), data.draw(st.sampled_from(["fps", "qr"]))
    x = tokens(sum(lengths), D, dtype=dtype, kind="clustered", seed=data.draw(st.integers(0, 999)))
    cu, cu_keep = offsets(lengths), offsets(keeps)
    sizes = (sum(keeps), max(lengths), max(keeps))
    got, indices = backend.compress_varlen(x, cu, cu_keep, *sizes, basis, layout=layout, select=select)
    alone = [
        backend.compress(image[None].clone(), k, basis, layout=layout, select=select)
        for image, k in zip(x.split(lengths), keeps, strict=True)
    ]
    assert_same(got, torch.cat([a[0][0] for a in alone]))
    assert_same(indices, torch.cat([a[1][0] + int(c) for a, c in zip(alone, cu, strict=False)]))


@on_every_backend(data=st.data(), dtype=st.sampled_from(DTYPES), N=st.integers(1, 90), D=st.integers(1, 70))
def test_merge_of_any_rows(backend, data, dtype, N, D):
    K = data.draw(st.integers(1, N))
    seed = data.draw(st.integers(0, 999))
    x = tokens(1, N, D, dtype=dtype, kind=data.draw(st.sampled_from(["normal", "clustered", "repeated"])), seed=seed)
    make = torch.Generator().manual_seed(seed)
    indices = torch.randint(N, (1, K), generator=make)
    targets = torch.rand(1, K, generator=make) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    check_merge(x[0], backend.merge(x, indices, targets=targets)[0], indices[0], targets[0])

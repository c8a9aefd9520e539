"""Computed floors on GPUs: the least that a call must move and compute, and the time this takes at the rates of a data
sheet. Nothing here is measured; benchmarks/gpu.py puts measured rates into the same formulas.

    python -m benchmarks.floors               the tables
    python -m benchmarks.floors --markdown    into docs/gpu.md, between its markers

A call is a sequence of pieces of work. A piece is one or more launches, and starts when the piece before has ended:

    memory(piece) = moved + passes * max(0, array - cache)          bytes, for each array that it reads again
    time(piece)   = launches * gap + max(memory / bandwidth, matrix / matrix rate, lanes / lane rate)
    graphed       = sum of time(piece)
    ungraphed     = max(graphed, launches of the call * host)

`moved` counts the bytes that a piece reads for the first time or writes. An array that is read again comes from the L2
cache, and from memory only as far as it exceeds the cache. Reads from the cache count as free, since no data sheet
gives its bandwidth, and so do arrays without a D in their size. `matrix` counts floating-point operations on the matrix
units (16-bit input), `lanes` float32 instructions outside them (an fma is one). So the times are lower bounds of a
formulation, not predictions.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib import command
from benchmarks.lib.cases import BASIS, Case, gpu_cases
from benchmarks.lib.sheet import Sheet, markdown, replaced, show

DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- floors:begin -->", "<!-- floors:end -->"


@dataclass(frozen=True)
class Rates:
    """The peak rates of a device: bytes and operations per second; its bytes of memory and L2; seconds per launch."""

    name: str
    bandwidth: float
    matrix: float  # floating-point operations, 16-bit in and float32 out, without sparsity
    float32: float  # floating-point operations outside the matrix units, an fma being two
    memory: float
    cache: float
    source: str
    gap: float = 2.5e-6  # assumed: from one kernel of a graph to the next that needs it, an empty kernel included
    host: float = 5e-6  # assumed: time of a launch on the host, outside a graph

    @property
    def lanes(self) -> float:
        """float32 instructions per second."""
        return self.float32 / 2


# Rates of the SXM parts, without sparsity; the cache sizes are those that the devices report.
DEVICES = (
    Rates("A100", 2.039e12, 312e12, 19.5e12, 80e9, 40e6, "NVIDIA A100 80GB SXM data sheet"),
    Rates("H100", 3.35e12, 989.5e12, 67e12, 80e9, 50e6, "NVIDIA H100 SXM data sheet"),
    Rates("B200", 7.7e12, 2250e12, 75e12, 180e9, 126e6, "NVIDIA HGX B200 data sheet, one GPU"),
)


@dataclass(frozen=True)
class Work:
    """One piece of a call."""

    stage: str
    launches: int = 1
    moved: float = 0  # bytes read for the first time, and written
    again: tuple[tuple[int, float], ...] = ()  # passes, and the bytes of the array that each reads again
    matrix: float = 0
    lanes: float = 0

    def bytes(self, rates: Rates) -> float:
        """Returns the bytes that are read from memory or written to it."""
        return self.moved + sum(passes * max(0.0, size - rates.cache) for passes, size in self.again)

    def touched(self) -> float:
        """Returns the bytes read and written, in memory or in a cache."""
        return self.moved + sum(passes * size for passes, size in self.again)

    def bounds(self, rates: Rates) -> dict[str, float]:
        """Returns the seconds that each resource takes, by its name."""
        return {
            "launches": self.launches * rates.gap,
            "memory": self.bytes(rates) / rates.bandwidth,
            "matrix": self.matrix / rates.matrix,
            "lanes": self.lanes / rates.lanes,
        }

    def seconds(self, rates: Rates) -> float:
        launches, *rest = self.bounds(rates).values()
        return launches + max(rest)


def graphed(pieces: list[Work], rates: Rates) -> float:
    """Returns the seconds of a call whose launches are replayed from a graph."""
    return sum(piece.seconds(rates) for piece in pieces)


def ungraphed(pieces: list[Work], rates: Rates) -> float:
    """Returns the seconds of a call whose launches come from the host one by one."""
    return max(graphed(pieces, rates), sum(piece.launches for piece in pieces) * rates.host)


def floor(case: Case) -> list[Work]:
    """The bound of implementations that multiply float32 outside of the matrix units: one launch, which reads X once,
    and again what the cache cannot hold of an image, since s5 needs all tokens after s4 has seen all of them; writes
    the tokens once; and computes the similarities at the rate of the fastest unit. s1 to s4 count as free.

    moved  = (B N D + B K D) itemsize; B times again: N D itemsize
    matrix = B 2 (N - K) T D          (float32 tokens: lanes = B (N - K) T D instead)
    """
    B, N, D, K = case.B, case.N, case.D, case.keep
    product, image = _product(case), N * D * case.itemsize
    moved, again = B * (N + K) * D * case.itemsize, ((B, image),)
    return [Work("all", moved=moved, again=again, matrix=product.matrix, lanes=product.lanes)]


def triton(case: Case) -> list[Work]:
    """The Triton backend: M + 4 launches, with the names of its kernels.

    s1_norms     moved B N D itemsize;                        lanes B N D (1 + c)
    s1_s3_sweep  M times: again X;                            lanes B N D (3 + c)    the dot product and the distance
    s4_topk      only arrays without a D in their size
    s5_assign    again the dropped tokens and the targets;    matrix B 2 (N - K) T D
    s5_mean      again the same; moved B K D itemsize;        lanes B (N - K) D (1 + c)

    c = 1 for 16-bit tokens, whose conversion to float32 takes an instruction for each element, else 0.
    """
    B, N, D, K = case.B, case.N, case.D, case.keep
    c = int(case.itemsize == 2)
    X = B * N * D * case.itemsize
    merged = B * (N - K + case.targets) * D * case.itemsize
    product = _product(case)
    return [
        Work("s1_norms", moved=X, lanes=B * N * D * (1 + c)),
        *(Work("s1_s3_sweep", again=((1, X),), lanes=B * N * D * (3 + c)) for _ in range(BASIS)),
        Work("s4_topk"),
        Work("s5_assign", again=((1, merged),), matrix=product.matrix, lanes=product.lanes),
        Work(
            "s5_mean",
            moved=B * K * D * case.itemsize,
            again=((1, merged),),
            lanes=B * (N - K) * D * (1 + c),
        ),
    ]


def published(case: Case) -> list[Work]:
    """The published formulation (benchmarks/lib/baselines.py) in eager torch, one image after the other.

    For each image, with X4 = 4 N D and V = (N - K) T D itemsize, the size of the broadcast similarity:

    widen       16-bit tokens only: 1 launch;     moved N D itemsize + X4
    s1          6 (M - 1) + 1 launches;           moved (M - 1) 2 X4, again (M - 1) 3 X4    difference, square, sum
    s2_s3       11 launches;                      moved 2 X4, again 4 X4                    products, difference, norm
    s4          6 launches
    s5 cosine   14 launches;                      moved 3 V + (N - K + T) D itemsize, again 3 V + N D itemsize;
                                                  lanes 6 V / itemsize
    s5 mean     11 launches (16-bit tokens: 12);  moved 4 (N - K + T) D + K D itemsize, again X4 + 4 (N - K + T) D

    and 2 launches for the batch. Every operation of torch that is not a view counts as one launch. In fact there are
    more, since sorts, indexing by a mask and others take several kernels.
    """
    N, D, K, T, itemsize = case.N, case.D, case.keep, case.targets, case.itemsize
    narrow = int(itemsize == 2)
    X4, V, merged = 4 * N * D, (N - K) * T * D * itemsize, (N - K + T) * D
    widen = [Work("widen", moved=N * D * itemsize + X4)] if narrow else []
    image = [
        *widen,
        Work("s1", 6 * (BASIS - 1) + 1, 2 * (BASIS - 1) * X4 + (0 if narrow else X4), ((3 * (BASIS - 1), X4),)),
        Work("s2_s3", 11, 2 * X4, ((4, X4),)),
        Work("s4", 6),
        Work(
            "s5 cosine",
            14,
            3 * V + merged * itemsize,
            ((3, V), (1, N * D * itemsize)),
            lanes=6 * (N - K) * T * D,
        ),
        Work("s5 mean", 11 + narrow, 4 * merged + K * D * itemsize, ((1, X4), (1, 4 * merged))),
    ]
    return image * case.B + [Work("batch", 2)]


def published_memory(case: Case) -> int:
    """Returns the bytes that the similarity of one image needs at once: both normalised sides, and the product."""
    return 3 * (case.N - case.keep) * case.targets * case.D * case.itemsize


def _product(case: Case) -> Work:
    """Returns the work of the similarities of s5: on the matrix units for 16-bit tokens, else outside them as IEEE
    float32."""
    fma = case.B * (case.N - case.keep) * case.targets * case.D
    return Work("product", matrix=2 * fma) if case.itemsize == 2 else Work("product", lanes=fma)


def sheets(cases: list[Case]) -> list[Sheet]:
    """Returns the tables of rates, of work, and of times for each dtype."""
    gap, host = DEVICES[0].gap * 1e6, DEVICES[0].host * 1e6
    rates = Sheet(
        "Rates",
        "The rates are those of the data sheets, without sparsity. The sizes of L2 are those that the devices report. "
        f"Assumed, not from a data sheet: {gap:g} us from a kernel of a graph to the next, {host:g} us on the host for "
        "a launch outside a graph.",
        ["device", "memory TB/s", "matrix TFLOP/s", "float32 TFLOP/s", "memory GB", "L2 MB", "source"],
        [
            [
                device.name,
                *(f"{value / 1e12:g}" for value in (device.bandwidth, device.matrix, device.float32)),
                *(f"{device.memory / 1e9:g}", f"{device.cache / 1e6:g}", device.source),
            ]
            for device in DEVICES
        ],
        words=("device", "source"),
    )
    work = Sheet(
        "Work, computed",
        "X: the tokens. fma: a lower bound for norms and steps, in millions. similarity: floating-point operations of "
        "s5. touched: bytes read and written, in memory or cache, by the Triton backend (a step reads X) and by the "
        "published formulation.",
        [
            *("shape", "dtype", "X MB", "fma", "similarity GFLOP", "launches", "touched MB"),
            *("published launches", "published touched MB"),
        ],
        [_work_line(case) for case in cases],
    )
    times = [
        Sheet(
            f"Times, computed: {name}",
            "Times are in microseconds. floor: the bound that no implementation can beat, and the resource that sets "
            "it. graph, host: the M + 4 launches of the Triton backend, replayed from a graph, or launched one by one. "
            "published: the published formulation, launched one by one since it waits for the host; - if its broadcast "
            "similarity does not fit in memory.",
            ["shape", *(f"{device.name} {what}" for device in DEVICES for what in _WHAT)],
            [[case.shape, *(text for device in DEVICES for text in _times(case, device))] for case in chosen],
        )
        for name in dict.fromkeys(case.dtype_name for case in cases)
        for chosen in [[case for case in cases if case.dtype_name == name]]
    ]
    return [rates, work, *times]


_WHAT = ("floor", "graph", "host", "published")


def _work_line(case: Case) -> list[str]:
    ours, theirs = triton(case), published(case)
    (once,) = floor(case)
    product = _product(case)
    return [
        *(case.shape, case.dtype_name, _number(case.B * case.N * case.D * case.itemsize / 1e6)),
        _number((once.lanes - product.lanes) / 1e6),
        _number((product.matrix + 2 * product.lanes) / 1e9),
        *(str(sum(w.launches for w in ours)), _number(sum(w.touched() for w in ours) / 1e6)),
        *(str(sum(w.launches for w in theirs)), _number(sum(w.touched() for w in theirs) / 1e6)),
    ]


def _times(case: Case, device: Rates) -> list[str]:
    (once,) = floor(case)
    bounds = once.bounds(device)
    theirs = _number(1e6 * ungraphed(published(case), device)) if published_memory(case) < device.memory else "-"
    return [
        f"{_number(1e6 * once.seconds(device))} {max(bounds, key=bounds.__getitem__)}",
        _number(1e6 * graphed(triton(case), device)),
        _number(1e6 * ungraphed(triton(case), device)),
        theirs,
    ]


def _number(value: float) -> str:
    """Formats a number with three digits and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def section() -> str:
    """Returns the text between the markers of docs/gpu.md: the formulas of the docstrings here, and the tables."""
    model = (__doc__ or "").partition("A call is")
    texts = [model[1] + model[2], *(f"{call.__name__}: {inspect.getdoc(call)}" for call in (floor, triton, published))]
    formulas = "\n\n".join(f"```text\n{text.strip()}\n```" for text in texts)
    return "\n\n".join([f"### Formulas\n\n{formulas}", *map(markdown, sheets(gpu_cases()))]) + "\n"


def main() -> None:
    """Prints the tables, or writes them into docs/gpu.md."""
    parser = command.parser("floors", __doc__)
    parser.add_argument("--markdown", action="store_true", help=f"write the tables into {DOCUMENT.name}")
    if parser.parse_args().markdown:
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(), BEGIN, END, section()))
    else:
        from rich.console import Console  # imported here, so that the GPU check runs without it

        show(Console(width=200), {}, sheets(gpu_cases()))


if __name__ == "__main__":
    main()

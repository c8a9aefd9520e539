"""Benchmarks of apet_kernels: every result is checked before it is timed, and every time has its floor beside it.

python -m benchmarks.cpu          the tables, JSON and markdown
python -m pytest benchmarks       the same measurements under pytest-benchmark, with memory and overhead per call
Both take --smoke: two tiny cases and three rounds, to see in seconds that everything still runs.

python -m benchmarks.gpu_check    on a GPU, `make gpu-check`: the tests, benchmarks.gpu, and a report
python -m benchmarks.tune         on a GPU: tiles for the Triton kernels
python -m benchmarks.floors       without one: what a GPU takes at least, computed
"""

"""Benchmarks of apet_kernels: every result is checked before it is timed, and every time is shown with a baseline or a
bound.

python -m benchmarks.kept         time against tokens kept, next to other methods for the same job
python -m benchmarks.growth       how time and memory grow with every size
python -m benchmarks.stages       the stages, each beside its reference cost, on every instruction set
python -m benchmarks.ragged       images of different sizes, packed
python -m benchmarks.cpu          shape by shape against the published formulation, eager torch and torch.compile
python -m benchmarks.hooks        a Hugging Face model with and without compression; benchmarks.serving: a vLLM server
python -m benchmarks.quality      the quality of the kept tokens: a separate study, docs/quality.md
python -m benchmarks.report       docs/benchmarks.md and its pictures, from the files in benchmarks/results
python -m benchmarks.regress      whether the kernel became slower between two of these files, in ratios
python -m pytest benchmarks       the same measurements under pytest-benchmark, with memory and overhead per call
All measurements take --smoke: tiny cases and three rounds, to check in seconds that everything still runs.
benchmarks/lib contains their shared parts.

python -m benchmarks.gpu_quick    on a GPU, `make gpu-check`: tests and times every path, in minutes
python -m benchmarks.gpu_carry    builds the libraries for a GPU machine that cannot build them
python -m benchmarks.gpu_figures  writes the figures of the estimate and the tables of docs/ from a run of gpu_quick
python -m benchmarks.gpu          on a GPU: against torch and the published formulation, shape by shape
python -m benchmarks.tune         on a GPU: searches the tiles of the Triton kernels
python -m benchmarks.floors       computes a lower bound of the time on a GPU, without one
"""

"""The parts of benchmarks/gpu_quick.py: steps, the process that runs one of them (worker.py), builds and reports."""

"""The parts of benchmarks/gpu_quick.py: what runs in processes of its own (worker.py, steps.py), builds and reports."""

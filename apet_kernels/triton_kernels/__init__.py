"""The Triton backend: one file per kernel, in the order of the data flow, and `launch.py`, which lists them.

    s1_norms -> s1_s3_sweep (M times) -> s4_topk -> s5_assign -> s5_mean          docs/gpu.md

Importing this package imports Triton; `apet_kernels` does so on the first call that needs it.
"""

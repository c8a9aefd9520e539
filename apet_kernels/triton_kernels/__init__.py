"""The Triton backend: one file per launch, in the order of the data flow, and `launch.py`, which lines them up.

    s1_norms -> s1_s3_step (M times) -> s4_topk -> s5_assign -> s5_mean          docs/gpu.md

Importing this package imports Triton; `apet_kernels` does so on the first call that needs it.
"""

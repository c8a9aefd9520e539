"""Rates of a machine in round numbers, for tests of values that are computed from them."""

RATES = {"float32 GFLOP/s": 200.0, "bfloat16 GFLOP/s": 800.0, "copy GB/s": 40.0, "read GB/s": 50.0}
RATES |= {"cached GB/s": 100.0, "call us": 10.0, "peak GFLOP/s": 1000.0, "cache MiB": 32.0}

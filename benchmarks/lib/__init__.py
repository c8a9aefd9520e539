"""The shared parts of the benchmarks: cases, checks, timing, rows, baselines, ceilings, tables and command lines."""

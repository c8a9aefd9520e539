"""What the benchmarks share: cases and checks, turns and rows, baselines and ceilings, tables and command lines."""

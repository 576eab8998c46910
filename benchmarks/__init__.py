"""Benchmarks of fused_kd: `python -m benchmarks` measures, draws and prints; see `--help`.

Imports go one way: cases -> providers -> agreement, measured, ranking -> run -> report, plot -> __main__.
"""

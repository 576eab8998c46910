"""Benchmarks of fused_kd: `python -m benchmarks` measures, draws and prints; see `--help`.

The modules build on each other in one direction: cases -> providers -> agreement, measure, ranking ->
run -> report, plot -> __main__.
"""

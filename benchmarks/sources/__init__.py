"""Benchmark of alternatives to logits: ``python -m benchmarks --source head``, ``topk`` or ``shard``."""

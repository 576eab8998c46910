"""The benchmark of what may stand where logits stand: ``python -m benchmarks --source head``, ``topk`` or ``shard``."""

"""Training with the losses of fused_kd: the paper's experiment in small. ``python examples/train.py --help``."""

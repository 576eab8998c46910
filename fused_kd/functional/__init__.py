"""One function per loss: checks the arguments, flattens them to rows, chooses a backend, restores the shape."""

from fused_kd.functional.dist import dist_loss
from fused_kd.functional.divergence import js_loss, kd_loss
from fused_kd.functional.nkd import nkd_loss
from fused_kd.functional.smoothing import tf_kd_loss, zipf_ls_loss
from fused_kd.functional.study import decompose
from fused_kd.functional.teacher import dkd_loss, wsld_loss
from fused_kd.functional.uskd import uskd_loss, uskd_soft_labels

__all__ = [
    "decompose",
    "dist_loss",
    "dkd_loss",
    "js_loss",
    "kd_loss",
    "nkd_loss",
    "tf_kd_loss",
    "uskd_loss",
    "uskd_soft_labels",
    "wsld_loss",
    "zipf_ls_loss",
]

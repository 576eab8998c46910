"""The losses, one file each, with a function and an nn.Module. The function checks its arguments, flattens them to
rows, chooses a backend and restores the shape. The module keeps hyper-parameters and trained parameters.

A module takes the function's keyword arguments at construction, and its tensors at each call. Attributes may change
between calls. For a schedule, give a callable in place of a number, ``KDLoss(temperature=schedule.now)``: each call of
the loss calls it without arguments. Under ``torch.compile`` it should read floats: an int that it reads becomes a
constant of the graph, and each new value recompiles the graph.
"""

from fused_kd.losses.decompose import decompose
from fused_kd.losses.dist import DISTLoss, dist_loss
from fused_kd.losses.dkd import DKDLoss, dkd_loss
from fused_kd.losses.js import JSLoss, js_loss
from fused_kd.losses.kd import KDLoss, kd_loss
from fused_kd.losses.nkd import NKDLoss, nkd_loss
from fused_kd.losses.tf_kd import TfKDLoss, tf_kd_loss
from fused_kd.losses.uskd import USKDLoss, uskd_loss, uskd_soft_labels
from fused_kd.losses.wsld import WSLDLoss, wsld_loss
from fused_kd.losses.zipf_ls import ZipfLSLoss, zipf_ls_loss

__all__ = [
    "DISTLoss",
    "DKDLoss",
    "JSLoss",
    "KDLoss",
    "NKDLoss",
    "TfKDLoss",
    "USKDLoss",
    "WSLDLoss",
    "ZipfLSLoss",
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

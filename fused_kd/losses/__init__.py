"""A loss is one file: the function, which checks its arguments, flattens them to rows, chooses a backend and restores
the shape, and the nn.Module of its name, which keeps hyper-parameters, and what is trained.

A module takes the function's keyword arguments when it is made and its tensors when it is called. The attributes may be
changed between calls. Or give a callable in place of a number, for a schedule, ``KDLoss(temperature=schedule.now)``: it
is called without arguments whenever the loss is. Under ``torch.compile`` let it keep floats: an int that it reads
becomes a constant of the graph, and each new value recompiles the graph.
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

"""What a user writes: tests/package/test_types.py has mypy and pyright read it, and runs it."""

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import assert_type

import fused_kd
from fused_kd import DistillationParts, DISTParts, LossParts, USKDParts

student = torch.randn(4, 6, requires_grad=True)
teacher, weak = torch.randn(2, 4, 6)
dense = torch.randn(4, 3, 6)
target = torch.tensor([0, 1, 2, 5])
weight = torch.tensor([True, True, False, True])
step = 0


def warm_up() -> float:
    return min(1.0, step / 10)


# Schedules of every hyper-parameter that is a number, and numbers as they come, integers too.
scheduled: Callable[[], float] = warm_up
nkd = fused_kd.NKDLoss(gamma=warm_up, temperature=lambda: 1.0 + step, ce_weight=1, label_smoothing=lambda: 0.1)
kd = fused_kd.KDLoss(temperature=4, ce_weight=scheduled)
dkd = fused_kd.DKDLoss(alpha=warm_up, beta=warm_up)
wsld = fused_kd.WSLDLoss(alpha=warm_up)
js = fused_kd.JSLoss(beta=warm_up, class_dim=-1)
dist = fused_kd.DISTLoss(beta=warm_up, gamma=warm_up)
tf_kd = fused_kd.TfKDLoss(correct=lambda: 0.9, temperature=lambda: 20.0)
zipf = fused_kd.ZipfLSLoss(beta=warm_up, power=lambda: 1.0)
uskd = fused_kd.USKDLoss(6, 6, alpha=warm_up, beta=warm_up, mu=warm_up)

# Attributes that are changed between calls.
nkd.gamma = 2.0
nkd.gamma = warm_up
nkd.reduction = "sum"
kd.temperature = 2.0
kd.class_dim = 1
dkd.beta = 0.5
js.beta = 0.25
tf_kd.correct = 0.9
zipf.power = 0.5
uskd.mu = lambda: 0.1

# What comes back.
assert_type(nkd.forward(student, teacher, target), Tensor)
assert_type(nkd.forward(student, teacher, target, return_parts=True), tuple[Tensor, LossParts])
assert_type(kd.forward(student, teacher), Tensor)
assert_type(kd.forward(student, teacher, None, return_parts=True), tuple[Tensor, DistillationParts])
assert_type(dkd.forward(student, teacher, target, weight=weight), Tensor)
assert_type(dist.forward(student, teacher, return_parts=True), tuple[Tensor, DISTParts])
assert_type(tf_kd.forward(student, target), Tensor)
assert_type(zipf.forward(student, dense, target, return_parts=True), tuple[Tensor, DistillationParts])
assert_type(uskd.forward(student, weak, target), Tensor)
assert_type(uskd.forward(student, weak, target, return_parts=True), tuple[Tensor, USKDParts])
wsld.forward(student, teacher, target).backward()
js.forward(student, teacher, target, weight=weight).backward()
nkd(student, teacher, target).backward()

assert_type(fused_kd.nkd_loss(student, teacher, target, gamma=2), Tensor)
assert_type(fused_kd.zipf_ls_loss(student, dense, target, weight=weight), Tensor)
assert_type(fused_kd.zipf_ls_loss(student, dense, target, return_parts=True)[1], DistillationParts)
assert_type(fused_kd.uskd_loss(student, weak, target, class_dim=1, weight=weight), Tensor)

# What stands where logits stand.
head = torch.nn.Linear(3, 6)
source = fused_kd.Head(torch.randn(4, 3, requires_grad=True), head.weight, head.bias, softcap=30)
kept = fused_kd.TopK(torch.randn(4, 2).log_softmax(1) - 0.1, torch.tensor([[0, 1]] * 4), rest="bucket")
kd.num_classes, kd.class_dim = 6, None
assert_type(fused_kd.dkd_loss(source, teacher, target, normalizer=4, num_classes=6), Tensor)
assert_type(kd.forward(source, kept, target, normalizer=torch.tensor(4)), Tensor)
assert_type(kd.forward(source, kept, return_parts=True), tuple[Tensor, DistillationParts])
assert_type(fused_kd.uskd_loss(source, weak, target), Tensor)
print(fused_kd.explain(source, "kd", kept))


def shared(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return fused_kd.kd_loss(fused_kd.ClassShard(logits, 0, 12), fused_kd.ClassShard(teacher_logits, 0, 12), target)


def logged(log: bool) -> Tensor:
    """A flag that is not known before it runs."""
    calls = (
        fused_kd.nkd_loss(student, teacher, target, return_parts=log),
        fused_kd.kd_loss(student, teacher, return_parts=log),
        fused_kd.dkd_loss(student, teacher, target, return_parts=log),
        fused_kd.wsld_loss(student, teacher, target, return_parts=log),
        fused_kd.js_loss(student, teacher, return_parts=log),
        fused_kd.dist_loss(student, teacher, return_parts=log),
        fused_kd.tf_kd_loss(student, target, return_parts=log),
        fused_kd.zipf_ls_loss(student, dense, target, return_parts=log),
        fused_kd.uskd_loss(student, weak, target, return_parts=log),
    )
    modules = (
        nkd.forward(student, teacher, target, return_parts=log),
        kd.forward(student, teacher, return_parts=log),
        uskd.forward(student, weak, target, return_parts=log),
    )
    result = calls[0] if log else modules[0]
    return result[0] if isinstance(result, tuple) else result


logged(True).backward()
logged(False).backward()

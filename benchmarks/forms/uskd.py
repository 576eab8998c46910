"""USKD: two forms to compare fused_kd with, and the deviations that near-equal keys and long sums explain.

Both forms use the defaults of the ImageNet recipe, alpha 1, beta 0.1 and mu 0.005, class indices as targets, the rank
key of the paper's Eq. 10 and the mean over the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.forms.nkd import accumulating

ALPHA, BETA, MU = 1.0, 0.1, 0.005
EPSILON = 1e-6  # in the divisors of the rank key
KEPT, SPREAD = 0.9, 0.1  # shares of the target and of all classes in the smoothed label for the weak logits


def published(student_logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
    """USKD with the operations of the authors' release (github.com/yzd-v/cls_KD), rewritten.

    Two sorts give the ranks: one of the keys, one of the resulting order. A boolean mask picks the non-target entries,
    which copies them and synchronises a GPU. The release's first version had this key, Eq. 10; its newest has
    logarithms in the student's half, which is another loss (fused_kd's rank="cls_kd") at the same cost.
    """
    rows, classes = student_logits.shape
    index = target.view(rows, 1)
    value = torch.ones_like(index)
    p = F.softmax(student_logits, dim=1)
    p_target = p.gather(1, index)
    target_label = p_target**2
    target_label = target_label + value - target_label.mean(0, keepdim=True)
    target_label[value == 0] = 0
    log_p = F.log_softmax(student_logits, dim=1)
    target_term = -(target_label.detach() * log_p.gather(1, index)).sum(dim=1).mean()

    smoothed = torch.zeros_like(student_logits).scatter_(1, index, KEPT)
    smoothed = smoothed + SPREAD * torch.ones_like(student_logits) / classes
    log_v = F.log_softmax(weak_logits, dim=1)
    weak_term = -(MU * smoothed * log_v).sum(dim=1).mean()

    v = F.softmax(weak_logits, dim=1)
    v_rest = 1 - v.gather(1, index).sum(1, keepdim=True) + EPSILON
    p_rest = 1 - p_target.sum(1, keepdim=True) + EPSILON
    _, order = torch.sort(v / v_rest + p / p_rest, descending=True, dim=1)
    precision = torch.promote_types(student_logits.dtype, torch.float32)
    zipf = (1 / torch.arange(1, classes + 1, dtype=precision, device=student_logits.device)).repeat(rows, 1)
    zipf = zipf.gather(1, torch.argsort(order))

    non_target = torch.ones_like(student_logits).scatter_(1, index, 0).bool()
    log_p_hat = F.log_softmax(student_logits[non_target].reshape(rows, classes - 1), dim=1)
    zipf = zipf[non_target].reshape(rows, classes - 1)
    zipf = (zipf / zipf.sum(dim=1, keepdim=True)).detach()
    non_target_term = -(zipf * log_p_hat).sum(dim=1).mean()
    return ALPHA * target_term + BETA * non_target_term + weak_term


def mask_free(student_logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
    """USKD without boolean masks and with one sort: one graph with static shapes, which a compiler fuses best."""
    s, w = accumulating(student_logits), accumulating(weak_logits)
    classes = s.shape[1]
    index = target.unsqueeze(1)
    is_target = torch.arange(classes, device=target.device) == index
    s_target, w_target = s.gather(1, index), w.gather(1, index)
    s_sum, w_sum = s.logsumexp(1, keepdim=True), w.logsumexp(1, keepdim=True)
    s_rest = s.masked_fill(is_target, float("-inf")).logsumexp(1, keepdim=True)

    with torch.no_grad():
        square = (s_target - s_sum).exp().square()
        target_label = square + 1 - square.mean()
        w_rest = w.masked_fill(is_target, float("-inf")).logsumexp(1, keepdim=True)
        # 1 - p as the sum over the others keeps its digits where p is near 1.
        p_rest, v_rest = (s_rest - s_sum).exp() + EPSILON, (w_rest - w_sum).exp() + EPSILON
        order = ((w - w_sum).exp() / v_rest + (s - s_sum).exp() / p_rest).argsort(dim=1, descending=True, stable=True)
        zipf = 1 / torch.arange(1, classes + 1, dtype=s.dtype, device=s.device)
        total = zipf.sum()
        zipf = torch.zeros_like(s).scatter(1, order, zipf.expand_as(s))
        zipf_rest = total - zipf.gather(1, index)
        zipf = zipf.masked_fill(is_target, 0.0) / zipf_rest

    target_term = target_label * (s_sum - s_target)
    non_target_term = s_rest - (zipf * s).sum(1, keepdim=True)  # = -sum of zipf log p_hat, as zipf sums to 1
    weak_term = w_sum - KEPT * w_target - SPREAD * w.mean(1, keepdim=True)
    return (ALPHA * target_term + BETA * non_target_term + MU * weak_term).mean()


def rank_keys(student_logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
    """USKD's rank keys in float32, for the benchmark of the ranking alone."""
    import fused_kd

    terms = fused_kd.reference.uskd_terms(student_logits.detach().float(), weak_logits.detach().float(), target)
    return (terms.weak_key + terms.student_key).contiguous()


class Swaps(NamedTuple):
    """Deviations of the student's gradient of one row's loss that exchanged ranks of near-equal keys may cause.

    An entry may deviate from the exact one by ``below`` (at most 0) to ``above`` (at least 0). Its deviation times
    ``loss_per_gradient`` is then the effect of the same exchange on the loss.
    """

    below: Tensor
    above: Tensor
    loss_per_gradient: Tensor
    is_target: Tensor


def explain_by_swaps(
    student_logits: Tensor, weak_logits: Tensor, target: Tensor, dtype: torch.dtype, as_published: bool
) -> Swaps:
    """Bound the ranks that a form may give, from an interval around each float64 key; its logits have ``dtype``.

    A softmax of logits up to m is off by at most 4 eps (1 + m), eps of the accumulating dtype: the difference to the
    maximum or to logsumexp rounds by eps m; the exponential, the sum and the quotient round by one eps each. The
    published form rounds in the logits' dtype, and its 1 - p loses digits where p is near 1: up to 2 eps of that dtype.
    Two classes may exchange ranks only if their intervals overlap.
    """
    import fused_kd

    accumulating = torch.float64 if dtype == torch.float64 else torch.float32
    index = target.unsqueeze(1)
    classes = student_logits.shape[1]
    is_target = torch.arange(classes, device=target.device) == index
    low, high = torch.zeros_like(student_logits), torch.zeros_like(student_logits)
    for logits in (student_logits, weak_logits):
        share = logits.softmax(1)
        relative = 4 * torch.finfo(accumulating).eps * (1 + logits.abs().amax(1, keepdim=True))
        rest = share.masked_fill(is_target, 0.0).sum(1, keepdim=True) + EPSILON
        lost = 0.0
        if as_published:
            relative, lost = relative + 4 * torch.finfo(dtype).eps, 2 * torch.finfo(dtype).eps
        low += share * (1 - relative) / (rest + lost)
        high += share * (1 + relative) / (rest - lost).clamp(min=EPSILON / 2)

    # The first possible rank counts the classes that must come before, the last one all that can.
    first = 1.0 + classes - torch.searchsorted(low.sort(1).values, high, right=True)
    last = (classes - torch.searchsorted(high.sort(1).values, low)).double()
    harmonic = (1 / torch.arange(1, classes + 1, dtype=torch.float64, device=target.device)).sum()
    smallest = (1 / last) / (harmonic - 1 / last.gather(1, index))
    largest = (1 / first) / (harmonic - 1 / first.gather(1, index))
    zipf = fused_kd.reference.uskd_terms(student_logits, weak_logits, target).zipf
    log_p_hat = student_logits.masked_fill(is_target, float("-inf")).log_softmax(1)
    return Swaps(
        below=(BETA * (zipf - largest)).clamp(max=0.0).masked_fill(is_target, 0.0),
        above=(BETA * (zipf - smallest)).clamp(min=0.0).masked_fill(is_target, 0.0),
        # The gradient contains -beta zipf, the loss -beta zipf log p_hat.
        loss_per_gradient=log_p_hat.masked_fill(is_target, 0.0),
        is_target=is_target,
    )


class LabelSum(NamedTuple):
    """Deviation of the weak gradient of one row's loss that rounding the sum of the row's labels may cause.

    It is ``direction`` times one number per row of magnitude up to ``limit``.
    """

    direction: Tensor  # (N, C)
    limit: float


def explain_by_label_sum(weak_logits: Tensor, dtype: torch.dtype) -> LabelSum:
    """Bound the rounding of sum(V') in the backward pass of PyTorch's ``log_softmax``, mu (v_j sum(V') - V'_j).

    PyTorch adds up a row in the accumulating dtype, one vector of classes after the other. Each addition rounds by up
    to half an ulp of the sum so far, at most 1. One lane holds the target's 0.9. At 128256 classes the others' 0.1 / C
    are a few ulps of that, so nearly all additions in this lane round the same way. Fewer lanes mean more additions;
    PyTorch's shortest vectors have 32 bytes (AVX2; AVX-512 has twice that).
    """
    accumulating = torch.float64 if dtype == torch.float64 else torch.float32
    additions = weak_logits.shape[1] / (32 // accumulating.itemsize)
    return LabelSum(MU * weak_logits.softmax(1), additions * torch.finfo(accumulating).eps / 2)

"""The losses with a top-k teacher.

K are the kept classes, with log-probabilities l of the full softmax at temperature 1, in any order. An index of -1 is a
pad. The teacher's remaining probability, r = max(0, 1 − Σ_K exp l_j), is spread evenly over the other classes, with a
share u = r / (C − |K|) each. This fixes the normaliser at every temperature: Z = Σ_K exp(l_j / T) + (C − |K|) u^(1/T).
``rest`` says how the loss treats the other classes:

- ``"renormalize"``: the ordinary loss with a teacher that is -inf there;
- ``"uniform"``: the ordinary loss with a teacher that is log u there;
- ``"drop"``: q_j(T) on K, and no sum over classes includes the others; hats renormalise what remains;
- ``"bucket"``: q_j(T) on K, and the others are one class, with the sum of their probabilities; so for the student.

The distillation of a row then depends on few numbers: the kept logits, the target's logit, and :class:`Rest` of the
others. With probabilities the target is the most probable class. Only the CE and WSLD's two cross-entropies use all of
them; a class outside K has the teacher's probability u / Z there, or 0 with ``"drop"`` and ``"renormalize"``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd.reference.js import jensen_shannon
from fused_kd.reference.rows import (
    NEG_INF,
    DistillationParts,
    Labels,
    LossParts,
    accumulation_dtype,
    check_target,
    combine,
    counted_logits,
    cross_entropy,
    divergence,
    drop_impossible,
    find_labels,
    times_log,
)

RESTS = ("drop", "renormalize", "bucket", "uniform")

#: The losses that :func:`row_parts` defines on the kept classes alone, and the values of ``rest`` that need it.
_ON_KEPT, _OF_KEPT = ("nkd", "kd", "dkd", "wsld", "js"), ("drop", "bucket")


class Kept(NamedTuple):
    """The kept classes of the teacher."""

    log_probs: Tensor  # (N, k), -inf at pads
    columns: Tensor  # (N, k), 0 at pads
    present: Tensor  # (N, k), False at pads
    is_target: Tensor  # (N, k)
    target_kept: Tensor  # (N,)
    valid: Tensor  # (N,), NaN if an index is out of range or appears twice, else 1
    number: Tensor  # (N,), the number of kept classes
    log_share: Tensor  # (N,), log u, -inf if no probability remains


class Rest(NamedTuple):
    """Sums of the student's logits over the classes that are neither kept nor the target, (N,) each."""

    soft: Tensor  # logsumexp of s / T, -inf if there are no such classes
    sharp: Tensor  # logsumexp of s
    number: Tensor  # number of these classes


def _of_all_classes(name: str) -> tuple[Callable[..., Any], Mapping[str, inspect.Parameter]]:
    """Return the loss with logits of all classes from the teacher, and its parameters by name."""
    from fused_kd import reference

    loss = getattr(reference, f"{name}_loss", None)
    parameters: Mapping[str, inspect.Parameter] = {} if loss is None else inspect.signature(loss).parameters
    if loss is None or "teacher_logits" not in parameters:
        raise ValueError(f"loss: {name!r} has no teacher, so it takes no TopK")
    return loss, parameters


def check_rest(name: str, rest: str, beta: float) -> None:
    """Raise if a loss has no meaning with this ``rest``."""
    if rest not in RESTS:
        raise ValueError(f"rest: expected one of {', '.join(map(repr, RESTS))}, got {rest!r}")
    if name == "js" and beta == 1.0 and rest == "renormalize":
        raise ValueError(
            "beta: at 1 the Jensen–Shannon divergence is KL(p ‖ q), which is infinite where the teacher has no "
            "probability, as outside the kept classes with rest='renormalize'; take rest='bucket' or 'uniform'"
        )
    on_kept = name in _ON_KEPT
    if (name == "js" and beta != 0.0 and rest == "drop") or (rest in _OF_KEPT and not on_kept):
        others = "'renormalize', 'bucket' or 'uniform'" if on_kept else "'renormalize' or 'uniform'"
        raise NotImplementedError(
            f"rest: {rest!r} is not defined for {name}_loss, which compares two distributions over the same classes; "
            f"take rest={others}"
        )


def topk_loss(
    name: str,
    student_logits: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    rest: str,
    target: Tensor | None,
    hyper: Mapping[str, float],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Compute a loss by its name, with a teacher's log-probabilities ``(N, k)`` of the classes ``indices`` ``(N, k)``.

    ``hyper`` has hyper-parameters by name. Missing ones get the loss's defaults, and unknown ones are ignored. Returns
    the loss and its parts.
    """
    loss_of_all, parameters = _of_all_classes(name)
    named = _hyper_parameters(parameters, hyper)
    check_rest(name, rest, named.get("beta", 0.0))
    if parameters["target"].default is None:
        check_target(target, named["ce_weight"])
    elif target is None:
        raise ValueError(f"target: {name}_loss needs a class for each row, got None")
    dtype = accumulation_dtype(student_logits, log_probs)
    columns = student_logits.shape[1]
    given = torch.zeros_like(indices[:, 0]) if target is None else target
    labels = find_labels(given, columns, -1 if target is None else ignore_index, dtype, most=1, weight=weight)
    kept = find_kept(log_probs.detach().to(dtype), indices, labels.columns, columns)
    labels = labels._replace(valid=labels.valid * kept.valid)
    if rest not in _OF_KEPT:
        teacher = dense_teacher(kept, rest, columns) * kept.valid.unsqueeze(1)
        given_on = {"ignore_index": ignore_index, "reduction": reduction, "weight": weight}
        return loss_of_all(student_logits.to(dtype), teacher, target, **named, **given_on)  # type: ignore[no-any-return]
    student = counted_logits(drop_impossible(student_logits.to(dtype)), labels.counted)
    # A logsumexp of +inf has a derivative, but its row has no value.
    infinite = (student.detach() == -NEG_INF).any(dim=1, keepdim=True)
    student = student * torch.where(infinite, torch.nan, 1.0).to(dtype)
    # Relative to the largest, as log_softmax takes them: a logsumexp far from 0 has few digits for the differences.
    largest = student.detach().amax(dim=1, keepdim=True)
    student = student - torch.where(largest.isfinite(), largest, 0.0)
    kept = kept._replace(log_probs=counted_logits(kept.log_probs, labels.counted))
    excluded = _marked(kept, columns) | labels.is_target
    few = Rest(
        _logsumexp(torch.where(excluded, NEG_INF, student / named["temperature"])).squeeze(1),
        _logsumexp(torch.where(excluded, NEG_INF, student)).squeeze(1),
        columns - excluded.sum(dim=1),
    )
    s_target = student.gather(1, labels.columns).squeeze(1)
    log_p = student.log_softmax(dim=1)
    u = _wsld_weight(log_p.detach(), kept, rest, labels) if name == "wsld" else None
    each = row_parts(name, student.gather(1, kept.columns), s_target, few, kept, rest, named, columns, u)
    each.append(cross_entropy(log_p, labels, named["ce_weight"], named["label_smoothing"]))
    loss, reduced = combine(each, labels, reduction)
    return loss, (LossParts if len(reduced) == 3 else DistillationParts)(*reduced)


def _hyper_parameters(parameters: Mapping[str, inspect.Parameter], hyper: Mapping[str, float]) -> dict[str, float]:
    if hyper.get("logit_standardization"):
        raise ValueError(
            "logit_standardization: z-scores need all of the teacher's logits, and only some were kept; leave it False"
        )
    own = {}
    for parameter in parameters.values():
        if isinstance(parameter.default, float):
            own[parameter.name] = hyper.get(parameter.name, parameter.default)
    return own


def find_kept(log_probs: Tensor, indices: Tensor, target: Tensor, num_classes: int) -> Kept:
    """Find the kept classes of each row. ``target`` is ``(N, 1)``."""
    in_range = (indices >= 0) & (indices < num_classes)
    valid = torch.where(wrong_indices(indices, num_classes), torch.nan, 1.0).to(log_probs.dtype)
    columns = torch.where(in_range, indices, 0)
    is_target = in_range & (columns == target)
    log_probs = torch.where(in_range, log_probs, NEG_INF)
    number = in_range.sum(dim=1)
    outside = num_classes - number
    left = (1.0 - log_probs.exp().sum(dim=1)).clamp(min=0.0)
    log_share = (left / outside.clamp(min=1)).log()
    log_share = torch.where((outside > 0) | (left != left), log_share, NEG_INF)
    return Kept(log_probs, columns, in_range, is_target, is_target.any(dim=1), valid, number, log_share)


def wrong_indices(indices: Tensor, num_classes: int) -> Tensor:
    """Return a mask (N,) of the rows in which an index is out of range or appears twice."""
    ordered = indices.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    return twice.any(dim=1) | ((indices < -1) | (indices >= num_classes)).any(dim=1)


def dense_teacher(kept: Kept, rest: str, num_classes: int) -> Tensor:
    """Return logits of all classes: the kept log-probabilities, and elsewhere log u, or -inf."""
    share = kept.log_share if rest == "uniform" else torch.full_like(kept.log_share, NEG_INF)
    logits = share.unsqueeze(1).expand(-1, num_classes + 1)
    # Pads go to an extra column.
    return logits.scatter(1, torch.where(kept.present, kept.columns, num_classes), kept.log_probs)[:, :num_classes]


def _marked(kept: Kept, num_classes: int) -> Tensor:
    marked = torch.zeros((kept.columns.shape[0], num_classes + 1), dtype=torch.bool, device=kept.columns.device)
    return marked.scatter(1, torch.where(kept.present, kept.columns, num_classes), True)[:, :num_classes]


def _wsld_weight(log_p: Tensor, kept: Kept, rest: str, labels: Labels) -> Tensor:
    """u of :func:`wsld_loss`: of the cross-entropies with all labels, at T = 1."""
    log_q = dense_teacher(kept, "uniform", log_p.shape[1]).log_softmax(dim=1)
    if rest == "drop":
        log_q = torch.where(_marked(kept, log_p.shape[1]) | log_q.isnan(), log_q, NEG_INF)
    ce_s, ce_t = cross_entropy(log_p, labels, 1.0), cross_entropy(log_q, labels, 1.0)
    return torch.where(ce_s == -NEG_INF, 1.0, -torch.expm1(-ce_s / (ce_t + 1e-7)))


def row_parts(
    name: str,
    s_kept: Tensor,
    s_target: Tensor,
    few: Rest,
    kept: Kept,
    rest: str,
    hyper: Mapping[str, float],
    num_classes: int,
    u: Tensor | None,
) -> list[Tensor]:
    """Compute each row's parts but the CE, with ``rest="drop"`` or ``"bucket"``, from :class:`Rest` and the student's
    logits at K ``(N, k)`` and the target ``(N,)``. They are sums over rows of few columns, (N, k + 2): the kept classes
    without the target, the rest, and the target. ``u`` is WSLD's weight."""
    temperature = hyper["temperature"]
    s_kept = torch.where(kept.present, s_kept, NEG_INF)

    def student(scale: float, sums: Tensor) -> Tensor:
        return _side_by_side(torch.where(kept.is_target, NEG_INF, s_kept / scale), sums, s_target / scale)

    def teacher(scale: float) -> Tensor:
        share = kept.log_share / scale
        own = torch.where(kept.is_target, NEG_INF, kept.log_probs / scale)
        # The maximum picks the target's entry, if it was kept.
        of_target = torch.where(kept.is_target, kept.log_probs, NEG_INF).amax(dim=1) / scale
        of_target = torch.where(kept.target_kept, of_target, share)
        return _side_by_side(own, share + few.number.to(share.dtype).log(), of_target)

    soft, of_teacher = student(temperature, few.soft), teacher(temperature)
    if name == "nkd":
        log_p_target = student(1.0, few.sharp).log_softmax(dim=1)[:, -1]
        q_target = teacher(1.0).softmax(dim=1)[:, -1]
        if rest == "drop":
            q_target = torch.where(kept.target_kept, q_target, 0.0 * q_target)  # NaN stays
        target_part = -times_log(q_target, log_p_target)
        q_hat, log_q_hat, log_p_hat = _hats(soft, of_teacher, rest)
        by = hyper["gamma"] * temperature**2
        non_target_part = -times_log(by * q_hat, log_p_hat).sum(dim=1)
        return [target_part, _unless_alone(non_target_part, num_classes)]
    if name == "dkd":
        q_hat, log_q_hat, log_p_hat = _hats(soft, of_teacher, rest)
        non_target_part = divergence(q_hat, log_q_hat, log_p_hat, hyper["beta"] * temperature**2)
        log_b_s, log_b_t = _log_binary(soft), _log_binary(of_teacher)
        if rest == "drop":
            log_b_t = _log_binary(of_teacher, _counting(of_teacher, kept))
        target_part = divergence(log_b_t.exp(), log_b_t, log_b_s, hyper["alpha"] * temperature**2)
        return [target_part, _unless_alone(non_target_part, num_classes)]
    q, log_q = _softmax(_whole(of_teacher, kept, rest))
    p, log_p = _softmax(_whole(soft, kept, rest))
    if rest == "drop":
        counts = _counting(of_teacher, kept)
        q, log_q = torch.where(counts, q, 0.0), torch.where(counts, log_q, NEG_INF)
    if u is not None:
        weight = (hyper["alpha"] * temperature**2 * u).unsqueeze(1)
        return [-times_log(weight * q, log_p).sum(dim=1)]
    if name == "kd":
        return [divergence(q, log_q, log_p, temperature**2)]
    return [jensen_shannon(p, log_p, q, log_q, hyper["beta"], temperature**2)]


def _side_by_side(kept: Tensor, rest: Tensor, target: Tensor) -> Tensor:
    return torch.cat([kept, rest.unsqueeze(1), target.unsqueeze(1)], dim=1)


def _logsumexp(logits: Tensor, of_none: float = NEG_INF) -> Tensor:
    """Return the logsumexp (N, 1); ``of_none``, without a gradient, if all are -inf."""
    empty = (logits == NEG_INF).all(dim=1, keepdim=True)
    return torch.where(empty, of_none, torch.where(empty, 0.0, logits).logsumexp(dim=1, keepdim=True))


def _softmax(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities and their logarithms."""
    logs = columns - columns.logsumexp(dim=1, keepdim=True)
    return logs.exp(), logs


def _hats(soft: Tensor, teacher: Tensor, rest: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return q^, log q^ and log p^, without the target."""
    soft, teacher = soft[:, :-1], teacher[:, :-1]
    if rest == "drop":
        teacher = torch.cat([teacher[:, :-1], torch.full_like(teacher[:, -1:], NEG_INF)], dim=1)
    log_q_hat = teacher - _logsumexp(teacher, 0.0)  # -inf stays -inf
    return log_q_hat.exp(), log_q_hat, soft - _logsumexp(soft, 0.0)


def _counting(teacher: Tensor, kept: Kept) -> Tensor:
    """Return a mask of the columns that count with ``rest="drop"``."""
    counts = torch.ones_like(teacher, dtype=torch.bool)
    counts[:, -2] = False
    counts[:, -1] = kept.target_kept
    return counts


def _log_binary(logits: Tensor, counts: Tensor | None = None) -> Tensor:
    """log (target, all others), (N, 2): over the columns that count, with the normaliser of all."""
    normalizer = logits.logsumexp(dim=1, keepdim=True)
    if counts is not None:
        logits = torch.where(counts, logits, NEG_INF)
    return torch.cat([logits[:, -1:], _logsumexp(logits[:, :-1])], dim=1) - normalizer


def _whole(logits: Tensor, kept: Kept, rest: str) -> Tensor:
    """With ``rest="bucket"``, move a target that was not kept into the bucket."""
    if rest != "bucket":
        return logits
    # Not logaddexp: its second derivative is NaN if one of them is -inf.
    both = _logsumexp(logits[:, -2:]).squeeze(1)
    together = torch.where(kept.target_kept, logits[:, -2], both)
    return _side_by_side(logits[:, :-2], together, torch.where(kept.target_kept, logits[:, -1], NEG_INF))


def _unless_alone(part: Tensor, num_classes: int) -> Tensor:
    """Return 0 for two classes: the only non-target class has probability 1 on both sides."""
    return torch.zeros_like(part) if num_classes == 2 else part

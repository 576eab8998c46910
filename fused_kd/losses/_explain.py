"""Which backend runs, and why: for logits and for sources."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kd import backends, sources
from fused_kd.backends import Explanation, topk
from fused_kd.core.catalogue import LOSSES, has_column_term
from fused_kd.losses._sources import is_source
from fused_kd.reference.topk import check_rest
from fused_kd.sources import ClassShard, Head, Logits, TeacherLogits, TopK


def explain(
    student_logits: Logits | torch.device | str = "cpu", loss: str = "nkd", teacher_logits: TeacherLogits | None = None
) -> Explanation:
    """Which backend ``backend="auto"`` takes for a loss, and why not the others. Print the result.

    Args:
        student_logits: A tensor or a device such as ``"cuda"``, the current GPU; each GPU has its own answer. For a
            :class:`Head` or a :class:`ClassShard` the result also says how it runs.
        loss: A name from :func:`fused_kd.catalogue`, such as ``"nkd"`` or ``"uskd"``.
        teacher_logits: Needed only if the teacher is a :class:`Head`, a :class:`ClassShard` or a :class:`TopK`.

    Raises:
        ValueError, NotImplementedError: There is no such loss, or it does not take such a source.

    Example:
        >>> print(fused_kd.explain(student_logits, loss="uskd"))
        >>> print(fused_kd.explain(Head(hidden, weight), "kd", TopK(log_probs, indices, rest="bucket")))
    """
    found = backends.explain(_device(student_logits), loss)
    if not (teacher_logits is None or isinstance(teacher_logits, Tensor) or is_source(teacher_logits)):
        kind = type(teacher_logits).__name__
        raise TypeError(f"teacher_logits: expected a Tensor, a Head, a ClassShard, a TopK or None, got {kind}")
    how = [_how("student", student_logits), _how("teacher", teacher_logits)]
    given = [each for each in (student_logits, teacher_logits) if is_source(each)]
    for each in given:
        if not isinstance(each, tuple(getattr(sources, name) for name in LOSSES[loss].sources)):
            raise ValueError(f"loss: {LOSSES[loss].title} does not take a {type(each).__name__}")
    if given and has_column_term(loss):
        how.append("only with gamma=0: the term of the batch's columns needs all rows at once")
    if isinstance(teacher_logits, TopK):
        check_rest(loss, teacher_logits.rest, LOSSES[loss].defaults.get("beta", 0.0))
        if not topk.is_fused(loss, teacher_logits.rest):
            how[1] = "teacher: made dense, a chunk of rows at a time"
    if given and found.chosen == "reference":
        how[:2] = ["the reference computes the logits of all rows at once"]
    return found._replace(how=tuple(line for line in how if line))


def _device(given: Any) -> Any:
    if isinstance(given, ClassShard):
        return _device(given.logits)
    return given.hidden if isinstance(given, Head) else given


def _how(name: str, given: Any) -> str:
    """Describe how a source runs; "" for logits."""
    if isinstance(given, ClassShard):
        lines = (f"{name}: sharded classes, in stages with an exchange after each", _how(name, given.logits))
        return "; ".join(filter(None, lines))
    if isinstance(given, Head):
        return f"{name}: logits by products, a chunk of rows at a time"
    if isinstance(given, TopK):
        return f"{name}: only the kept classes are read"
    return ""

"""Inputs in place of logits: a last layer that is not applied yet, a teacher's top-k log-probabilities, and the classes
that one of several processes has.

A loss is the same function of the logits that a source replaces; only what is stored and moved differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from fused_kd.backends.sources import CHUNK_BYTES
from fused_kd.core import checks

__all__ = ["CHUNK_BYTES", "ClassShard", "Head", "TopK"]


@dataclass(frozen=True, eq=False)
class Head:
    r"""The last layer, not yet applied: logits :math:`z = \mathrm{logit\_scale} \cdot (h W^\top + b)`, and with a
    ``softcap`` :math:`c \tanh(z / c)`.

    The logits of all rows never exist together: they are made for a chunk of rows, whose loss and gradient are computed
    and multiplied into the gradients of ``hidden``, ``weight`` and ``bias`` before the next chunk. Products accumulate
    in float32 or better, and so does the weight's gradient over the chunks, whatever their dtype. Each of the three
    gets a gradient if it requires one. As a teacher a head has none: pass its tensors detached.

    Args:
        hidden: Hidden states ``(..., D)``, the input of the last layer.
        weight: ``(C, D)``, as :class:`torch.nn.Linear` has it.
        bias: ``(C,)``, or None.
        softcap: Bound of the logits' magnitude, above 0, or None.
        logit_scale: What logits are multiplied by before the softcap.
        chunk_rows: Rows of a chunk; the student's, if both heads say. None takes as many as
            :data:`fused_kd.sources.CHUNK_BYTES` allows: 128 MiB on the CPU, 1 GiB on a GPU.

    Example:
        >>> head = torch.nn.Linear(512, 50000)
        >>> hidden, target = torch.randn(32, 512), torch.randint(50000, (32,))
        >>> teacher = Head(torch.randn(32, 64), torch.randn(50000, 64))
        >>> nkd_loss(Head(hidden, head.weight, head.bias), teacher, target).backward()
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    chunk_rows: int | None = None


@dataclass(frozen=True, eq=False)
class TopK:
    r"""A teacher of which only the top-k log-probabilities were stored.

    With :math:`\ell` the kept log-probabilities of its full softmax, of the classes :math:`K`, :math:`r = \max(0,
    1 - \sum_K e^{\ell_j})` is what was not kept, and :math:`u = r / (C - k)` its even share. At temperature :math:`T`
    the rest is taken as spread evenly: :math:`Z = \sum_K e^{\ell_j / T} + (C - k) u^{1/T}`, :math:`q_j(T) = e^{\ell_j /
    T} / Z` of a kept class and :math:`q_{rest}(T) = (C - k) u^{1/T} / Z`.

    Args:
        log_probs: Log-probabilities ``(..., k)`` at temperature 1, of a softmax over all classes.
        indices: Their classes ``(..., k)``, integers in any order; -1 where a row has fewer.
        rest: What the classes that were not kept are to be:

            - ``"renormalize"``: the teacher is :math:`e^{\ell_j / T} / \sum_K e^{\ell_i / T}` on :math:`K` and 0
              elsewhere.
            - ``"drop"``: it is :math:`q_j(T)` on :math:`K`, and the rest counts nowhere. The probabilities sum to less
              than 1, so this is no divergence and may be below 0.
            - ``"bucket"``: all others are one class, of the teacher's probability :math:`q_{rest}(T)` and of the
              student's :math:`1 - \sum_K p_j(T)`.
            - ``"uniform"``: each of the others has :math:`u^{1/T} / Z`.

    An index twice in a row, or out of range, is an error on the CPU and a NaN row on a GPU. So are pads alone with
    ``"renormalize"``, which leave nothing to renormalise, unless the row does not count: give it ``ignore_index`` or a
    ``weight`` of 0. With any other rest a row of pads alone has no kept class, and all is rest.

    Above temperature 1 the rest weighs more than what it was at 1, since it is spread over so many classes: of 100,000
    classes a rest of 1e-8 weighs more at T = 4 than all that was kept. Where what was kept sums to 1 but for rounding,
    there is no rest to speak of: take ``"renormalize"``, as :meth:`from_logits` does.

    Example:
        >>> log_probs, indices = torch.randn(8, 1000).log_softmax(-1).topk(64)
        >>> kd_loss(student_logits, TopK(log_probs, indices, rest="bucket"), target)
    """

    log_probs: Tensor
    indices: Tensor
    rest: str

    @classmethod
    def from_logits(cls, logits: Tensor, indices: Tensor) -> TopK:
        """Of logits ``(..., k)``, whose softmax over the kept classes is taken first: nothing is left over, as with
        ``"renormalize"``."""
        checks.check_logits("logits", logits)
        checks.check_tensor("indices", indices, "a Tensor of integers")
        if indices.shape != logits.shape:
            raise ValueError(
                f"indices: expected the shape of logits, {tuple(logits.shape)}, got {tuple(indices.shape)}"
            )
        kept = logits.masked_fill(indices < 0, float("-inf"))
        return cls(kept.log_softmax(-1), indices, "renormalize")


@dataclass(frozen=True, eq=False)
class ClassShard:
    """Some classes of each row, of which other processes have the others: vocabulary parallel.

    The processes exchange some hundred bytes of each row, no logits. The loss and its parts are the same numbers on
    each, and each has the gradient of its own columns. It is for every loss of rows with a teacher of its own or none:
    USKD and Zipf's label smoothing rank all classes, and DIST needs ``gamma=0``.

    Every process of the group takes part in each call and in its backward pass, where numbers are exchanged with
    ``reduction="none"``, with the same rows, weights, options, ``chunk_rows`` and dtypes, and with tensors of which the
    same require grad. The target is the same class indices ``(...)`` among all ``num_classes``, or probabilities of the
    columns that are here, ``(..., width)``. The teacher is sharded as the student is. Or it is a :class:`TopK` with
    classes among all, the same on every process: then the student's logits of these are exchanged, too.

    Errors that several processes have a part in, such as classes that are missing or twice or bad values, are raised on
    all of them. On a GPU, where reading would stall, the classes are checked until one call was right. An error of one
    process alone, such as a wrong type, is raised there alone and leaves the others waiting.

    A DTensor whose classes are sharded needs no ClassShard: it becomes one of its local tensor in the group of that
    dimension of its mesh. Its teacher is a DTensor with the same placements; target and weight are what the process has
    of them, or DTensors that are placed as the rows are. The loss is a plain Tensor, and where another dimension of the
    mesh shards the rows, that of the rows that are here: a mean divides by their number, not by that of all.

    ``backend="reference"`` gathers the columns of all processes instead, and stalls a GPU. A second derivative is
    refused. ``torch.compile`` holds a call in one graph.

    Args:
        logits: ``(..., width)`` logits of the classes from ``first_class`` on, or a :class:`Head` with their weight;
            its ``hidden`` is the same on every process, and so is that one's gradient, which is summed over them. That
            of weight and bias is of the classes that are here. A width may be 0, and they need not be equal.
        first_class: The first of these classes, among all.
        num_classes: How many classes a row has on all processes together.
        group: The process group, or None for the default one.

    Example:
        >>> shard, first = torch.randn(8, 500, requires_grad=True), 500 * distributed.get_rank()
        >>> teacher, target = torch.randn(8, 500), torch.randint(1000, (8,))  # the same target on every process
        >>> nkd_loss(ClassShard(shard, first, 1000), ClassShard(teacher, first, 1000), target).backward()
    """

    logits: Tensor | Head
    first_class: int
    num_classes: int
    group: Any = None


#: What may be given for the student's logits, and for the teacher's.
Logits: TypeAlias = "Tensor | Head | ClassShard"
TeacherLogits: TypeAlias = "Tensor | Head | ClassShard | TopK"

"""Inputs in place of logits: a last layer that is not applied yet, a teacher's top-k log-probabilities, and the classes
of one of several processes.

A loss has the same value as with the logits that a source replaces, but stores and moves less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fused_kd.backends.sources import CHUNK_BYTES
from fused_kd.core import checks

__all__ = ["CHUNK_BYTES", "ClassShard", "Head", "TopK"]


@dataclass(frozen=True, eq=False)
class Head:
    r"""The last layer before it is applied. Its logits are :math:`z = \mathrm{logit\_scale} \cdot (h W^\top + b)`, or
    with a ``softcap`` :math:`c \tanh(z / c)`.

    The logits of all rows are never stored at once. Chunk by chunk of rows, the loss computes the logits, their
    gradient, and from it the gradients of ``hidden``, ``weight`` and ``bias``. Products accumulate in float32 or
    float64, whatever the dtype, and so does the weight's gradient over the chunks. Only a CPU with bfloat16
    instructions rounds the results of products in bfloat16, as :func:`torch.nn.functional.linear` does. Each of the
    three tensors gets a gradient if it requires one. A teacher gets no gradient: pass its tensors detached.

    Args:
        hidden: Hidden states ``(..., D)``, the input of the last layer.
        weight: ``(C, D)``, as :class:`torch.nn.Linear` has it.
        bias: ``(C,)``, or None.
        softcap: Bound c of the logits' magnitude, above 0, or None.
        logit_scale: Factor of the logits, applied before the softcap.
        chunk_rows: Rows in a chunk; if both heads set it, the student's is used. None takes as many as
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

    Let :math:`K` be the kept classes and :math:`\ell` their log-probabilities under the teacher's full softmax. The
    rest has the probability :math:`r = \max(0, 1 - \sum_K e^{\ell_j})`, and :math:`u = r / (C - k)` is its share per
    class, since the rest is assumed to be spread evenly. At temperature :math:`T`, with
    :math:`Z = \sum_K e^{\ell_j / T} + (C - k) u^{1/T}`, a kept class has :math:`q_j(T) = e^{\ell_j / T} / Z`, and the
    rest has :math:`q_{rest}(T) = (C - k) u^{1/T} / Z`.

    Args:
        log_probs: Log-probabilities ``(..., k)`` at temperature 1, of a softmax over all classes.
        indices: Their classes ``(..., k)``, integers in any order; -1 where a row has fewer.
        rest: How to treat the classes that were not kept:

            - ``"renormalize"``: the teacher is :math:`e^{\ell_j / T} / \sum_K e^{\ell_i / T}` on :math:`K` and 0
              elsewhere.
            - ``"drop"``: the teacher is :math:`q_j(T)` on :math:`K`, and the rest is ignored. The probabilities sum to
              less than 1, so this is no divergence and may be below 0.
            - ``"bucket"``: all other classes are one class. Its probability is :math:`q_{rest}(T)` for the teacher and
              :math:`1 - \sum_K p_j(T)` for the student.
            - ``"uniform"``: each other class has :math:`u^{1/T} / Z`.

    With probability targets, such as those of mixup, the target is the most probable class, as with a dense teacher.
    The cross-entropy and WSLD use all labels. In WSLD, a labelled class outside :math:`K` has the teacher's probability
    :math:`u` at temperature 1, or 0 with ``"drop"`` and ``"renormalize"``: such a row then has the weight 0.

    A class twice in one row, or out of range, is an error on the CPU and makes the row NaN on a GPU. The same holds for
    a row of pads only with ``"renormalize"``, unless the row does not count: give it ``ignore_index`` or a ``weight``
    of 0. With any other rest, a row of pads only has no kept class: all classes are the rest.

    Above temperature 1 the rest weighs more than at 1, since it is spread over so many classes: with 100,000 classes, a
    rest of 1e-8 weighs more at T = 4 than all kept classes together. If the kept probabilities sum to 1 except for
    rounding, there is no meaningful rest: use ``"renormalize"``, as :meth:`from_logits` does.

    Example:
        >>> log_probs, indices = torch.randn(8, 1000).log_softmax(-1).topk(64)
        >>> kd_loss(student_logits, TopK(log_probs, indices, rest="bucket"), target)
    """

    log_probs: Tensor
    indices: Tensor
    rest: str

    @classmethod
    def from_logits(cls, logits: Tensor, indices: Tensor) -> TopK:
        """From the teacher's logits ``(..., k)`` of the kept classes. Their softmax is over these classes only, so
        ``rest`` is ``"renormalize"``."""
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
    """Some of the classes of each row; the other processes have the rest (vocabulary parallelism).

    The processes exchange 56 to 232 bytes per row instead of logits. All processes get the same loss and parts, and
    each gets the gradient of its own columns. USKD and Zipf's label smoothing do not take a ClassShard, since they rank
    all classes; DIST needs ``gamma=0``.

    Every process of the group must make each call and its backward pass, which also exchanges numbers for
    ``reduction="none"``. The rows, weights, options, ``chunk_rows`` and dtypes must be the same on all processes, and
    the same tensors must require grad. The target is class indices ``(...)`` among all ``num_classes``, the same on all
    processes, or the probabilities ``(..., width)`` of the columns that are here. The teacher must be sharded as the
    student is, or be a :class:`TopK` with indices among all classes, the same on all processes.

    Errors that concern several processes, such as bad values or classes that are missing or given twice, are raised on
    all of them. On a GPU, where reading would stall, the classes are checked until they were right once. An error of a
    single process, such as a wrong type, is raised only there, and the other processes wait.

    A DTensor whose classes are sharded needs no ClassShard: its local tensor is used as one, with the group of that
    dimension of its mesh. Its teacher must be a DTensor with the same placements. Target and weight are the local ones,
    or DTensors with the placements of the rows. The loss is a plain Tensor. If another dimension of the mesh shards the
    rows, it is the loss of the local rows: a mean divides by their number, not by the number of all rows.

    ``backend="reference"`` gathers the columns of all processes instead, and stalls a GPU. Second derivatives raise an
    error. ``torch.compile`` keeps a call in one graph.

    Args:
        logits: ``(..., width)`` logits of the classes from ``first_class`` on, or a :class:`Head` with their weight;
            its ``hidden`` must be the same on every process. The gradient of ``hidden`` is summed over the processes,
            so it is also the same on each; weight and bias get the gradient of the local classes. Widths may differ,
            and may be 0.
        first_class: The index of the first local class, among all classes.
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


# So that PyTorch finds their tensors: under DDP with static_graph=True, gradients of an output without tensors are not
# averaged.
for _source in (Head, TopK, ClassShard):
    torch.export.register_dataclass(_source)

#: What may be given for the student's logits, and for the teacher's.
Logits: TypeAlias = "Tensor | Head | ClassShard"
TeacherLogits: TypeAlias = "Tensor | Head | ClassShard | TopK"

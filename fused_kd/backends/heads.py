"""The products of a last layer and of its gradients, for a chunk of rows: they accumulate in float32 or better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fused_kd.core.source_rows import SourceRows

#: Classes of a weight in half precision that are converted at a time, where no product of such gives float32.
_CONVERTED = 4096
_MIXED = hasattr(torch.ops.aten.mm, "dtype")  # torch.mm(..., out_dtype=), of CUDA tensors


def _kept(of: Tensor, dtype: torch.dtype) -> torch.dtype:
    """As what the gradient of a tensor is kept. Of float16 that is the accumulating dtype, as it could underflow or
    overflow before the incoming one has scaled it."""
    return dtype if of.dtype == torch.float16 else of.dtype


def room(source: SourceRows, wanted: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
    """As the gradients of a source are kept until the incoming one is known: empty where one is not wanted."""
    found = []
    for want, of in zip(wanted, (source.values, source.weight, source.bias), strict=True):
        if of is None or not want:
            found.append(source.values.new_empty(0))
        else:
            found.append(of.new_empty(of.shape, dtype=_kept(of, dtype)))
    return found


def _mixes(weight: Tensor, compute: torch.dtype | None) -> bool:
    """Whether products of halves, which give float32, are to be had."""
    return _MIXED and weight.is_cuda and (compute or weight.dtype) in (torch.float16, torch.bfloat16)


class Matrix:
    """Logits that exist, chunk by chunk, and their gradient."""

    over = False  # whether a chunk's gradient may be written over its logits

    def __init__(self, source: SourceRows, wanted: Sequence[bool], dtype: torch.dtype) -> None:
        self.source, self.wanted, self.dtype = source, wanted, dtype
        self.found: Tensor | None = None

    def logits(self, start: int, stop: int) -> Tensor:
        logits = self.source.values[start:stop]
        return logits.to(self.dtype) if logits.dtype == torch.float16 else logits  # the dtype of their gradient

    def take(self, gradient: Tensor, logits: Tensor, counted: Tensor, rows: tuple[int, int]) -> None:
        if len(gradient) == len(self.source.values):
            self.found = gradient  # as it is
            return
        if self.found is None:
            self.found = self.gradients()[0]
        self.found[slice(*rows)] = gradient

    def gradients(self) -> list[Tensor]:
        first, *others = room(self.source, (self.wanted[0] and self.found is None, False, False), self.dtype)
        return [first if self.found is None else self.found, *others]


class Products:
    """A head's logits, and what their gradient is multiplied into, row chunk by row chunk.

    ``num_classes`` are the classes at hand: what the weight has beyond them is padding. ``compute`` is the dtype of the
    factors, autocast's where that is at work. Gradients that are ``wanted``, of hidden states, weight and bias, are
    summed in the accumulating ``dtype``.
    """

    def __init__(
        self,
        head: SourceRows,
        wanted: Sequence[bool],
        dtype: torch.dtype,
        num_classes: int,
        compute: torch.dtype | None,
    ) -> None:
        assert head.weight is not None
        weight = head.weight[:num_classes]
        self.head, self.classes, self.dtype = head, num_classes, dtype
        self.bias = None if head.bias is None else head.bias[:num_classes].to(dtype)
        self.mixed = _mixes(weight, compute)
        self.weight = weight.to(compute) if self.mixed and compute is not None else weight
        self.over = not head.softcap  # whose derivative needs the logits
        self.chunk = head.values.new_empty(0, num_classes, dtype=dtype)
        contiguous = partial(torch.empty_like, dtype=dtype, memory_format=torch.contiguous_format)  # as the fake says
        self.of_hidden = contiguous(head.values) if wanted[0] else None
        self.of_weight = contiguous(head.weight).zero_() if wanted[1] else None
        self.of_bias = contiguous(head.bias).zero_() if wanted[2] and head.bias is not None else None

    def gradients(self) -> list[Tensor]:
        """As they are kept, see :func:`room`."""
        found = []
        given = (self.head.values, self.head.weight, self.head.bias)
        for gradient, of in zip((self.of_hidden, self.of_weight, self.of_bias), given, strict=True):
            if gradient is None or of is None:
                found.append(self.head.values.new_empty(0))
            else:
                found.append(gradient.to(_kept(of, self.dtype)))
        return found

    def logits(self, start: int, stop: int) -> Tensor:
        """(rows, classes) in the accumulating dtype, until the next chunk's."""
        head, hidden = self.head, self.head.values[start:stop]
        if self.mixed:
            out: Tensor = torch.mm(hidden.to(self.weight.dtype), self.weight.T, out_dtype=self.dtype)
        else:
            hidden = hidden.to(self.dtype)
            if len(self.chunk) < len(hidden):
                self.chunk = hidden.new_empty(len(hidden), self.classes)
            out = self.chunk[: len(hidden)]  # the same memory for every chunk, whose pages are there already
            for classes, weight in self._tiles():
                torch.mm(hidden, weight.T, out=out[:, classes])
        if self.bias is not None:
            out += self.bias
        if head.softcap:
            return out.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap)
        return out if head.logit_scale == 1.0 else out.mul_(head.logit_scale)

    def take(self, gradient: Tensor, logits: Tensor, counted: Tensor, rows: tuple[int, int]) -> None:
        """Multiply a chunk's gradient of the logits, which is overwritten, into those of the head. Of rows that are not
        ``counted`` the gradient is 0, whatever they hold."""
        head = self.head
        if head.softcap:
            gradient.mul_(logits.div_(head.softcap).square_().neg_().add_(1.0))
        if head.logit_scale != 1.0:
            gradient.mul_(head.logit_scale)
        if self.of_bias is not None:
            self.of_bias[: self.classes] += gradient.sum(0)
        hidden = head.values[slice(*rows)].where(counted[:, None], 0.0)
        if self.mixed:
            self._take_mixed(gradient, hidden, rows)
            return
        hidden = hidden.to(self.dtype)
        if self.of_hidden is not None:
            of_hidden = torch.zeros_like(hidden)
            for classes, weight in self._tiles():
                of_hidden.addmm_(gradient[:, classes], weight)
            self.of_hidden[slice(*rows)] = of_hidden
        if self.of_weight is not None:
            self.of_weight[: self.classes].addmm_(gradient.T, hidden)

    def _take_mixed(self, gradient: Tensor, hidden: Tensor, rows: tuple[int, int]) -> None:
        power = None
        if self.weight.dtype == torch.float16 and gradient.numel():
            # A gradient that is divided by the number of rows would underflow there.
            largest = gradient.abs().nan_to_num_(nan=0.0, posinf=0.0).amax()
            power = torch.exp2(-torch.frexp(largest).exponent.clamp(min=-100).to(self.dtype))
            gradient = gradient.mul_(power)
        half = gradient.to(self.weight.dtype)
        if self.of_hidden is not None:
            of_hidden: Tensor = torch.mm(half, self.weight, out_dtype=self.dtype)
            self.of_hidden[slice(*rows)] = of_hidden if power is None else of_hidden.div_(power)
        if self.of_weight is not None:
            of_weight: Tensor = torch.mm(half.T, hidden.to(half.dtype), out_dtype=self.dtype)
            self.of_weight[: self.classes] += of_weight if power is None else of_weight.div_(power)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the accumulating dtype, whole where it is in that already."""
        step = max(self.classes, 1) if self.weight.dtype == self.dtype else _CONVERTED
        for first in range(0, self.classes, step):
            classes = slice(first, min(first + step, self.classes))
            yield classes, self.weight[classes].to(self.dtype)


def maker(
    source: SourceRows, wanted: Sequence[bool], dtype: torch.dtype, num_classes: int, compute: torch.dtype | None = None
) -> Matrix | Products:
    """What gives the logits of a source's rows and takes their gradient."""
    if source.weight is None:
        return Matrix(source, wanted, dtype)
    return Products(source, wanted, dtype, num_classes, compute)

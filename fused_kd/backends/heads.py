"""The matrix products of a head and its gradients, for a chunk of rows. They accumulate in float32 or better.

In bfloat16 a CPU that multiplies it in hardware is many times as fast as with float32, but PyTorch then rounds the
results to bfloat16, as it does in an ordinary last layer. There the logits, their gradient and each chunk's gradient of
the weight are rounded; the chunks' sum is float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from fused_kd.core.rows import SourceRows

#: Classes of a half-precision weight, or of its gradient, that are converted at a time, if no product of halves gives
#: float32. They fit in a cache.
_CONVERTED = 4096
_MIXED = hasattr(torch.ops.aten.mm, "dtype")  # torch.mm(..., out_dtype=), for CUDA tensors


def _stored_dtype(of: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor's stored gradient. For float16 it is the accumulating dtype, because the gradient
    could underflow or overflow before the incoming gradient scales it."""
    return dtype if of.dtype == torch.float16 else of.dtype


def empty_gradients(source: SourceRows, wanted: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
    """Allocate the stored gradients of a source, empty where not wanted."""
    return [
        of.new_empty(of.shape, dtype=_stored_dtype(of, dtype))
        if want and of is not None
        else source.values.new_empty(0)
        for want, of in zip(wanted, source[:3], strict=True)
    ]


def _mixes(weight: Tensor, compute: torch.dtype | None) -> bool:
    """Whether products of halves can give float32."""
    return _MIXED and weight.is_cuda and (compute or weight.dtype) in (torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return torch.backends.mkldnn.is_available() and any(ask() for ask in asked if ask is not None)  # type: ignore[no-untyped-call]


def _rounds(weight: Tensor, compute: torch.dtype | None) -> bool:
    """Whether products are made in bfloat16, results included."""
    return weight.is_cpu and (compute or weight.dtype) == torch.bfloat16 and multiplies_bfloat16()


class Matrix:
    """Given logits, chunk by chunk, and their gradient. The columns after ``num_classes`` are padding."""

    in_place = False  # whether a chunk's gradient may be written over its logits

    def __init__(self, source: SourceRows, wanted: Sequence[bool], dtype: torch.dtype, num_classes: int) -> None:
        self.source, self.wanted, self.dtype = source, wanted, dtype
        self.padding = source.values.shape[1] - num_classes
        self.gradient: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        values = self.source.values
        logits = values[rows, : values.shape[1] - self.padding]
        return logits.to(self.dtype) if logits.dtype == torch.float16 else logits  # the dtype of their gradient

    def take(self, gradient: Tensor, logits: Tensor, factors: Tensor, rows: slice) -> None:
        if len(gradient) == len(self.source.values):
            self.gradient = gradient
            return
        if self.gradient is None:
            self.gradient = self.gradients()[0]
        self.gradient[rows] = gradient

    def gradients(self) -> list[Tensor]:
        wanted = (self.wanted[0] and self.gradient is None, False, False)
        first, *others = empty_gradients(self.source, wanted, self.dtype)
        return [first if self.gradient is None else self.gradient, *others]


class Products:
    """A head's logits and gradients, computed for one chunk of rows after the other.

    ``num_classes`` is the number of classes; the weight's further rows are padding. ``compute`` is the dtype of the
    factors under autocast, else None. The ``wanted`` gradients of hidden states, weight and bias are summed in the
    accumulating ``dtype``.
    """

    padding = 0  # of a chunk's gradient

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
        # Beside a float64 teacher the logits are wider, and states of another dtype than the weight's would be rounded.
        exact = dtype == torch.float32 and (compute is not None or head.values.dtype == weight.dtype)
        self.mixed = exact and _mixes(weight, compute)
        # The derivative of the softcap is 1 minus a square.
        self.rounded = exact and not head.softcap and _rounds(weight, compute)
        self.weight = weight.to(compute) if (self.mixed or self.rounded) and compute is not None else weight
        self.in_place = not head.softcap  # its derivative needs the logits
        self.chunk = head.values.new_empty(0, num_classes, dtype=torch.bfloat16 if self.rounded else dtype)
        contiguous = partial(torch.empty_like, dtype=dtype, memory_format=torch.contiguous_format)  # as in the fake
        self.hidden_gradient = contiguous(head.values) if wanted[0] else None
        self.weight_gradient = contiguous(head.weight).zero_() if wanted[1] else None
        self.bias_gradient = contiguous(head.bias).zero_() if wanted[2] and head.bias is not None else None

    def gradients(self) -> list[Tensor]:
        """Return the gradients in their stored dtypes, see :func:`empty_gradients`."""
        gradients = (self.hidden_gradient, self.weight_gradient, self.bias_gradient)
        empty = self.head.values.new_empty
        return [
            empty(0) if gradient is None or of is None else gradient.to(_stored_dtype(of, self.dtype))
            for gradient, of in zip(gradients, self.head[:3], strict=True)
        ]

    def logits(self, rows: slice) -> Tensor:
        """Return (rows, classes) in the accumulating dtype, or rounded. The next chunk overwrites them."""
        head, hidden = self.head, self.head.values[rows]
        if self.mixed:
            out: Tensor = torch.mm(hidden.to(self.weight.dtype), self.weight.T, out_dtype=self.dtype)
        else:
            hidden = hidden.to(self.chunk.dtype)
            if len(self.chunk) < len(hidden):
                self.chunk = hidden.new_empty(len(hidden), self.classes)
            out = self.chunk[: len(hidden)]  # all chunks share this memory, so its pages are mapped only once
            if self.rounded and self.bias is not None:
                torch.addmm(self.bias.to(out.dtype), hidden, self.weight.T, out=out)  # rounded once
            else:
                for classes, weight in self._tiles():
                    torch.mm(hidden, weight.T, out=out[:, classes])
        if self.bias is not None and not self.rounded:
            out += self.bias
        if head.softcap:
            return out.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap)
        return out if head.logit_scale == 1.0 else out.mul_(head.logit_scale)

    def take(self, gradient: Tensor, logits: Tensor, factors: Tensor, rows: slice) -> None:
        """Multiply a chunk's gradient of the logits into the head's gradients. It is overwritten. Rows with a factor of
        0 do not count: they have a gradient of 0, whatever they hold."""
        head = self.head
        if head.softcap:
            slope = logits.div_(head.softcap).square_().neg_().add_(1.0)
            gradient.mul_(slope.nan_to_num_(nan=0.0))  # 0 stays 0 in a row that does not count, and NaN stays NaN
        if head.logit_scale != 1.0:
            gradient.mul_(head.logit_scale)
        if self.bias_gradient is not None:
            self.bias_gradient[: self.classes] += gradient.sum(0, dtype=self.dtype)
        hidden = head.values[rows].where((factors != 0)[:, None], 0.0)
        if self.mixed:
            self._take_mixed(gradient, hidden, rows)
            return
        hidden = hidden.to(self.chunk.dtype)
        if self.hidden_gradient is not None:
            product = torch.zeros_like(hidden)
            for classes, weight in self._tiles():
                product.addmm_(gradient[:, classes], weight)
            self.hidden_gradient[rows] = product
        if self.weight_gradient is not None and not self.rounded:
            self.weight_gradient[: self.classes].addmm_(gradient.T, hidden)
        elif self.weight_gradient is not None:
            for first in range(0, self.classes, _CONVERTED):
                classes = slice(first, min(first + _CONVERTED, self.classes))
                self.weight_gradient[classes] += torch.mm(gradient[:, classes].T, hidden)

    def _take_mixed(self, gradient: Tensor, hidden: Tensor, rows: slice) -> None:
        power = None
        if self.weight.dtype == torch.float16 and gradient.numel():
            # A gradient that is divided by the number of rows would underflow in float16.
            largest = gradient.abs().nan_to_num_(nan=0.0, posinf=0.0).amax()
            power = torch.exp2(-torch.frexp(largest).exponent.clamp(min=-100).to(self.dtype))
            gradient = gradient.mul_(power)
        half = gradient.to(self.weight.dtype)
        product: Tensor
        if self.hidden_gradient is not None:
            product = torch.mm(half, self.weight, out_dtype=self.dtype)
            self.hidden_gradient[rows] = product if power is None else product.div_(power)
        if self.weight_gradient is not None:
            product = torch.mm(half.T, hidden.to(half.dtype), out_dtype=self.dtype)
            self.weight_gradient[: self.classes] += product if power is None else product.div_(power)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight in the dtype of a chunk, in one piece if it has that dtype already."""
        dtype = self.chunk.dtype
        step = max(self.classes, 1) if self.weight.dtype == dtype else _CONVERTED
        for first in range(0, self.classes, step):
            classes = slice(first, min(first + step, self.classes))
            yield classes, self.weight[classes].to(dtype)


def maker(
    source: SourceRows, wanted: Sequence[bool], dtype: torch.dtype, num_classes: int, compute: torch.dtype | None = None
) -> Matrix | Products:
    """Return the object that gives the logits of a source's rows and takes their gradient."""
    if source.weight is None:
        return Matrix(source, wanted, dtype, num_classes)
    return Products(source, wanted, dtype, num_classes, compute)

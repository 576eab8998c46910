"""What infinities and NaN do, which the docstring of every loss says in the same words."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_HEAD = "Infinities and NaN:\n"
_SHARED = """A student's logit of -inf is a class that cannot occur: its probability and its gradient are 0, and 0 log 0
is 0. {own} The cross-entropy is +inf where a label other than 0 is there, as label smoothing makes every label. A NaN
or a logit of +inf makes the loss and the gradient of its row NaN, and {others}. An ignored row stays 0, whatever it
holds. A gradient that is 0 stays 0, whatever comes in from above."""
#: Of a loss whose distillation has the logarithm of the student's probabilities.
WITH_A_TEACHER = """A teacher's -inf is a probability of 0. Where the student's is 0 and the teacher's is not, the loss
is +inf."""


def infinities(own: str, others: str = "no other's") -> Callable[[Function], Function]:
    """Puts the section before "Shape:" of a docstring; ``own`` is what this loss does at -inf."""

    def complete(function: Function) -> Function:
        if function.__doc__:  # python -OO has none
            text = " ".join(_SHARED.format(own=" ".join(own.split()), others=others).split())
            body = textwrap.fill(text, width=120, initial_indent=" " * 8, subsequent_indent=" " * 8)
            before, shape, after = function.__doc__.partition("    Shape:\n")
            function.__doc__ = f"{before}    {_HEAD}{body}\n\n{shape}{after}"
        return function

    return complete

"""The ranking alone: fused_kd's argsort against PyTorch's, on a loss's rank keys for the case's inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.forms.spec import OURS, Loss
from benchmarks.measure import machine, timing
from benchmarks.measure.cases import Inputs

SORT = "torch.sort"

Ranking = Callable[[Tensor], Tensor]  # keys (N, C) -> indices by descending key, equal keys by ascending index


def _torch_sort(keys: Tensor) -> Tensor:
    return torch.sort(keys, dim=1, descending=True, stable=True).indices


def _fused_kd(keys: Tensor) -> Tensor:
    from fused_kd.backends import native

    return native.argsort_descending(keys)


def _no_fused_ranking(device: str) -> str | None:
    from fused_kd.backends import native

    if device != "cpu":
        return "on a GPU the ranking is part of other kernels, not a function of its own"
    return native.unavailable(device)


class Bench:
    """Rankings of one case: verified at construction; ``calls`` are timed in turn with the loss's providers."""

    def __init__(self, loss: Loss, inputs: Inputs) -> None:
        assert loss.rank_keys is not None
        self.keys = loss.rank_keys(*inputs[:3])
        self.entries: dict[str, dict[str, Any]] = {}
        self._functions: dict[str, Ranking] = {}
        device = self.keys.device.type
        expected = _torch_sort(self.keys)
        for name, function, reason in (
            (SORT, _torch_sort, None),
            (OURS, _fused_kd, _no_fused_ranking(device)),
        ):
            status = "unavailable" if reason else "ok"
            if reason is None:
                try:
                    if not torch.equal(function(self.keys), expected):
                        status, reason = "wrong", "another order than a stable descending sort of the same keys"
                except Exception as error:  # reported in the result, as for the providers
                    status, reason = "failed", machine.describe(error)
            self.entries[name] = {"name": name, "status": status, "reason": reason}
            if status == "ok":
                self._functions[name] = function

    def calls(self) -> dict[str, Callable[[timing.Samples], None]]:
        timed = timing.plain_timer(self.keys.device.type)

        def call(function: Ranking) -> Callable[[timing.Samples], None]:
            return lambda samples: timed(lambda: function(self.keys), samples)

        return {name: call(function) for name, function in self._functions.items()}


def add_ratios(case: dict[str, Any]) -> None:
    """Add the ranking's speed over torch.sort, and its share of the whole loss, forward and backward."""
    measured = {entry["name"]: entry["times"] for entry in case["ranking"]["entries"] if "times" in entry}
    loss: dict[str, Any] = next(
        (entry["times"] for entry in case["providers"] if entry["name"] == OURS and "times" in entry), {}
    )
    for regime, own in measured.get(OURS, {}).items():
        median = own["milliseconds"]["both"]["median"]
        if SORT in measured:
            own["speedup"] = measured[SORT][regime]["milliseconds"]["both"]["median"] / median
        if regime in loss:
            own["share_of_loss"] = median / loss[regime]["milliseconds"]["both"]["median"]

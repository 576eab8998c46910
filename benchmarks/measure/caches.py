"""Hot and cold caches: calls back to back, or each after other eager work, as in a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure.timing import Samples, quantiles, synchronize, time_in_turn

HOT, COLD = "hot", "cold"
REGIMES = (COLD, HOT)
TARGET, SHORTEST, LONGEST = 5e-3, 3e-3, 8e-3  # seconds of the other work before a cold call
STREAMED_BYTES = 2**26  # more than two cores' L2 and L3 on most processors
BATCH, PIXELS, CHANNELS, BLOCKS = 4, 32, 16, 2
COLD_BLOCK = 0.05  # seconds per block of cold calls, other work included

Calls = dict[str, Callable[[Samples], None]]


class _Network(nn.Module):
    """Small layers of several kinds: many calls, in Python and in the dispatcher, are what empties the caches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
            )
            for _ in range(BLOCKS)
        )
        self.head = nn.Linear(CHANNELS, 4 * CHANNELS)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return F.gelu(self.head(x.mean((2, 3))))


class OtherWork:
    """Work before each cold call: steps of a small network, and a weight average too large for the caches.

    The number of steps is chosen to last about ``TARGET``; ``about`` reports the actual duration.
    """

    def __init__(self, device: str) -> None:
        self.device, self.steps = device, 1
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            self.network = _Network()
            self.images = torch.randn(BATCH, 3, PIXELS, PIXELS)
            # Like weight averaging at the end of a training step: reads both tensors, writes one.
            self.average = torch.zeros(STREAMED_BYTES // 8)
            self.weights = torch.zeros_like(self.average)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-6, momentum=0.9)
        streaming = min(self._seconds(self._stream))
        step = min(self._seconds(self._step))
        self.steps = max(1, round((TARGET - streaming) / step))
        self.taken: list[float] = []  # seconds of each call

    def _stream(self) -> None:
        self.average.lerp_(self.weights, 0.01)
        synchronize(self.device)

    def _step(self) -> None:
        self.optimizer.zero_grad()
        self.network(self.images).sum().backward()
        self.optimizer.step()
        synchronize(self.device)

    def __call__(self) -> None:
        start = time.perf_counter()
        self._stream()
        for _ in range(self.steps):
            self._step()
        self.taken.append(time.perf_counter() - start)

    def _seconds(self, work: Callable[[], None], repeats: int = 15) -> list[float]:
        times = []
        for _ in range(repeats + 3):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return times[3:]

    def about(self) -> dict[str, Any]:
        """Description for the result, with the duration before the calls."""
        return {
            "steps": self.steps,
            "streamed_bytes": STREAMED_BYTES,
            "milliseconds": quantiles(self.taken) if self.taken else None,
        }


def doubts(other_work: dict[str, Any] | None) -> list[str]:
    """A warning if the other work was too long or too short to stand for a training step."""
    milliseconds = other_work and other_work["milliseconds"]
    if milliseconds and not SHORTEST <= milliseconds["median"] / 1e3 <= LONGEST:
        wanted = f"{SHORTEST * 1e3:g} to {LONGEST * 1e3:g}"
        return [f"the other work before a cold call lasted {milliseconds['median']:.1f} ms instead of {wanted}"]
    return []


def time_calls(
    calls: Calls,
    regimes: Sequence[str],
    other_work: OtherWork | None,
    seconds: float,
    min_rounds: int,
    progress: Callable[[float], None],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Number of calls and quantiles in milliseconds, by call and regime; each regime takes ``seconds``."""
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in calls}
    for number, regime in enumerate(regimes):

        def share(done: float, number: int = number) -> None:
            progress((number + done) / len(regimes))

        cold: dict[str, Any] = {"before": other_work, "block_seconds": COLD_BLOCK} if regime == COLD else {}
        samples = time_in_turn(calls, seconds, min_rounds, share, **cold)
        for name, sample in samples.items():
            parts = {part: quantiles(times) for part, times in asdict(sample).items() if times}
            found[name][regime] = {"calls": len(sample.both), "milliseconds": parts}
    return found

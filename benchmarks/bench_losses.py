"""The benchmark's cases for pytest-benchmark: forward + backward of each provider, and the rankings alone.

    pytest benchmarks/bench_losses.py --benchmark-enable --benchmark-group-by=param:loss,param:case

Use this to compare commits: `--benchmark-autosave`, later `--benchmark-compare`. The figures of the README come from
`python -m benchmarks`, which takes the providers in turn. Here they run one after another, so a disturbance of the
machine can favour one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch

from benchmarks.forms.providers import LOSSES
from benchmarks.forms.spec import OURS, Loss, Provider
from benchmarks.measure import agreement, timing
from benchmarks.measure.cases import DEFAULT_DTYPES, Case, Inputs, make_inputs
from benchmarks.measure.ranking import SORT, Bench

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _cases(loss: Loss) -> list[Case]:
    return [Case(*shape, dtype, DEVICE) for dtype in DEFAULT_DTYPES[DEVICE] for shape in loss.shapes[DEVICE]]


@lru_cache(maxsize=1)  # the tests are ordered by case
def _inputs(case: Case, trains_other: bool, positions: int) -> Inputs:
    return make_inputs(case, trains_other=trains_other, positions=positions)


def _name(loss: Loss, case: Case, last: str) -> str:
    return f"{loss.name}-{case.rows}x{case.classes}-{case.dtype}-{last}"


def _parameters() -> Iterator[object]:
    for loss in LOSSES.values():
        for case in _cases(loss):
            for provider in loss.providers:
                yield pytest.param(loss, case, provider, id=_name(loss, case, provider.name))


def _rankings() -> Iterator[object]:
    for loss in LOSSES.values():
        if loss.rank_keys:
            for case in _cases(loss):
                for name in (SORT, OURS):
                    yield pytest.param(loss, case, name, id=_name(loss, case, name))


@pytest.mark.parametrize(("loss", "case", "provider"), list(_parameters()))
def test_forward_backward(benchmark, loss: Loss, case: Case, provider: Provider) -> None:  # type: ignore[no-untyped-def]
    reason = provider.unavailable(case.device)
    if reason and provider.name == OURS:
        pytest.fail(f"fused_kd has no kernel to be timed here: {reason}")
    if reason:
        pytest.skip(reason)
    torch._dynamo.reset()
    inputs = _inputs(case, loss.trains_other, loss.positions)
    function = provider.build()
    if provider.same_loss:
        found = agreement.Judge(loss, inputs).errors(provider, function)
        assert found.within(agreement.tolerance(loss, case, provider)), found

    def step() -> None:
        inputs.drop_gradients()
        function(*inputs[:3]).backward()  # type: ignore[no-untyped-call]
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{loss.name} {case.name}"
    benchmark.extra_info.update(provider=provider.name, inputs=inputs.source)
    benchmark(step)
    inputs.drop_gradients()


@pytest.mark.parametrize(("loss", "case", "name"), list(_rankings()))
def test_ranking(benchmark, loss: Loss, case: Case, name: str) -> None:  # type: ignore[no-untyped-def]
    bench = Bench(loss, _inputs(case, loss.trains_other, loss.positions))
    entry = bench.entries[name]
    if entry["status"] == "unavailable" and DEVICE == "cuda":
        pytest.skip(entry["reason"])
    assert entry["status"] == "ok", entry["reason"]
    benchmark.group = f"{loss.name} ranking {case.name}"
    benchmark(bench.calls()[name], timing.Samples())

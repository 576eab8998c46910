"""Fixtures of the tests of direct and repeated calls."""

import pytest

from fused_kd import direct


@pytest.fixture
def watch(monkeypatch):
    """A function that watches a module's ``loss``: of each call, whether it returned a loss."""

    def of(module):
        seen, loss = [], module.loss

        def watched(*given):
            made = loss(*given)
            seen.append(made is not None)
            return made

        monkeypatch.setattr(module, "loss", watched)
        return seen

    return of


@pytest.fixture
def taken(watch):
    """Of each call whether it was ordinary."""
    return watch(direct)

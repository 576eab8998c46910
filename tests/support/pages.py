"""The snippets of a page of docs/, each a block of code under a comment with its name, for tests that run them."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


def snippets(page):
    """Source by name, in the page's order."""
    text = (DOCS / page).read_text()
    return dict(re.findall(r"<!-- (\w+) -->\n```python\n(.*?)```", text, flags=re.DOTALL))


def run_snippet(page, name):
    """The names that a snippet defines."""
    namespace = {"__name__": f"{page.removesuffix('.md')}_{name}"}
    exec(compile(snippets(page)[name], f"{page}:{name}", "exec"), namespace)
    return namespace


def needs(*modules):
    """Skip unless they are installed. timm, torchdistill and transformers import torchvision if it is there, which a
    build for another PyTorch than the one here breaks by two operators that it does not find: none of them is used."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if importlib.util.find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for operator in ("nms", "qnms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{operator}", schema)
            importlib.import_module("torchvision")


def untouched(teacher, before):
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module, before):
    return any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())

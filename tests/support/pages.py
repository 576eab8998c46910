"""The blocks of Python on the pages of docs/: those under a comment with a name, for tests that run them one by one."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
_NAMED = re.compile(r"<!-- (\w+) -->\n```python\n(.*?)```", flags=re.DOTALL)


def snippets():
    """Source by name, of all pages: a name stands once."""
    found = [named for page in PAGES for named in _NAMED.findall(page.read_text(encoding="utf-8"))]
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


def snippet(name):
    return snippets()[name]


def run_snippet(name):
    """The names that a snippet defines."""
    namespace = {"__name__": f"docs_{name}"}
    exec(compile(snippet(name), f"docs: {name}", "exec"), namespace)
    return namespace


def unnamed(page):
    """The other blocks of a page, which run one after the other."""
    text = _NAMED.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


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


def training_arguments(folder, **options):
    """Arguments of transformers' Trainer: one epoch of plain SGD on the CPU, two rows at a time."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )

"""The README: its first examples run as they are pasted, and what comes first stands first."""

import re
from pathlib import Path

import torch

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_first_examples_run_as_pasted():
    names = {}
    first, module = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[:2]
    exec(compile(first, "README.md", "exec"), names)
    assert names["student_logits"].grad.abs().sum() > 0
    loss = names["loss"].detach()
    exec(compile(module, "README.md, the module", "exec"), names)
    torch.testing.assert_close(names["loss"].detach(), loss)
    torch.testing.assert_close(sum(names["parts"]), loss)
    (sources,) = (block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "import Head" in block)
    exec(compile(sources, "README.md, sources", "exec"), names)
    assert names["head"].weight.grad.abs().sum() > 0


def test_installing_and_what_ran_on_a_gpu_stand_first():
    assert TEXT.index("pip install .") < TEXT.index("```python")
    first = re.search(r"\bGPU|CUDA|Triton", TEXT)
    assert TEXT[: first.start()].endswith("**"), "the paragraph that says what ran on a GPU"

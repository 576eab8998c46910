"""Random calls in float64: whatever options, sources, layouts and odd values come together, a backend gives the
reference's loss, parts and gradients."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

import fused_kd
from fused_kd import Head, TopK, check
from fused_kd.core.catalogue import LOSSES

CALLS = 120  # of each loss
SHARED = {
    "ce_weight": (0.0, 0.5, 1.0),
    "label_smoothing": (0.0, 0.1),
    "reduction": ("mean", "sum", "none"),
    "temperature": (0.7, 1.0, 2.0, 3.3),
    "logit_standardization": (False, False, True),
}
OWN = {
    "nkd": {"gamma": (0.0, 1.5)},
    "uskd": {
        "alpha": (0.0, 1.0),
        "beta": (0.0, 0.1),
        "mu": (0.0, 0.005),
        "rank": ("normalized", "cls_kd", "weak", "final", "sum"),
        "square": (True, False),
    },
    "dkd": {"alpha": (0.0, 1.0), "beta": (0.0, 8.0)},
    "wsld": {"alpha": (0.0, 2.25)},
    "tf_kd": {"correct": (0.9, 0.99)},
    "js": {"beta": (0.0, 0.1, 0.5, 1.0)},
    "dist": {"beta": (0.0, 2.0), "gamma": (0.0, 2.0)},
    "zipf_ls": {"beta": (0.1, 1.0), "power": (0.5, 2.0)},
}


def odd_values(logits, kind):
    """Logits with one kind of odd values."""
    logits, row = logits.clone(), random.randrange(len(logits))
    if kind == "impossible classes":
        logits[torch.rand(logits.shape) < 0.2] = -math.inf
    elif kind == "an impossible row":
        logits[row] = -math.inf
    elif kind == "constant rows":
        logits[:] = logits[..., :1]
    elif kind == "far from zero":
        logits += 1000
    elif kind in ("nan", "inf"):
        logits[row, ..., random.randrange(logits.shape[-1])] = float(kind)
    return logits


class Call:
    """A call of a loss that a seed determines; ``run`` makes it with a backend."""

    def __init__(self, name, seed):
        random.seed(seed)
        torch.manual_seed(seed)
        choose = random.choice
        self.name, self.seed = name, seed
        rows = choose(((1,), (2,), (5,), (8,), (3, 2)))
        classes = choose((2, 3, 4, 7, 16, 33, 100, 257, 2049))
        kinds = ["none"] * 6 + ["impossible classes", "an impossible row", "constant rows", "far from zero"]
        self.student = odd_values(torch.randn(*rows, classes, dtype=torch.float64) * 2, choose([*kinds, "nan", "inf"]))
        self.other = odd_values(torch.randn(*rows, classes, dtype=torch.float64) * 2, choose(kinds[:7]))
        labels = torch.randint(classes, rows)
        self.options = {key: choose(values) for key, values in (SHARED | OWN.get(name, {})).items()}
        if name in ("uskd", "zipf_ls", "tf_kd"):
            del self.options["logit_standardization"]
            if name != "tf_kd":
                del self.options["temperature"]
        self.target = torch.where(torch.rand(rows) < choose((0.0, 0.4)), -100, labels)
        if random.random() < 0.25:
            share = choose((0.7, 0.5, 1.0))  # mixed, tied, one-hot
            mixed = share * F.one_hot(labels, classes) + (1 - share) * F.one_hot(torch.randint(classes, rows), classes)
            self.target = choose((mixed.double(), torch.randn(*rows, classes).double().softmax(-1)))
        if random.random() < 0.3:
            self.options["weight"] = torch.rand(rows) * (torch.rand(rows) < 0.7)
        if self.options["reduction"] == "mean" and random.random() < 0.3:
            self.options["normalizer"] = choose((0.0, 3.0, torch.tensor(7.0)))
        sources = [] if name == "zipf_ls" else ["head", *(["topk", "both"] if name not in ("uskd", "tf_kd") else [])]
        self.source = choose(("plain", "plain", *sources))
        if self.source in ("topk", "both"):
            self.options["logit_standardization"] = False
        self.rest = choose(("drop", "renormalize", "bucket", "uniform"))
        self.kept, self.pads = random.randrange(1, min(classes - 1, 20) + 1), choose((0.0, 0.3))
        self.head = {"chunk_rows": choose((None, 1, 2)), "softcap": choose((None, 5.0)), "logit_scale": 0.7}
        self.turned = self.source == "plain" and name != "zipf_ls" and len(rows) == 2 and random.random() < 0.5
        padded = self.source == "plain" and not self.turned and name not in ("uskd", "zipf_ls")
        self.padding = (random.randrange(6), random.randrange(6)) if padded and random.random() < 0.5 else None
        self.incoming = choose((0.0, 1.0, 2.5))

    def run(self, backend):
        """Return the loss, its parts and the gradients of all leaves."""
        torch.manual_seed(self.seed)
        shape, dtype = self.student.shape, torch.float64
        student, other, target = self.student.clone().requires_grad_(), self.other.clone(), self.target
        leaves, options = [student], dict(self.options, backend=backend, return_parts=True)
        if self.name == "uskd":
            leaves.append(other.requires_grad_())
        if self.padding:
            options["num_classes"] = shape[-1]
            leaves[0] = student = F.pad(self.student, (0, self.padding[0]), value=math.nan).requires_grad_()
            other = F.pad(other, (0, self.padding[1]), value=math.inf)
        if self.turned:
            options["class_dim"] = 1
            student, other = student.mT, other.mT
            target = target.mT if target.is_floating_point() else target
        if self.source in ("head", "both"):
            hidden, weight = torch.randn(*shape[:-1], 5, dtype=dtype), torch.randn(shape[-1], 5, dtype=dtype)
            leaves[0] = hidden.requires_grad_()
            leaves += [weight.requires_grad_(), torch.randn(shape[-1], dtype=dtype, requires_grad=True)]
            student = Head(hidden, weight, leaves[-1], **self.head)
        if self.source in ("topk", "both"):
            possible = other.nan_to_num(neginf=-30.0)
            log_probs, indices = possible.log_softmax(-1).topk(self.kept)
            order = torch.rand(log_probs.shape).argsort(-1)
            pad = torch.rand(log_probs.shape) < self.pads
            pad[..., 0] = False  # no row of pads alone
            log_probs, indices = log_probs.gather(-1, order), indices.gather(-1, order)
            other = TopK(log_probs.where(~pad, math.nan), indices.where(~pad, -1), self.rest)
        if self.name == "zipf_ls":
            other = torch.randn(*shape[:1], 4, shape[-1], dtype=dtype)
            student, target = (each if len(shape) == 2 else each[:, 0] for each in (student, target))
            if "weight" in options and len(shape) == 3:
                options["weight"] = options["weight"][:, 0]
        given = (student, target) if self.name == "tf_kd" else (student, other, target)
        loss, parts = getattr(fused_kd, LOSSES[self.name].function)(*given, **options)
        loss.backward(torch.full_like(loss, self.incoming))
        return [loss.detach(), *(part.detach() for part in parts)], [leaf.grad for leaf in leaves]

    def __str__(self):
        return f"seed {self.seed}: {self.name} {tuple(self.student.shape)} {self.source} {self.rest} {self.options}"


def assert_close(ours, exact, call):
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), call
    scale = float(exact[finite].abs().max()) if finite.any() else 0.0
    assert bool(((ours - exact)[finite].abs() <= 1e-8 * max(scale, 1e-3)).all()), call


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", [each for each in check.runnable("cpu", "nkd") if each == "native"])
def test_a_random_call_is_the_references(backend, name):
    alike = 0
    for seed in range(CALLS):
        call = Call(name, seed)
        try:
            values, gradients = call.run("reference")
        except (ValueError, NotImplementedError) as error:  # a rest without a meaning
            with pytest.raises(type(error)):
                call.run(backend)
            continue
        try:
            found = call.run(backend)
        except RuntimeError as error:
            if "no kernel supports that" in str(error):
                continue
            raise
        assert_close(found[0][0], values[0], call)
        if values[0].isfinite().all():
            for ours, exact in zip(found[0][1:], values[1:], strict=True):
                assert_close(ours, exact, call)
        for ours, exact in zip(found[1], gradients, strict=True):
            assert_close(ours, exact, call)
        alike += 1
    assert alike >= CALLS // 2

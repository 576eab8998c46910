"""What the processes of a group do in the tests of sharded classes: each makes the whole rows from one seed,
passes its own columns to a loss, and compares what it gets with what one process has of all."""

import inspect
import itertools
import warnings
from typing import Any, NamedTuple

import interpreter
import pytest
import torch
from torch import distributed
from torch.nn.functional import one_hot

import fused_kd
from fused_kd import ClassShard, Head, TopK, check
from fused_kd.backends import shards, sources
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES

INF = float("inf")
LABELS = torch.tensor([[3, 39, 0], [7, 7, 21]])
TOLERANCE = {"rtol": 1e-11, "atol": 1e-11, "equal_nan": True}


class Rows(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor
    target: torch.Tensor
    options: dict[str, Any]


def function(loss):
    return getattr(fused_kd, LOSSES[loss].function)


def columns(rank, widths):
    first = sum(widths[:rank])
    return slice(first, first + widths[rank])


def variants(loss):
    """By name: what a call is of."""
    own = {"gamma": 0.0} if loss == "dist" else {}
    parameters = inspect.signature(function(loss)).parameters
    full = own | {"ce_weight": 1.0, "label_smoothing": 0.1, "temperature": 3.0}
    yield "plain", make(11, **own)
    yield "one temperature", make(11, **own, temperature=1.0, ce_weight=1.0)
    yield "everything", make(11, **full, weighted=True)
    yield "probabilities", make(11, **full, labels=True, weighted=True)
    yield "ties of probabilities", make(11, **own, labels=True, tied=True)
    yield "probabilities and a normalizer", make(11, **own, labels=True, normalizer=3.0)
    yield "none", make(11, **full, reduction="none", weighted=True)
    yield "sum", make(11, **own, reduction="sum", rows=(2, 3))
    yield "no row counts", make(11, **own, ignored=6)
    yield "no rows", make(11, **own, rows=(0,))
    yield "no rows of probabilities", make(11, **own, rows=(0,), labels=True)
    yield "impossible", make(11, **own, impossible=0.4, ce_weight=1.0)
    yield "impossible probabilities", make(11, **own, impossible=0.4, ce_weight=1.0, labels=True)
    yield "NaN", make(11, **own, nan=True, reduction="none")
    yield "spread", make(11, **full, spread=40.0)
    yield "many", make(3000, **full)
    if "logit_standardization" in parameters:
        yield "z-scores", make(11, **full, logit_standardization=True)
        yield "z-scores, probabilities", make(11, **full, logit_standardization=True, labels=True, impossible=0.3)
    if loss == "js":
        yield "reverse KD", make(11, beta=1.0, temperature=2.0)
        yield "KD", make(11, beta=0.0, temperature=2.0)
    if "target" in parameters and parameters["target"].default is None:
        yield "no target", make(11, **own)._replace(target=None)


def make(
    classes, *, rows=(6,), spread=2.0, labels=False, tied=False, weighted=False, ignored=1, impossible=0.0, nan=False,
    **options: Any,
):  # fmt: skip
    generator = torch.Generator().manual_seed(classes)
    shape = (*rows, classes)
    student, teacher = (spread * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "st")
    target = torch.randint(classes, rows, generator=generator)
    if impossible and target.numel():
        gone = torch.rand(shape, generator=generator) < impossible
        gone[..., 0] = False  # no row without a class
        gone[1, 1:] = True  # and on some processes one with none
        student[gone], teacher[gone] = -INF, -INF
        target[gone.gather(-1, target[..., None])[..., 0]] = 0
    if nan:
        student[2, -1] = torch.nan
    if labels:
        target = torch.rand(shape, generator=generator, dtype=torch.float64).mul(4).softmax(-1)
        target = target.masked_fill(student == -INF, 0.0)
        if tied:
            target[..., 2] = target[..., -2] = 2.0
        target /= target.sum(-1, keepdim=True)
    else:
        target.view(-1)[:ignored] = -100
    if weighted:
        options["weight"] = 2.0 * torch.rand(rows, generator=generator, dtype=torch.float64)
        options["weight"].view(-1)[-1:] = 0.0
    return Rows(student, teacher, target, options)


def called(loss, backend, student, teacher, target, options):
    """Loss and parts; the gradient is where it belongs."""
    others = [] if loss == "tf_kd" else [teacher]
    value, parts = function(loss)(student, *others, target, backend=backend, return_parts=True, **options)
    value.sum().backward()
    return [value.detach(), *parts]


def whole(loss, backend, problem):
    student = problem.student.clone().requires_grad_()
    return *called(loss, backend, student, *problem[1:]), student.grad


def sharded(loss, backend, problem, rank, widths):
    student, teacher, target, options = problem
    own = columns(rank, widths)
    leaf = student[..., own].clone().requires_grad_()
    span = (own.start, sum(widths))
    if target is not None and target.is_floating_point():
        target = target[..., own]
    found = called(loss, backend, ClassShard(leaf, *span), ClassShard(teacher[..., own], *span), target, options)
    return *found, leaf.grad


def compare(found, exact, own, name):
    """What is wrong, to be raised at the end: the other processes go on."""
    *exact, gradient = exact
    try:
        torch.testing.assert_close([*found], [*exact, gradient[..., own]], **TOLERANCE)
    except AssertionError as error:
        return [f"{name}: {error}"]
    return []


def widths_of(world, classes):
    """Uneven ones, among them 1 and 0."""
    if world == 2:
        return [(4, classes - 4), (1, classes - 1), (0, classes)]
    return [(4, 1, classes - 5), (2, classes - 2, 0)]


def all_variants(rank, world, loss, backend):
    """Compared with the eager reference of whole rows."""
    done, wrong = [], []
    for name, problem in variants(loss):
        exact = whole(loss, "reference", problem)
        for widths in widths_of(world, problem.student.shape[-1]):
            found = sharded(loss, backend, problem, rank, widths)
            wrong += compare(found, exact, columns(rank, widths), f"{name}, {widths}")
        same = shards.gathered(found[0].reshape(-1), distributed.group.WORLD)
        wrong += [] if all(torch.equal(same[0].nan_to_num(), each.nan_to_num()) for each in same) else [name]
        done.append(name)
    assert not wrong, "\n".join(wrong)
    return done


def narrow(rank, world, loss, dtype):
    """As near to float64 as the eager reference of whole rows in that dtype, and a few units."""
    problem = make(3000, temperature=3.0, ce_weight=1.0, **({"gamma": 0.0} if loss == "dist" else {}))
    problem = problem._replace(student=problem.student.to(dtype), teacher=problem.teacher.to(dtype))
    wide = problem._replace(student=problem.student.double(), teacher=problem.teacher.double())
    exact, eager = whole(loss, "reference", wide), whole(loss, "reference", problem)
    widths = widths_of(world, 3000)[0]
    own = columns(rank, widths)
    slack = check._SLACK_ULPS[torch.float32] * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    found = sharded(loss, "native", problem, rank, widths)
    eager, exact = ([*each[:-1], each[-1][..., own]] for each in (eager, exact))
    for ours, theirs, right in zip(found, eager, exact, strict=True):
        size = right.abs().amax().clamp(min=1e-30)
        error, budget = ((each.double() - right).abs().amax() / size for each in (ours, theirs))
        assert error <= budget + slack, (float(error), float(budget))


def interpreted(rank, world, loss):
    interpreter.quicken(pytest.MonkeyPatch())
    for labels in (False, True):
        problem = make(11, temperature=2.0, ce_weight=1.0, labels=labels, **({"gamma": 0.0} if loss == "dist" else {}))
        widths = widths_of(world, 11)[-1 if labels else 0]
        found = sharded(loss, "triton", problem, rank, widths)
        wrong = compare(found, whole(loss, "reference", problem), columns(rank, widths), "triton")
        assert not wrong, wrong


def heads(rank, world, backend, dtype):
    """The whole head in one process, its hidden states' gradient on all, and of weight and bias what is here."""
    generator = torch.Generator().manual_seed(1)
    problem = make(11, rows=(2, 3), weighted=True, temperature=2.0, ce_weight=1.0)
    for reduction, widths in itertools.product(("mean", "none"), widths_of(world, 11)):
        given = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 5), (11, 5), (11,))]
        of_teacher = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 4), (11, 4))]
        options = problem.options | {"reduction": reduction}
        own, results = columns(rank, widths), []
        numbers = {"softcap": 8.0, "logit_scale": 1.5}
        for cut in (slice(0, 11), own):
            hidden, weight, bias = (each.to(dtype) for each in given)
            leaves = [hidden.clone().requires_grad_(), *(each[cut].clone().requires_grad_() for each in (weight, bias))]
            student = Head(*leaves, **numbers, chunk_rows=4)
            teacher = Head(of_teacher[0].to(dtype), of_teacher[1][cut].to(dtype))
            if cut is own:
                student, teacher = (ClassShard(each, own.start, 11) for each in (student, teacher))
            found = called("nkd", backend, student, teacher, problem.target, options)
            results.append([*found, leaves[0].grad, *(each.grad for each in leaves[1:])])
        right = [*results[0][:-2], *(each[own] for each in results[0][-2:])]
        tolerance = TOLERANCE if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-3}
        for ours, exact in zip(results[1], right, strict=True):
            torch.testing.assert_close(ours, exact, **tolerance)


def chunks(rank, world):
    """As many on every process, though one has the most classes by far, and a budget for a few rows."""
    budget, sources.CHUNK_BYTES["cpu"] = sources.CHUNK_BYTES["cpu"], 4096
    try:
        hidden, weight = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
        exact = fused_kd.tf_kd_loss(hidden @ weight.T, torch.arange(40))
        own = columns(rank, (3, 37) if world == 2 else (1, 3, 36))
        shard = ClassShard(Head(hidden, weight[own]), own.start, 40)
        torch.testing.assert_close(fused_kd.tf_kd_loss(shard, torch.arange(40)), exact)
    finally:
        sources.CHUNK_BYTES["cpu"] = budget


def bytes_per_row(rank, world):
    """By loss and variant, what a process gives the others of a row."""
    name = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"
    gather, sent = getattr(distributed, name), []

    def counted(into, own, group):
        sent.append(own.numel() * own.element_size())
        return gather(into, own, group)

    setattr(distributed, name, counted)
    found = {}
    try:
        for loss in ROW_LOSSES:
            for kind, problem in variants(loss):
                if kind not in ("everything", "probabilities", "z-scores", "z-scores, probabilities"):
                    continue
                totals = []
                for rows in (2, 6):
                    sent.clear()
                    cut = {key: value[:rows] if key == "weight" else value for key, value in problem.options.items()}
                    some = Rows(*(each[:rows] for each in problem[:3]), cut)
                    sharded(loss, "native", some, rank, widths_of(world, 11)[0])
                    totals.append(sum(sent))
                found[loss, kind] = (totals[1] - totals[0]) / 4
    finally:
        setattr(distributed, name, gather)
    return found


class WithItsLoss(torch.nn.Module):
    """A network whose loss takes its last layer as a Head: DDP sees the gradients of all its parameters."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(5, 8), torch.nn.Linear(8, 40)

    def forward(self, inputs, teacher, target, normalizer):
        head = Head(self.body(inputs).tanh(), self.head.weight, self.head.bias, chunk_rows=2)
        return fused_kd.nkd_loss(head, teacher, target, normalizer=normalizer)


def head_under_ddp(rank, size):
    """The gradients are those of one process with the rows of all: a normalizer of all rows, and DDP's mean."""
    torch.manual_seed(0)
    network = WithItsLoss().double()
    inputs, teacher = (torch.randn(3 * size, width, dtype=torch.float64) for width in (5, 40))
    target = torch.randint(40, (3 * size,))
    own = slice(3 * rank, 3 * rank + 3)
    expected = torch.autograd.grad(network(inputs, teacher, target, 3 * size), [*network.parameters()])
    wrapped = torch.nn.parallel.DistributedDataParallel(network)
    wrapped(inputs[own], teacher[own], target[own], 3).backward()
    torch.testing.assert_close([each.grad for each in network.parameters()], [*expected])


class ItsHead(WithItsLoss):
    """A network that returns its last layer as a Head."""

    def forward(self, inputs):
        return Head(self.body(inputs).tanh(), self.head.weight, self.head.bias)


def head_from_ddp(rank, size):
    """DDP averages the gradients of a Head that it returns, with static_graph too, where it looks for tensors."""
    inputs, teacher = (torch.randn(size, 3, width, generator=torch.Generator().manual_seed(0)) for width in (5, 40))
    for options in ({}, {"static_graph": True}):
        torch.manual_seed(0)
        network = ItsHead()
        expected = torch.autograd.grad(fused_kd.nkd_loss(network(inputs), teacher, LABELS), [*network.parameters()])
        wrapped = torch.nn.parallel.DistributedDataParallel(network, **options)
        fused_kd.nkd_loss(wrapped(inputs[rank]), teacher[rank], LABELS[rank]).backward()
        torch.testing.assert_close([each.grad for each in network.parameters()], [*expected])


def head_of_fsdp(rank, size):
    """Outside the forward pass, FSDP leaves each process a part of the weight: both of its versions get the advice."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import init_device_mesh

    teacher = torch.randn(3, 40)
    networks = ItsHead(), ItsHead()
    fully_shard(networks[0], mesh=init_device_mesh("cpu", (size,)))
    FullyShardedDataParallel(networks[1], device_id=torch.device("cpu"), use_orig_params=True)
    for network in networks:
        head = Head(torch.randn(3, 8), network.head.weight)
        with pytest.raises((TypeError, ValueError), match="weight only in the forward pass of the module"):
            fused_kd.nkd_loss(head, teacher, LABELS[0])


def kept_classes(rank, size, backend):
    """A top-k teacher beside shards of the student's logits, and of its head; and what was kept may be wrong."""
    if backend == "triton":
        interpreter.quicken(pytest.MonkeyPatch())
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 5), (31, 5), (6, 31))
    )
    target, weights = torch.randint(31, (6,), generator=generator), torch.rand(6, generator=generator)
    target[1], weights[2] = -100, 0.0
    options = {"temperature": 2.0, "ce_weight": 1.0, "label_smoothing": 0.1, "weight": weights, "reduction": "none"}
    cases = (("nkd", "bucket"), ("kd", "uniform"), ("dkd", "drop"), ("js", "uniform"), ("wsld", "renormalize"))
    for (loss, rest), widths in zip(cases, 5 * widths_of(size, 31), strict=False):
        kept, own = TopK(*teacher.log_softmax(1).topk(6), rest=rest), columns(rank, widths)
        for head in (False, True):
            results = []
            for cut in (slice(0, 31), own):
                leaves = [hidden, weight[cut]] if head else [hidden @ weight[cut].T]
                leaves = [each.clone().requires_grad_() for each in leaves]
                student = Head(*leaves, chunk_rows=4) if head else leaves[0]
                student = student if cut is not own else ClassShard(student, own.start, 31)
                found = called(loss, "reference" if cut is not own else backend, student, kept, target, options)
                results.append([*found, *(each.grad for each in leaves)])
            right = [*results[0][:-1], results[0][-1][own] if head else results[0][-1][:, own]]
            torch.testing.assert_close(results[1], right, **TOLERANCE)
    own = columns(rank, widths_of(size, 31)[0])
    labels = 0.7 * one_hot(target.clamp(min=0), 31).double() + 0.3 * one_hot(kept.indices[:, 0], 31)
    whole, shard = (hidden @ weight.T).requires_grad_(), (hidden @ weight[own].T).requires_grad_()
    for rest in ("renormalize", "bucket"):
        kept, whole.grad, shard.grad = TopK(kept.log_probs, kept.indices, rest), None, None
        exact = called("wsld", "reference", whole, kept, labels, options)
        given = "wsld", ClassShard(shard, own.start, 31), kept, labels[:, own], options
        if rest == "bucket":
            with pytest.raises(RuntimeError, match="and probability targets of sharded classes"):
                called(given[0], "native", *given[1:])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore" if rest == "bucket" else "error", "fused_kd runs")
            found = called(given[0], "auto" if rest == "bucket" else backend, *given[1:])
        torch.testing.assert_close([*found, shard.grad], [*exact, whole.grad[:, own]], **TOLERANCE)
    kept.indices[3, 0] = kept.indices[3, 1]
    shard = ClassShard(hidden @ weight[own].T, own.start, 31)
    if backend == "triton":
        assert fused_kd.kd_loss(shard, kept, target, backend=backend, reduction="none").isnan().tolist()[3]
    else:
        with pytest.raises(ValueError, match="indices: expected each class once"):
            fused_kd.kd_loss(shard, kept, target, backend=backend)

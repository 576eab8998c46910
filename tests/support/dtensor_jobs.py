"""What the processes of a group do in the tests of DTensors, of errors and of compiled calls; see shard_jobs."""

import shard_jobs
import torch
from shard_jobs import Rows, called, columns, compare, make, whole
from torch import distributed

import fused_kd
from fused_kd import ClassShard, Head, TopK, nkd_loss


def of_classes(rank, world, loss, backend):
    """One dimension of the mesh, chunks as DTensor makes them, some without a class; targets of every kind."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, wrong = init_device_mesh("cpu", (world,)), []
    own_options = {"gamma": 0.0} if loss == "dist" else {}
    for classes, labels, rows, placed in (
        (11, False, (6,), False),
        (11, True, (2, 3), True),
        (7, False, (2, 3), True),
        (4, True, (6,), False),
    ):
        problem = make(classes, rows=rows, labels=labels, weighted=True, ce_weight=1.0, **own_options)
        student, teacher = (distribute_tensor(each, mesh, [Shard(-1)]) for each in problem[:2])
        first = sum(map(len, torch.arange(classes).chunk(world)[:rank]))
        own = slice(first, first + student.to_local().shape[-1])
        student.requires_grad_()
        target, options = problem.target, problem.options
        if placed:
            target = distribute_tensor(target, mesh, [Shard(-1) if labels else Replicate()])
            options = options | {"weight": distribute_tensor(options["weight"], mesh, [Replicate()])}
        elif labels:
            target = target[..., own]
        value = called(loss, backend, student, teacher, target, options)
        assert student.grad.placements == (Shard(student.dim() - 1),), student.grad.placements
        assert type(value[0]) is torch.Tensor
        exact = whole(loss, "reference", problem)
        wrong += compare((*value, student.grad.to_local()), exact, own, f"{classes} {labels}")
    assert not wrong, wrong


def two_dimensions(rank, world):
    """Rows over one dimension of a mesh of 2 by 2, classes over the other: the mean is over the rows that are here."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, wrong = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")), []
    for rows_placed, labels in ((Shard(0), False), (Shard(0), True), (Replicate(), False)):
        problem = make(7, rows=(6,), labels=labels, weighted=True, ce_weight=1.0)
        placements = [rows_placed, Shard(-1)]
        student, teacher = (distribute_tensor(each, mesh, placements) for each in problem[:2])
        student.requires_grad_()
        target = distribute_tensor(problem.target, mesh, placements if labels else [rows_placed, Replicate()])
        weight = distribute_tensor(problem.options["weight"], mesh, [rows_placed, Replicate()])
        value = called("nkd", "native", student, teacher, target, problem.options | {"weight": weight})
        here = slice(None) if rows_placed == Replicate() else slice(3 * (rank // 2), 3 * (rank // 2) + 3)
        cut = problem.options | {"weight": problem.options["weight"][here]}
        exact = whole("nkd", "reference", Rows(*(each[here] for each in problem[:3]), cut))
        own = slice(0, 4) if rank % 2 == 0 else slice(4, 7)
        wrong += compare((*value, student.grad.to_local()), exact, own, f"{rows_placed} {labels}")
        assert student.grad.placements == student.placements
    assert not wrong, wrong
    over_both = distribute_tensor(problem.student, mesh, [Shard(1), Shard(1)])
    return [_said(lambda: nkd_loss(over_both, over_both, problem.target))]


def _said(call):
    """What a call says that raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused_dtensors(rank, world):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    problem = make(8)
    student, teacher = (distribute_tensor(each, mesh, [Shard(-1)]) for each in problem[:2])
    of_rows = distribute_tensor(problem.student, mesh, [Shard(0)])
    replicated = distribute_tensor(problem.student, mesh, [Replicate()])
    target = problem.target
    value = nkd_loss(replicated.requires_grad_(), problem.teacher, distribute_tensor(target, mesh, [Replicate()]))
    value.backward()
    torch.testing.assert_close(value, nkd_loss(problem.student, problem.teacher, target))
    assert replicated.grad.placements == (Replicate(),)

    # Beside plain logits what is replicated is what it is.
    def placed(tensor):
        return distribute_tensor(tensor, mesh, [Replicate()])

    ones = torch.ones(6)
    for given in ((placed(target), None), (target, placed(ones)), (placed(target), placed(ones))):
        found = nkd_loss(problem.student, problem.teacher, given[0], weight=given[1])
        torch.testing.assert_close(found, nkd_loss(problem.student, problem.teacher, target))
    rows = (problem.student, problem.teacher, target)
    dense = torch.stack([problem.teacher] * 2, 1)
    module = fused_kd.USKDLoss(8, 8).double()
    whole_only = {}
    for name, call, given, other in (
        ("uskd_loss", fused_kd.uskd_loss, rows, "weak_logits"),
        ("uskd_soft_labels", fused_kd.uskd_soft_labels, rows, "weak_logits"),
        ("zipf_ls_loss", fused_kd.zipf_ls_loss, (rows[0], dense, target), "dense_logits"),
        ("decompose", fused_kd.decompose, rows, "teacher_logits"),
        ("USKDLoss", module, rows, "feature"),
    ):
        for at, argument in enumerate(("student_logits", other, "target")):
            wrong = [placed(each) if at == place else each for place, each in enumerate(given)]
            whole_only[f"{name} {argument}"] = _said(lambda call=call, wrong=wrong: call(*wrong))
    partial = DTensor.from_local(problem.student, mesh, [Partial()])
    square = distribute_tensor(torch.randn(2, 8, 3, 3), mesh, [Shard(1)])
    return {
        "partial": _said(lambda: nkd_loss(partial, partial, target)),
        "rows": _said(lambda: nkd_loss(of_rows, of_rows, target)),
        "plain teacher": _said(lambda: nkd_loss(student, problem.teacher, target)),
        "teacher elsewhere": _said(lambda: nkd_loss(student, replicated.detach(), target)),
        "plain student": _said(lambda: nkd_loss(problem.student, teacher, target)),
        "target of rows": _said(lambda: nkd_loss(student, teacher, distribute_tensor(target, mesh, [Shard(0)]))),
        "classes inside": _said(lambda: nkd_loss(square, square, torch.zeros(2, 3, 3).long(), class_dim=1)),
        "head": _said(lambda: nkd_loss(Head(student, student), Head(teacher, teacher), target)),
        "teacher with gradient": _said(lambda: nkd_loss(student, teacher.detach().requires_grad_(), target)),
        "padding": _said(lambda: nkd_loss(student, teacher, target, num_classes=7)),
        "normalizer": _said(lambda: nkd_loss(student, teacher, target, normalizer=placed(torch.tensor(3.0)))),
        "plain logits, target of rows": _said(
            lambda: nkd_loss(problem.student, problem.teacher, distribute_tensor(target, mesh, [Shard(0)]))
        ),
        "indices": _said(
            lambda: nkd_loss(problem.student, TopK(problem.teacher[:, :1], placed(target[:, None]), "drop"), target)
        ),
        **whole_only,
        "in a shard": _said(lambda: nkd_loss(ClassShard(student, 0, 8), ClassShard(student, 0, 8), target)),
    }


def refused(rank, world):
    """Messages by what is wrong; a call that is right comes after each, since no process may be left behind."""
    problem = make(10)
    own = columns(rank, shard_jobs.widths_of(world, 10)[0])
    student, teacher = (each[:, own] for each in problem[:2])
    alone = distributed.new_group([0])
    right = ClassShard(student, own.start, 10), ClassShard(teacher, own.start, 10)
    exact = nkd_loss(*problem[:3])

    def shards(first=own.start, number=10, **others):
        return [ClassShard(each, first, number, **others) for each in (student, teacher)]

    bad_target = problem.target.clone()
    bad_target[2] = 10
    labels = torch.full((6, 10), 0.1)
    labels[1] *= 2
    calls = {
        "gap": lambda **x: nkd_loss(*shards(number=11), problem.target, **x),
        "overlap": lambda **x: nkd_loss(*shards(first=own.start - rank), problem.target, **x),
        "negative": lambda **x: nkd_loss(*shards(first=own.start - 1), problem.target, **x),
        "numbers": lambda **x: nkd_loss(*shards(number=10 + rank), problem.target, **x),
        "target": lambda **x: nkd_loss(*right, bad_target, **x),
        "labels": lambda **x: nkd_loss(*right, labels[:, own], ce_weight=1.0, **x),
        "teacher": lambda **x: nkd_loss(right[0], teacher, problem.target, **x),
        "teacher's place": lambda **x: nkd_loss(right[0], ClassShard(teacher, own.start + 1, 10), problem.target, **x),
        "class_dim": lambda **x: nkd_loss(*right, problem.target, class_dim=0, **x),
        "kind": lambda **x: nkd_loss(ClassShard([1.0], 0, 10), right[1], problem.target, **x),
        "first": lambda **x: nkd_loss(*shards(first=1.0), problem.target, **x),
        "group": lambda **x: nkd_loss(*shards(group="tensor"), problem.target, **x),
        "columns": lambda **x: fused_kd.dist_loss(*right, problem.target, gamma=1.0, **x),
        "outside": lambda **x: rank and nkd_loss(*shards(group=alone), problem.target, **x),
    }
    said = {}
    for backend in ("native", "reference"):
        for name, call in calls.items():
            said[name, backend] = _said(lambda call=call, backend=backend: call(backend=backend))
            torch.testing.assert_close(nkd_loss(*right, problem.target, backend=backend), exact)
    leaf = student.clone().requires_grad_()
    for backend in ("native", "reference"):
        value = nkd_loss(ClassShard(leaf, own.start, 10), right[1], problem.target, backend=backend)
        said["twice", backend] = _said(lambda value=value: torch.autograd.grad(value, leaf, create_graph=True))
    return said


def another_layout(rank, world):
    """Some processes have the same classes as before, and others do not."""
    problem = make(10)
    exact = whole("nkd", "reference", problem)
    for widths in ((4, 3, 3), (4, 4, 2), (4, 3, 3)):
        found = shard_jobs.sharded("nkd", "native", problem, rank, widths)
        wrong = compare(found, exact, columns(rank, widths), str(widths))
        assert not wrong, wrong
    # The ranks need not be in the order of the classes, and the first of equal labels is taken nevertheless.
    problem = make(9, labels=True, tied=True)
    exact = whole("nkd", "reference", problem)
    own = slice(9 - 3 * rank - 3, 9 - 3 * rank)
    for backend in ("native", "reference"):
        leaf = problem.student[:, own].clone().requires_grad_()
        shards = ClassShard(leaf, own.start, 9), ClassShard(problem.teacher[:, own], own.start, 9)
        found = called("nkd", backend, *shards, problem.target[:, own], problem.options)
        wrong = compare((*found, leaf.grad), exact, own, backend)
        assert not wrong, wrong


def compiled(rank, world):
    """As one graph, of shards and of DTensors."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    problem = make(10, rows=(6,))
    own = columns(rank, shard_jobs.widths_of(world, 10)[0])
    leaf, teacher, target = problem.student[:, own].clone().requires_grad_(), problem.teacher[:, own], problem.target

    def of_shards(student, teacher, target):
        shards = ClassShard(2.0 * student, own.start, 10), ClassShard(teacher, own.start, 10)
        return nkd_loss(*shards, target, ce_weight=1.0) * 3.0

    def of_dtensors(student, teacher, target):
        return nkd_loss(2.0 * student, teacher, target, ce_weight=1.0) * 3.0

    of_whole = problem.student.clone().requires_grad_()
    exact = of_dtensors(of_whole, problem.teacher, target)
    exact.backward()
    found = torch.compile(of_shards, fullgraph=True, backend="aot_eager")(leaf, teacher, target)
    found.backward()
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(leaf.grad, of_whole.grad[:, own])
    mesh = init_device_mesh("cpu", (world,))
    student, teacher = (distribute_tensor(each, mesh, [Shard(-1)]) for each in problem[:2])
    student.requires_grad_()
    found = torch.compile(of_dtensors, fullgraph=True, backend="aot_eager")(student, teacher, target)
    found.backward()
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(student.grad.full_tensor(), of_whole.grad)

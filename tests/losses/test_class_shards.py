"""Classes of rows over processes: loss and gradient are those of one process that has all of them."""

import re
import subprocess
import sys

import dtensor_jobs
import pytest
import shard_jobs
import torch
import worlds

from fused_kd import ClassShard, nkd_loss
from fused_kd.core.catalogue import ROW_LOSSES

SIZES = (2, 3)
_started = {}


@pytest.fixture(scope="module", autouse=True)
def _close():
    yield
    for world in _started.values():
        world.close()
    _started.clear()


@pytest.fixture
def world(request):
    size = getattr(request, "param", 2)
    if size not in _started:
        _started[size] = worlds.World(size)
    return _started[size]


each_size = pytest.mark.parametrize("world", SIZES, indirect=True)
each_size_and_backend = pytest.mark.parametrize(
    ("world", "backend"),
    [(2, "native"), (3, "native"), (3, "reference"), pytest.param(2, "reference", marks=pytest.mark.slow)],
    indirect=["world"],
)


@each_size_and_backend
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_shards_are_the_row(world, loss, backend):
    assert len(world.run(shard_jobs.all_variants, loss, backend)[0]) >= 15


@each_size
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_shards_are_as_exact_as_eager_rows(world, loss, dtype):
    world.run(shard_jobs.narrow, loss, dtype)


@each_size
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", ("native", "reference"))
def test_heads(world, backend, dtype):
    world.run(shard_jobs.heads, backend, dtype)


@each_size
def test_every_process_has_as_many_chunks(world):
    world.run(shard_jobs.chunks)


#: Of a row, that a process gives the others, in float64: statistics, the moments before them where z-scores are
#: distilled, and the likeliest label of probabilities.
BYTES = {
    "nkd": {"everything": 104, "probabilities": 144, "z-scores": 184, "z-scores, probabilities": 224},
    "kd": {"everything": 96, "probabilities": 136, "z-scores": 160, "z-scores, probabilities": 200},
    "dkd": {"everything": 96, "probabilities": 136, "z-scores": 160, "z-scores, probabilities": 200},
    "wsld": {"everything": 104, "probabilities": 152, "z-scores": 184, "z-scores, probabilities": 232},
    "tf_kd": {"everything": 56, "probabilities": 96},
    "js": {"everything": 112, "probabilities": 152, "z-scores": 176, "z-scores, probabilities": 216},
    "dist": {"everything": 120, "probabilities": 160, "z-scores": 192, "z-scores, probabilities": 232},
}


def test_bytes_of_a_row(world):
    found = world.run(shard_jobs.bytes_per_row)
    assert found[0] == found[1]
    assert found[0] == {(loss, kind): number for loss, kinds in BYTES.items() for kind, number in kinds.items()}
    assert {*BYTES} == {*ROW_LOSSES}


@pytest.mark.parametrize("loss", ("nkd", "js"))
def test_triton(world, loss):
    pytest.importorskip("triton")
    world.run(shard_jobs.interpreted, loss)


@each_size_and_backend
@pytest.mark.parametrize("loss", ("nkd", "js", "tf_kd"))
def test_dtensors(world, loss, backend):
    world.run(dtensor_jobs.of_classes, loss, backend)


@pytest.mark.parametrize("world", (4,), indirect=True)
def test_dtensors_of_two_dimensions(world):
    for (said,) in world.run(dtensor_jobs.two_dimensions):
        assert said.startswith("ValueError: student_logits: expected a DTensor with its classes sharded over one")


#: What a message has, by what is wrong.
DTENSORS = {
    "partial": "ValueError: student_logits: expected a DTensor with placements Shard and Replicate; redistribute it",
    "rows": "ValueError: student_logits: .*if only rows are sharded, pass student_logits.to_local",
    "plain teacher": "ValueError: teacher_logits: expected a DTensor with the placements of student_logits",
    "teacher elsewhere": "ValueError: teacher_logits: expected a DTensor on the mesh of student_logits with placements",
    "plain student": "ValueError: teacher_logits: expected no DTensor, or a replicated one",
    "target of rows": "ValueError: target: expected a DTensor on the mesh of student_logits with placements .Replicate",
    "classes inside": "ValueError: class_dim: expected the last dimension for a DTensor",
    "head": "TypeError: student_logits: expected Tensors in a Head, got a DTensor. FSDP gathers .* sharded, .*to_local",
    "teacher with gradient": "ValueError: teacher_logits: .* do not require grad",
    "in a shard": "TypeError: student_logits.logits: expected Tensors in a ClassShard, got a DTensor; pass its to_l",
    "padding": "ValueError: num_classes: expected None with sharded classes, got 7; .*a ClassShard of its",
    "normalizer": "TypeError: normalizer: expected a Tensor that is no DTensor, got one; pass its to_local",
    "plain logits, target of rows": "ValueError: target: expected no DTensor, or a replicated one, since student_log",
    "indices": "TypeError: teacher_logits.indices: expected a Tensor of integers that is no DTensor, got one; pass its",
    **{
        f"{name} {argument}": f"TypeError: {argument}: expected a Tensor that is no DTensor, got one; pass its to_local"
        for name, other in (
            ("uskd_loss", "weak_logits"),
            ("uskd_soft_labels", "weak_logits"),
            ("zipf_ls_loss", "dense_logits"),
            ("decompose", "teacher_logits"),
            ("USKDLoss", "feature"),
        )
        for argument in ("student_logits", other, "target")
    },
}
SHARDS = {
    "gap": "ValueError: student_logits: expected shards that together have each class exactly once, .* of 11, from 0",
    "overlap": "ValueError: student_logits: expected shards that together have each class exactly once",
    "negative": "ValueError: student_logits: expected shards that together .*: rank 0 has 4 of 10, from -1 on; rank 1",
    "numbers": "ValueError: student_logits: expected shards .*of 10, from .*of 11, from",
    "target": "IndexError: target: expected class indices from 0 to 9, or ignore_index -100, got 10",
    "labels": "ValueError: target: expected class probabilities that sum to 1 in each row, got a row that sums to 2",
    "teacher": "ValueError: teacher_logits: expected the classes and the group of student_logits, .*got no ClassShard",
    "teacher's place": "ValueError: teacher_logits: expected the classes .*got those of 10 from [0-9] on in group",
    "class_dim": "ValueError: class_dim: expected None or the last with a ClassShard, got 0",
    "kind": "TypeError: student_logits.logits: expected a Tensor, got list",
    "first": "TypeError: student_logits.first_class: expected an int, got float",
    "group": "TypeError: student_logits.group: expected torch.distributed.group.WORLD or another ProcessGroup",
    "columns": "ValueError: gamma: expected 0 for DIST of",
    "twice": "RuntimeError: fused_kd: .* not support double backward",
}
OF_VALUES = ("gap", "overlap", "negative", "numbers", "target", "labels")  # what one process alone cannot see


def test_dtensors_that_cannot_be(world):
    for found in world.run(dtensor_jobs.refused_dtensors):
        assert found.keys() == DTENSORS.keys()
        for name, said in found.items():
            assert re.match(DTENSORS[name], said), said


@each_size
def test_errors_are_the_same_everywhere(world):
    found = world.run(dtensor_jobs.refused)
    for each in found:
        for (name, backend), said in each.items():
            assert name == "outside" or re.match(SHARDS[name], said), (name, backend, said)
            assert name not in OF_VALUES or said == found[0][name, backend]
    assert found[0]["outside", "native"] == "nothing"
    assert re.match("TypeError: student_logits.group: .*that this process belongs to", found[1]["outside", "native"])


def test_nobody_pays_for_dtensors():
    code = "import sys, fused_kd; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_a_group():
    shard = ClassShard(torch.randn(2, 3), 0, 6)
    with pytest.raises(ValueError, match=r"while torch.distributed is not initialised"):
        nkd_loss(shard, shard, torch.zeros(2).long())


@pytest.mark.parametrize("world", (3,), indirect=True)
def test_another_layout(world):
    world.run(dtensor_jobs.another_layout)


def test_compiled(world):
    world.run(dtensor_jobs.compiled)


def test_a_head_under_ddp(world):
    world.run(shard_jobs.head_under_ddp)


def test_a_head_that_ddp_returns(world):
    world.run(shard_jobs.head_from_ddp)


def test_a_head_of_fsdp(world):
    world.run(shard_jobs.head_of_fsdp)


@each_size
@pytest.mark.parametrize("backend", ("native", "reference"))
def test_kept_classes_of_the_teacher(world, backend):
    world.run(shard_jobs.kept_classes, backend)


def test_kept_classes_of_the_teacher_on_triton(world):
    pytest.importorskip("triton")
    world.run(shard_jobs.kept_classes, "triton")

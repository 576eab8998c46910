"""The study's plan: tasks, methods with their hyper-parameters, and single runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Method:
    """A loss with the study's ``settings`` for ``--set``; other hyper-parameters have fused_kd's defaults."""

    title: str
    loss: str
    teacher: bool = False
    settings: tuple[str, ...] = ()
    note: str = ""


#: Methods by name. Hyper-parameters are values published for ImageNet with a ResNet-34 and a ResNet-18, else fused_kd's
#: defaults, which are the papers' own. None is tuned here.
METHODS: dict[str, Method] = {
    "ce": Method("baseline", "ce", note="cross-entropy"),
    "label-smoothing": Method("label smoothing", "label-smoothing", note="ε = 0.1"),
    "kd": Method(
        "KD", "kd", teacher=True, settings=("temperature=1",),
        note="T = 1, cross-entropy and KL one to one, as in mdistiller and cls_KD for ImageNet, which halve each",
    ),
    "dkd": Method(
        "DKD", "dkd", teacher=True, settings=("alpha=1", "beta=0.5", "temperature=1"),
        note="α = 1, β = 0.5, T = 1: its authors' values for ImageNet, without their warm-up of the loss's weight",
    ),
    "nkd": Method("NKD", "nkd", teacher=True, note="γ = 1.5, T = 1: the paper's values for ImageNet"),
    "tf-kd": Method(
        "Tf-KD", "tf-kd",
        note="the designed teacher with 0.99 for the target, T = 20. Its term counts as much as the cross-entropy; in "
        "the published code it counts far less, as it is also divided by the number of classes",
    ),
    "zipf-ls": Method("Zipf's LS", "zipf-ls", note="weight 0.1, votes from the positions of the last map"),
    "uskd": Method("USKD", "uskd", note="α = 1, β = 0.1, μ = 0.005: the paper's values for ImageNet"),
}  # fmt: skip
WITH_TEACHER = ("ce", "label-smoothing", "kd", "dkd", "nkd")
TEACHER_FREE = ("ce", "label-smoothing", "tf-kd", "zipf-ls", "uskd")
#: Seeds of the compared students. A task may have more at the shared learning rate.
SEEDS = tuple(range(5))
#: Seeds of the runs that choose learning rates, and of no others.
RATE_SEEDS = (50, 51)
TEACHER_SEED = 100
#: Number of the seeds that ablations use.
ABLATION_SEEDS = 5


@dataclass(frozen=True)
class Length:
    """Longer training: the task's epochs times ``factor``, for some methods and the first seeds."""

    factor: int
    seeds: int
    methods: tuple[str, ...] = ("ce",)


@dataclass(frozen=True)
class Teacher:
    """A teacher, trained once with cross-entropy. Tasks with the same data may share one, by ``name``."""

    name: str
    model: str
    epochs: int
    lr: float


@dataclass(frozen=True)
class Task:
    """Data, a student and its schedule, shared by all methods.

    ``data``: options of train.py. ``rates``: the first learning rates in the search for the baseline's best, each twice
    the previous one. ``what``: completes "trained on". ``unit``: a label belongs to an ``"image"`` or a ``"token"``.
    ``seeds``: of the students at the shared rate; a task with a larger deviation between seeds needs more.
    ``lengths``: longer training, to see what more epochs would change.
    """

    name: str
    title: str
    what: str
    data: tuple[str, ...]
    student: str
    teacher: Teacher
    epochs: int
    batch_size: int
    rates: tuple[float, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    unit: str = "image"
    seeds: tuple[int, ...] = SEEDS
    lengths: tuple[Length, ...] = (Length(2, 3),)
    device: str = "cpu"

    def setting(self) -> dict[str, Any]:
        """The settings that comparable runs share, in JSON's types."""
        own: dict[str, Any] = asdict(self)
        setting = {name: own[name] for name in ("data", "student", "teacher", "epochs", "batch_size")}
        return {**setting, "data": list(self.data)}


_GLYPHS = ("--data", "glyphs", "--classes", "1000", "--image-size", "16", "--draws", "12", "--shift", "0")
_LENGTHS = (Length(2, 3), Length(4, 3, ("ce", "uskd")), Length(8, 1))
_TEXT = ("--data", "text", "--classes", "1024")
_TEXT_TEACHER = Teacher("text", "gru-large", epochs=5, lr=0.002)
_PYTHON_TEXT = "predicting the next of 1024 byte-pair tokens in the sources of Python's standard library"
#: All but Zipf's LS: its votes come from the positions of an image's last map.
_TEXT_METHODS = tuple(name for name in METHODS if name != "zipf-ls")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "glyphs", "glyphs, CNN", "1000 Chinese characters in several fonts, 16 × 16 pixels", _GLYPHS, "cnn-tiny",
            Teacher("glyphs", "cnn-medium", epochs=20, lr=0.2), epochs=20, batch_size=256, rates=(0.1, 0.2, 0.4),
            seeds=tuple(range(10)), lengths=_LENGTHS,
        ),
        Task(
            "text-gru", "text, GRU", _PYTHON_TEXT,
            _TEXT, "gru-small", _TEXT_TEACHER, epochs=4, batch_size=32, rates=(0.004, 0.008, 0.016),
            methods=_TEXT_METHODS, unit="token", lengths=_LENGTHS,
        ),
        Task(
            "text-transformer", "text, transformer", _PYTHON_TEXT,
            _TEXT, "transformer-small", _TEXT_TEACHER, epochs=4, batch_size=32, rates=(0.004, 0.008, 0.016),
            methods=_TEXT_METHODS, unit="token", lengths=_LENGTHS,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One training run of a task.

    ``settings`` are added to those of :data:`METHODS`, ``lr`` is the peak learning rate, and ``longer`` multiplies the
    task's epochs.
    """

    task: str
    method: str
    lr: float
    seed: int
    settings: tuple[str, ...] = ()
    longer: int = 1

    @property
    def key(self) -> str:
        """The run's name within the task, also of its folder and record."""
        long = (f"epochs-x{self.longer}",) if self.longer > 1 else ()
        return "-".join((self.method, *self.settings, *long, f"lr-{self.lr:g}", f"seed-{self.seed}"))


@dataclass(frozen=True)
class Job:
    """A training run for a process: its folder and options of train.py."""

    name: str
    folder: Path
    options: tuple[str, ...]


def _common(task: Task, cache: Path, folder: Path) -> tuple[str, ...]:
    fixed = ("--batch-size", str(task.batch_size), "--cache", str(cache), "--out", str(folder))
    return (*task.data, *fixed, "--device", task.device, "--quiet", "--resume")


def teacher_job(task: Task, cache: Path, out: Path) -> Job:
    """The job that trains a task's teacher."""
    teacher, folder = task.teacher, out / "teachers" / task.teacher.name
    own: tuple[str, ...] = ("--model", teacher.model, "--epochs", str(teacher.epochs), "--lr", f"{teacher.lr:g}")
    own += ("--seed", str(TEACHER_SEED))
    return Job(f"teacher {teacher.name}", folder, (*_common(task, cache, folder), *own))


def student_job(task: Task, spec: Spec, cache: Path, out: Path) -> Job:
    """The job that trains a student."""
    method, folder = METHODS[spec.method], out / task.name / spec.key
    own = ["--model", task.student, "--epochs", str(task.epochs * spec.longer), "--lr", f"{spec.lr:g}"]
    own += ["--seed", str(spec.seed), "--loss", method.loss]
    for setting in (*method.settings, *spec.settings):
        own += ["--set", setting]
    if method.teacher:
        teacher = out / "teachers" / task.teacher.name
        own += ["--teacher", str(teacher / "best.safetensors"), "--cache-teacher", str(teacher / "logits")]
    return Job(f"{task.name} {spec.key}", folder, (*_common(task, cache, folder), *own))


def needs_teacher(spec: Spec) -> bool:
    return METHODS[spec.method].teacher


def unique(specs: Sequence[Spec]) -> list[Spec]:
    """The specs without duplicates, in order of first occurrence."""
    return list(dict.fromkeys(specs))

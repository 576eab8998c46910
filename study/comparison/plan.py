"""What the study runs: its tasks, the methods and their hyper-parameters, and what one run is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Method:
    """One loss as the study has it.

    ``settings`` are given to ``--set``; what they leave out is fused_kd's default.
    """

    title: str
    loss: str
    teacher: bool = False
    settings: tuple[str, ...] = ()
    note: str = ""


#: By name. Hyper-parameters are those published for ImageNet with a ResNet-34 and a ResNet-18 where there are such,
#: else the defaults of fused_kd, which are the papers' own. None is tuned here.
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
        note="the designed teacher with 0.99 for the target, T = 20. Its term counts as much as the cross-entropy; the "
        "published code also divides it by the number of classes, so that there it counts far less",
    ),
    "zipf-ls": Method("Zipf's LS", "zipf-ls", note="weight 0.1, the votes of the last map's positions"),
    "uskd": Method("USKD", "uskd", note="α = 1, β = 0.1, μ = 0.005: the paper's values for ImageNet"),
}  # fmt: skip
WITH_TEACHER = ("ce", "label-smoothing", "kd", "dkd", "nkd")
TEACHER_FREE = ("ce", "label-smoothing", "tf-kd", "zipf-ls", "uskd")
#: Of the students that are compared, unless a task has more. Only the shared learning rate has more.
SEEDS = tuple(range(5))
#: Of the runs that learning rates are chosen by, and no others.
RATE_SEEDS = (50, 51)
#: A teacher has a seed of its own.
TEACHER_SEED = 100
#: The baseline is also trained twice as long, with so many of the seeds.
LONGER, LONGER_SEEDS = 2, 3
#: Ablations have so many of them.
ABLATION_SEEDS = 3


@dataclass(frozen=True)
class Teacher:
    """The network that teaches, trained once with cross-entropy. Tasks of the same data may share one, by ``name``."""

    name: str
    model: str
    epochs: int
    lr: float


@dataclass(frozen=True)
class Task:
    """Data, a student and its schedule, which all methods share.

    ``data`` are options of train.py; ``rates`` the learning rates that the search for the baseline's best begins with,
    each twice the one before; ``what`` completes "trained on"; ``unit`` what a label is of, ``"image"`` or ``"token"``;
    ``seeds`` those of its students at the shared rate: a task whose seeds differ more needs more of them.
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
    device: str = "cpu"

    def setting(self) -> dict[str, Any]:
        """What must be the same for runs to be comparable, as JSON has it."""
        own: dict[str, Any] = asdict(self)
        setting = {name: own[name] for name in ("data", "student", "teacher", "epochs", "batch_size")}
        return {**setting, "data": list(self.data)}


_GLYPHS = ("--data", "glyphs", "--classes", "1000", "--image-size", "16", "--draws", "12", "--shift", "0")
_TEXT = ("--data", "text", "--classes", "1024")
_TEXT_TEACHER = Teacher("text", "gru-large", epochs=5, lr=0.002)
_OF_PYTHON = "the next of 1024 byte-pair tokens in the sources of Python's standard library"
#: Text has no Zipf's LS: its votes are those of the positions of an image's last map.
_OF_TEXT = tuple(name for name in METHODS if name != "zipf-ls")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "glyphs", "glyphs, CNN", "1000 Chinese characters in several fonts, 16 × 16 pixels", _GLYPHS, "cnn-tiny",
            Teacher("glyphs", "cnn-medium", epochs=20, lr=0.2), epochs=20, batch_size=256, rates=(0.1, 0.2, 0.4),
            seeds=tuple(range(10)),
        ),
        Task(
            "text-gru", "text, GRU", _OF_PYTHON,
            _TEXT, "gru-small", _TEXT_TEACHER, epochs=4, batch_size=32, rates=(0.004, 0.008, 0.016),
            methods=_OF_TEXT, unit="token",
        ),
        Task(
            "text-transformer", "text, transformer", _OF_PYTHON,
            _TEXT, "transformer-small", _TEXT_TEACHER, epochs=4, batch_size=32, rates=(0.004, 0.008, 0.016),
            methods=_OF_TEXT, unit="token",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One training run of a task: a method, what of it is set otherwise than in :data:`METHODS`, the peak learning
    rate and the seed. ``longer`` times the task's epochs are made."""

    task: str
    method: str
    lr: float
    seed: int
    settings: tuple[str, ...] = ()
    longer: int = 1

    @property
    def key(self) -> str:
        """Its name within the task: that of its folder and its record."""
        long = (f"epochs-x{self.longer}",) if self.longer > 1 else ()
        return "-".join((self.method, *self.settings, *long, f"lr-{self.lr:g}", f"seed-{self.seed}"))


@dataclass(frozen=True)
class Job:
    """A training run as a process: its folder and options of train.py."""

    name: str
    folder: Path
    options: tuple[str, ...]


def _common(task: Task, cache: Path, folder: Path) -> tuple[str, ...]:
    fixed = ("--batch-size", str(task.batch_size), "--cache", str(cache), "--out", str(folder))
    return (*task.data, *fixed, "--device", task.device, "--quiet", "--resume")


def teacher_job(task: Task, cache: Path, out: Path) -> Job:
    """The training of a task's teacher."""
    teacher, folder = task.teacher, out / "teachers" / task.teacher.name
    own: tuple[str, ...] = ("--model", teacher.model, "--epochs", str(teacher.epochs), "--lr", f"{teacher.lr:g}")
    own += ("--seed", str(TEACHER_SEED))
    return Job(f"teacher {teacher.name}", folder, (*_common(task, cache, folder), *own))


def student_job(task: Task, spec: Spec, cache: Path, out: Path) -> Job:
    """The training of a student."""
    method, folder = METHODS[spec.method], out / task.name / spec.key
    own = [
        "--model",
        task.student,
        "--epochs",
        str(task.epochs * spec.longer),
        "--lr",
        f"{spec.lr:g}",
        "--seed",
        str(spec.seed),
    ]
    own += ["--loss", method.loss]
    for setting in (*method.settings, *spec.settings):
        own += ["--set", setting]
    if method.teacher:
        teacher = out / "teachers" / task.teacher.name
        own += ["--teacher", str(teacher / "best.safetensors"), "--cache-teacher", str(teacher / "logits")]
    return Job(f"{task.name} {spec.key}", folder, (*_common(task, cache, folder), *own))


def needs_teacher(spec: Spec) -> bool:
    return METHODS[spec.method].teacher


def unique(specs: Sequence[Spec]) -> list[Spec]:
    """Each once, in the order in which they first come."""
    return list(dict.fromkeys(specs))

"""What the study runs: the methods, their hyper-parameters, and the setting that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from study.training import options


@dataclass(frozen=True)
class Method:
    """One loss as the study has it.

    ``settings`` are given to ``--set``, what they leave out is fused_kd's default; ``rate`` times the learning rate of
    the others is this one's.
    """

    title: str
    loss: str
    teacher: bool = False
    settings: tuple[str, ...] = ()
    note: str = ""
    rate: float = 1.0

    @property
    def options(self) -> tuple[str, ...]:
        """The hyper-parameters as options of train.py."""
        return tuple(part for text in self.settings for part in ("--set", text))


#: No method of the paper's.
CONTROL = "ce-twice"
#: By name. Hyper-parameters are those published for ImageNet with a ResNet-34 and a ResNet-18 where there are such,
#: else the defaults of fused_kd, which are the papers' own. None is tuned here.
METHODS: dict[str, Method] = {
    "ce": Method("baseline", "ce", note="cross-entropy"),
    CONTROL: Method(
        "baseline, twice the rate", "ce", rate=2.0,
        note="a control: most losses here add a term to the whole cross-entropy, and so take larger steps",
    ),
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
TEACHER_FREE = ("ce", CONTROL, "label-smoothing", "tf-kd", "zipf-ls", "uskd")
WITH_TEACHER = ("ce", CONTROL, "label-smoothing", "kd", "dkd", "nkd")
#: The teacher has a seed of its own.
TEACHER_SEED = 100


@dataclass(frozen=True)
class Setting:
    """What all runs of a study have in common, the teacher's, too. ``lr`` is train.py's own unless it is given."""

    classes: int = 1000
    draws: int = 1
    student: str = "cnn-small"
    teacher: str = "cnn-medium"
    epochs: int = 20
    batch_size: int = 128
    lr: float | None = None


@dataclass(frozen=True)
class Job:
    """One training run: its folder, options of train.py, and the job that must have ended before it."""

    name: str
    folder: Path
    options: tuple[str, ...]
    epochs: int
    after: str | None = None


def jobs(setting: Setting, methods: Sequence[str], seeds: Sequence[int], cache: Path, out: Path) -> list[Job]:
    """The teacher first, then seed by seed, what needs no teacher before what waits for it."""
    common = (
        "--classes", str(setting.classes), "--draws", str(setting.draws), "--epochs", str(setting.epochs),
        "--batch-size", str(setting.batch_size), "--cache", str(cache), "--device", "cpu", "--quiet", "--resume",
        *(("--lr", str(setting.lr)) if setting.lr else ()),
    )  # fmt: skip
    made: list[Job] = []
    if any(METHODS[name].teacher for name in methods):
        folder = out / "teacher"
        own: tuple[str, ...] = ("--model", setting.teacher, "--seed", str(TEACHER_SEED), "--out", str(folder))
        made.append(Job("teacher", folder, (*common, *own), setting.epochs))
    for seed in seeds:
        for needs_teacher in (False, True):
            for name in methods:
                method, folder = METHODS[name], run_folder(out, name, seed)
                if method.teacher != needs_teacher:
                    continue
                own = ("--model", setting.student, "--seed", str(seed), "--out", str(folder))
                own += ("--loss", method.loss, *method.options)
                if method.rate != 1:
                    usual: float = options.parse([*common, *own]).lr
                    own += ("--lr", str(method.rate * usual))
                if needs_teacher:
                    own += ("--teacher", str(out / "teacher" / "best.safetensors"))
                after = "teacher" if needs_teacher else None
                made.append(Job(folder.name, folder, (*common, *own), setting.epochs, after))
    return made


def run_folder(out: Path, method: str, seed: int) -> Path:
    """Where the run of a method with a seed is."""
    return out / f"{method}-{seed}"

"""Made-up records of a study, for the tests of its page."""

from pathlib import Path

from study.comparison.plan import METHODS, RATE_SEEDS, Length, Spec, Task, Teacher
from study.comparison.records import Records

SEEDS = (0, 1, 2)
#: Accuracy in % of the first seed; the others are a little better, all methods alike.
ACCURACY = {
    "ce": 70.0, "label-smoothing": 71.0, "kd": 72.0, "dkd": 73.0, "nkd": 74.0,
    "tf-kd": 71.5, "zipf-ls": 71.6, "uskd": 73.0,
}  # fmt: skip
RATE = 0.2
TASK = Task(
    "glyphs", "glyphs, CNN", "images of characters", ("--data", "glyphs"), "cnn-tiny",
    Teacher("made-up", "cnn-small", 4, 0.1), epochs=4, batch_size=64, rates=(0.1, 0.2, 0.4),
    lengths=(Length(2, 3), Length(4, 3, ("ce", "uskd"))),
)  # fmt: skip
TEXT = Task(
    "text-gru", "text, GRU", "the sources of programs", ("--data", "text"), "gru-small",
    Teacher("made-up", "gru-large", 4, 0.1), epochs=4, batch_size=64, rates=(0.1, 0.2, 0.4),
    methods=tuple(name for name in METHODS if name != "zipf-ls"), unit="token",
)  # fmt: skip
MADE_WITH = {
    "cpu": "A CPU", "cpu_capability": "AVX2", "torch": "2.13.0", "python": "3.11.7", "fused_kd": "0.2.0",
    "commit": "0123456789",
}  # fmt: skip


def record(accuracy, spec, data="0123"):
    """The record of a run that ended with this accuracy in %."""
    value = accuracy / 100
    curve = [value - 0.1, value - 0.02, value - 0.005, value]
    splits = {"test": value, "held-out": value + 0.01} if spec.task == "glyphs" else {"test": value}
    return {
        "method": spec.method, "settings": list(spec.settings), "lr": spec.lr, "seed": spec.seed, "longer": spec.longer,
        "accuracy": splits, "test_loss": dict.fromkeys(splits, 1.0),
        "curve": {"training_loss": [1.0] * 4, "accuracy": dict.fromkeys(splits, curve)},
        "parameters": 12345, "seconds": 60.0, "peak_memory": 2**29, "data": data, "made_with": MADE_WITH,
    }  # fmt: skip


def put(records, accuracy, method, seed, lr=RATE, settings=(), longer=1, task=TASK, **more):
    spec = Spec(task.name, method, lr, seed, settings, longer)
    records.runs[task.name][spec.key] = record(accuracy, spec, **more)


def searched(records, task, method, accuracy):
    """The runs that rates are chosen by: ``accuracy`` in % by learning rate."""
    for lr, value in accuracy.items():
        for seed in RATE_SEEDS:
            put(records, value, method, seed, lr, task=task)


def made_up(accuracy=ACCURACY, wobble=None, cost=True, tasks=(TASK,)):
    """Records in which the paper's order shows, but for what is given. ``wobble``: by method, what to add by seed."""
    records = Records(Path("made-up"), {task.name: task for task in tasks})
    for task in tasks:
        searched(records, task, "ce", {0.1: 68.0, 0.2: 70.0, 0.4: 69.0})
        for name in set(accuracy) & set(task.methods):
            for seed in SEEDS:
                more = (wobble or {}).get(name, (0.0,) * len(SEEDS))[seed]
                put(records, accuracy[name] + 0.3 * seed + more, name, seed, task=task)
    teacher = Spec("glyphs", "ce", 0.1, 100)
    records.teachers["made-up"] = record(80.0, teacher) | {"parameters": 54321}
    records.cost = made_up_cost() if cost else None
    return records


def made_up_cost():
    machine = {
        "cpu": "A CPU", "cpu_capability": "AVX2", "cores": 2, "memory_gib": 16.0, "load_average_before": 0.1,
    }  # fmt: skip
    software = {
        "torch": "2.13.0", "python": "3.11.7", "fused_kd": "0.1.0", "git_commit": "0123456789abcdef",
        "git_dirty": False,
    }  # fmt: skip
    rows = []
    for classes in (1000, 3755):
        for number, name in enumerate(ACCURACY):
            eager = {"step": 0.09 + classes * 1e-5, "loss": 0.02 + classes * 1e-5, "memory": 3e7}
            forms = {
                "fused": {"step": 0.08, "loss": 0.0015 * (number + 1), "memory": 2.5e7},
                "eager": eager,
                "published": {key: value + 0.01 for key, value in eager.items()},
            }
            of_pytorch = {"PyTorch": {"step": 0.08, "loss": 0.001, "memory": 2e7}}
            own = of_pytorch if METHODS[name].loss in ("ce", "label-smoothing") else forms
            rows.append(
                {
                    "method": name, "classes": classes, "batch_size": 128, "images": 7000, "threads": 2, "steps": 24,
                    "forms": own,
                }
            )  # fmt: skip
    about = {"date": "2026-01-02T03:04:05+00:00", "machine": machine, "software": software}
    return {"about": about, "student": "cnn-small", "teacher": "cnn-medium", "most_classes": 3755, "rows": rows}

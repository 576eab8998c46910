"""Made-up results of a study, for the tests of its page."""

from study.comparison.plan import METHODS

SEEDS = (0, 1, 2)
#: Accuracy in % of the first seed; the others are a little better, all methods alike.
ACCURACY = {
    "ce": 70.0, "label-smoothing": 71.0, "kd": 72.0, "dkd": 73.0, "nkd": 74.0,
    "tf-kd": 71.5, "zipf-ls": 71.6, "uskd": 73.0,
}  # fmt: skip


def made_up(accuracy=ACCURACY, wobble=None, cost=True):
    """Results in which the paper's order shows, but for what is given. ``wobble``: by method, what to add by seed."""
    runs = []
    for name, first in accuracy.items():
        for seed in SEEDS:
            value = (first + 0.3 * seed + (wobble or {}).get(name, (0.0,) * len(SEEDS))[seed]) / 100
            runs.append(
                {
                    "method": name, "seed": seed, "accuracy": {"test": value, "held-out": value + 0.01},
                    "training_loss": 0.8, "test_loss": {"test": 1.1, "held-out": 1.0}, "peak_memory": 600 * 2**20,
                    "parameters": 12345,
                }
            )  # fmt: skip
    machine = {
        "cpu": "A CPU", "cpu_capability": "AVX2", "cores": 2, "memory_gib": 16.0, "load_average_before": 0.1,
    }  # fmt: skip
    software = {
        "torch": "2.13.0",
        "python": "3.11.7",
        "fused_kd": "0.1.0",
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
    }
    about = {"date": "2026-01-02T03:04:05+00:00", "machine": machine, "software": software}
    results = {
        "setting": {
            "classes": 1000, "draws": 1, "student": "cnn-small", "teacher": "cnn-medium", "epochs": 20,
            "batch_size": 128,
        },
        "methods": list(accuracy),
        "seeds": list(SEEDS),
        "parallel": {"runs": 2, "threads": 1},
        "about": about,
        "teacher": {"accuracy": {"test": 0.8, "held-out": 0.81}, "parameters": 54321},
        "runs": runs,
    }  # fmt: skip
    if cost:
        rows = []
        for classes in (1000, 3755):
            for number, name in enumerate(accuracy):
                eager = {"step": 0.09 + classes * 1e-5, "loss": 0.02 + classes * 1e-5, "memory": 3e7}
                forms = {
                    "fused": {"step": 0.08, "loss": 0.0015 * (number + 1), "memory": 2.5e7},
                    "eager": eager,
                    "published": {key: value + 0.01 for key, value in eager.items()},
                }
                own = (
                    {"PyTorch": {"step": 0.08, "loss": 0.001, "memory": 2e7}}
                    if METHODS[name].loss in ("ce", "label-smoothing")
                    else forms
                )
                rows.append(
                    {
                        "method": name, "classes": classes, "batch_size": 128, "images": 7000, "threads": 2,
                        "steps": 24, "forms": own,
                    }
                )  # fmt: skip
        results["cost"] = {"about": about, "most_classes": 3755, "rows": rows}
    return results

"""Every loss as a function of its logits alone, for the tests of how it may be differentiated and recorded."""

import torch
from loss_cases import function, make

from fused_kd import check
from fused_kd.core.catalogue import LOSSES

REFUSAL = "use backend='reference'"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
#: (loss, backend, device) of every fused loss that runs here, USKD included.
FUSED = [(loss, name, device) for loss in LOSSES for device in DEVICES for name in check.runnable(device, loss)]
CPU = [place for place in FUSED if place[2] == "cpu" and place[1] == "native"]
#: Of the form of the gradient: one, one that columns couple, two, and one with logits of positions.
KINDS = [place for place in CPU if place[0] in ("nkd", "dist", "uskd", "zipf_ls")]


def ids(places):
    return ["-".join(place) for place in places]


def problem(place, rows=3, classes=5, dtype=torch.float64, **options):
    """A function of the logits that a loss is differentiated in, the student's and USKD's weak ones, and these."""
    loss, name, device = place
    student, others, target = make(loss, rows, classes, dtype=dtype, device=device, scale=1.0)
    logits, fixed = ((student, others[0]), ()) if loss == "uskd" else ((student,), tuple(others))
    if loss != "tf_kd":
        options = {"ce_weight": 0.5, **options}

    def value(*leaves):
        result = function(loss)(*leaves, *fixed, target, backend=name, **options)
        return result[0] if options.get("return_parts") else result

    return value, logits


def reference(place, **options):
    return problem((place[0], "reference", place[2]), **options)


class Head(torch.nn.Module):
    """Parameters that reach the loss through a linear layer."""

    def __init__(self, value, logits, width=4):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        rows, classes = logits[0].shape
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(width, classes, dtype=logits[0].dtype, device=logits[0].device) for _ in logits
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.feature = torch.randn(rows, width, generator=generator).to(logits[0])
        self.value = value

    def forward(self, feature):
        return self.value(*(layer(feature) for layer in self.layers))

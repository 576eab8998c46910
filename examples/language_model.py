"""Distil a language model token by token with KD, in accumulated micro-batches. Half a minute on a laptop.

    python examples/language_model.py

Tokens are characters of Python's own documentation. A prompt's tokens have the label -100 and are ignored. The mean is
over the counted tokens of the whole batch: ``normalizer`` is their number. If the logits of a large vocabulary do not
fit into memory, pass ``Head(hidden, head.weight, head.bias)`` instead.
"""

import argparse
import pydoc

import torch
from torch import Tensor, nn

from fused_kd import kd_loss

LENGTH, PROMPT = 64, 8


class Model(nn.Module):
    """A GRU; with a transformer the rest stays the same."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens))[0])  # type: ignore[no-any-return]


def batch(text: Tensor, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (rows, LENGTH), and the next tokens as targets, except for the prompt."""
    starts = torch.randint(len(text) - LENGTH - 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    window = text[starts + torch.arange(LENGTH + 1)]
    target = window[:, 1:].clone()
    target[:, :PROMPT] = -100
    return window[:, :-1], target


def train(model: nn.Module, teacher: nn.Module | None, text: Tensor, steps: int, micro_batches: int = 2) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        parts = [batch(text, 16, seed=step * micro_batches + number) for number in range(micro_batches)]
        counted = sum(int((target != -100).sum()) for _, target in parts)
        for tokens, target in parts:
            student_logits = model(tokens)  # (rows, LENGTH, tokens)
            if teacher is None:
                loss = nn.functional.cross_entropy(student_logits.flatten(0, 1), target.flatten(), reduction="sum")
                loss = loss / counted
            else:
                with torch.no_grad():
                    teacher_logits = teacher(tokens)
                loss = kd_loss(
                    student_logits, teacher_logits, target, temperature=1.0, ce_weight=0.5, normalizer=counted
                )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def perplexity(model: nn.Module, text: Tensor) -> float:
    with torch.no_grad():
        tokens, target = batch(text, 256, seed=0)
        return nn.functional.cross_entropy(model(tokens).flatten(0, 1), target.flatten()).exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="per training, default: %(default)s")
    steps = parser.parse_args().steps
    page = "".join(pydoc.render_doc(name, renderer=pydoc.plaintext) for name in ("argparse", "subprocess", "pathlib"))
    characters = sorted(set(page))
    text = torch.tensor([characters.index(character) for character in page])
    training, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    torch.manual_seed(0)
    teacher, student, alone = Model(len(characters), 192), Model(len(characters), 48), Model(len(characters), 48)
    alone.load_state_dict(student.state_dict())
    train(teacher, None, training, steps)
    train(alone, None, training, steps)
    train(student, teacher.eval(), training, steps)
    for name, model in (("teacher", teacher), ("student, text alone", alone), ("student, with KD", student)):
        print(f"{name:<22} perplexity {perplexity(model, held_out):.2f}")


if __name__ == "__main__":
    main()

"""Text as data: the windows, the networks, and that losses, caches and scores are of every token."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

pytest.importorskip("tokenizers")

from study import train
from study.datasets import registry, text
from study.datasets.arrays import DataError
from study.training import checkpoint, methods, networks, options
from study.training.errors import RunError
from study.training.report import Bar, read_table
from study.training.text_networks import TEXT_NETWORKS

BAR = Bar(Console(stderr=True), quiet=True)
ASKED = text.Text(classes=300, window=8, tokens=4000, of_file=800)
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "import", "return", "class", "self", "none")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Files of random words, and two that are left out."""
    folder, draws = tmp_path_factory.mktemp("library"), np.random.default_rng(0)
    for name in ("a.py", "b.py", "c/d.py", "c/e.py", "f.py", "g.py", "test/h.py", "site-packages/i.py"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n" + " ".join(draws.choice(WORDS, 1500)))
    return folder


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    return text.load(ASKED, tmp_path_factory.mktemp("cache"), BAR, sources)


def test_windows_are_followed_by_their_labels(made, sources):
    assert made.text and made.size == 8 and made.classes == 300 and made.notes["files"] == 6
    for split in (made.train, made.tests["test"]):
        # Within a block a window's last label begins the next window.
        inputs, labels = (array.reshape(-1, text.BLOCK * 8) for array in (split.inputs, split.labels))
        assert (inputs[:, 1:] == labels[:, :-1]).all()
    blocks = (len(made.train) // text.BLOCK, len(made.tests["test"]) // text.BLOCK)
    assert blocks[1] == -(-sum(blocks) // text.TEST_SHARE)
    assert 4000 <= made.train.labels.size < 4000 + 6 * 800
    paths = [path.as_posix() for path in text.sources(sources)]
    assert sorted(paths) == ["a.py", "b.py", "c/d.py", "c/e.py", "f.py", "g.py"] and paths != sorted(paths)


def test_tokens_are_of_the_text(made, sources, tmp_path):
    from tokenizers import Tokenizer

    text.load(ASKED, tmp_path, BAR, sources)
    (path,) = tmp_path.glob("*/tokenizer.json")
    first = (sources / text.sources(sources)[0]).read_text()
    # The very first block is tested on, the second is the first to train on.
    decoded = Tokenizer.from_file(str(path)).decode(made.tests["test"].inputs[: text.BLOCK].ravel().tolist())
    assert first.startswith(decoded.removeprefix(text.BEGIN))
    again = text.load(ASKED, tmp_path, BAR, sources)
    assert again.fingerprint == made.fingerprint


def test_refusals(sources, tmp_path):
    for classes in (299, 40000):
        with pytest.raises(DataError, match="--classes: text has 300 to 32767 tokens"):
            text.load(text.Text(classes=classes), tmp_path, BAR, sources)
    with pytest.raises(DataError, match="--tokens: expected at least 33"):
        text.load(text.Text(tokens=3), tmp_path, BAR, sources)
    with pytest.raises(DataError, match="this text makes"):
        text.load(text.Text(classes=30000), tmp_path, BAR, sources)
    with pytest.raises(DataError, match="make no block of 512 tokens to train on"):
        text.load(text.Text(classes=300, of_file=5), tmp_path, BAR, sources)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--data", "text", "PATH"), "--data text: expected no path, got PATH"),
        (("--data", "text", "--draws", "2"), "--draws: only for --data glyphs, got text"),
        (("--data", "glyphs", "--tokens", "99"), "--tokens: only for --data text, got glyphs"),
    ],
)
def test_options_of_other_data_are_refused(arguments, message):
    parser = argparse.ArgumentParser()
    registry.add_arguments(parser)
    with pytest.raises(DataError, match=message):
        registry.load(parser.parse_args(arguments), BAR)


@pytest.mark.parametrize("name", TEXT_NETWORKS)
def test_networks_see_no_later_token(name):
    torch.manual_seed(0)
    network = networks.build(name, classes=50, channels=1, size=8, norm="batch", mean=(0.0,), std=(1.0,)).eval()
    tokens = torch.randint(50, (2, 8))
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % 50
    features, others = network.features(tokens), network.features(other)
    for one, two in zip(features, others, strict=True):
        one, two = one.unflatten(0, (2, 8)), two.unflatten(0, (2, 8))
        torch.testing.assert_close(one[:, :5], two[:, :5])
        assert not torch.allclose(one[:, 5:], two[:, 5:])
    assert network(tokens).shape == (16, 50) and features.weak.shape == (16, network.weak_width)


@pytest.fixture
def here(made, monkeypatch):
    """Runs are of this text."""
    monkeypatch.setattr(registry, "load", lambda args, bar: made)
    return lambda *arguments: train.run(
        options.parse(["--epochs", "1", "--batch-size", "8", "--quiet", "--log-steps", "1", *map(str, arguments)])
    )


@pytest.fixture
def teacher(here, tmp_path):
    here("--model", "gru-small", "--out", tmp_path / "teacher")
    return tmp_path / "teacher" / "best.safetensors"


@pytest.mark.parametrize("model", ["gru-tiny", "transformer-tiny"])
def test_learns_and_scores_every_token(model, here, made, tmp_path):
    result = here("--model", model, "--epochs", 4, "--lr", 0.02, "--out", tmp_path)
    network, _ = checkpoint.load_network(tmp_path / "best.safetensors", "--teacher")
    split = made.tests["test"]
    logits = network(torch.from_numpy(split.inputs.astype(np.int64)))
    labels = torch.from_numpy(np.array(split.labels)).flatten()
    assert result.best["test"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert result.best["test"] > 0.05  # words of a random text are guessed once in eighteen times, their ends always
    if result.best_epoch == result.epochs:
        last = float(read_table(tmp_path / "epochs.csv")[-1]["test_loss_test"])
        assert last == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("loss", [name for name in methods.NAMES if name != "zipf-ls"])
def test_every_loss_but_one(loss, here, teacher, tmp_path):
    given = ("--teacher", teacher) if methods.build(loss, [], "auto").needs_teacher else ()
    here("--model", "gru-tiny", "--loss", loss, "--out", tmp_path / "run", *given)
    assert len(read_table(tmp_path / "run" / "steps.csv")) > 10


def test_zipf_ls_has_no_positions_here(here, tmp_path):
    with pytest.raises(RunError, match="--loss zipf-ls: its votes are those of an image's positions"):
        here("--model", "gru-tiny", "--loss", "zipf-ls", "--out", tmp_path)


@pytest.mark.parametrize("top_k", [0, 299])
def test_cached_teacher_is_the_teacher(top_k, here, teacher, tmp_path):
    """But for bfloat16; with all but one class kept the rest is what the last class has."""
    here("--model", "gru-tiny", "--loss", "kd", "--teacher", teacher, "--out", tmp_path / "live")
    cached = ("--cache-teacher", tmp_path / "cache", "--cache-top-k", top_k)
    here("--model", "gru-tiny", "--loss", "kd", "--teacher", teacher, "--out", tmp_path / "cached", *cached)
    rows = [read_table(tmp_path / name / "steps.csv") for name in ("live", "cached")]
    for one, two in zip(*rows, strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=0.01)


def test_pieces_of_a_batch_make_the_same_step(here, tmp_path):
    for name, pieces in (("whole", 1), ("pieces", 2)):
        here("--model", "gru-tiny", "--accumulate", pieces, "--out", tmp_path / name)
    rows = [read_table(tmp_path / name / "steps.csv") for name in ("whole", "pieces")]
    for one, two in zip(*rows, strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-4)


def test_networks_of_other_data_are_refused(here, tmp_path):
    with pytest.raises(RunError, match="--model cnn-tiny: takes images, and the data are text"):
        here("--model", "cnn-tiny", "--out", tmp_path)
    with pytest.raises(RunError, match="--model gru-tiny: takes text, and the data are images"):
        networks.check_data("gru-tiny", text=False)

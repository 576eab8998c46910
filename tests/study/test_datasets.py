"""The data sets of the examples, on small data made here."""

import argparse
import io
import pickle
import shutil
import tarfile

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("fontTools", reason="fonttools is not installed")
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image
from rich.console import Console

from study import train
from study.datasets import __main__ as command_line
from study.datasets import fonts, glyphs, registry
from study.datasets.arrays import DataError
from study.training.report import Bar

BAR = Bar(Console(stderr=True), quiet=True)


def make_font(path, family, characters, slant):
    """A font whose glyph number n is a stack of bars, one for each bit of n, that leans."""
    names = [".notdef", *(f"g{i}" for i in range(len(characters)))]
    outlines = {}
    for i, name in enumerate(names):
        pen = TTGlyphPen(None)
        for bit in range(7):
            width = 700 if (i >> bit) & 1 else 200
            low, left = 100 * bit, 100 + slant * bit
            corners = [(left, low), (left, low + 60), (left + width, low + 60), (left + width, low)]
            pen.moveTo(corners[0])
            for corner in corners[1:]:
                pen.lineTo(corner)
            pen.closePath()
        outlines[name] = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(text): names[i + 1] for i, text in enumerate(characters)})
    builder.setupGlyf(outlines)
    builder.setupHorizontalMetrics({name: (1000, 0) for name in names})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Three font families of the same forty characters, and no other."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    for family, slant in (("Alpha", 0), ("Beta", 20), ("Gamma", -10)):
        make_font(folder / f"{family}.ttf", family, glyphs.characters()[:40], slant)
    monkeypatch.setattr(fonts, "font_folders", lambda: [folder])
    return folder


def parse(*options):
    parser = argparse.ArgumentParser()
    registry.add_arguments(parser)
    return parser.parse_args([str(option) for option in options])


def load(*options):
    return registry.load(parse(*options), BAR)


def test_glyphs(installed, tmp_path):
    options = ("--classes", 30, "--image-size", 16, "--draws", 3, "--cache", tmp_path / "cache")
    made = load(*options)
    assert made.notes == {"families": ["Alpha", "Beta"], "held_out": "Gamma"}
    assert made.train.inputs.shape == (30 * 2 * 3, 1, 16, 16) and made.train.inputs.dtype == np.uint8
    assert {name: len(split) for name, split in made.tests.items()} == {"test": 30 * 2 * 2, "held-out": 30 * 2}
    assert (np.bincount(made.train.labels) == 6).all()
    assert (made.train.inputs.reshape(180, -1).max(1) > 100).all(), "every image has ink"
    # No test image is a training image.
    seen = {image.tobytes() for image in made.train.inputs}
    assert len(seen) == 180
    assert not any(image.tobytes() in seen for split in made.tests.values() for image in split.inputs)


def test_glyphs_depend_on_the_seed_alone(installed, tmp_path):
    options = ("--classes", 10, "--image-size", 16)
    first = load(*options, "--cache", tmp_path / "one")
    again = load(*options, "--cache", tmp_path / "two")
    other = load(*options, "--cache", tmp_path / "two", "--data-seed", 1)
    assert (first.train.inputs == again.train.inputs).all() and first.fingerprint == again.fingerprint
    assert (first.train.inputs != other.train.inputs).any() and first.fingerprint != other.fingerprint
    fewer = load(*options, "--cache", tmp_path / "two", "--draws", 2)
    assert (fewer.train.inputs.reshape(10, 2, 2, -1) == first.train.inputs.reshape(10, 2, 18, -1)[:, :, :2]).all()
    assert (fewer.tests["test"].inputs == first.tests["test"].inputs).all()


def test_few_families_make_as_many_images_and_are_told(installed, tmp_path, capsys):
    """An epoch of six families has 36 images of a class; of two with six draws it would have 12, too few to learn."""
    made = load("--classes", 10, "--image-size", 16, "--cache", tmp_path / "cache")
    assert (np.bincount(made.train.labels) == 36).all()
    what, warning = registry.about(made)
    assert what == "glyphs: 2 font families (Alpha, Beta), 18 draws of a character in each; held out: Gamma"
    assert warning.startswith("warning: the recommended fonts give 6 training families, here are 2")
    assert fonts.INSTALL in warning
    made.notes["families"] = ["A", "B", "C", "D", "E", "F"]
    assert [line.startswith("glyphs: 6 font families") for line in registry.about(made)] == [True]
    cache, out = tmp_path / "cache", tmp_path / "run"
    options = ["--classes", "10", "--image-size", "16", "--cache", str(cache), "--out", str(out), "--model", "cnn-tiny"]
    assert train.main([*options, "--epochs", "1", "--batch-size", "60", "--quiet"]) == 0
    assert what in capsys.readouterr().err


def test_glyphs_of_installed_fonts(tmp_path):
    try:
        made = load("--classes", 50, "--draws", 1, "--cache", tmp_path / "cache")
    except DataError as error:
        pytest.skip(str(error))
    assert made.notes["held_out"] not in made.notes["families"]
    assert made.train.inputs.shape == (50 * len(made.notes["families"]), 1, 32, 32)
    for split in (made.train, *made.tests.values()):
        spread = split.inputs.astype(float).std((1, 2, 3))
        assert spread.min() > 8, "every image has ink"
    # The mean training images, blurred, tell far more characters of the held-out family than chance, which is 2 %.
    held_out = made.tests["held-out"]
    mean = made.train.inputs.mean(0, dtype=float)
    blurred, queries = (
        (split.inputs - mean)[:, 0].reshape(-1, 16, 2, 16, 2).mean((2, 4)).reshape(len(split), -1)
        for split in (made.train, held_out)
    )
    centres = blurred.reshape(50, -1, 256).mean(1)
    accuracy = (
        (queries @ (centres / np.linalg.norm(centres, axis=1, keepdims=True)).T).argmax(1) == held_out.labels
    ).mean()
    assert accuracy > 0.1  # by chance, of 100 images, once in 100,000 times


def test_a_second_load_draws_nothing(installed, tmp_path, monkeypatch):
    options = ("--classes", 10, "--image-size", 16, "--cache", tmp_path / "cache")
    first = load(*options)
    monkeypatch.setattr(glyphs, "_draw", None)
    assert load(*options).fingerprint == first.fingerprint


def test_an_interrupted_build_leaves_nothing(installed, tmp_path, monkeypatch):
    draw, calls = glyphs._draw, 0

    def stop(*arguments):
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return draw(*arguments)

    options = ("--classes", 10, "--image-size", 16, "--cache", tmp_path / "cache")
    monkeypatch.setattr(glyphs, "_draw", stop)
    with pytest.raises(KeyboardInterrupt):
        load(*options)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load(*options).train) == 360


@pytest.mark.parametrize("harm", ["flip", "cut", "delete", "manifest"])
def test_corrupt_cache(installed, tmp_path, harm):
    options = ("--classes", 10, "--image-size", 16, "--cache", tmp_path / "cache")
    load(*options)
    (folder,) = (tmp_path / "cache").iterdir()
    images = folder / "train.inputs.npy"
    if harm == "flip":
        content = bytearray(images.read_bytes())
        content[-1] ^= 1
        images.write_bytes(content)
    elif harm == "cut":
        images.write_bytes(images.read_bytes()[:-100])
    elif harm == "delete":
        images.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="corrupt cache") as caught:
        load(*options)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--classes", 41), "two font families must cover 41 characters, none does; install Chinese fonts"),
        (("--classes", 10, "--data-seed", -1), "--data-seed: expected at least 0, got -1"),
        (("--classes", 1), "--classes: glyphs has 2 to 3755 classes, got 1"),
        (("--classes", 10, "--held-out", "Delta"), "no font family 'Delta' covers 10 characters"),
        (("--image-size", 4), "--image-size: expected at least 8, got 4"),
        (("--data", "imagenet"), "--data: expected glyphs, text, cifar100 PATH, imagefolder PATH, got 'imagenet'"),
        (
            ("--data", "cifar100", ".", "--draws", "3"),
            "--draws: only for --data glyphs, got cifar100",
        ),
        (("--data", "imagefolder", ".", "--data-seed", "0"), "--data-seed: only for --data glyphs"),
        (("--data", "cifar100"), "--data cifar100: expected one path, got 0"),
        (("--data", "cifar100", "/none"), "--data cifar100: /none does not exist"),
    ],
)
def test_what_cannot_be(installed, tmp_path, options, words):
    with pytest.raises(DataError) as caught:
        load(*options, "--cache", tmp_path / "cache")
    assert words in str(caught.value)


def test_command_line(installed, tmp_path, capsys):
    options = ["--classes", "10", "--image-size", "16", "--cache", str(tmp_path / "cache")]
    assert command_line.main([*options, "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "glyphs: 10 classes, 360 images; tests: test 40, held-out 20" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheet.png").size == (24 * 16, 10 * 16)
    assert command_line.main(["--classes", "41"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_sheet_shows_every_family(installed, tmp_path):
    made = load("--classes", 10, "--image-size", 16, "--draws", 20, "--cache", tmp_path / "cache")
    registry.sheet(made, tmp_path / "sheet.png", rows=1, columns=30)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).reshape(16, 30, 16).transpose(1, 0, 2)
    of_first_class = made.train.inputs[:40, 0]  # 20 draws of Alpha, then 20 of Beta
    families = [int((of_first_class == image).all((1, 2)).argmax()) // 20 for image in sheet]
    assert families == [0] * 15 + [1] * 15


def test_a_cache_that_cannot_be_written(installed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--cache: cannot write to ") as caught:
        load("--classes", 10, "--image-size", 16, "--cache", tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


def make_cifar(folder, train=200):
    draws = np.random.default_rng(0)
    folder.mkdir(parents=True)
    content = {}
    for split, n in (("train", train), ("test", 100)):
        images = draws.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = [i % 100 for i in range(n)]
        content[split] = images, labels
        batch = {b"data": images, b"fine_labels": labels, b"coarse_labels": labels}
        (folder / split).write_bytes(pickle.dumps(batch, protocol=2))
    return content


def test_cifar100(tmp_path):
    content = make_cifar(tmp_path / "disk" / "cifar-100-python")
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "disk" / "cifar-100-python", "cifar-100-python")
    for path in (tmp_path / "disk", tmp_path / "disk" / "cifar-100-python", tmp_path / "cifar-100-python.tar.gz"):
        made = load("--data", "cifar100", path, "--cache", tmp_path / "cache")
        assert made.classes == 100 and list(made.tests) == ["test"]
        assert (made.train.inputs.reshape(200, -1) == content["train"][0]).all()
        assert made.train.labels.tolist() == content["train"][1]
        mean = content["train"][0].reshape(200, 3, 1024).mean((0, 2)) / 255
        assert made.mean == pytest.approx(mean.tolist())


class Evil:
    def __reduce__(self):
        return print, ("called",)


def test_cifar100_has_a_hundred_classes(tmp_path):
    make_cifar(tmp_path / "cifar-100-python")
    options = ("--data", "cifar100", tmp_path, "--cache", tmp_path / "cache")
    assert load(*options, "--classes", 100).classes == 100
    with pytest.raises(DataError, match=r"--classes: cifar100 at .* has 100 classes, got 50"):
        load(*options, "--classes", 50)


@pytest.mark.parametrize("harm", ["cut", "evil", "missing", "labels", "encoding", "archive", "flipped archive"])
def test_damaged_cifar100(tmp_path, capsys, harm):
    folder = tmp_path / "cifar-100-python"
    make_cifar(folder)
    file, path = folder / "train", folder
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif harm == "evil":
        file.write_bytes(pickle.dumps({b"data": Evil()}))
    elif harm == "missing":
        (folder / "test").unlink()
    elif harm == "labels":
        file.write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, 100]}, protocol=2))
    elif harm == "encoding":
        file.write_bytes(file.read_bytes().replace(b"latin1", b"litin1"))
    else:
        path, whole = tmp_path / "cifar.tar.gz", io.BytesIO()
        with tarfile.open(fileobj=whole, mode="w:gz") as archive:
            archive.add(folder, "cifar-100-python")
        content = bytearray(whole.getvalue())
        if harm == "archive":
            del content[len(content) // 2 :]
        else:
            content[-8] ^= 1  # the checksum, as a flipped pixel leaves it
        path.write_bytes(content)
    with pytest.raises(DataError, match="cifar100: ") as caught:
        load("--data", "cifar100", path, "--cache", tmp_path / "cache")
    assert str(path) in str(caught.value)
    assert "called" not in capsys.readouterr().out
    assert not list((tmp_path / "cache").glob("*")), "nothing is kept"


def make_folder(path):
    for split, n in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (path / split / name).mkdir(parents=True)
            for i in range(n):
                image = np.full((40, 60, 3), 100 * label + 10 * i + 5, np.uint8)
                image[:, :10] = image[:, -10:] = 255  # what a square leaves out
                Image.fromarray(image).save(path / split / name / f"{i}.png")


def test_imagefolder(tmp_path):
    make_folder(tmp_path / "pets")
    made = load("--data", "imagefolder", tmp_path / "pets", "--image-size", 20, "--cache", tmp_path / "cache")
    assert made.classes == 2 and made.notes["names"] == ["cat", "dog"]
    assert made.train.inputs.shape == (6, 3, 20, 20) and len(made.tests["val"]) == 4
    assert made.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert made.train.inputs[:, 0, 10, 10].tolist() == [5, 15, 25, 105, 115, 125]
    assert int(made.train.inputs[:, :, 1:-1, 1:-1].max()) == 125, "the middle of each image"


@pytest.mark.parametrize("harm", ["image", "class", "split", "empty", "empty class"])
def test_damaged_imagefolder(tmp_path, harm):
    path = tmp_path / "pets"
    make_folder(path)
    culprit = path / "train" / "dog" / "1.png"
    if harm == "image":
        culprit.write_bytes(culprit.read_bytes()[:60])
    elif harm == "class":
        culprit = path / "val" / "bird"
        culprit.mkdir()
    elif harm == "split":
        shutil.rmtree(path / "val")
        culprit = path
    else:
        culprit = path / "val" if harm == "empty" else path / "train" / "dog"
        for file in culprit.rglob("*.png"):
            file.unlink()
    with pytest.raises(DataError, match="imagefolder: ") as caught:
        load("--data", "imagefolder", path, "--image-size", 20, "--cache", tmp_path / "cache")
    assert str(culprit) in str(caught.value)

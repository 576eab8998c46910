"""The default data set: Chinese characters in several font families, shifted, scaled, rotated, blurred and noisy.

The classes are the first characters of GB 2312's level 1, the 3755 most used ones, that every family covers. One family
is held out of training as a second test set. The other families' test images come from separate generators.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from study.datasets.arrays import DataError, Dataset, dataset, key_of, statistics, write_split
from study.datasets.fonts import INSTALL, Family, choose_families
from study.training.report import Bar

#: Increased when the same request gives other images.
VERSION = 1
_SPLITS = {"train": 0, "test": 1, "held-out": 2}
#: Training families among the recommended fonts, and draws per family.
_FAMILIES, _DRAWS = 6, 6
#: Characters are drawn this many times larger than the image before warping.
_OVERSAMPLING = 2


@dataclass(frozen=True)
class Glyphs:
    """A request for a data set. ``draws`` is per class and family; None means 6, or with fewer than 6 families enough
    for equally many images per class: with fewer images an epoch would have too few steps."""

    classes: int = 1000
    size: int = 32
    draws: int | None = None
    test_draws: int = 2
    seed: int = 0
    held_out: str | None = None


def characters() -> list[str]:
    """Level 1 of GB 2312 in its order, by pronunciation: rows 16 to 55 of 94 columns, the last row incomplete."""
    pairs = (bytes((0xA0 + row, 0xA0 + column)) for row in range(16, 56) for column in range(1, 95))
    return [text for pair in pairs if (text := pair.decode("gb2312", errors="ignore"))]


def load(request: Glyphs, cache: Path, bar: Bar) -> Dataset:
    """Open the data set in ``cache``; build it first if needed."""
    level = characters()
    if not 2 <= request.classes <= len(level):
        raise DataError(f"--classes: glyphs has 2 to {len(level)} classes, got {request.classes}")
    if request.seed < 0:
        raise DataError(f"--data-seed: expected at least 0, got {request.seed}")
    if (request.draws is not None and request.draws < 1) or request.test_draws < 1 or request.size < 8:
        raise DataError("glyphs: expected at least one draw, one test draw and 8 pixels")
    families, held_out = choose_families(level, request.classes, request.held_out)
    names = [family.name for family in families]
    if request.draws is None:
        request = replace(request, draws=max(_DRAWS, math.ceil(_FAMILIES * _DRAWS / len(families))))
    wanted = {
        "version": VERSION,
        **asdict(request),
        "families": [family.identity() for family in families],
        "held_out": held_out.identity(),
    }
    folder = cache / f"glyphs-{request.classes}-{key_of(wanted)}"
    manifest = {"request": wanted, "notes": {"families": names, "held_out": held_out.name}}
    return dataset(folder, manifest, lambda to: _build(to, request, families, held_out, bar))


def about(made: Dataset) -> list[str]:
    """Lines with the data set's font families, which depend on the machine, and a warning if they are few."""
    names, held_out = made.notes["families"], made.notes["held_out"]
    draws = len(made.train) // (made.classes * len(names))
    families = "1 font family" if len(names) == 1 else f"{len(names)} font families"
    lines = [f"glyphs: {families} ({', '.join(names)}), {draws} draws of a character in each; held out: {held_out}"]
    if len(names) < _FAMILIES:
        lines.append(
            f"warning: the recommended fonts give {_FAMILIES} training families, here are {len(names)}, so accuracies "
            f"differ from docs/study.md; {INSTALL}"
        )
    return lines


def _build(folder: Path, request: Glyphs, families: list[Family], held_out: Family, bar: Bar) -> dict[str, Any]:
    everyone = [*families, held_out]
    common = frozenset.intersection(*(family.covered for family in everyone))
    level = [text for text in characters() if ord(text) in common]
    assert request.draws is not None
    counts = {"train": (families, request.draws), "test": (families, request.test_draws)}
    counts["held-out"] = ([held_out], request.test_draws)
    fonts = {family.name: [face.load(request.size * _OVERSAMPLING) for face in family.faces] for family in everyone}
    rows: dict[str, list[npt.NDArray[np.uint8]]] = {name: [] for name in counts}
    chosen: list[str] = []
    with bar.task("drawing characters", total=request.classes) as advance:
        for text in level:
            drawn = {name: [_draw(font, text, request.size) for font in faces] for name, faces in fonts.items()}
            # A font may list a character without a glyph for it.
            if all(image.getbbox() is not None for images in drawn.values() for image in images):
                for split, (members, draws) in counts.items():
                    warps = [
                        _warp(drawn[family.name], request, split, text, family.name, draw)
                        for family in members
                        for draw in range(draws)
                    ]
                    rows[split].append(np.stack(warps))
                chosen.append(text)
                advance(1)
            if len(chosen) == request.classes:
                break
    if len(chosen) < request.classes:
        raise DataError(
            f"--classes: the fonts draw {len(chosen)} characters in common, {request.classes} were asked for"
        )
    for split, images in rows.items():
        array = np.concatenate(images)[:, None]
        write_split(folder, split, array, np.repeat(np.arange(request.classes), len(images[0])))
        if split == "train":
            stats = statistics(array)
    return {"name": "glyphs", "splits": list(rows), "classes": request.classes, "characters": "".join(chosen), **stats}


def _draw(font: ImageFont.FreeTypeFont, text: str, size: int) -> Image.Image:
    """Draw the character in white on black, centred on a canvas of twice the image's size."""
    canvas = size * _OVERSAMPLING * 2
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (canvas, canvas))
    position = ((canvas - left - right) / 2, (canvas - top - bottom) / 2)
    ImageDraw.Draw(image).text(position, text, fill=255, font=font)
    return image


def _warp(
    images: list[Image.Image], request: Glyphs, split: str, text: str, family: str, draw: int
) -> npt.NDArray[np.uint8]:
    """Make one draw. Its generator is independent of other draws, so adding draws does not change it."""
    key = (request.seed, _SPLITS[split], ord(text), zlib.crc32(family.encode()), draw)
    random = np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))
    size = request.size
    source = images[int(random.integers(len(images)))]
    angle, shear = np.deg2rad(random.uniform(-12, 12)), random.uniform(-0.15, 0.15)
    scale_x, scale_y = np.exp(random.uniform(-0.15, 0.15, 2)) * 0.8
    shift_x, shift_y = random.uniform(-0.09, 0.09, 2) * size
    # The affine map goes from a pixel of the result to a place in the source.
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, sin + shear], [-sin, cos]]) / np.array([[scale_x], [scale_y]]) * _OVERSAMPLING
    centre, middle = source.width / 2, size / 2
    offset = centre - matrix @ (middle + np.array([shift_x, shift_y]))
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    affine = Image.Transform.AFFINE
    image = source.transform((size, size), affine, coefficients, resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32)
    pixels = _blur(pixels, float(random.uniform(0.3, 1.0)))
    contrast, base = random.uniform(0.5, 1.0), random.uniform(0.0, 40.0)
    pixels = pixels * contrast + base + random.standard_normal(pixels.shape, dtype=np.float32) * random.uniform(4, 24)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _blur(pixels: npt.NDArray[np.float32], sigma: float) -> npt.NDArray[np.float32]:
    """Blur by a Gaussian of five taps along both axes."""
    taps = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2).astype(np.float32)
    taps /= taps.sum()
    for axis in (0, 1):
        padded = np.pad(pixels, [(2, 2) if i == axis else (0, 0) for i in (0, 1)])
        length = pixels.shape[axis]
        pixels = sum(
            tap * (padded[i : i + length] if axis == 0 else padded[:, i : i + length]) for i, tap in enumerate(taps)
        )
    return pixels

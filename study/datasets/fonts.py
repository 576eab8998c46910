"""Installed fonts: their families, and the characters that each covers."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError
from fontTools.ttLib.ttCollection import TTCollection
from PIL import ImageFont

from study.datasets.arrays import DataError, content_hash

INSTALL = (
    "install Chinese fonts, on Debian: apt-get install fonts-noto-cjk fonts-wqy-zenhei fonts-wqy-microhei "
    "fonts-arphic-uming fonts-arphic-ukai fonts-lxgw-wenkai"
)
#: Endings for the weight or region of a face; the rest is the family's name.
_STYLE = re.compile(r"\s+(Light|Regular|Medium|Bold|Black|Thin|Heavy|DemiLight|SemiBold|SC|TC|HK|JP|KR|CN|TW|MBE)$")
#: Faces of fixed width or with bitmaps, which repeat another face's glyphs.
_REPEATS = re.compile(r"\b(Mono|Sharp)\b")
#: Preference of regions: first the forms of GB 2312.
_REGIONS = {"SC": 0, "CN": 0, "": 1, "JP": 2, "TC": 3, "HK": 4, "TW": 5, "MBE": 6, "KR": 7}


@dataclass(frozen=True)
class Face:
    """One face in a font file."""

    path: Path
    index: int

    def load(self, size: int) -> ImageFont.FreeTypeFont:
        """The face, ready to draw at ``size`` pixels."""
        return ImageFont.truetype(str(self.path), size, index=self.index)


@dataclass
class Family:
    """Faces of one design in several weights, and the code points that all faces have."""

    name: str
    faces: list[Face] = field(default_factory=list)
    covered: frozenset[int] = frozenset()

    def identity(self) -> dict[str, object]:
        """Data that identifies this version of the family."""
        return {
            "name": self.name,
            "faces": [[face.path.name, face.index, content_hash(face.path)] for face in self.faces],
        }


def font_folders() -> list[Path]:
    """Font folders of this system."""
    home = Path.home()
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    if sys.platform == "win32":
        return [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"]
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    folders = [Path(folder) / "fonts" for folder in shared.split(":") if folder]
    return [*folders, home / ".local/share/fonts", home / ".fonts"]


def find_families(characters: list[str], at_least: int, folders: list[Path] | None = None) -> list[Family]:
    """Families that cover at least ``at_least`` of the characters, by name.

    Each weight of a family is taken once, in the regional form nearest to GB 2312. Faces of fixed width repeat another
    face's glyphs and are left out.
    """
    wanted = frozenset(map(ord, characters))
    found: dict[str, dict[str, tuple[int, Face, frozenset[int]]]] = {}
    paths = sorted(
        path
        for folder in (font_folders() if folders is None else folders)
        for path in (folder.rglob("*") if folder.is_dir() else ())
        if path.suffix.lower() in (".ttf", ".otf", ".ttc", ".otc")
    )
    for path in dict.fromkeys(paths):
        for index, name, style, covered in _faces(path, wanted):
            if len(covered) < at_least:
                continue
            family, region = _split_name(name)
            entry = (_REGIONS.get(region, 9), Face(path, index), covered)
            faces = found.setdefault(family, {})
            if style not in faces or entry[0] < faces[style][0]:
                faces[style] = entry
    families = []
    for family, by_style in sorted(found.items(), key=lambda item: item[0].casefold()):
        entries = [by_style[style] for style in sorted(by_style)]
        covered = frozenset.intersection(*(entry[2] for entry in entries))
        if len(covered) >= at_least:
            families.append(Family(family, [entry[1] for entry in entries], covered))
    return families


def _split_name(name: str) -> tuple[str, str]:
    region = ""
    while match := _STYLE.search(name):
        region = match[1] if match[1] in _REGIONS else region
        name = name[: match.start()]
    return name, region


def _faces(path: Path, wanted: frozenset[int]) -> list[tuple[int, str, str, frozenset[int]]]:
    """(index, family, style, covered) of each face in a file, without repeats; none if the file is unreadable."""
    try:
        if path.suffix.lower() in (".ttc", ".otc"):
            fonts = list(TTCollection(str(path), lazy=True).fonts)
        else:
            fonts = [TTFont(str(path), lazy=True)]
        faces = []
        # Faces of a collection share tables, and parsing a table takes a tenth of a second.
        parsed: dict[int, frozenset[int]] = {}
        for index, font in enumerate(fonts):
            name = font["name"].getBestFamilyName() or path.stem
            style = font["name"].getBestSubFamilyName() or "Regular"
            if _REPEATS.search(name):
                continue
            table = font.reader.tables["cmap"].offset
            if table not in parsed:
                parsed[table] = wanted.intersection(font.getBestCmap() or ())
            faces.append((index, name, style, parsed[table]))
        return faces
    except (TTLibError, OSError, KeyError, AttributeError, AssertionError, ValueError):
        return []  # ignore damaged fonts of the system


def choose_families(characters: list[str], classes: int, held_out: str | None) -> tuple[list[Family], Family]:
    """(families to train on, held-out family); all cover at least ``classes`` common characters."""
    families: list[Family] = []
    common = frozenset(map(ord, characters))
    # Largest coverage first, so that a font with few characters does not exclude others.
    for family in sorted(find_families(characters, classes), key=lambda family: -len(family.covered)):
        if len(common & family.covered) >= classes:
            families.append(family)
            common &= family.covered
    families.sort(key=lambda family: family.name.casefold())
    names = [family.name for family in families]
    if len(families) < 2:
        have = f"only {names[0]} does" if names else "none does"
        raise DataError(f"glyphs: two font families must cover {classes} characters, {have}; {INSTALL}")
    if held_out is None:
        held_out = "LXGW WenKai" if "LXGW WenKai" in names else names[-1]
    if held_out not in names:
        raise DataError(
            f"glyphs: no font family {held_out!r} covers {classes} characters; there are {', '.join(names)}"
        )
    rest = [family for family in families if family.name != held_out]
    return rest, families[names.index(held_out)]

"""Text from any installation of Python: the sources of its standard library, as windows of byte-pair tokens.

A file's tokens are cut into blocks, and every twelfth block is for tests, so that both splits have text from all parts.
The tokenizer is trained on the whole text. The library's own tests are left out, as some distributions lack them.
"""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from study.datasets.arrays import DataError, Dataset, content_hash, dataset, key_of, write_split
from study.training.report import Bar

#: Increased when the same request gives other tokens.
VERSION = 1
#: Windows per block; one of this many blocks is for tests.
BLOCK, TEST_SHARE = 16, 12
#: The token that begins each file.
BEGIN = "<file>"
_LEFT_OUT = frozenset(("test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"))


@dataclass(frozen=True)
class Text:
    """A request for a data set: ``classes``, the size of the vocabulary; ``window``, tokens of a row; ``tokens``, the
    most to train on; ``of_file``, the most of one file, as some are long tables."""

    classes: int = 1024
    window: int = 32
    tokens: int = 1_000_000
    of_file: int = 6000


def sources(root: Path) -> list[Path]:
    """Files under ``root``, relative to it, in an order independent of their content."""
    found = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = [path for path in found if not _LEFT_OUT.intersection(path.parts)]
    return sorted(kept, key=lambda path: (zlib.crc32(path.as_posix().encode()), path))


def load(request: Text, cache: Path, bar: Bar, folder: Path | None = None) -> Dataset:
    """Open the data set in ``cache``; build it first if needed. ``folder`` replaces the standard library.

    Raises:
        DataError: There is too little text, ``tokenizers`` is not installed, or a number is out of range.
    """
    if not 300 <= request.classes <= 32767:
        raise DataError(f"--classes: text has 300 to 32767 tokens, got {request.classes}")
    if request.tokens < request.window + 1:
        raise DataError(f"--tokens: expected at least {request.window + 1}, got {request.tokens}")
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    names = sources(root)
    files = [root / name for name in names]
    listed = [[name.as_posix(), content_hash(file)] for name, file in zip(names, files, strict=True)]
    wanted = {"version": VERSION, **asdict(request), "files": listed}
    key = key_of(wanted)
    manifest = {"request": key, "notes": {"files": len(files)}}
    return dataset(cache / f"text-{request.classes}-{key}", manifest, lambda to: _build(to, request, files, bar))


def _build(folder: Path, request: Text, files: list[Path], bar: Bar) -> dict[str, Any]:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise DataError("--data text: tokenizers is not installed; pip install tokenizers") from None
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=request.classes,
        special_tokens=[BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < request.classes:
        raise DataError(f"--classes: this text makes {tokenizer.get_vocab_size()} tokens, {request.classes} asked for")
    begin = tokenizer.token_to_id(BEGIN)
    blocks: dict[str, list[npt.NDArray[np.int64]]] = {"train": [], "test": []}
    length, count = request.window * BLOCK, 0
    with bar.task("tokens", request.tokens) as advance:
        for text in texts:
            tokens = np.array([begin, *tokenizer.encode(text).ids[: request.of_file]])
            # An incomplete block at a file's end is dropped. Each block also has the token after its last one.
            for first in range(0, len(tokens) - length, length):
                split = "train" if count % TEST_SHARE else "test"
                blocks[split].append(tokens[first : first + length + 1])
                count += 1
            advance(len(tokens))
            if len(blocks["train"]) * length >= request.tokens:
                break
    if not blocks["train"]:
        raise DataError(f"text: the standard library's sources make no block of {length} tokens to train on")
    for split, made in blocks.items():
        both = [np.stack(made)[:, shift : shift + length].reshape(-1, request.window) for shift in (0, 1)]
        write_split(folder, split, both[0].astype(np.int16), both[1])
    tokenizer.save(str(folder / "tokenizer.json"))
    stats = {"mean": [0.0], "std": [1.0]}
    return {"name": "text", "splits": ["train", "test"], "classes": request.classes, **stats}


def about(made: Dataset) -> list[str]:
    """A line about the text's size."""
    return [
        f"text: {made.train.labels.size:,} tokens to train on, of {made.notes['files']} files of Python's own sources"
    ]

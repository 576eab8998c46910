"""Makes imagenet_classes.txt: the names of the 1000 ImageNet-1k classes, one per line, in the order of the logits.

pip install --no-deps torchvision
python benchmarks/data/make_class_names.py
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path


def names() -> list[str]:
    """Class names from torchvision's own module; importing the whole package needs the PyTorch it was built for."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        raise SystemExit("torchvision is not installed")
    spec = importlib.util.spec_from_file_location("categories", Path(package.origin).parent / "models" / "_meta.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [str(name) for name in module._IMAGENET_CATEGORIES]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("imagenet_classes.txt"))
    args = parser.parse_args()
    found = names()
    args.output.write_text("".join(f"{name}\n" for name in found), encoding="utf-8")
    print(f"{args.output.name}: {len(found)} names")


if __name__ == "__main__":
    main()

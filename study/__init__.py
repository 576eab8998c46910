"""Training with the losses of fused_kd: the paper's experiment in small. ``python study/train.py --help``."""

import sys
from importlib.util import find_spec

#: What is imported, some of it only when a run saves its network, and the package that has it.
_NEEDED = {
    "torch": "torch",
    "rich": "rich",
    "numpy": "numpy",
    "PIL": "Pillow",
    "fontTools": "fonttools",
    "safetensors": "safetensors",
}


def require(program: str) -> None:
    """End the program with one line if something that it imports is not installed."""
    if missing := [package for module, package in _NEEDED.items() if find_spec(module) is None]:
        sys.exit(
            f"{program}: not installed: {', '.join(missing)}; "
            "run `python -m pip install --editable '.[examples]'` in fused_kd's folder"
        )

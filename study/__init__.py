"""Training with fused_kd's losses: the paper's experiment in small. ``python study/train.py --help``."""

import sys
from importlib.util import find_spec

#: Imported modules and their packages. Some are imported only when a run saves its network.
_NEEDED = {
    "torch": "torch",
    "rich": "rich",
    "numpy": "numpy",
    "PIL": "Pillow",
    "fontTools": "fonttools",
    "safetensors": "safetensors",
}


def require(program: str) -> None:
    """Exit with one line if a package that the program imports is not installed."""
    if missing := [package for module, package in _NEEDED.items() if find_spec(module) is None]:
        sys.exit(
            f"{program}: not installed: {', '.join(missing)}; "
            "run `python -m pip install --editable '.[examples]'` in fused_kd's folder"
        )

"""Atomic checkpoints, and networks as safetensors with all that a teacher needs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from study.datasets.arrays import Dataset
from study.training import networks
from study.training.errors import RunError
from study.training.network import Network

FORMAT = 1
#: Required metadata of a network's file.
DESCRIPTION = ("model", "norm", "classes", "channels", "size", "mean", "std")


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: write a temporary one, sync it and rename it. Until then the previous file stays.

    Raises:
        RunError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with temporary.open("wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # makes the rename durable
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns OSError into RuntimeError
        raise RunError(
            f"{path}: cannot be written ({' '.join(str(error).split())}); the previous one is kept"
        ) from None


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a run."""
    write(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read the state of a run, on the CPU.

    Raises:
        RunError: The file cannot be read, or is not a checkpoint of this program.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise RunError(f"{path}: corrupt checkpoint ({type(error).__name__}); cannot resume from it") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not all(key in state for key in keys):
        raise RunError(f"{path}: not a checkpoint of this program, format {FORMAT}; cannot resume from it")
    return state


def save_network(path: Path, network: Network, description: dict[str, Any]) -> None:
    """Write a network's weights as safetensors, with the JSON values of ``description`` as metadata."""
    from safetensors.torch import save as to_bytes

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {name: json.dumps(value) for name, value in description.items()}
    write(path, lambda file: file.write(to_bytes(tensors, metadata)))


def load_network(path: Path, option: str) -> tuple[Network, dict[str, Any]]:
    """Load a file of :func:`save_network`: the network in evaluation mode, and its description.

    Raises:
        RunError: The file cannot be read, or is not such a file; the message begins with ``option``.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise RunError(f"{option} {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"{option} {path}: corrupt checkpoint ({' '.join(str(error).split())})") from None
    missing = [name for name in DESCRIPTION if name not in metadata]
    if missing:
        raise RunError(f"{option} {path}: not a network saved by this program, its metadata lacks {', '.join(missing)}")
    arguments = {name: metadata[name] for name in DESCRIPTION if name != "model"}
    network = networks.build(metadata["model"], **arguments)
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        raise RunError(
            f"{option} {path}: corrupt checkpoint, its weights are not those of {metadata['model']}"
        ) from None
    return network.eval().requires_grad_(False), metadata


def load_teacher(path: Path, data: Dataset) -> Network:
    """Load the network of ``--teacher``, which must fit the data.

    Raises:
        RunError: It cannot be read, or was trained with other classes, channels or image sizes.
    """
    network, description = load_network(path, "--teacher")
    for name, here in (("classes", data.classes), ("channels", data.channels), ("size", data.size)):
        if description[name] != here:
            raise RunError(f"--teacher {path}: trained with {description[name]} {name}, but the data set has {here}")
    return network


def weights_hash(network: Network) -> str:
    """SHA-256 of a network's weights and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

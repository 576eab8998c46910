"""Processes of a Gloo group that stay and do one job after another, since to start them takes seconds."""

import contextlib
import datetime
import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback

PATIENCE = 60.0  # seconds for a job


def leave():
    """End this process of a Gloo group at once, without the interpreter's own clearing up.

    A thread of Gloo's may still hold the last collective, and with it an object of Python's. If it lets go of that
    while the interpreter is ending, Python ends the thread by force and C++ aborts the process: one run in twelve where
    eight processes share two cores.
    """
    sys.stdout.flush()
    os._exit(0)


class Failed(Exception):
    """What happened to a job in a process: its rank, the exception's name, its words and where."""


def _serve(rank, size, store, connection):
    import torch

    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=PATIENCE / 2)  # a group shall hang for no longer than a test
    torch.distributed.init_process_group("gloo", f"file://{store}", timeout=wait, rank=rank, world_size=size)
    while (asked := connection.recv()) is not None:
        module, name, arguments = asked
        try:
            connection.send((True, getattr(importlib.import_module(module), name)(rank, size, *arguments)))
        except Exception:
            connection.send((False, f"rank {rank}: {traceback.format_exc()}"))
    torch.distributed.destroy_process_group()


class World:
    """``size`` processes; ``run`` has each call a function of a module with its rank, their number and arguments."""

    def __init__(self, size):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor", "fused_kd"])
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self._connections, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function, *arguments):
        """What each process returned, by rank."""
        for connection in self._connections:
            connection.send((function.__module__, function.__name__, arguments))
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(PATIENCE):
                raise Failed(f"rank {rank} does not answer")
            results.append(connection.recv())
        failures = [result for fine, result in results if not fine]
        if failures:
            raise Failed("\n".join(failures))
        return [result for _, result in results]

    def close(self):
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

"""Python programs in processes that are forked from one that has imported PyTorch, which takes three seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path

import torch
from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "fastkd.cli"])  # optimisers import torch._dynamo


def launched(
    words: Sequence[str | Path], processes: int = 1, cwd: Path | None = None, seconds: float = 600
) -> subprocess.CompletedProcess[str]:
    """Return what ``python`` with these words did, in one process, or in several as torchrun starts them.

    Args:
        words: a script, or -m and a module, then arguments.
        processes: number of ranks. If one fails, the others are killed.
        cwd: their working directory; None: that of the test.
        seconds: time after which all are killed.
    """
    deadline, command = time.monotonic() + seconds, [str(x) for x in words]
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(rank)) for rank in range(processes)]
        environment = dict(os.environ)  # the fork server has that of its start
        variables = [environment | variables_of(i, processes, store) for i in range(processes)]
        arguments = [(command, x, cwd or Path.cwd(), y) for x, y in zip(folders, variables, strict=True)]
        ranks = [CONTEXT.Process(target=_run, args=x) for x in arguments]
        for folder, rank in zip(folders, ranks, strict=True):
            folder.mkdir()
            rank.start()
        while (alive := [x.sentinel for x in ranks if x.is_alive()]) and not any(x.exitcode for x in ranks):
            if not connection.wait(alive, deadline - time.monotonic()):
                break
        for rank in ranks:
            rank.kill()
            rank.join()
        codes = [x.exitcode or 0 for x in ranks]
        status = next((x for x in codes if x > 0), min(codes))  # a negative one is that of a rank that was killed
        out, err = ("".join((folder / name).read_text() for folder in folders) for name in ("out", "err"))
    return subprocess.CompletedProcess(command, status, out, err)


def variables_of(rank: int, processes: int, store: TCPStore) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a rank."""
    if processes == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    numbers |= {"GROUP_RANK": 0, "MASTER_PORT": store.port, "TORCHELASTIC_RESTART_COUNT": 0}
    names = {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(number) for name, number in numbers.items()} | names


def _run(command: list[str], folder: Path, cwd: Path, variables: dict[str, str]) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(variables, CUDA_VISIBLE_DEVICES="")
    os.chdir(cwd)
    torch.set_num_threads(1)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")

"""The processes that train together: how they start, find one another, add up, and end. Torch's process group, gloo on the CPU and nccl on CUDA.

One rank needs no launcher; more run under torch.distributed.run (`launch`), `deepspeed` or Spark's distributors, which all set RANK, LOCAL_RANK
and WORLD_SIZE.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

from conf.section import Mistake

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
COMMAND = "STUDBOOK_COMMAND"  # of a rank's environment: the process that `launch` was called in
ALONE = 3  # exit status of a rank whose launcher is gone
LOST = (  # what gloo and nccl say when another rank is gone
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
    "Socket Timeout",
    "connectFullMesh",
    "NCCL communicator",
    "NCCL error",
)


class Ranks(NamedTuple):
    rank: int
    world: int


def launched() -> bool:
    """Whether a launcher started this process as one of its ranks."""
    return "RANK" in os.environ


def launch(module: str, arguments: Sequence[str], ranks: int) -> int:
    """(python module, its command line, processes on this machine) -> exit status; 0 when every rank ended well."""
    # threads as torch.distributed.run would set them, with a warning
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {COMMAND: str(os.getpid())}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={_free_port()}", "-m", module, *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def join(device: str, patience: int) -> Ranks:
    """ "cpu" or "cuda" -> this process's place among the ranks, joined until it exits. Raises Mistake when there is no such device.

    patience: seconds that a rank waits in a collective for the others before it takes them for lost.
    """
    if launched():
        threading.Thread(target=_end_when_alone, args=(os.getppid(),), name="launcher-watch", daemon=True).start()
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise Mistake("device: given cuda, but torch sees no CUDA device here; run where there is one, or set cpu")
    if device == "cpu":
        # one thread: the same sums on any number of cores, and threads that spin for a busy core made a step 5 times slower [measured]
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    os.environ.setdefault("LOCAL_RANK", "0")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        timeout = timedelta(seconds=patience)
        if launched():
            torch.distributed.init_process_group(BACKENDS[device], timeout=timeout)
        else:  # a store in memory: neither a port nor a launcher's variables
            torch.distributed.init_process_group(
                BACKENDS[device], store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
            )
        atexit.register(torch.distributed.destroy_process_group)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


def _end_when_alone(launcher: int) -> None:
    """Ends this rank when its launcher, or the command that started the launcher, is gone: else the ranks of a killed command train on unseen.

    The next start of the same training would find the folder taken, or worse, finished by others. What a kill leaves is what it goes on from.
    """
    import psutil

    with suppress(psutil.Error):
        command = os.environ.get(COMMAND)
        while os.getppid() == launcher and (command is None or psutil.Process(launcher).ppid() == int(command)):
            time.sleep(1.0)
    with suppress(OSError):  # nobody may be there to read it
        print("studbook: what started this rank is gone, so it ends; start again: it goes on from the last checkpoint", flush=True)
    os._exit(ALONE)


def leave(status: int = 0) -> None:
    """The last word of a launched rank: ends the process without the interpreter's finalization.

    A gloo thread may still hold the tensors of the last collective; when it drops them while Python is finalized it waits for
    a lock that is never given, and aborts the rank (pytorch #179291; 2 of 14 runs of ZeRO 3 on a busy machine). DeepSpeed's hooks
    keep the process group alive, so destroying it does not end those threads.
    """
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def total(values: Sequence[float], device: Any) -> list[float]:
    """This rank's numbers -> their sums over all ranks, in float64."""
    import torch

    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return [float(value) for value in tensor]


def total_modulo(values: Sequence[int], device: Any) -> list[int]:
    """This rank's whole numbers below 2**64 -> their sums over all ranks modulo 2**64."""
    import torch

    tensor = torch.tensor([value - 2**64 if value >= 2**63 else value for value in values], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(tensor)
    return [int(value) % 2**64 for value in tensor]


def collect(value: object) -> list[Any]:
    """This rank's small object -> those of all ranks, in their order."""
    import torch

    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    import torch

    torch.distributed.barrier()


def lost(error: BaseException) -> bool:
    """Whether an error means that another rank is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

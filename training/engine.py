"""A torch module and settings -> a module that trains on one or many ranks. The only file that knows DeepSpeed.

ZeRO 0 to 3, fp32 or bf16, gloo on the CPU and nccl on CUDA. Nothing is compiled: torch's own AdamW, and DeepSpeed's
shared-memory op for the CPU, the one thing it would build by itself, is switched off. One rank needs no launcher; more
run under torch.distributed.run (`launch`), which sets RANK, LOCAL_RANK and WORLD_SIZE as any other launcher does.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from conf.settings import Mistake, TrainScorer

if TYPE_CHECKING:
    import torch

CLIP = 1.0  # largest norm of a step's gradient
WARM_UP = 0.05  # share of the steps over which the learning rate rises; then it falls to 0 as a cosine


class Ranks(NamedTuple):
    rank: int
    world: int


def launched() -> bool:
    """Whether a launcher started this process as one of its ranks."""
    return "RANK" in os.environ


def launch(module: str, arguments: Sequence[str], ranks: int) -> int:
    """(python module, its command line, processes on this machine) -> exit status; 0 when every rank ended well."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # as torch.distributed.run would set it, with a warning
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={_free_port()}", "-m", module, *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def start(device: str) -> Ranks:
    """ "cpu" or "cuda" -> this process's place among the ranks, joined until it exits. Raises Mistake when there is no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise Mistake("device: given cuda, but torch sees no CUDA device here; run where there is one, or set cpu")
    if device == "cpu":
        # one thread: the same sums on any number of cores, and threads that spin for a busy core made a step 5 times slower [measured]
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    os.environ.setdefault("DS_ACCELERATOR", device)  # or DeepSpeed warns while it looks for one
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "gloo" if device == "cpu" else "nccl"
    if not torch.distributed.is_initialized():
        if launched():
            torch.distributed.init_process_group(backend)
        else:  # a store in memory: neither a port nor a launcher's variables
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        atexit.register(torch.distributed.destroy_process_group)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would need g++ at run time
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


def leave() -> None:
    """The last word of a launched rank: ends the process with status 0, without the interpreter's finalization.

    A gloo thread may still hold the tensors of the last collective; when it drops them while Python is finalized it waits for
    a lock that is never given, and aborts the rank (pytorch #179291; 2 of 14 runs of ZeRO 3 on a busy machine). DeepSpeed's hooks
    keep the process group alive, so destroying it does not end those threads.
    """
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def wrap(module: torch.nn.Module, settings: TrainScorer, steps: int) -> Any:
    """(module with the same weights on every rank, settings, optimizer steps to come) -> DeepSpeed engine: call, backward, step."""
    import deepspeed
    import torch

    def factor(step: int) -> float:
        warm = max(1, round(WARM_UP * steps))
        return (step + 1) / warm if step < warm else 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    config = {
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": settings.zero_stage},
        "bf16": {"enabled": settings.precision == "bf16"},
        "steps_per_print": sys.maxsize,
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, factor), config=config
    )
    return engine


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Engine -> the whole fp32 weights on the CPU by their own names. Every rank must call it: the parts are gathered."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        whole[name] = (parameter.data if master is None else master).detach().float().cpu().clone()
    return whole


def total(values: Sequence[float], device: Any) -> list[float]:
    """This rank's numbers -> their sums over all ranks, in float64."""
    import torch

    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return [float(value) for value in tensor]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

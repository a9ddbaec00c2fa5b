"""A torch module and settings -> a module that trains on one or many ranks. The only file that knows DeepSpeed.

ZeRO 0 to 3, fp32 or bf16, gloo on the CPU and nccl on CUDA. Nothing is compiled: torch's own AdamW, and DeepSpeed's
shared-memory op for the CPU, the one thing it would build by itself, is switched off. One rank needs no launcher; more
run under torch.distributed.run (`launch`), `deepspeed` or Spark's distributors, which all set RANK, LOCAL_RANK and WORLD_SIZE.

What is trained lives in fp32 on every stage, cut over the ranks in a way of the stage's own. `fragments` gives this rank's parts
under the parameters' names, in place; all that needs the weights (export, moving average, checkpoints of it) goes through them.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from conf.settings import Loop, Mistake

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]
TAG = "engine"  # of DeepSpeed's own files in a checkpoint's folder
UNIVERSAL = "universal"  # the same, converted for any number of ranks
COMMAND = "STUDBOOK_COMMAND"  # of a rank's environment: the process that `launch` was called in
ALONE = 3  # exit status of a rank whose launcher is gone
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
    "Socket Timeout",
    "NCCL",
    "connectFullMesh",
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


def start(device: str, patience: int = 600) -> Ranks:
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
    os.environ.setdefault("DS_ACCELERATOR", device)  # or DeepSpeed warns while it looks for one
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "gloo" if device == "cpu" else "nccl"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        timeout = timedelta(seconds=patience)
        if launched():
            torch.distributed.init_process_group(backend, timeout=timeout)
        else:  # a store in memory: neither a port nor a launcher's variables
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout)
        atexit.register(torch.distributed.destroy_process_group)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would need g++ at run time
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    if deepspeed.utils.groups._WORLD_GROUP is None:
        # its copy of the group of all ranks, through which gradients go: it would wait torch's own 30 minutes for a rank that hangs
        deepspeed.utils.groups._WORLD_GROUP = torch.distributed.new_group(timeout=timedelta(seconds=patience))
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


def wrap(module: torch.nn.Module, settings: Loop, steps: int, ranks: Ranks, universal: bool = False) -> Any:
    """(module with the same weights on every rank, settings, optimizer steps of the whole training) -> DeepSpeed engine.

    Its `backward` wants the mean over the rows of the step x the number of micro-batches: it divides by that, and averages over the ranks.
    universal: its checkpoint will be read from the form that fits any number of ranks.
    """
    import deepspeed
    import torch

    config = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": micro_batches(settings, ranks.world),
        "gradient_clipping": settings.clip_norm,
        "zero_optimization": {"stage": settings.zero_stage},
        "bf16": {"enabled": settings.precision == "bf16"},
        "steps_per_print": sys.maxsize,
        "checkpoint": {"load_universal": universal},
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    factor = schedule(settings, steps)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, factor), config=config
    )
    return engine


def micro_batches(settings: Loop, world: int) -> int:
    """Of one rank in one optimizer step. Raises Mistake when the step cannot be cut evenly."""
    count, rest = divmod(settings.rows_per_step, settings.micro_batch * world)
    if rest:
        raise Mistake(
            f"rows_per_step: given {settings.rows_per_step}, expected a multiple of micro_batch x ranks = {settings.micro_batch} x {world}"
        )
    return count


def schedule(settings: Loop, steps: int) -> Callable[[int], float]:
    """-> factor of the learning rate at an optimizer step (from 0): a linear rise, then as settings.schedule says."""
    warm = max(1, round(settings.warm_up * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return {"cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "linear": 1.0 - done, "constant": 1.0}[settings.schedule]

    return factor


def fragments(engine: Any) -> Weights:
    """Engine -> this rank's parts of the trained parameters' fp32 values, by name; writing to them writes to the model's master weights.

    A parameter of which this rank holds nothing is not there. After a write call `refresh`.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    held: Weights = {}
    for name, parameter in _trained(engine):
        if hasattr(parameter, "ds_id"):  # ZeRO 3
            held[name] = safe_get_local_fp32_param(parameter).detach()
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2, and bf16
            if parameter._hp_mapping is not None:
                held[name] = parameter._hp_mapping.hp_fragment.detach()
        else:
            held[name] = parameter.data
    return held


def refresh(engine: Any) -> None:
    """Makes the weights that the model computes with what the fp32 fragments are. Every rank must call it."""
    if hasattr(next(iter(_trained(engine)))[1], "ds_id"):
        held = fragments(engine)
        for name, parameter in _trained(engine):
            parameter.ds_tensor.data.copy_(held[name])  # type: ignore[attr-defined]
        persistent = engine.optimizer.persistent_parameters  # small ones that ZeRO 3 keeps whole
        if persistent:
            persistent[0].partition(persistent, has_been_updated=False)
            persistent[0].all_gather(persistent)
    elif hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()


def weights(engine: Any, keep: bool) -> Weights:
    """Engine -> the whole fp32 values of the trained parameters on the CPU, by name ({} unless `keep`). Every rank must call it: parts are gathered."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole: Weights = {}
    for name, parameter in _trained(engine):
        master = safe_get_full_fp32_param(parameter)
        if keep:
            whole[name] = (parameter.data if master is None else master).detach().float().cpu().clone()
    return whole


def save(engine: Any, folder: Path) -> str:
    """Writes DeepSpeed's files of all ranks into the folder -> "" or what failed on this rank. Every rank must call it.

    An error of one rank is told afterwards: raised at once it would leave the others waiting in DeepSpeed's barriers.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    failures: list[str] = []

    class Saver(TorchCheckpointEngine):
        def save(self, state_dict: Any, path: str) -> None:
            try:
                super().save(state_dict, path)
            except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
                failures.append(f"{path}: {error}".splitlines()[0])

    kept, engine.checkpoint_engine = engine.checkpoint_engine, Saver()
    info = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}  # stages 1 and 2 convert only with it
    try:
        engine.save_checkpoint(str(folder), tag=TAG, client_state=info, save_latest=False, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine = kept
    return "; ".join(failures)


def load(engine: Any, folder: Path, universal: bool) -> None:
    """What `save` wrote -> into the engine: weights, optimizer, learning rate. Every rank must call it."""
    tag = f"{TAG}-{UNIVERSAL}" if universal else TAG
    found, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
    assert found is not None, folder


def make_universal(folder: Path) -> None:
    """DeepSpeed's files of one number of ranks -> the same for any, beside them, all of it or nothing; done once. One rank calls it."""
    import shutil
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    made = folder / f"{TAG}-{UNIVERSAL}"
    if made.is_dir():
        return
    part = made.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    told = Namespace(
        input_folder=str(folder / TAG), output_folder=str(part), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    try:
        ds_to_universal.main(told)
        part.rename(made)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise Mistake(f"checkpoint {folder}: it could not be converted for another number of ranks: {error}") from error


def await_universal(folder: Path) -> None:
    """Waits for what another rank's `make_universal` makes: for hours, if it must (a collective has a time limit; the launcher sees a dead rank)."""
    while not (folder / f"{TAG}-{UNIVERSAL}").is_dir():
        time.sleep(0.2)


@contextmanager
def swapped(engine: Any, other: Weights) -> Iterator[None]:
    """For the length of the block the model computes with `other` (fragments), which holds the model's own meanwhile. Every rank must enter it."""
    _swap(engine, other)
    try:
        yield
    finally:
        _swap(engine, other)


def _swap(engine: Any, other: Weights) -> None:
    for name, mine in fragments(engine).items():
        kept = mine.clone()
        mine.copy_(other[name])
        other[name].copy_(kept)
    refresh(engine)


def cut(engine: Any, whole: Callable[[str], torch.Tensor], ranks: Ranks) -> Weights:
    """(name -> a whole fp32 tensor, read one at a time) -> this rank's parts of them, cut as `fragments` are."""
    import torch

    parts: Weights = {}
    for name, held in fragments(engine).items():
        parameter, flat = engine.module.get_parameter(name), whole(name).flatten()
        if hasattr(parameter, "ds_id"):  # equal parts, the last one padded
            padded = torch.nn.functional.pad(flat, (0, held.numel() * ranks.world - flat.numel()))
            part = padded.narrow(0, held.numel() * ranks.rank, held.numel())
        elif hasattr(parameter, "_hp_mapping"):
            address = parameter._hp_mapping.lp_fragment_address
            part = flat.narrow(0, address.start, address.numel)
        else:
            part = flat
        parts[name] = part.to(held.device, held.dtype, copy=True).view(held.shape)
    return parts


def skipped(engine: Any) -> int:
    """Optimizer steps that DeepSpeed left out since its start, because a gradient was not finite (ZeRO 1 to 3)."""
    return int(engine.skipped_steps)


def spoilt(engine: Any) -> bool:
    """Whether a weight on this rank is not finite: what becomes of such a gradient where no step is left out (ZeRO 0)."""
    import torch

    return not all(bool(torch.isfinite(part.sum())) for part in fragments(engine).values())  # a sum: one pass, and no copy


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


def _trained(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

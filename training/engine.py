"""A torch module and settings -> a module that trains on one or many ranks. With training/fragments.py the only file that knows DeepSpeed.

ZeRO 0 to 3, fp32 or bf16. Nothing is compiled: torch's own AdamW, and DeepSpeed's shared-memory op for the CPU, the one thing it would build by
itself, is switched off.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.loops import Loop
from conf.section import Mistake
from training import process_group
from training.process_group import Ranks

if TYPE_CHECKING:
    import torch

TAG = "engine"  # of DeepSpeed's own files in a checkpoint's folder
UNIVERSAL = "universal"  # the same, converted for any number of ranks


def start(device: str, patience: int = 600) -> Ranks:
    """ "cpu" or "cuda" -> this process's place among the ranks, joined until it exits. Raises Mistake when there is no such device.

    patience: seconds that a rank waits in a collective for the others before it takes them for lost.
    """
    ranks = process_group.join(device, patience)
    os.environ.setdefault("DS_ACCELERATOR", device)  # or DeepSpeed warns while it looks for one
    import deepspeed
    import torch

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would need g++ at run time
    deepspeed.init_distributed(dist_backend=process_group.BACKENDS[device], verbose=False)
    if deepspeed.utils.groups._WORLD_GROUP is None:
        # its copy of the group of all ranks, through which gradients go: it would wait torch's own 30 minutes for a rank that hangs
        deepspeed.utils.groups._WORLD_GROUP = torch.distributed.new_group(timeout=timedelta(seconds=patience))
    return ranks


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


def skipped(engine: Any) -> int:
    """Optimizer steps that DeepSpeed left out since its start, because a gradient was not finite (ZeRO 1 to 3)."""
    return int(engine.skipped_steps)

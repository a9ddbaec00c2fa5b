"""What each row cost in training -> parquet files, so that selection can learn from training; a job lands them as `train_stats`.

One row each time an image was trained on: image_id, epoch, step, loss (without row weights). A file holds the steps since the checkpoint
before, and is written before the checkpoint that stands for them; a training that goes on from a checkpoint removes the files of later steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from udfs.pinned import hash_file

FOLDER = "row_losses"
WORST = 3  # images that an error names


class RowLosses:
    """Of one rank. Memory: about 130 bytes a row since the last file, most of them the id as a Python object."""

    def __init__(self, root: Path, rank: int) -> None:
        self._folder, self._rank = root / FOLDER, rank
        self._parts: list[tuple[npt.NDArray[Any], int, int, Any, npt.NDArray[np.bool_]]] = []

    def add(self, ids: npt.NDArray[Any], epoch: int, step: int, losses: Any, real: npt.NDArray[np.bool_]) -> None:
        """losses: float32 tensor [n] on the device; copied when a file is written or an error asks."""
        self._parts.append((ids[real], epoch, step, losses.detach().float(), real))  # a copy: ids may be a view of a whole window

    def settle(self) -> None:
        """Takes the losses off the device."""
        self._parts = [(ids, epoch, step, losses.cpu(), real) for ids, epoch, step, losses, real in self._parts]

    def worst(self) -> list[tuple[float, str]]:
        """The images with the largest losses since the last file, hex; those that are not finite first."""
        found: dict[str, float] = {}
        for ids, _, _, losses, real in self._parts:
            for image_id, loss in zip(ids, losses.cpu().numpy()[real], strict=True):
                value = float(loss) if np.isfinite(loss) else float("inf")
                found[image_id.hex()] = max(value, found.get(image_id.hex(), value))
        return sorted(((value, image_id) for image_id, value in found.items()), reverse=True)[:WORST]

    def write(self) -> str:
        """-> "" or what failed; then the rows stay for the next call."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._parts:
            return ""
        columns: dict[str, Any] = {
            "image_id": pa.array([image_id for ids, *_ in self._parts for image_id in ids], pa.binary(32)),
            "epoch": np.concatenate([np.full(int(real.sum()), epoch, np.int32) for _, epoch, _, _, real in self._parts]),
            "step": np.concatenate([np.full(int(real.sum()), step, np.int32) for _, _, step, _, real in self._parts]),
            "loss": np.concatenate([losses.cpu().numpy()[real] for _, _, _, losses, real in self._parts]).astype(np.float32),
        }
        path = self._folder / f"{self._parts[0][2]:08d}-{self._parts[-1][2]:08d}-{self._rank:04d}.parquet"
        part = path.with_suffix(".part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), part, compression="zstd")
            part.rename(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            return f"{path}: {error}"
        self._parts = []
        return ""


def forget_after(root: Path, step: int) -> None:
    """Removes the files that hold steps after this one: a training that goes on from here makes them again."""
    for path in (root / FOLDER).glob("*"):
        if path.suffix != ".parquet" or int(path.name.split("-")[1]) > step:
            path.unlink()


def digests(root: Path) -> dict[str, str]:
    """Name -> sha256 of the files of a training."""
    return {path.name: hash_file(path) for path in sorted((root / FOLDER).glob("*.parquet"))}

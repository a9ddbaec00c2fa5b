"""A pinned ONNX file -> a session of onnxruntime on the device of this worker: for detectors and exported towers.

On a CPU a detector's session has one thread: Spark's tasks and the decode threads are what runs side by side, and the numbers do not depend on the
machine's cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CUDA = "CUDAExecutionProvider"


def open_session(path: Path, device: str, arena: bool = True, threads: int | None = 1) -> InferenceSession:
    """(ONNX file, "cpu" or "cuda:N") -> session. Raises ValueError when the device is CUDA and this onnxruntime has no such provider.

    arena: keep memory between runs; for inputs of one shape. threads: of the CPU; None: as many as the machine has cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or 0, 1
    options.log_severity_level = 3  # errors
    options.enable_cpu_mem_arena = arena
    if device == "cpu":
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    told = (CUDA, {"device_id": int(device.rpartition(":")[2]) if ":" in device else 0})
    have = onnxruntime.get_available_providers()
    session = onnxruntime.InferenceSession(path, options, providers=[told, "CPUExecutionProvider"]) if CUDA in have else None
    if session is None or CUDA not in session.get_providers():
        raise ValueError(
            f"device {device}: onnxruntime here runs on {have}; install onnxruntime-gpu and its CUDA libraries, or set embed.device: cpu"
        )
    return session

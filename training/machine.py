"""What runs a training -> the text of its environment, the tags of its source, and samples of how busy the machine is."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 10.0  # as MLflow's own sampling


def describe_environment() -> str:
    """-> text: Python, platform, CPU and GPU, and every installed distribution with its version."""
    names = {(d.metadata["Name"] or "?").lower(): d.version for d in metadata.distributions()}
    lines = [f"python {platform.python_version()}", f"platform {platform.platform()}", f"cpu {_cpu()}, {os.cpu_count()} cores"]
    return "\n".join([*lines, *(f"gpu {gpu}" for gpu in _gpus()), "", *(f"{name}=={names[name]}" for name in sorted(names)), ""])


def describe_source() -> dict[str, str]:
    """-> tags: the commit of the checkout that this code lies in and whether files differ from it; without one the package's version."""
    if _git("rev-parse", "--show-toplevel") == str(ROOT):
        changed = "true" if _git("status", "--porcelain", "--untracked-files=no") else "false"
        return {"mlflow.source.git.commit": _git("rev-parse", "HEAD"), "studbook.git.dirty": changed}
    try:
        return {"studbook.version": metadata.version("studbook")}
    except metadata.PackageNotFoundError:
        return {}


class Sampler:
    """A thread that samples this machine (rank 0's) by MLflow's own monitors and gives each sample to `keep`.

    MLflow's SystemMetricsMonitor itself ends for good at the first request that fails; here samples go through the journal.
    """

    def __init__(self, keep: Callable[[Mapping[str, float]], None]) -> None:
        self._keep, self._stopped = keep, threading.Event()
        self._thread = threading.Thread(target=self._work, name="machine-samples", daemon=True)

    def start(self) -> None:
        """Begin; the first sample is kept after SAMPLE_SECONDS, or at the end."""
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no NVIDIA library, no GPU
            self._monitors.append(GPUMonitor())
        self._sample()  # CPU use is counted from the call before
        self._thread.start()

    def stop(self) -> None:
        """Keep one last sample and end."""
        if self._thread.is_alive():
            self._stopped.set()
            self._thread.join()

    def _work(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._keep(self._sample())
        self._keep(self._sample())

    def _sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": float(value) for name, value in values.items()}


def _git(*arguments: str) -> str:
    """What git says of the folder of this code; "" where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")  # where a GPU is used it is imported
    if torch is None or not torch.cuda.is_available():
        return []
    return [f"{torch.cuda.get_device_name(number)}, CUDA {torch.version.cuda}" for number in range(torch.cuda.device_count())]

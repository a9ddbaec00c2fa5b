"""A device's name -> its peak dense bf16 FLOPs a second: what a model's use of it (MFU) is measured by.

From the vendors' data sheets (NVIDIA A100, H100, H200, L4, L40, L40S: tensor cores, without sparsity; the SXM part where there are two).
"""

from __future__ import annotations

import re
from typing import Any

PEAK = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


def peak_flops(device: Any, precision: str) -> float | None:
    """torch device -> FLOPs a second, or None where the peak is not known (a CPU; fp32, whose peak depends on the TF32 setting)."""
    import torch

    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if re.search(rf"\b{part}\b", name)), None)

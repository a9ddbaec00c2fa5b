"""Latents, noise and a time -> what a flow-matching model is shown, what it should answer, and how far off it was.

t = 0 is the image, t = 1 the noise: z_t = (1 - t) x + t noise, and the model answers the velocity noise - x. It is told t as it mixed
the two, as the sampler of diffusers does (AuraFlowPipeline: sigma = timestep / 1000). The public training code that AuraFlow grew out
of (cloneofsimo/minRF) draws t logit-normal and, in its last stage, shifts it by sqrt(3) = 1.73 but tells the model the t before the
shift: which of the two a release has learnt is not probed here.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Times = Literal["uniform", "logit_normal"]
QUARTERS = 4  # of the range of t: the loss falls with t in a way of its own in each, so one mean hides a lot


def draw_times(count: int, times: Times, shift: float, device: torch.device | str) -> torch.Tensor:
    """-> t [count] in (0, 1), float32, by torch's random state: uniform, or the logistic of a normal; then shifted."""
    import torch

    if times == "uniform":
        return shift_times(torch.rand(count, device=device), shift)
    return shift_times(torch.sigmoid(torch.randn(count, device=device)), shift)


def shift_times(t: torch.Tensor, shift: float) -> torch.Tensor:
    """t -> shift t / (1 + (shift - 1) t): above 1 it moves towards the noise, as large pictures need (SD3, Esser et al. 2024, 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


def mix(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Latents and noise [n, ...], t [n] -> z_t [n, ...]."""
    t = t.view(-1, *[1] * (x.dim() - 1))
    return (1 - t) * x + t * noise


def losses(answer: torch.Tensor, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The model's velocity, latents, noise [n, ...] -> mean squared error of each row, float32 [n]."""
    return (answer.float() - (noise - x)).square().flatten(1).mean(1)


def fixed_draw(image_id: bytes, quarter: int, shape: tuple[int, ...]) -> tuple[float, torch.Tensor]:
    """-> t in that quarter of (0, 1) and noise, always the same for an image.

    No seed of a training enters: two versions are compared on the same noise, so their rows can be paired.
    """
    import torch

    hashed = hashlib.sha256(b"held out %d " % quarter + image_id).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(hashed[:8], "little") % 2**63)
    place = float(torch.rand((), generator=generator))
    return (quarter + place) / QUARTERS, torch.randn(shape, generator=generator)

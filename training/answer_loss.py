"""Tokens, pictures and labels of some rows -> what each row's answer costs: the loss of a captioner, in training and on held-out images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of a token that is not an answer's, as torch has it


def answer_losses(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Arrays of captioner_rows.Maker.arrays on the device -> the summed cross-entropy of each row's answer, float32 [n]. `model`: InternVL, wrapped or not."""
    import torch
    import torch.nn.functional as F

    labels = inputs["labels"][:, 1:]
    wanted = labels != IGNORED
    before = F.pad(wanted, (0, 1))  # the columns whose next token is an answer's
    pixels = inputs["pixels"].to(next(model.parameters()).dtype)
    told = {"input_ids": inputs["tokens"], "attention_mask": inputs["mask"], "pixel_values": pixels}
    logits = model(**told, logits_to_keep=before, use_cache=False).logits.float()
    losses = torch.zeros(wanted.shape, device=logits.device)
    losses[wanted] = F.cross_entropy(logits, labels[wanted], reduction="none")
    return losses.sum(1)

"""Checkpoints of torch as Lightning, a script or an attacker writes them."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from udfs import score_head


class ArgsLikeLightnings(dict[str, Any]):
    """A class that the unpickler must not look up."""


class Touch:
    """Makes the canary's file when it is unpickled by a real unpickler."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


class Evaluate(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.canary)!r}, 'w').close()",)


class SetState(Touch):
    """By a state that an object of this class would take."""

    def __reduce__(self) -> tuple[Any, ...]:
        return argparse.Namespace, (), {"canary": self.canary, "run": Touch(self.canary)}


def make_head() -> torch.nn.Module:
    """A score head for vectors of 48 numbers, the same each time."""
    torch.manual_seed(0)
    return score_head.build(48)


def lightning(head: torch.nn.Module, **more: Any) -> dict[str, Any]:
    """What Lightning saves beside the weights."""
    state = OrderedDict((f"model.{name}", value) for name, value in head.state_dict().items())
    optimizer = torch.optim.AdamW(head.parameters())
    head(torch.randn(2, 48)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": state,
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": ArgsLikeLightnings(lr=1e-3, args=argparse.Namespace(path=Path("x"), device=torch.device("cpu"), sizes={1, 2})),
    } | more


def saved(path: Path, thing: Any) -> Path:
    torch.save(thing, path)
    return path


def archive(path: Path, pickled: bytes, members: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A checkpoint made by hand."""
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in {"a/data.pkl": pickled, "a/version": b"3\n", **(members or {})}.items():
            file.writestr(name, data)
    return path

"""The rooms stand alone: each imports without the other's libraries, importing is light, and importing does nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module is imported in a child whose import system knows none of the blocked libraries, as if they were not installed
CHILD = """
import importlib, json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

BLOCKED, modules = json.loads(sys.argv[1]), json.loads(sys.argv[2])
sys.meta_path.insert(0, Blocked())
for module in modules:
    importlib.import_module(module)
sys.stderr.write(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def modules(*rooms: str) -> list[str]:
    """Every module of the rooms, found on the disk: the test grows with the project."""
    paths = [path.relative_to(ROOT).with_suffix("") for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    assert len(names) > len(rooms)
    return names


def imported(names: list[str], blocked: tuple[str, ...] = ()) -> set[str]:
    """Imports in a child -> the libraries that are loaded there. Fails when an import fails or prints."""
    command = [sys.executable, "-c", CHILD, json.dumps(blocked), json.dumps(names)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    *said, loaded = child.stderr.splitlines()
    assert (child.stdout, said) == ("", []), "importing printed something"
    return set(json.loads(loaded))


@pytest.mark.parametrize(
    ("rooms", "blocked"),
    [
        (("conf", "udfs", "jobs"), ("petastorm", "deepspeed", "training")),
        (("conf", "udfs", "training"), ("pyspark", "delta", "jobs")),
        (("conf", "udfs"), ("petastorm", "deepspeed", "pyspark", "delta", "mlflow", "jobs", "training")),
    ],
    ids=["jobs without petastorm and DeepSpeed", "training without Spark", "the kernel without either"],
)
def test_a_room_imports_without_the_libraries_of_the_other(rooms: tuple[str, ...], blocked: tuple[str, ...]) -> None:
    imported(modules(*rooms), blocked)


def test_the_spark_driver_imports_every_job_and_kernel_without_torch() -> None:
    heavy = {"torch", "torchvision", "open_clip", "transformers", "timm"}
    assert imported(modules("conf", "udfs", "jobs")) & heavy == set()

"""The notebooks are Databricks source, plain Python that runs against a lake, and what jupytext makes of it.

notebooks/captions.py runs in test_compare_captioners.py, on a lake that has captions.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jupytext
import nbformat
import pytest
import yaml
from pyspark.sql import SparkSession

from conf.settings import Settings
from jobs import embed, ingest
from jobs.lake import Lake
from jobs.tables import TABLES

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.py"))
(TOUR,) = (path for path in NOTEBOOKS if path.name == "tour.py")
of_each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
SEPARATOR = "# COMMAND ----------"


class Cell(NamedTuple):
    kind: str
    text: str


def cells(notebook: Path) -> list[Cell]:
    """The source's cells after its first line, read without jupytext: text is code, or markdown without its `# `."""
    parts = notebook.read_text().removeprefix("# Databricks notebook source\n").split(f"{SEPARATOR}\n")
    found = []
    for part in parts:
        marker, _, body = part.strip("\n").partition("\n")
        if marker == "# %% [markdown]":
            found.append(Cell("markdown", "\n".join(line.removeprefix("# ") for line in body.splitlines())))
        else:
            assert marker == "# %%", f"a cell begins with {marker!r}"
            found.append(Cell("code", body))
    return found


@of_each
def test_a_notebook_is_databricks_source(notebook: Path) -> None:
    assert notebook.read_text().startswith("# Databricks notebook source\n")
    assert [cell.kind for cell in cells(notebook)] == ["markdown", "code"] * (len(cells(notebook)) // 2)
    assert len(cells(notebook)) >= 6


@of_each
def test_jupytext_makes_a_notebook_of_the_sources_cells(tmp_path: Path, notebook: Path) -> None:
    jupytext.write(jupytext.read(notebook), tmp_path / "made.ipynb")
    made = nbformat.read(tmp_path / "made.ipynb", as_version=4)
    nbformat.validate(made)
    head, *rest = made.cells
    assert head.source == "# Databricks notebook source"
    # a separator is the last line of the cell before it; in markdown without its `# `
    plain = [Cell(cell.cell_type, cell.source.removesuffix(SEPARATOR.removeprefix("# ")).removesuffix("# ").rstrip("\n")) for cell in rest]
    assert plain == cells(notebook)


def test_the_tour_runs_as_plain_python_in_the_running_session(
    images: Path,
    tmp_path: Path,
    spark: SparkSession,
    make_settings: Callable[..., Settings],
    make_lake: Callable[[Settings], Lake],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = make_settings(waves={"rows": 20, "task_rows": 10})
    lake = make_lake(settings)
    ingest.run(lake, settings)
    embed.run(lake, settings)
    config = tmp_path / "build.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", [str(TOUR), str(config)])
    capsys.readouterr()
    left = runpy.run_path(str(TOUR), run_name="__main__")
    told = capsys.readouterr().out
    assert left["lake"].spark.sparkContext is spark.sparkContext
    cells_of_rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("|")]
    counted = {row[0]: int(row[1]) for row in cells_of_rows if row[0] in TABLES}
    assert counted == {name: 12 if name in ("images", "sources", "pixels", "embeddings") else 0 for name in TABLES}

"""A folder of pictures becomes a list that is read back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.jobs.conftest import write_image
from udfs import deny_list
from udfs.opener import Opener


def test_a_list_made_of_a_folder_names_what_it_leaves_out(tmp_path: Path) -> None:
    write_image(tmp_path / "in/a.png", 1)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "in/flat.png")
    (tmp_path / "in/words.txt").write_text("no picture")
    command = [sys.executable, "-m", "jobs.make_deny_list", str(tmp_path / "in"), str(tmp_path / "list.txt"), "--date", "2026-11-25"]
    made = subprocess.run([*command, "--kind", "phash", "--name", "us"], capture_output=True, text=True)
    assert made.returncode == 1, made.stderr
    assert "flat.png: a flat picture" in made.stderr and "words.txt: not_an_image" in made.stderr
    found = deny_list.read({"name": "us", "path": str(tmp_path / "list.txt"), "kind": "phash", "sha256": None}, Opener())
    assert 2 <= len(found.hashes) <= 46

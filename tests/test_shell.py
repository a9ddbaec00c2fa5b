"""What a person meets first: the targets, and one line when Java or Python is not the right one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHELL = {tool: shutil.which(tool) or "" for tool in ("sh", "sed", "head", "grep")}


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def java(home: Path, version: str, modules: str = "java.base@17 jdk.incubator.vector@17") -> Path:
    """A JAVA_HOME whose java answers as the real ones do (the version on stderr)."""
    answer = f"case $1 in -version) echo '{version}' >&2 ;; *) printf '%s\\n' {modules} ;; esac"
    program(home / "bin" / "java", answer)
    return home


def check(what: str, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("JAVA_HOME", "PYTHON")} | variables
    if path is not None:  # a PATH with nothing but the shell's tools and what the test puts there
        for tool, real in SHELL.items():
            (path / tool).symlink_to(real)
        environment["PATH"] = str(path)
    command = [SHELL["sh"], str(ROOT / "infra" / "prerequisites.sh"), what]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    "version",
    ['openjdk version "17.0.15" 2025-04-15', 'openjdk version "21" 2023-09-19', 'java version "21.0.2" 2024-01-16 LTS'],
)
def test_java_17_and_21_pass_in_silence(tmp_path: Path, version: str) -> None:
    done = check("java", JAVA_HOME=str(java(tmp_path, version)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ('java version "1.8.0_392"', "found Java 1.8.0_392"),
        ('openjdk version "11.0.21" 2023-10-17', "found Java 11.0.21"),
        ('openjdk version "25" 2025-09-16', "found Java 25"),
        ("no java at all", "found Java of unknown version"),
    ],
)
def test_another_java_is_one_line_that_says_found_needed_and_how(tmp_path: Path, version: str, found: str) -> None:
    line = refusal(check("java", JAVA_HOME=str(java(tmp_path, version))))
    assert found in line
    assert "needed: Java 17 or 21" in line
    assert "get it: apt-get install openjdk-17-jre-headless" in line


def test_a_java_without_the_vector_module_is_named_as_a_slim_runtime(tmp_path: Path) -> None:
    home = java(tmp_path, 'openjdk version "17.0.9" 2023-10-17', modules="java.base@17")
    assert "slim runtime without the module jdk.incubator.vector" in refusal(check("java", JAVA_HOME=str(home)))


def test_no_java_and_a_java_home_without_java_are_told_apart(tmp_path: Path) -> None:
    assert "found no java on PATH and no JAVA_HOME" in refusal(check("java", path=tmp_path))
    assert "found JAVA_HOME=/nowhere, but no program" in refusal(check("java", JAVA_HOME="/nowhere"))


def test_the_wrong_python_is_one_line_that_says_found_needed_and_how(tmp_path: Path) -> None:
    python = program(tmp_path / "python3", "echo 3.9.2")
    for done in (check("python", path=tmp_path), check("python", PYTHON=str(python))):
        line = refusal(done)
        assert "found Python 3.9.2" in line
        assert "needed: Python 3.11" in line
        assert "get it: " in line


def test_no_python_at_all_is_one_line(tmp_path: Path) -> None:
    assert "found no python3.11 or python3; needed: Python 3.11" in refusal(check("python", path=tmp_path))


def test_python_311_is_found_under_any_of_its_names(tmp_path: Path) -> None:
    python = program(tmp_path / "python3", "echo 3.11.9")
    assert check("python", path=tmp_path).stdout.strip() == str(python)


@pytest.mark.parametrize("wrong", ["JAVA_HOME", "PYTHON"])
def test_make_demo_stops_at_the_check_before_it_fetches_or_runs_anything(tmp_path: Path, wrong: str) -> None:
    value = (
        java(tmp_path / "old", 'openjdk version "11.0.21" 2023-10-17')
        if wrong == "JAVA_HOME"
        else program(tmp_path / "python", "echo 3.9.2")
    )
    alone = {name: told for name, told in os.environ.items() if not name.startswith("MAKE")}  # `make test` runs this inside a make
    done = subprocess.run(["make", "demo", f"{wrong}={value}"], cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert [line.startswith("studbook: found") for line in done.stderr.splitlines()] == [True, False]  # then make's own last word
    assert done.stderr.splitlines()[1].startswith("make: ***")


def test_make_alone_lists_the_commands() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("demo", "test", "lint", "bench", "proof", "mlflow", "clean"):
        assert f"  make {target} " in done.stdout

"""The archive of the JVM's classes is only a saving: sessions start with it, without it and with a wrong one."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from jobs import archive_classes, session

JARS = ["/jars/a.jar", "/jars/b.jar"]


def test_only_a_session_in_one_jvm_has_its_jars_on_the_class_path() -> None:
    for master in ("local", "local[2]", "local[*,4]"):
        told = session._local(master, JARS)
        assert told["spark.driver.extraClassPath"] == os.pathsep.join(JARS)
        assert '"-XX:SharedArchiveFile=/jars/classes.jsa"' in told["spark.driver.extraJavaOptions"]
    assert session._local("local-cluster[2,1,1024]", JARS) == session._local("local[2]", []) == session.LOCAL
    assert session._local("spark://host:7077", JARS) == session._local("", JARS) == {}


@pytest.mark.parametrize("archive", ["absent", "no archive at all"])
def test_a_jvm_starts_silently_without_an_archive_that_it_cannot_use(tmp_path: Path, archive: str) -> None:
    if archive != "absent":
        (tmp_path / session.ARCHIVE).write_text(archive)
    options = shlex.split(session._local("local[1]", [str(tmp_path / "a.jar")])["spark.driver.extraJavaOptions"])
    java = Path(os.environ["JAVA_HOME"], "bin/java") if os.environ.get("JAVA_HOME") else "java"
    done = subprocess.run([java, *options, "--version"], capture_output=True, text=True, check=True)
    assert done.stderr == "" and "archive" not in done.stdout


def test_an_archive_is_made_anew_for_other_jars_and_not_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_classes, "TARGET", tmp_path)
    asked = []
    monkeypatch.setattr(
        archive_classes, "record_in_child", lambda: asked.append((tmp_path / f"{session.ARCHIVE}.partial").write_text("classes"))
    )
    for jars in ("a.jar", "b.jar"):
        (tmp_path / jars).write_text("jar")
        archive_classes.main()
        archive_classes.main()
    assert len(asked) == 2 and (tmp_path / session.ARCHIVE).read_text() == "classes"


def test_a_record_that_fails_leaves_sessions_without_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(archive_classes, "TARGET", tmp_path)
    monkeypatch.setattr(archive_classes, "record_in_child", lambda: "no room on the disk")
    archive_classes.main()
    assert "stages start without it: no room on the disk" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

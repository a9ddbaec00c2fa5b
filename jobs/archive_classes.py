""".cache/jars -> .cache/jars/classes.jsa: the classes that a stage loads, as an archive that every later JVM maps in. `make jars`

A JVM loads and checks 26,000 classes before a stage has planned its work: with the archive a short stage takes a fifth less time, CPU and wall
[measured: 26.9 to 21.1 CPU-s]. It is made by one small run of ingest and embed (about 55 CPU-s and 190 MB, once) and is good for the Java and the
Spark that made it; another Java ignores it, and a call makes it anew. Nothing depends on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyspark
from PIL import Image

from conf.settings import Settings
from jobs.fetch_jars import TARGET
from jobs.session import ARCHIVE, JAVA


def main() -> None:
    archive, made_by, partial = (TARGET / name for name in (ARCHIVE, f"{ARCHIVE}.made-by", f"{ARCHIVE}.partial"))
    if archive.exists() and made_by.exists() and made_by.read_text() == maker():
        return
    print(f"archiving the classes of Spark's JVM into {archive} (190 MB)", flush=True)
    said = record_in_child()
    if not partial.exists():
        print(f"studbook: the classes could not be archived, stages start without it: {said[-800:]}", file=sys.stderr)
        return
    partial.replace(archive)
    made_by.write_text(maker())


def record_in_child() -> str:
    """-> what it said. In a process of its own: the archive is written when the JVM ends."""
    command = [sys.executable, "-m", "jobs.archive_classes", "--record"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def maker() -> str:
    """What an archive is good for: this Java, and these jars where they lie."""
    java = Path(os.environ["JAVA_HOME"], "bin/java") if os.environ.get("JAVA_HOME") else "java"  # as Spark chooses it
    told = subprocess.run([java, "-version"], capture_output=True, text=True, check=True).stderr
    jars = "".join(f"{path.name} {path.stat().st_mtime_ns}\n" for path in sorted(TARGET.glob("*.jar")))
    return f"{told}Spark {pyspark.__version__} in {Path(pyspark.__file__).parent}\n{TARGET.resolve()}\n{jars}"


def record() -> None:
    """Ingest and embed of two drawn pictures, in a session that writes the archive when it ends."""
    from jobs import embed, ingest, session
    from jobs.lake import Lake

    with tempfile.TemporaryDirectory() as folder:
        settings = build(Path(folder))
        lake = Lake(session.start(settings.spark), settings)
        lake.create()
        ingest.run(lake, settings)
        embed.run(lake, settings)
        embed.run(lake, settings)  # with tables that have rows
        gateway = lake.spark.sparkContext._gateway
        lake.spark.stop()
    assert gateway is not None
    gateway.proc.stdin.close()  # what the JVM ends at
    gateway.proc.wait()


def build(folder: Path) -> Settings:
    (folder / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (90 * number, 20, 30)).save(folder / f"images/{number}.png")
    java = f'{JAVA} "-XX:ArchiveClassesAtExit={(TARGET / ARCHIVE).resolve()}.partial"'
    told = {
        "lake": {"root": f"{folder}/lake"},
        "spark": {"master": "local[2]", "jars": str(TARGET), "conf": {"spark.driver.extraJavaOptions": java}},
        "mlflow": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"},
        "encoder": "colour-grid",
        "ingest": {"sources": [{"name": "drawn", "kind": "folder", "uri": f"{folder}/images"}]},
        "embed": {"encoders": ["colour-grid"], "device": "cpu"},
        "label": {"views": {"blur:1": 0.6}},
        "select": {"name": "drawn", "seed": 1, "rules": []},
        "export": {"root": f"{folder}/exports"},
        "training": {"root": f"{folder}/trainings"},
        "report": {"path": f"{folder}/report.html"},
    }
    return Settings.model_validate(told, strict=False)


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        record()
    else:
        main()

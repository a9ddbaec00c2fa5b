"""infra/delta-jars.sha256 -> .cache/jars: the Delta jars that Spark does not bring, each with its pinned hash. `make jars`

Fetched once by Spark's own Ivy (about 15 s, 12.6 MB); afterwards a call only checks the hashes, without a JVM. Each
jar is asked for alone: with its closure Ivy would bring 87 MB, among it another Hadoop (3.4.2) than Spark's (3.4.1).
Behind a mirror set DEFAULT_ARTIFACT_REPOSITORY, as for any `spark.jars.packages`.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from conf.section import Mistake
from conf.settings import stop

PINS = Path(__file__).parent.parent / "infra" / "delta-jars.sha256"
TARGET = Path(".cache/jars")
IVY = Path(".cache/ivy")


def main() -> None:
    try:
        fetch(pins(PINS), TARGET, IVY)
    except Mistake as mistake:
        stop(str(mistake))


def pins(path: Path) -> dict[str, str]:
    """A sha256sum file -> {jar: sha256}."""
    return {name: sha256 for sha256, name in (line.split() for line in path.read_text().splitlines())}


def fetch(wanted: dict[str, str], target: Path, ivy: Path) -> None:
    """Jars that `target` lacks are fetched into it. Raises Mistake when the download fails or a jar is not the pinned one."""
    missing = [name for name, sha256 in wanted.items() if not is_pinned(target / name, sha256)]
    if not missing:
        return
    print(f"fetching {len(missing)} Delta jars (12.6 MB) into {target}", flush=True)
    resolve_in_child(missing, ivy)
    target.mkdir(parents=True, exist_ok=True)
    for name in missing:
        fetched = ivy / "jars" / name
        if not is_pinned(fetched, wanted[name]):
            raise Mistake(
                f"{fetched} is not the jar whose sha256 {PINS.name} pins ({wanted[name]}); remove {ivy} and run `make jars` again"
            )
        shutil.copyfile(fetched, target / f"{name}.partial")
        (target / f"{name}.partial").replace(target / name)


def is_pinned(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def coordinates(jar: str) -> str:
    """`io.delta_delta-spark_4.0_2.13-4.4.0.jar`, as Ivy names files -> `io.delta:delta-spark_4.0_2.13:4.4.0`."""
    group, rest = jar.removesuffix(".jar").split("_", 1)
    artifact, version = rest.rsplit("-", 1)
    return f"{group}:{artifact}:{version}"


def resolve_in_child(jars: list[str], ivy: Path) -> None:
    """In a process of its own, since Ivy talks a lot and a JVM stays: its output goes to a log, an error becomes one line."""
    ivy.mkdir(parents=True, exist_ok=True)
    log = ivy / "fetch.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "jobs.fetch_jars", "--resolve", str(ivy.resolve()), *jars]  # Ivy refuses a relative path
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise Mistake(
            f"the Delta jars could not be fetched ({log} says why); check the network, or set DEFAULT_ARTIFACT_REPOSITORY "
            f"to a Maven mirror, or put the jars that infra/{PINS.name} lists into {TARGET}, then run `make jars` again"
        )


def resolve(ivy: str, jars: list[str]) -> None:
    """Spark's Ivy fetches each jar without its closure into `ivy`/jars."""
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[1]").config("spark.jars.ivy", ivy).config("spark.ui.enabled", "false")
    spark = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1").getOrCreate()
    for jar in jars:
        spark.sql(f"ADD JAR 'ivy://{coordinates(jar)}?transitive=false'")
    spark.stop()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--resolve"]:
        resolve(sys.argv[2], sys.argv[3:])
    else:
        main()

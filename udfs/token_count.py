"""Text -> how many tokens the text encoder of the trained model makes of it: the number by which captions and prompts are bounded.

The tokenizer is named in the config: a folder that holds the `tokenizer.json` of the model's own tokenizer (T5's, of pile-T5-XL for V7), with the
file's sha256; or the stand-in `utf8-bytes/4`, a quarter of the bytes, for a machine without that file: near enough for English, and no bound
for other scripts. Which one counted stands in every row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from udfs.pinned import pinned

STAND_IN = "utf8-bytes/4"
FILE = "tokenizer.json"


class Counter(NamedTuple):
    """name: what a row says of it; count(text) -> tokens, with the end mark that the tokenizer adds. Safe to share between threads.

    `count` raises UnicodeEncodeError, a ValueError, for half of a character.
    """

    name: str
    count: Callable[[str], int]


@lru_cache(maxsize=4)
def load(tokenizer: str, sha256: str | None = None) -> Counter:
    """(a folder, the sha256 of its tokenizer.json) or (STAND_IN, None) -> the counter of this worker, made once.

    Raises ValueError when there is no such file, when it is another one than the pinned, or none.
    """
    if tokenizer == STAND_IN:
        if sha256 is not None:
            raise ValueError(f"tokenizer {STAND_IN}: given sha256 {sha256}, but it has no file; leave sha256 out")
        return Counter(STAND_IN, _quarter_of_bytes)
    path = Path(tokenizer) / FILE
    if not path.is_file():
        raise ValueError(
            f"tokenizer: no {FILE} in {Path(tokenizer).absolute()}; give the folder of the text encoder's tokenizer, or {STAND_IN!r} as a stand-in"
        )
    if sha256 is None:
        raise ValueError(f"tokenizer {path}: its sha256 is needed (`sha256sum {path}`)")
    return Counter(f"{Path(tokenizer).name}:{sha256[:12]}", _of_file(pinned(path, sha256, "tokenizer")))


def _quarter_of_bytes(text: str) -> int:
    return -(-len(text.encode()) // 4)


def _of_file(path: Path) -> Callable[[str], int]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library has no class of its own: a plain Exception from Rust
        raise ValueError(f"tokenizer {path}: the library cannot read it: {str(error)[:200]}; give a whole {FILE}") from None
    tokenizer.no_truncation()  # a file may hold both, and every longer text would be counted as the limit
    tokenizer.no_padding()

    def count(text: str) -> int:
        text.encode()  # raises for half of a character, which the library names a TypeError
        return len(tokenizer.encode(text).ids)

    return count

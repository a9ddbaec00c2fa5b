"""The tokens of a text: by a real tokenizer.json made here, and by the stand-in, each under its own name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from udfs import token_count
from udfs.pinned import hash_file


def write_tokenizer(folder: Path, truncated: bool = False) -> str:
    """A whole tokenizer of words, with T5's end mark -> the sha256 of its file."""
    words = ["<pad>", "</s>", "<unk>", "a", "red", "fox", "snow"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    if truncated:
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=16)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return hash_file(folder / "tokenizer.json")


def test_the_tokens_of_a_folder_are_counted_with_the_end_mark_under_the_files_hash(tmp_path: Path) -> None:
    sha256 = write_tokenizer(tmp_path / "t5")
    counter = token_count.load(str(tmp_path / "t5"), sha256)
    assert counter.name == f"t5:{sha256[:12]}"
    assert [counter.count(text) for text in ("", "a red fox", "a red fox, a red fox")] == [1, 4, 8]


def test_a_limit_or_a_padding_in_the_file_bounds_no_count(tmp_path: Path) -> None:
    counter = token_count.load(str(tmp_path), write_tokenizer(tmp_path, truncated=True))
    assert [counter.count("fox " * n) for n in (1, 100)] == [2, 101]


def test_the_stand_in_is_a_quarter_of_the_bytes_rounded_up_and_says_its_name() -> None:
    counter = token_count.load("utf8-bytes/4")
    assert counter.name == "utf8-bytes/4"
    assert [counter.count(text) for text in ("", "f", "foxe", "foxes", "лиса")] == [0, 1, 1, 2, 2]


def test_a_worker_loads_a_tokenizer_once(tmp_path: Path) -> None:
    sha256 = write_tokenizer(tmp_path)
    assert token_count.load(str(tmp_path), sha256) is token_count.load(str(tmp_path), sha256)


def test_half_of_a_character_is_a_named_error_by_either(tmp_path: Path) -> None:
    for counter in (token_count.load("utf8-bytes/4"), token_count.load(str(tmp_path), write_tokenizer(tmp_path))):
        with pytest.raises(UnicodeEncodeError):
            counter.count("a\ud800")


def test_what_is_not_a_pinned_tokenizer_is_a_mistake_that_says_what_to_do(tmp_path: Path) -> None:
    sha256 = write_tokenizer(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{}")
    for tokenizer, pin, message in (
        ("utf8-bytes/3", None, r"no tokenizer.json in .*utf8-bytes/3; give the folder .* or 'utf8-bytes/4'"),
        ("utf8-bytes/4", sha256, "it has no file; leave sha256 out"),
        (str(tmp_path), None, "its sha256 is needed"),
        (str(tmp_path), "0" * 64, f"expected {'0' * 64}, found {sha256}"),
        (str(tmp_path / "broken"), hash_file(tmp_path / "broken/tokenizer.json"), "the library cannot read it"),
    ):
        with pytest.raises(ValueError, match=message):
            token_count.load(tokenizer, pin)

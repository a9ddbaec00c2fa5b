"""A deny list is right as a whole or it stops the job; a picture that it names is found again under the usual alterations."""

from __future__ import annotations

import hashlib
import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from udfs import deny_list, perceptual_hash, picture_frames
from udfs.opener import Opener
from udfs.reject import Reject

HEADER = "# studbook deny-list kind=phash kernel=1 date=2026-11-25 name=test\n"
DISTANCE = 46


def picture(seed: int) -> Image.Image:
    """Noise over eight scales: as much to tell apart as a photograph has."""
    random = np.random.default_rng(seed)
    whole = np.zeros((240, 320, 3))
    for cells in (3, 6, 12, 24):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
        whole += np.asarray(coarse) / cells
    return Image.fromarray((255 * (whole - whole.min()) / np.ptp(whole)).astype(np.uint8))


def luma(image: Image.Image) -> Image.Image:
    return image.convert("L")


def listed(path: Path, **told: object) -> dict[str, object]:
    return {"name": "ours", "path": str(path), "kind": "phash", "sha256": None} | told


def screen(hashes: np.ndarray, guess: bool = True) -> deny_list.Screen:
    return deny_list.Screen([deny_list.DenyList("ours", "phash", "", None, hashes)], DISTANCE, guess)


def is_denied(of: deny_list.Screen, image: Image.Image) -> bool:
    try:
        of.check(luma(image))
    except Reject as reject:
        assert (reject.code, reject.detail) == ("denied", "ours")
        return True
    return False


def test_a_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    hashes = picture_frames.crops(luma(picture(1)))
    path = tmp_path / "list.txt"
    path.write_text(deny_list.text_of("phash", hashes, date(2026, 11, 25), "test"))
    found = deny_list.read(listed(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest()), Opener())
    assert (found.made, found.name) == (date(2026, 11, 25), "ours")
    assert np.array_equal(found.hashes, hashes)
    plain = "\n".join(hashlib.sha256(word).hexdigest().upper() for word in (b"a", b"b")) + "\n\n# a comment\n"
    path.write_text(plain)
    assert [row.tobytes() for row in deny_list.read(listed(path, kind="sha256"), Opener()).hashes] == [
        hashlib.sha256(word).digest() for word in (b"a", b"b")
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "missing; nothing is done without the list"),
        ("", "first line of a list of perceptual hashes"),
        (HEADER, "holds 0 hashes"),
        (HEADER + "ab" * 31, "line 2: given"),
        (HEADER + "ab" * 31 + "\n" + "ab" * 33, "line 2: given"),
        (HEADER + "ab" * 31 + "xy", "line 2: given"),
        (HEADER + "\n" + "00" * 31 + "80", "line 3: the hash of a flat picture"),
        (HEADER.replace("kernel=1", "kernel=9") + "ab" * 32, "kernel 9, this code makes kernel 1"),
        (HEADER.replace("phash", "sha256") + "ab" * 32, "a list of kind sha256, the config says phash"),
        (HEADER.replace("name", "count=2 name") + "ab" * 32, "holds 1 hashes, its first line says 2"),
        (HEADER.replace("2026-11-25", "yesterday") + "ab" * 32, "date: given 'yesterday'"),
        ("ab" * 32, "first line of a list of perceptual hashes"),
    ],
)
def test_a_list_that_is_not_whole_and_of_its_kind_stops_the_job(tmp_path: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=r"deny\.lists ours") as refused:
        deny_list.read(listed(tmp_path / "list.txt"), Opener())
    assert told in str(refused.value)


def test_another_file_than_the_pinned_one_stops_the_driver_and_the_worker(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(HEADER + "ab" * 32)
    with pytest.raises(ValueError, match="pinned is 00"):
        deny_list.read(listed(path, sha256="00" * 32), Opener())
    told = {"lists": [listed(path, sha256="00" * 32)], "distance": 1, "guess": True, "stores": {}}
    with pytest.raises(ValueError, match="pinned is 00"):
        deny_list.screen(json.dumps(told))


@pytest.mark.parametrize("seed", range(4))
def test_altered_copies_of_a_listed_picture_are_denied_and_others_are_not(seed: int) -> None:
    original = picture(seed)
    by_one, by_crops = (screen(hashes) for hashes in (picture_frames.mirrored(luma(original))[:1], picture_frames.crops(luma(original))))
    copies = {
        "same": original,
        "half": original.resize((160, 120)),
        "squeezed": original.resize((200, 200)),
        "mirrored": ImageOps.mirror(original),
        "bordered": ImageOps.expand(original, 20, "navy"),
        "letterbox": ImageOps.expand(original, (0, 40), "black"),
        "mirrored with a border": ImageOps.expand(ImageOps.mirror(original), 30, "white"),
    }
    for name, copy in copies.items():
        assert is_denied(by_one, copy), name
    for box in ((0, 0, 290, 220), (30, 20, 320, 240), (20, 14, 308, 230)):
        assert is_denied(by_crops, original.crop(box)), box
    assert not any(is_denied(by_crops, picture(other)) for other in range(10, 20))
    assert not is_denied(screen(picture_frames.mirrored(luma(original))[:1], guess=False), copies["bordered"])


def test_a_flat_picture_matches_nothing_and_the_lists_name_is_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deny_list, "CHUNK", 100)
    lists = [
        deny_list.DenyList(name, "phash", "", None, np.concatenate([picture_frames.crops(luma(picture(seed))) for seed in seeds]))
        for name, seeds in (("first", range(20, 24)), ("second", range(30, 36)))
    ]
    whole = deny_list.Screen(lists, DISTANCE, guess=True)
    assert whole.names(picture_frames.guesses(Image.new("L", (64, 64), 7))[None]) == [None]
    asked = np.stack([picture_frames.mirrored(luma(picture(seed))) for seed in (23, 35, 5)])
    assert whole.names(asked) == ["first", "second", None]
    assert not deny_list.tells(picture_frames.mirrored(Image.new("L", (64, 64), 7))).any()


def test_the_hash_of_squares_is_that_of_the_picture() -> None:
    image = picture(3)
    assert [one.tobytes() for one in picture_frames.mirrored(luma(image))] == list(perceptual_hash.phash(image))

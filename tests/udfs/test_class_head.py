"""The classifier's head: bytes and back, probabilities by hand, `other`, and what is no number."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from udfs import class_head, classify
from udfs.class_head import About
from udfs.reject import Reject

ABOUT = About("style", ("anime", "photo", "sketch"), 2.0, 0.5)


def make_head(hidden: int | None = None, about: About = ABOUT) -> bytes:
    torch.manual_seed(1)
    return class_head.pack(class_head.build(4, len(about.classes), hidden).state_dict(), about)


@pytest.mark.parametrize("hidden", [None, 5])
def test_a_head_is_the_same_after_its_bytes_and_equal_heads_are_equal_bytes(hidden: int | None) -> None:
    assert make_head(hidden) == make_head(hidden)
    head = class_head.load(make_head(hidden))
    assert head.about == class_head.read_about(make_head(hidden)) == ABOUT
    torch.manual_seed(1)
    whole = class_head.build(4, 3, hidden)
    vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    with torch.no_grad():
        expected = torch.softmax(whole(torch.from_numpy(vectors / lengths * 2)) / 2.0, 1).numpy()  # sqrt(width) is 2, the temperature 2
    assert class_head.classify_batch(vectors, head) == pytest.approx(expected, abs=1e-6)


def test_loading_moves_no_random_state() -> None:
    head = make_head()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    class_head.load(head)
    assert torch.equal(torch.rand(3), expected)


def test_what_is_no_head_is_refused_with_what_was_found() -> None:
    with pytest.raises(ValueError, match="metadata are not those of one"):
        class_head.read_about(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ValueError, match=r"given tensors \['7.weight'\]"):
        class_head.load(class_head.pack({"7.weight": torch.zeros(3, 4)}, ABOUT))
    with pytest.raises(ValueError, match="2 outputs for 3 classes"):
        class_head.load(class_head.pack(class_head.build(4, 2, None).state_dict(), ABOUT))


def test_an_image_is_of_its_likeliest_class_from_the_threshold_on_and_other_below() -> None:
    assert class_head.decide(np.array([0.2, 0.5, 0.3]), ABOUT) == ("photo", 0.5)
    assert class_head.decide(np.array([0.4, 0.25, 0.35]), ABOUT) == ("other", 0.4)
    with pytest.raises(Reject, match="not_finite"):
        class_head.decide(np.array([np.nan, 0.5, 0.5]), ABOUT)


def test_the_stage_gets_a_row_for_each_vector_and_a_reject_where_it_is_no_number() -> None:
    vectors = np.array([[1, 0, 0, 0], [np.nan, 0, 0, 0], [np.inf, 1, 0, 0]], dtype="<f2")
    frame = pd.DataFrame({"image_id": [b"a", b"b", b"c"], "vector": [row.tobytes() for row in vectors]})
    (rows,) = classify.classify([frame, frame.iloc[:0]], make_head())
    assert rows.image_id.tolist() == [b"a", b"b", b"c"]
    assert [one and one["code"] for one in rows.reject] == [None, "not_finite", "not_finite"]
    probabilities = rows.probabilities[0]
    assert [one["class"] for one in probabilities] == list(ABOUT.classes)
    assert sum(one["p"] for one in probabilities) == pytest.approx(1)
    assert rows.p[0] == max(one["p"] for one in probabilities)
    assert rows["class"][0] == ("other" if rows.p[0] < 0.5 else max(probabilities, key=lambda one: one["p"])["class"])

"""What may be a class."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from conf.enrichment import ClassLabels


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "give tags, sources or file"),
        ({"tags": {"misc": "other"}}, "no class may be named 'other'"),
        ({"sources": {"a": "what is this?"}}, "should match pattern"),
        ({"tags": {"a": ""}}, "should match pattern"),
    ],
)
def test_what_cannot_be_a_class_is_refused(told: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ClassLabels(kind="style", rater="me", **told)


def test_words_with_spaces_and_dashes_are_classes() -> None:
    assert ClassLabels(kind="style", rater="me", tags={"a": "pixel art", "b": "3D_render-2.0"}).tags["a"] == "pixel art"

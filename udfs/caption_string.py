"""What is known of an image -> the one line and the tags that V7 was trained on.

    score_7, rating_safe, style_cluster_12, A red fox in snow. Digital painting, soft light.
    fox, red fur, snow

Order and separators: the released V7 pipeline (github.com/fuhrriel/pony-captioner, port of the team's notebook; the port writes a
blank before the line break, which is not part of the recipe). One score tag, never V6's chain score_9, score_8_up, ...
"""

from __future__ import annotations

from collections.abc import Sequence


def compose(score: int, rating: str, cluster: int | None, content: str, style: str, tags: Sequence[str]) -> str:
    """(bin 0..9, rating, style cluster or None, two captions, tags) -> the caption string. An image without a cluster, a style caption
    or tags has no such part: V7 had a cluster for every image, here `blocked` and `none` have none.
    """
    assert rating and content, (rating, content)
    line = " ".join([*marks(score, rating, cluster), *(text.strip() for text in (content, style) if text.strip())])
    return line + ("\n" + ", ".join(tags).lower() if tags else "")


def marks(score: int | None, rating: str | None, cluster: int | None) -> list[str]:
    """-> `score_7,` `rating_safe,` `style_cluster_12,`: those that are known, in V7's order."""
    assert score is None or 0 <= score <= 9, score
    named = (("score", score), ("rating", rating), ("style_cluster", cluster))
    return [f"{name}_{value}," for name, value in named if value is not None]

"""What two models gave for the same held-out rows -> how much better one is, with its bootstrap interval.

Rows that both have are compared in pairs: whole images are drawn (views of one image are not independent), the same draws
for both, by the functions of evaluate_scorer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from conf.section import Mistake
from training import evaluate_classifier, evaluate_scorer

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 30  # images: with fewer the percentile interval is too narrow for what it claims
SEED = 7

Draws = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Figures:
    """A comparison on `images` common images: `difference` is how much better, as [value, low, high]."""

    metric: str
    images: int
    rows: int
    version: float
    champion: float
    difference: tuple[float, float, float]

    @property
    def better(self) -> bool:
        return self.difference[1] > 0

    def __str__(self) -> str:
        value, low, high = self.difference
        return (
            f"{self.metric} {self.version:.4f} against the champion's {self.champion:.4f} on {self.images} images, {self.rows} rows: "
            f"{'better' if value > 0 else 'worse'} by {abs(value):.4f} (interval of the gain [{low:.4f}, {high:.4f}])"
        )


def measure_srcc(metric: str, version: pd.DataFrame, champion: pd.DataFrame, fewest: int) -> Figures:
    """Rows of both (image_id, view, value, prediction) -> SRCC on those with the same image, view and target."""
    rows = join(version, champion, ["image_id", "view", "value"], fewest)
    image, draws = draw(rows)
    of_rows, values = draws[:, image], rows["value"].to_numpy()
    ours, theirs = (evaluate_scorer.srcc(rows[f"prediction{side}"].to_numpy(), values, of_rows) for side in ("", "_champion"))
    return figures(metric, rows, image, ours, theirs, ours - theirs)


def measure_loss(metric: str, version: pd.DataFrame, champion: pd.DataFrame, fewest: int) -> Figures:
    """Losses of both (image_id, loss; an image may have several) -> the mean over images. Where both files say of which `lesson` (a captioner's
    request and answer) a loss is, only images with the same one are compared.
    """
    keys = ["image_id", "lesson"] if all("lesson" in table for table in (version, champion)) else ["image_id"]
    means = [table.groupby(keys)["loss"].mean().reset_index() for table in (version, champion)]
    rows = join(means[0], means[1], keys, fewest)
    image, draws = draw(rows)
    times = draws[:, image]
    ours, theirs = (times @ rows[f"loss{side}"].to_numpy() / times.sum(axis=1) for side in ("", "_champion"))
    return figures(metric, rows, image, ours, theirs, theirs - ours)


def measure_classes(metric: str, version: pd.DataFrame, champion: pd.DataFrame, fewest: int) -> Figures:
    """Classes of both (image_id, near_group, class, prediction) -> balanced accuracy on the images with the same class; near-duplicates are drawn together."""
    rows = join(version, champion, ["image_id", "class"], fewest)
    _, image = np.unique(rows["image_id"].to_numpy(), return_inverse=True)
    _, group = np.unique(rows["near_group"].to_numpy(), return_inverse=True)
    times = evaluate_scorer.draw_images(int(group.max()) + 1, SEED)[:, group]
    right = [(rows[f"prediction{side}"] == rows["class"]).to_numpy() for side in ("", "_champion")]
    _, target = np.unique(rows["class"].to_numpy(), return_inverse=True)
    ours, theirs = (evaluate_classifier.balanced_accuracy(one, target, times) for one in right)
    return figures(metric, rows, image, ours, theirs, ours - theirs)


class Metric(NamedTuple):
    """`file`: of a version's run, with its held-out rows. `same`: tags of a version that must be equal, or the rows are measured differently."""

    file: str
    measure: Callable[[str, pd.DataFrame, pd.DataFrame, int], Figures]
    smaller_is_better: bool
    same: tuple[str, ...] = ()


METRICS = {
    "held_out_srcc": Metric("held_out.parquet", measure_srcc, False),
    "held_out_balanced_accuracy": Metric("held_out_classes.parquet", measure_classes, False, ("label",)),
    "held_out_loss": Metric(
        "held_out_losses.parquet", measure_loss, True, ("base", "base_sha256", "image_size", "text_length", "captions")
    ),
}


COLUMNS = {
    "held_out.parquet": {"image_id", "view", "value", "prediction"},
    "held_out_classes.parquet": {"image_id", "near_group", "class", "prediction"},
    "held_out_losses.parquet": {"image_id", "loss"},
}


def join(version: pd.DataFrame, champion: pd.DataFrame, keys: list[str], fewest: int) -> pd.DataFrame:
    """Rows that both have, once each; Mistake when they are of too few images or a table has a key twice."""
    for table, whose in ((version, "the version"), (champion, "the champion")):
        if table.duplicated(keys).any():
            raise Mistake(f"the held-out rows of {whose} have {', '.join(keys)} twice; train it again")
    rows = version.merge(champion, on=keys, suffixes=("", "_champion"))
    if (images := rows["image_id"].nunique()) < fewest:
        raise Mistake(
            f"the version and the champion have {images} held-out images in common, expected {fewest} or more "
            f"(given {version['image_id'].nunique()} and {champion['image_id'].nunique()}); train the champion's settings on the new export first"
        )
    return rows


def draw(rows: pd.DataFrame) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
    """Rows -> number of each one's image, and how often each image is in a draw; the first draw is the rows as they are."""
    _, image = np.unique(rows["image_id"].to_numpy(), return_inverse=True)
    return image, evaluate_scorer.draw_images(int(image.max()) + 1, SEED)


def figures(metric: str, rows: pd.DataFrame, image: npt.NDArray[np.intp], ours: Draws, theirs: Draws, better: Draws) -> Figures:
    tail = (1.0 - evaluate_scorer.COVERAGE) / 2.0 * 100.0
    low, high = np.percentile(better[1:], [tail, 100.0 - tail])
    difference = (float(better[0]), float(low), float(high))
    return Figures(metric, int(image.max()) + 1, len(rows), float(ours[0]), float(theirs[0]), difference)

"""A ranking -> the comparison's plot, PNG bytes: a point for each arm and seed, a line for each arm's mean."""

from __future__ import annotations

import io

from training.draw_evaluation import COLOURS
from training.ranking import Ranking


def draw(ranking: Ranking) -> bytes:
    """Ranking -> PNG bytes, the best arm at the left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 1.4 * len(ranking.arms) + 2.5), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    seeds = sorted({seed for arm in ranking.arms for seed in arm.values})
    for number, seed in enumerate(seeds):
        points = [(place, arm.values[seed]) for place, arm in enumerate(ranking.arms) if seed in arm.values]
        places = [place + (number - (len(seeds) - 1) / 2) * 0.5 / max(1, len(seeds) - 1) for place, _ in points]
        axes.plot(places, [value for _, value in points], "o", color=COLOURS[number % len(COLOURS)], label=f"seed {seed}")
    for place, arm in enumerate(ranking.arms):
        axes.plot([place - 0.35, place + 0.35], [arm.mean, arm.mean], "-", color="#999999", zorder=0)
    axes.set_xticks(range(len(ranking.arms)), [arm.name for arm in ranking.arms], rotation=30, ha="right")
    axes.set_xlim(-0.6, len(ranking.arms) - 0.4)
    axes.set_ylabel(ranking.metric + (" (smaller is better)" if ranking.smaller_is_better else ""))
    axes.set_title("each arm's seeds and mean" + ("" if ranking.clear else "; the lead is not clear"))
    axes.legend(fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()

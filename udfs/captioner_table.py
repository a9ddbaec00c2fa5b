"""A comparison of captioners (udfs/compare_captioners.py) -> a row a measure, and the lines that a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ["captioner", "other", "kind", "measure", "value", "low", "high"]
Row = tuple[str, str, str, str, float, float | None, float | None]


def rows(told: Mapping[str, Any]) -> list[Row]:
    """-> COLUMNS: of a pair `other` is the second captioner; low and high where there is an interval; what is not known has no row."""
    out: list[Row] = []

    def add(captioner: str, other: str, kind: str, measure: str, value: Any) -> None:
        if isinstance(value, list | tuple):
            mean, low, high = value
            out.append((captioner, other, kind, measure, mean, low, high))
        elif value is not None:
            out.append((captioner, other, kind, measure, float(value), None, None))

    for name, one in told["captioners"].items():
        for measure, value in one.items():
            if measure not in ("kinds", "refusals"):
                add(name, "", "", measure, value)
        for code, count in one["refusals"].items():
            add(name, "", "", f"refused_{code}", count)
        for kind, each in one["kinds"].items():
            for measure, value in each.items():
                add(name, "", kind, measure, value)
    for pair in told["pairs"]:
        for measure in ("images", "agreement", "chance", "recall_difference"):
            add(pair["first"], pair["second"], "", measure, pair[measure])
    return out


def metrics(told: Mapping[str, Any]) -> dict[str, float]:
    """-> `captioner.kind.measure` or `captioner.other.measure` -> its value."""
    return {".".join(part for part in (*row[:4],) if part): row[4] for row in rows(told)}


def lines(told: Mapping[str, Any]) -> list[str]:
    out = []
    for name, one in told["captioners"].items():
        refused = ", ".join(f"{count} {code}" for code, count in one["refusals"].items()) or "none"
        refused += f" (not shown {one['not_shown']} that another's service prohibits)" if one["not_shown"] else ""
        money = "nothing to pay" if one["usd"] is None else f"{_shown(one['usd'], 1000, 2)} USD for 1,000 images"
        read = "" if one["ocr_similarity"] is None else f", text as it was read {_shown(one['ocr_similarity'])}"
        out.append(f"  {name}: tags named {_shown(one['tag_recall'])}{read}, refused {refused}, {money}")
        for kind, each in one["kinds"].items():
            lengths = f"{each['p10']:.0f} / {each['median']:.0f} / {each['p90']:.0f} tokens"
            same = f"duplicates {each['duplicates']:.0%}, same start {each['same_start']:.0%}, distinct words {each['distinct_words']:.2f}"
            out.append(f"    {kind:<7}{each['texts']:>6} texts, {lengths}, {same}")
    for pair in told["pairs"]:
        chance = "unknown" if pair["chance"] is None else f"{pair['chance']:.3f}"
        out.append(f"  {pair['first']} and {pair['second']} agree {_shown(pair['agreement'])}, by chance {chance}")
    return out


def _shown(interval: Any, scale: float = 1.0, places: int = 3) -> str:
    if interval is None:
        return "unknown"
    mean, low, high = (f"{scale * one:.{places}f}" for one in interval)
    return f"{mean} [{low}, {high}]"

"""styles -> contact sheets: one page a cluster and an index.html that opens without a server; also artifacts of the centre set's run.

    spark-submit --jars '.cache/jars/*.jar' jobs/style_sheets.py --config conf/demo.yaml

A page (JPEG) shows the nearest, median, farthest and margin cases of a cluster, `styles.images_per_sheet` of each, with id, size and
caption; one more page shows images of the state `none`. All clusters are drawn up to 64, else the 64 largest. They lie in `styles.sheets`
(none given: `styles` beside the report). Pages are drawn on the workers; cost: about 24 decodes a page. An image that any stage rejected
as `denied` is never shown; one that cannot be read is a box with its code. Made again only when assignments or denials changed.
"""

from __future__ import annotations

import base64
import re
from functools import partial
from typing import Any

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, digest
from jobs import centres, command, deny_lists, embedding, fitted, occurrences, snapshot, waves
from jobs import pages as html
from jobs.centres import Set
from jobs.lake import Lake
from jobs.waves import Stage
from udfs import style_sheet as kernel
from udfs.opener import to_uri
from udfs.reject import Reject

NAME = "style-sheets"
MOST = 64  # clusters that are drawn
NONE = "none"  # the page of images that are too far from every centre
FOLDER = "sheets"  # of the run's artifacts; jobs/artifacts.py deletes what lies in a folder of this name
PAGE = re.compile(r"(style_cluster_\d+|none)\.jpg|index\.html")
TOP = 3  # sources and tags that a page names


def run(lake: Lake, settings: Settings, plan_only: bool = False, chosen: Set | None = None) -> None:
    """`chosen`: the centre set where the caller has resolved it."""
    chosen = chosen or centres.current(settings)
    rows = assigned(lake, settings, chosen)
    identity = identity_of(settings, chosen, rows)
    if identity is None:
        raise Mistake(f"style sheets: no image has a style by {chosen.name} yet; run the stage assign_styles first")
    index = index_of(settings)
    if html.is_current(lake, index, identity):
        print(f"{NAME}: nothing to do, {index.removeprefix('file://')} is up to date")
        return
    if plan_only:
        print(f"{NAME}: {index.removeprefix('file://')} is to be made anew")
        return
    with waves.stage(lake, NAME, settings, {}) as stage:
        pages, cards = make(stage, settings, chosen, rows)
        write(lake, settings, chosen, identity, pages, cards)
    print(f"{NAME}: {len(pages)} pages, {index.removeprefix('file://')}", flush=True)


def identity_of(settings: Settings, chosen: Set, rows: DataFrame) -> str | None:
    """Assigned rows -> what the sheets of them are known by; None: there are no rows."""
    content = snapshot.content(["image_id", "page", "state", "distance", "margin"]).alias("content")
    summed = rows.agg(F.count("*").alias("n"), content).first()
    assert summed is not None
    if summed["n"] == 0:
        return None
    return digest(kernel.SHEET_VERSION, chosen.name, settings.styles.images_per_sheet, summed["n"], str(summed["content"]))


def are_current(lake: Lake, settings: Settings, chosen: Set) -> bool:
    """Whether the pages show what is assigned by this set now; older ones may show an image that was denied since."""
    identity = identity_of(settings, chosen, assigned(lake, settings, chosen))
    return identity is not None and html.is_current(lake, index_of(settings), identity)


def index_of(settings: Settings) -> str:
    """URI of the page that links to the others."""
    return f"{folder(settings)}/index.html"


def folder(settings: Settings) -> str:
    """URI of the folder of the pages."""
    beside = settings.report.path.rpartition("/")[0]
    return to_uri(settings.styles.sheets or (f"{beside}/styles" if beside else "styles")).rstrip("/")


def assigned(lake: Lake, settings: Settings, chosen: Set) -> DataFrame:
    """-> (image_id, page, state, distance, margin, next) of every image by this set, but for denied ones; page: a cluster's id, or `none`."""
    told = centres.fingerprint(chosen, settings)
    page = F.when(F.col("state") == "none", NONE).otherwise(F.col("nearest").cast("string"))
    rows = deny_lists.allowed(lake, lake.read("styles").where(F.col("fingerprint") == told))
    return rows.select("image_id", page.alias("page"), "state", "distance", "margin", F.col("top")[1]["cluster"].alias("next"))


def make(stage: Stage, settings: Settings, chosen: Set, rows: DataFrame) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Assigned rows -> (page -> JPEG, what the index says of each)."""
    lake = stage.lake
    counted = rows.groupBy("page").agg(F.count("*").alias("n"), F.median("distance").alias("distance"), F.median("margin").alias("margin"))
    sizes = {row["page"]: row for row in counted.collect()}  # a row a centre
    clusters = sorted(sizes.keys() - {NONE}, key=lambda page: (-sizes[page]["n"], int(page)))
    drawn = [*clusters[:MOST], *([NONE] if NONE in sizes else [])]
    mine = rows.where(F.col("page").isin(*drawn))
    words = _words(lake, mine)
    total = sum(row["n"] for row in sizes.values())
    cards = [_card(chosen, sizes[page], words.get(page, {}), total, sizes[clusters[0]]["n"] if clusters else total) for page in drawn]
    cases = stage.freeze(_placed(lake, choose(mine, settings.styles.images_per_sheet)), "cases")
    titles = {card["page"]: (card["title"], "\n".join(card["facts"])) for card in cards}
    worker = partial(kernel.draw, titles=titles, limits=settings.limits.model_dump(), stores=settings.store_options)
    told = {row["page"]: row for row in cases.groupBy("page").applyInArrow(worker, kernel.SCHEMA).collect()}  # MOST pages of some 200 KB
    lost = sum(row["undrawn"] for row in told.values())
    more = f", the {MOST} largest of {len(clusters)} clusters" if len(clusters) > MOST else ""
    print(f"{NAME}: {sum(row['drawn'] for row in told.values())} images drawn, {lost} not{more}", flush=True)
    return {page: bytes(told[page]["jpeg"]) for page in drawn}, cards


def choose(rows: DataFrame, many: int) -> DataFrame:
    """Rows of pages -> (page, image_id, kind, place, told): `many` of each kind; nearest before farthest before median, each image once,
    and whatever they are, the smallest margins.
    """
    by_distance = Window.partitionBy("page").orderBy("distance", "image_id")
    ranked = rows.withColumns(
        {
            "rank": F.row_number().over(by_distance),
            "n": F.count("*").over(Window.partitionBy("page")),
            "edge": F.row_number().over(Window.partitionBy("page").orderBy("margin", "image_id")),
        }
    )
    nearest = F.col("rank") <= many
    farthest = ~nearest & (F.col("rank") > F.col("n") - many)
    first = F.greatest(F.lit(many), F.floor((F.col("n") - many) / 2))  # the median ones are the ranks above it
    median = ~nearest & ~farthest & (F.col("rank") > first) & (F.col("rank") <= first + many)
    kind = F.when(nearest, "nearest").when(farthest, "farthest").when(median, "median")
    cases = [
        F.struct(kind.alias("kind"), F.col("rank").alias("place")),
        F.struct(F.lit("margin").alias("kind"), F.col("edge").alias("place")),
    ]
    cases = [F.when(kind.isNotNull(), cases[0]), F.when(F.col("edge") <= many, cases[1])]
    told = F.format_string("distance %.3f, margin %.3f to %d", "distance", "margin", "next")
    chosen = ranked.select("page", "image_id", told.alias("told"), F.explode(F.array_compact(F.array(*cases))).alias("case"))
    return chosen.select("page", "image_id", "told", "case.*")


def _placed(lake: Lake, cases: DataFrame) -> DataFrame:
    """Adds width, height, addresses and caption (the alt text of the latest source)."""
    sources = lake.read("sources").join(cases.select("image_id").distinct(), "image_id", "left_semi")
    where = sources.groupBy("image_id").agg(embedding.addresses().alias("addresses"))
    texts = occurrences.latest(sources, "alt_text").select("image_id", F.substring("alt_text", 1, 200).alias("caption"))
    sizes = lake.read("images").select("image_id", "width", "height")
    return cases.join(sizes, "image_id").join(where, "image_id").join(texts, "image_id")


def _words(lake: Lake, rows: DataFrame) -> dict[str, dict[str, list[str]]]:
    """Page -> its most frequent sources and tags, each with its share of the page's images."""
    known = lake.read("sources").join(rows.select("image_id", "page"), "image_id")
    sources = known.select("page", "image_id", F.lit("sources").alias("kind"), F.col("source").alias("word"))
    tags = known.select("page", "image_id", F.lit("tags").alias("kind"), F.explode("tags").alias("word"))
    counted = sources.unionByName(tags).distinct().groupBy("page", "kind", "word").count()
    order = Window.partitionBy("page", "kind").orderBy(F.desc("count"), "word")
    top = counted.withColumn("rank", F.row_number().over(order)).where(F.col("rank") <= TOP).orderBy("page", "kind", "rank").collect()
    told: dict[str, dict[str, list[str]]] = {}
    for row in top:
        told.setdefault(row["page"], {}).setdefault(row["kind"], []).append(f"{row['word'][:40]} ({row['count']})")
    return told


def _card(chosen: Set, size: Any, words: dict[str, list[str]], total: int, largest: int) -> dict[str, Any]:
    page, n = size["page"], size["n"]
    blocked = page != NONE and int(page) in chosen.centres.block
    title = "no style: too far from every centre" if page == NONE else f"style_cluster_{page}"
    limit = f"none above {chosen.centres.none_above:.3f}"
    facts = [f"{n} images, {n / total:.1%}; median distance {size['distance']:.3f} ({limit}), median margin {size['margin']:.3f}"]
    facts.append("; ".join(f"{kind}: {', '.join(told)}" for kind, told in sorted(words.items())))
    return {
        "page": page,
        "n": n,
        "state": "none" if page == NONE else "blocked" if blocked else "ok",
        "title": title + (" (blocked)" if blocked else ""),
        "share": 100 * n / max(largest, n),
        "file": file_of(page),
        "facts": facts,
    }


def file_of(page: str) -> str:
    return f"{NONE}.jpg" if page == NONE else f"style_cluster_{page}.jpg"


def write(lake: Lake, settings: Settings, chosen: Set, identity: str, pages: dict[str, bytes], cards: list[dict[str, Any]]) -> None:
    """Pages into the folder and into the run, the index last; pages of earlier sheets that were not drawn again go."""
    root = folder(settings)
    files = {file_of(page): data for page, data in pages.items()}
    lake.opener.delete(f"{root}/index.html")  # from here on the sheets are not there, until they are there whole
    for stale in _there(lake, root) - files.keys():
        lake.opener.delete(f"{root}/{stale}")
    most = settings.styles.images_per_sheet
    shown = [card | {"strip": _data(kernel.strip_of(pages[card["page"]], min(card["n"], most), kernel.COLUMNS, 96))} for card in cards]
    told = f"{len(cards)} pages" + (
        f": the {MOST} largest clusters." if sum(card["page"] != NONE for card in cards) == MOST else ": all clusters that have images."
    )
    facts = {"identity": identity, "name": chosen.name, "told": told, "encoder": centres.encoder(settings), "cards": shown}
    for name, data in files.items():
        lake.opener.write(f"{root}/{name}", data)
    files["index.html"] = html.render("style_sheets.html", facts)
    fitted.replace_artifacts(settings.mlflow, chosen.fitted.run, FOLDER, files)
    lake.opener.write(f"{root}/index.html", files["index.html"])


def there(lake: Lake, settings: Settings) -> list[str]:
    """URIs of the pages and the index that lie in the folder."""
    root = folder(settings)
    return [f"{root}/{name}" for name in sorted(_there(lake, root))]


def _there(lake: Lake, root: str) -> set[str]:
    """Names of the pages and the index that lie in the folder: no other file of it is touched."""
    try:
        names = {entry.uri.rpartition("/")[2] for entry in lake.opener.entries(root) if not entry.is_folder}
    except Reject as reject:
        if reject.code != "missing":
            raise
        return set()
    return {name for name in names if PAGE.fullmatch(name)}


def _data(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


if __name__ == "__main__":
    command.main(__doc__, run)

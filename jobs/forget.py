"""A denied image -> nothing of it but a permanent reject with its id and the code `denied`.

    python -m jobs.forget --config conf/demo.yaml                  # every denied image that has left something
    python -m jobs.forget IMAGE ... --config conf/demo.yaml        # and these: a full id (also one that never came), or what jobs.why takes

The only command that deletes. What goes: the image's rows in every table, and of their history exactly the data files that hold them
(a VACUUM would take the history of all images with it); waves and plans in staging; exports that hold it, as a whole (they are
frozen: who asks for one is told that it was withdrawn); its rows in the losses and scores of trainings and of MLflow's artifacts; style
sheets and the report, which their stages make again. What stays: the original file, which is not ours, models that were trained on it
(their names are printed), and versions of the tables that can no longer be read where a file is gone. A bucket that keeps old versions
of its objects keeps them here too: end those by its own rules.

`--plan` says what would go. The reject comes first, so that nothing takes the image meanwhile; what is to be removed stands in
`_forget/todo.json` of the lake until all of it is gone: killed anywhere, the same command goes on. It refuses to work beside another stage.
Cost: every parquet file of exports, trainings and history is looked into for its ids, some 10 CPU-ms a file, by Spark's tasks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, command_line, stop
from jobs import artifacts, caption_ledger, caption_page, deny, deny_lists, ingest, registry, session, style_sheets, traces, waves, why
from jobs.lake import Lake
from jobs.lease import Lease, landing
from jobs.tables import TABLES
from udfs.opener import to_uri
from udfs.reject import Reject
from udfs.traces import Traces

NAME = "forget"
KERNEL_VERSION = 1
MOST = 100_000  # images a run: their ids are held by the driver and sent to every task
LEAST_NAME = 8  # letters: a shorter name would be found in texts where it means something else
IMAGES = [name for name, table in TABLES.items() if "image_id BINARY" in table.columns]
TABLES_IN_ORDER = sorted(IMAGES, key=lambda name: (name == "sources", name))  # the names are looked up in `sources`: it goes last


def main() -> None:
    told = {"image": {"nargs": "*", "help": "id, file, key or address; none: every denied image that has left something"}}
    settings, arguments = command_line(__doc__ or "", options=told)
    try:
        lake = Lake(session.start(settings.spark), settings)
        lake.create()
        run(lake, settings, arguments.plan, arguments.image)
    except Mistake as mistake:
        stop(str(mistake))


def run(lake: Lake, settings: Settings, plan_only: bool = False, images: Sequence[str] = ()) -> None:
    if lake.has_catalog:
        raise Mistake(
            "forget: it removes data files itself, and those of a catalog are not its own; there, DELETE the rows and VACUUM the tables"
        )
    todo = _begun(lake)
    ids = {bytes.fromhex(one) for one in todo.ids} | _asked(lake, images) | (set() if images else _left(lake))
    if not ids:
        print(f"{NAME}: nothing to do")
        return
    found = _with_names(lake, ids, todo)
    if plan_only:
        _tell_plan(lake, settings, found)
        return
    has_mlflow = artifacts.reachable(settings)
    _refuse_company(lake, settings)
    with waves.stage(lake, NAME, settings, deny.TABLES) as stage:
        lake.opener.write(_todo(lake), found.to_json().encode())
        stage.run_whole(_rejects(lake, found))
    _tell_models(lake, settings, found)
    _refuse_company(lake, settings)  # one that started before the reject stood may have planned the image
    _clean_files(lake, settings, found)
    if has_mlflow:
        _tell("artifacts and tags in MLflow", artifacts.clean(settings, found, plan_only=False))
    with landing(lake, NAME, settings.waves.lease_seconds):
        _clean_tables(lake, settings, found)
    lake.opener.delete(lake.area("_forget"))
    print(f"{NAME}: {len(ids)} images are forgotten")


def _begun(lake: Lake) -> Traces:
    """What a run that was killed had still to do."""
    try:
        return Traces.from_json(lake.opener.read(_todo(lake)))
    except Reject as reject:
        if reject.code != "missing":
            raise
        return Traces(frozenset())


def _asked(lake: Lake, images: Iterable[str]) -> set[bytes]:
    """What the command line names -> ids. Raises Mistake for what is neither a full id nor known."""
    ids: set[bytes] = set()
    for image in images:
        if len(image) == 64 and set(image.lower()) <= set("0123456789abcdef"):
            found = [bytes.fromhex(image)]
        elif not (found := why.find(lake, image)):
            raise Mistake(
                f"forget: no table knows the image {image!r}; expected a hex id (64 digits of one that never came), a file, a key or an address"
            )
        ids |= set(found)
    return ids


def _left(lake: Lake) -> set[bytes]:
    """Denied images of which a table still has a row besides rejects."""
    denied, whole = F.broadcast(deny_lists.ids(lake)), None
    for table in IMAGES:
        if table != "rejects":
            rows = lake.read(table).select("image_id").join(denied, "image_id", "left_semi")
            whole = rows if whole is None else whole.unionByName(rows)
    assert whole is not None
    return {bytes(row["image_id"]) for row in whole.distinct().limit(MOST).collect()}


def _with_names(lake: Lake, ids: set[bytes], begun: Traces) -> Traces:
    """Ids -> with the input keys and names that the sources gave the images. A name that is too short to be one is left out."""
    keys, names = set(begun.keys), set(begun.names)
    told = Traces(frozenset(one.hex() for one in ids))
    rows = lake.read("sources").join(_frame(lake, told), F.col("image_id") == F.col("forgotten"), "left_semi")
    for row in rows.select("key", "uri", "offset", "length", "size", "row_group", ingest.input_key().alias("input_key")).toLocalIterator():
        if row["row_group"] is None and row["offset"] == 0 and row["length"] == row["size"]:  # a whole file: its address is the image's own
            keys.add(row["input_key"])
            names |= {row["uri"], unquote(row["uri"]), row["uri"].rpartition("/")[2], unquote(row["uri"]).rpartition("/")[2]}
        names.add(row["key"])
    # nor a bare word: `manifest` or `training` is also a key of our own JSON
    names = {name for name in names if len(name) >= LEAST_NAME and not name.isdigit() and not re.fullmatch(r"[A-Za-z_-]+", name)}
    return told._replace(keys=frozenset(keys), names=frozenset(names))


def _frame(lake: Lake, found: Traces) -> DataFrame:
    """-> `forgotten`: the ids."""
    return F.broadcast(lake.spark.createDataFrame([(bytearray.fromhex(one),) for one in sorted(found.ids)], "forgotten BINARY"))


def _rejects(lake: Lake, found: Traces) -> DataFrame:
    """The reject of each image that is not forgotten yet: what will stay of it."""
    known = lake.read("rejects", lake.version("rejects")).where(F.col("stage") == NAME).select("image_id")
    rows = _frame(lake, found).withColumnRenamed("forgotten", "image_id").join(known, "image_id", "left_anti")
    told = {
        "stage": F.lit(NAME),
        "input_key": F.lower(F.hex("image_id")),
        "fingerprint": F.lit(f"{NAME}:{KERNEL_VERSION}"),
        "detail": F.lit(""),
    }
    return deny_lists.as_rejects(rows.withColumns(told))


def _refuse_company(lake: Lake, settings: Settings) -> None:
    """Raises LeaseHeld, a Mistake, when a stage is at work: what it has planned or staged could bring the image back."""
    for uri in traces.files(lake, lake.area("_leases")):
        name = uri.rpartition("/")[2]
        if name.endswith(".json") and name not in (f"{NAME}.json", "landing.json"):
            Lease(lake, name.removesuffix(".json"), NAME, settings.waves.lease_seconds).refuse_holder()


def _clean_files(lake: Lake, settings: Settings, found: Traces) -> None:
    waves_ = traces.staged(lake, settings, found)
    for folder in waves_:
        lake.opener.delete(folder)
    _tell("folders of stopped runs", waves_)
    withdrawn = traces.exports(lake, settings, found)
    for root in withdrawn:
        traces.withdraw(lake, settings, root)
    _tell("exports", withdrawn)
    trained = traces.trainings(lake, settings, found)
    for folder in trained:
        traces.clean_training(lake, settings, found, folder)
    _tell("folders of trainings", trained)
    bought = caption_ledger.holding(lake, found.ids)
    caption_ledger.blot(lake, bought, found.ids)
    _tell("journals of paid captions", bought)
    shown = _pages(lake, settings)
    for page in shown:
        lake.opener.delete(page)
    _tell("pages", shown)


def _pages(lake: Lake, settings: Settings) -> list[str]:
    """What shows pictures and is made again by its stage: the report, the captions' page, the style sheets."""
    made = [to_uri(settings.report.path), caption_page.uri(settings)]
    return [page for page in made if lake.opener.exists(page)] + style_sheets.there(lake, settings)


def _clean_tables(lake: Lake, settings: Settings, found: Traces) -> None:
    """The images' rows, and the files of the tables' history that hold them."""
    counts = _counts(lake, found)
    for table in TABLES_IN_ORDER:
        if counts[table]:
            rows, keys = _rows(lake, table, found)
            lake.remove(table, rows, *keys)
    children = lake.read("sources").join(_frame(lake, found), F.col("derived_from") == F.col("forgotten"), "left_semi")
    if not children.isEmpty():
        lake.clear("sources", "derived_from", children.select("derived_from"))
    history = _history(lake, settings, found)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lake.conceal, TABLES_IN_ORDER))
    for table in TABLES_IN_ORDER:
        lake.delete_files(history[table])
        if counts[table] or history[table]:
            print(f"{NAME}: {table}: {counts[table]} rows, {len(history[table])} files of its history", flush=True)


def _counts(lake: Lake, found: Traces) -> dict[str, int]:
    """-> how many rows of each table would go."""
    whole = None
    for table in TABLES_IN_ORDER:
        rows = _rows(lake, table, found)[0].select(F.lit(table).alias("table"))
        whole = rows if whole is None else whole.unionByName(rows)
    assert whole is not None
    return dict.fromkeys(TABLES_IN_ORDER, 0) | {row["table"]: row["count"] for row in whole.groupBy("table").count().collect()}


def _rows(lake: Lake, table: str, found: Traces) -> tuple[DataFrame, list[str]]:
    """-> the table's rows that go, and the columns by which they are known."""
    ids = _frame(lake, found).withColumnRenamed("forgotten", "image_id")
    if table == "rejects":
        return _told_rejects(lake, found, ids), list(TABLES[table].key)
    return lake.read(table).join(ids, "image_id", "left_semi"), ["image_id"]


def _history(lake: Lake, settings: Settings, found: Traces) -> dict[str, list[str]]:
    """Table -> the files of its history that hold a trace."""
    with ThreadPoolExecutor(4) as pool:
        unread = list(zip(TABLES_IN_ORDER, pool.map(lake.unread, TABLES_IN_ORDER), strict=True))
    of = {uri: table for table, uris in unread for uri in uris}
    history: dict[str, list[str]] = {table: [] for table in TABLES_IN_ORDER}
    for uri in traces.holding(lake, settings, found, of):
        history[of[uri]].append(uri)
    return history


def _told_rejects(lake: Lake, found: Traces, ids: DataFrame) -> DataFrame:
    """Rejects of the images, also those of their files from before the id was known; not those that deny them."""
    rejects = lake.read("rejects")
    keys = lake.spark.createDataFrame([(one,) for one in sorted(found.keys)], "input_key STRING")
    by_name = rejects.where(F.col("stage") == ingest.NAME).join(F.broadcast(keys), "input_key", "left_semi")
    stays = (F.col("stage") == NAME) | ((F.col("stage") == ingest.NAME) & (F.col("code") == deny_lists.CODE))
    return rejects.join(ids, "image_id", "left_semi").where(~stays).unionByName(by_name)


def _tell_plan(lake: Lake, settings: Settings, found: Traces) -> None:
    print(f"{NAME}: {len(found.ids)} images, of which would go")
    counts, history = _counts(lake, found), _history(lake, settings, found)
    for table in TABLES_IN_ORDER:
        if counts[table] or history[table]:
            print(f"  {table}: {counts[table]} rows, {len(history[table])} files of its history")
    for what, look in (("export", traces.exports), ("training", traces.trainings), ("staging", traces.staged)):
        for folder in look(lake, settings, found):
            print(f"  {what}: {folder}")
    for part in caption_ledger.holding(lake, found.ids):
        print(f"  journal: {part}")
    for page in _pages(lake, settings):
        print(f"  page: {page}")
    if artifacts.reachable(settings):
        for one in artifacts.clean(settings, found, plan_only=True):
            print(f"  MLflow: {one}")
    _tell_models(lake, settings, found)


def _tell_models(lake: Lake, settings: Settings, found: Traces) -> None:
    """The trainings that saw an image: their weights are not made unseen."""
    seen = lake.read("train_stats").join(_frame(lake, found), F.col("image_id") == F.col("forgotten"), "left_semi")
    for row in seen.groupBy("model", "training").count().orderBy("model", "training").limit(why.TRAININGS).collect():
        versions = ", ".join(map(str, registry.made_by(settings.mlflow, row["model"], row["training"]))) or f"training {row['training']}"
        print(
            f"{NAME}: {row['model']} was trained on {row['count']} of them and keeps what it learned: {versions}; train anew without them",
            flush=True,
        )


def _tell(what: str, gone: Sequence[str]) -> None:
    for one in gone:
        print(f"{NAME}: {what}: {one}", flush=True)


def _todo(lake: Lake) -> str:
    return lake.area("_forget", "todo.json")


if __name__ == "__main__":
    main()

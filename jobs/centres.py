"""The centre set that counts now, and sets that derive from it: for fit_styles, assign_styles, add_style, block_styles, style_sheets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, load_encoder
from jobs import embedding, fitted
from jobs.fitted import Fitted
from jobs.lake import Lake
from udfs import style_centres
from udfs.embed import ORIGINAL
from udfs.style_centres import Centres

FEWEST = 2  # centres that may be used: a margin needs a second


class Set(NamedTuple):
    """A registered version and what its files say."""

    fitted: Fitted
    centres: Centres

    @property
    def name(self) -> str:
        return self.fitted.name


def encoder(settings: Settings) -> str:
    """Name of the encoder whose vectors are clustered."""
    return load_encoder(settings.styles.encoder or settings.encoder).name


def vectors_fingerprint(settings: Settings) -> str:
    return embedding.outputs(settings)[encoder(settings)]


def vectors(lake: Lake, settings: Settings) -> DataFrame:
    """-> (image_id, vector) of every image that has one of the right kind."""
    mine = (F.col("view") == ORIGINAL) & (F.col("fingerprint") == vectors_fingerprint(settings))
    return lake.read("embeddings").where(mine).select("image_id", "vector")


def current(settings: Settings, alias: str | None = None) -> Set:
    """The version of the alias. Raises Mistake when there is none, or when it was fitted on other vectors than this config embeds."""
    found = fitted.load(settings.mlflow, settings.styles.model, alias or settings.styles.alias)
    if style_centres.TENSORS not in found.files:
        raise Mistake(
            f"{found.name} holds {sorted(found.files)}, no style centres; give styles.model another name, or fit one: jobs.fit_styles"
        )
    centres, ours = style_centres.unpack(found.files), vectors_fingerprint(settings)
    if centres.encoder != ours:
        raise Mistake(
            f"{found.name} was fitted on vectors {centres.encoder}, this config embeds {ours}; fit centres on these vectors "
            f"(python -m jobs.fit_styles) and make them the {settings.styles.alias}, or set styles.encoder and embed to those of the centres"
        )
    return Set(found, centres)


def fingerprint(centres: Set, settings: Settings) -> str:
    """Of rows of `styles`: centres, rule and vectors."""
    parts = (centres.fitted.model, centres.fitted.sha256[:12], str(style_centres.KERNEL_VERSION), settings.styles.policy)
    return f"{':'.join(parts)}/{centres.centres.encoder}"


def check_block(ids: set[int], block: set[int], where: str) -> tuple[int, ...]:
    """Ids that are not to be used -> the same, sorted. Raises Mistake when the set has no such id, or too few are left."""
    if unknown := sorted(block - ids):
        raise Mistake(
            f"{where}: given the clusters {unknown[:10]}, which this set of {len(ids)} centres has not; its ids are {min(ids)} to {max(ids)}"
        )
    if len(ids - block) < FEWEST:
        raise Mistake(f"{where}: {len(block)} of {len(ids)} clusters are blocked; at least {FEWEST} must be left")
    return tuple(sorted(block))


def derive(settings: Settings, parent: Set, child: Centres, params: Mapping[str, object]) -> Fitted:
    """A set made from `parent` -> its registered version, the one that is there already where a kill left it without its alias. It takes
    the alias that its parent holds, so that what derives from the champion is the champion; if another has taken that alias meanwhile,
    it is a candidate.
    """
    alias = settings.styles.alias
    holds = fitted.held(settings.mlflow, parent.fitted.model).get(alias) == parent.fitted.version
    alias = alias if holds else fitted.CANDIDATE
    if made := fitted.find(settings.mlflow, parent.fitted.model, child.digest):
        fitted.settle(settings.mlflow, made.model, made.version, alias)
        return made
    tags = {key: parent.fitted.tags[key] for key in ("encoder_fingerprint", "recipe")} | {"derived_from": parent.name}
    return fitted.register(
        settings.mlflow,
        parent.fitted.model,
        style_centres.pack(child),
        child.digest,
        {**params, "derived_from": parent.name, "none_above": child.none_above, "blocked": len(child.block)},
        {"clusters": len(child.ids)},
        tags,
        alias=alias,
    )


def tell_alias(settings: Settings, made: Fitted) -> str:
    """-> what a command says of a version that it made."""
    alias = settings.styles.alias
    if fitted.held(settings.mlflow, made.model).get(alias) == made.version:
        return f"{made.name} is the {alias}"
    return f"{fitted.standing(settings.mlflow, made)}; look at it first: --set styles.alias={made.version} (assign_styles, style_sheets)"

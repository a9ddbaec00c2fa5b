"""The lake's tables: columns, keys and constraints, in one place.

`image_id` is the 32 raw bytes of the sha256 of the original file (hex in commands and in SQL by `hex(image_id)`).
A `fingerprint` names the model, preprocessing and kernel version that a row came from. `run` is the run that landed
the row. An address is (uri, offset, length): a whole file has offset 0; a member of a tar lies inside its uri; an
image in a parquet column has row_group, row (both from 0) and column, no offset, and length is the bytes of its cell.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_ID = "image_id BINARY NOT NULL"
ADDRESS = "uri STRING, offset BIGINT, length BIGINT, row_group INT, row INT, column STRING"
RUN = "run STRING NOT NULL"
_ID_CHECK = ("image_id_is_sha256", "octet_length(image_id) = 32")


@dataclass(frozen=True)
class Table:
    """`key` is unique in the table, NULL counting as a value (join by `<=>`); `checks` are (name, SQL condition) pairs that Delta enforces.

    `later`: (name, type) of columns that lakes made by older code lack; rows from before they came read NULL there.
    """

    name: str
    columns: str
    key: tuple[str, ...]
    checks: tuple[tuple[str, str], ...] = ()
    later: tuple[tuple[str, str], ...] = ()

    @property
    def ddl(self) -> str:
        return ", ".join([self.columns, *(f"{name} {kind}" for name, kind in self.later)])


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "images",
            f"{IMAGE_ID}, format STRING NOT NULL, width INT NOT NULL, height INT NOT NULL, bytes BIGINT NOT NULL, "
            f"frames INT NOT NULL, ai_marks ARRAY<STRUCT<where: STRING, text: STRING>> NOT NULL, {RUN}",
            ("image_id",),
            (_ID_CHECK, ("has_size", "width > 0 AND height > 0 AND bytes > 0 AND frames > 0")),
        ),
        Table(
            # `entry` is what a listing gives (a file, an archive, a manifest row), `seen` the state in which it was read
            "sources",
            f"source STRING NOT NULL, key STRING NOT NULL, {IMAGE_ID}, entry STRING NOT NULL, seen STRING NOT NULL, {ADDRESS}, "
            "size BIGINT NOT NULL, mtime_us BIGINT NOT NULL, tags ARRAY<STRING> NOT NULL, alt_text STRING, licence STRING, "
            f"opt_out BOOLEAN NOT NULL, derived_from BINARY, {RUN}",
            ("source", "key", "entry", "seen", "offset", "row_group", "row"),
            (_ID_CHECK, ("has_address", "uri IS NOT NULL AND ((offset >= 0 AND length > 0) OR (row_group >= 0 AND row >= 0))")),
        ),
        Table(
            "rejects",
            f"stage STRING NOT NULL, input_key STRING NOT NULL, fingerprint STRING NOT NULL, image_id BINARY, {ADDRESS}, "
            f"code STRING NOT NULL, detail STRING NOT NULL, permanent BOOLEAN NOT NULL, attempts INT NOT NULL, {RUN}",
            ("stage", "input_key", "fingerprint", "attempts", "offset", "row_group", "row"),  # these: members of one file
            (("attempts_from_one", "attempts >= 1"),),
        ),
        Table(
            "pixels",
            f"{IMAGE_ID}, view STRING NOT NULL, fingerprint STRING NOT NULL, phash BINARY NOT NULL, phash_mirror BINARY NOT NULL, "
            f"mean FLOAT NOT NULL, contrast FLOAT NOT NULL, saturation FLOAT NOT NULL, sharpness FLOAT NOT NULL, "
            f"entropy FLOAT NOT NULL, colour STRING NOT NULL, {RUN}",
            ("image_id", "view", "fingerprint"),
            (_ID_CHECK, ("hash_is_256_bit", "octet_length(phash) = 32 AND octet_length(phash_mirror) = 32")),
        ),
        Table(
            # vector: little-endian fp16
            "embeddings",
            f"{IMAGE_ID}, view STRING NOT NULL, fingerprint STRING NOT NULL, encoder STRING NOT NULL, width INT NOT NULL, "
            f"vector BINARY NOT NULL, {RUN}",
            ("image_id", "view", "fingerprint"),
            (_ID_CHECK, ("vector_is_fp16", "octet_length(vector) = 2 * width")),
        ),
        Table(
            # what a detector saw. labels: (name, kind such as `general`, `character`, `rating`, `nsfw`; probability); regions: text with its
            # probability and the corners of its box, x and y in turn, clockwise from the top left, as shares of width and height
            "detections",
            f"{IMAGE_ID}, view STRING NOT NULL, fingerprint STRING NOT NULL, detector STRING NOT NULL, "
            "labels ARRAY<STRUCT<name: STRING, kind: STRING, p: FLOAT>> NOT NULL, "
            f"regions ARRAY<STRUCT<text: STRING, p: FLOAT, box: ARRAY<FLOAT>>> NOT NULL, {RUN}",
            ("image_id", "view", "fingerprint"),
            (_ID_CHECK,),
        ),
        Table(
            # rater: a rule with its version (`rankiqa:1`), or a person
            "labels",
            f"{IMAGE_ID}, view STRING NOT NULL, kind STRING NOT NULL, value FLOAT NOT NULL, rater STRING NOT NULL, "
            f"fingerprint STRING NOT NULL, {RUN}",
            ("image_id", "view", "kind", "rater", "fingerprint"),
            (_ID_CHECK, ("value_in_unit", "value BETWEEN 0 AND 1")),
            # class: of a kind that is a choice (`style`, `ai_generated`): its name, and value is 1. origin: the collection that the image is
            # from, as the rater says it
            (("class", "STRING"), ("origin", "STRING")),
        ),
        Table(
            "scores",
            f"{IMAGE_ID}, fingerprint STRING NOT NULL, model STRING NOT NULL, model_version STRING NOT NULL, "
            f"embedding_fingerprint STRING NOT NULL, raw FLOAT NOT NULL, bin INT NOT NULL, tag STRING NOT NULL, {RUN}",
            ("image_id", "fingerprint"),
            (_ID_CHECK, ("bin_is_a_digit", "bin BETWEEN 0 AND 9"), ("raw_is_a_number", "NOT isnan(raw)")),
            (("bins", "STRING"),),  # the rule that made the bin: `v7`, or MODEL:VERSION of a calibration; NULL: v7
        ),
        Table(
            # centres: MODEL:VERSION. cluster: the nearest centre where the state is ok, NULL where it is not (policy v7: always a centre)
            "styles",
            f"{IMAGE_ID}, fingerprint STRING NOT NULL, centres STRING NOT NULL, embedding_fingerprint STRING NOT NULL, "
            "state STRING NOT NULL, cluster INT, tag STRING, nearest INT NOT NULL, distance FLOAT NOT NULL, second FLOAT NOT NULL, "
            f"margin FLOAT NOT NULL, top ARRAY<STRUCT<cluster: INT, distance: FLOAT>> NOT NULL, {RUN}",
            ("image_id", "fingerprint"),
            (_ID_CHECK, ("state_is_known", "state IN ('ok', 'blocked', 'none')"), ("ok_has_a_tag", "(cluster IS NULL) = (tag IS NULL)")),
        ),
        Table(
            # label: the kind of labels that the classifier was trained on; class: the likeliest one, or `other` below the classifier's threshold
            "classes",
            f"{IMAGE_ID}, fingerprint STRING NOT NULL, label STRING NOT NULL, model STRING NOT NULL, model_version STRING NOT NULL, "
            "embedding_fingerprint STRING NOT NULL, class STRING NOT NULL, p FLOAT NOT NULL, "
            f"probabilities ARRAY<STRUCT<class: STRING, p: FLOAT>> NOT NULL, {RUN}",
            ("image_id", "fingerprint"),
            (_ID_CHECK, ("p_in_unit", "p BETWEEN 0 AND 1")),
        ),
        Table(
            # the evidence of all detectors and classifiers under one set of thresholds; NULL: no model that could say so ran
            "flags",
            f"{IMAGE_ID}, fingerprint STRING NOT NULL, domain STRING, rating STRING, rating_by STRING, nsfw FLOAT, "
            "tags ARRAY<STRING> NOT NULL, ai_generated STRING NOT NULL, ai_evidence ARRAY<STRING> NOT NULL, has_text BOOLEAN, "
            f"text STRING, text_share FLOAT, watermark FLOAT, versions STRING NOT NULL, {RUN}",
            ("image_id", "fingerprint"),
            (
                _ID_CHECK,
                ("rating_is_known", "rating IS NULL OR rating IN ('safe', 'questionable', 'explicit')"),
                ("ai_is_known", "ai_generated IN ('declared', 'detected', 'unknown')"),
            ),
        ),
        Table(
            # a text of one kind (short, medium, long, style, tags, ocr) by one engine under one prompt; part: of a kind with several texts (ocr: a
            # region each), else 0. request: key of the call that gave it. tokens: by `tokenizer`
            "captions",
            f"{IMAGE_ID}, fingerprint STRING NOT NULL, kind STRING NOT NULL, part INT NOT NULL, text STRING NOT NULL, language STRING NOT NULL, "
            "tokens INT NOT NULL, tokenizer STRING NOT NULL, engine STRING NOT NULL, model STRING NOT NULL, prompt STRING NOT NULL, "
            f"tier STRING NOT NULL, request STRING NOT NULL, {RUN}",
            ("image_id", "fingerprint", "kind", "part"),
            (
                _ID_CHECK,
                ("kind_is_known", "kind IN ('short', 'medium', 'long', 'style', 'tags', 'ocr')"),
                ("has_text", "part >= 0 AND (text != '' AND tokens > 0 OR kind = 'ocr' AND part = 0)"),
            ),
        ),
        Table(
            # the ledger: one settled try of a request. attempt: wave/partition/attempt of the task. usd in nano-dollars (10^-9)
            "caption_calls",
            f"request STRING NOT NULL, try INT NOT NULL, attempt STRING NOT NULL, {IMAGE_ID}, fingerprint STRING NOT NULL, engine STRING NOT NULL, "
            "model STRING NOT NULL, tier STRING NOT NULL, outcome STRING NOT NULL, code STRING NOT NULL, prompt_tokens BIGINT, image_tokens BIGINT, "
            f"output_tokens BIGINT, thought_tokens BIGINT, estimated BOOLEAN NOT NULL, nano_usd BIGINT NOT NULL, seconds FLOAT NOT NULL, {RUN}",
            ("request", "try", "attempt"),
            (_ID_CHECK, ("costs_nothing_or_more", "nano_usd >= 0")),
        ),
        Table(
            "decisions",
            f"selection STRING NOT NULL, {IMAGE_ID}, kept BOOLEAN NOT NULL, "
            f"failed ARRAY<STRUCT<rule: STRING, value: STRING, bound: STRING, version: STRING>> NOT NULL, {RUN}",
            ("selection", "image_id"),
            (_ID_CHECK, ("kept_means_no_failure", "kept = (size(failed) = 0)")),
        ),
        Table(
            "selections",
            f"selection STRING NOT NULL, name STRING NOT NULL, {IMAGE_ID}, score INT, {RUN}",
            ("selection", "image_id"),
            (_ID_CHECK,),
        ),
        Table(
            # one row a file of an export; `export` is a digest, `root`/manifest.json the whole manifest, `ids` the checksum of its image_ids
            "exports",
            "export STRING NOT NULL, kind STRING NOT NULL, root STRING NOT NULL, file STRING NOT NULL, rows BIGINT NOT NULL, "
            f"bytes BIGINT NOT NULL, sha256 STRING NOT NULL, manifest_sha256 STRING NOT NULL, made_from STRING NOT NULL, {RUN}",
            ("export", "file"),
            (("has_rows", "rows > 0"),),
            (("ids", "STRING"),),
        ),
        Table(
            # what one training saw of an image: how often any of its rows was trained on, and their losses. `training` is its digest
            "train_stats",
            f"{IMAGE_ID}, training STRING NOT NULL, model STRING NOT NULL, export STRING NOT NULL, manifest_sha256 STRING NOT NULL, "
            "times_seen INT NOT NULL, loss_mean FLOAT NOT NULL, loss_first FLOAT NOT NULL, loss_last FLOAT NOT NULL, "
            f"loss_min FLOAT NOT NULL, loss_max FLOAT NOT NULL, {RUN}",
            ("image_id", "training"),
            (_ID_CHECK, ("was_seen", "times_seen > 0"), ("loss_is_a_number", "loss_min <= loss_max AND NOT isnan(loss_mean)")),
        ),
    )
}

"""captions, caption_calls, rejects -> the captioners beside each other, on the images that all of them were asked about (or that the service of
one of them prohibits): an MLflow run.

    spark-submit --jars '.cache/jars/*.jar' jobs/compare_captioners.py --config my.yaml

The sample is that of `compare_captioners` (its captioners caption it in the stage `caption`). Compared is everyone who was asked about enough of it:
by another prompt or model of before too. Lengths, tags named, text read, refusals, sameness, agreement of each pair, tokens and money, with intervals
over a bootstrap of images (udfs/compare_captioners.py, udfs/caption_words.py). The run holds them as metrics, as `captioners.csv`, as
`comparison.json` for the report, and in `images.parquet` the agreement of each pair about each image. A second run on the same rows does nothing.
Cost: joins of narrow tables with a sample; of at most 5,000 images the texts reach the driver, which measures them in seconds, or in
minutes where the pictures hold much text (the edits of two texts cost the product of their lengths).
"""

from __future__ import annotations

import io
import json
from typing import Any

import pandas as pd

from conf.settings import Settings, digest, load_prompt
from jobs import command, compared_rows, runs, waves
from jobs.lake import Lake
from udfs import caption_words, captioner_table, compare_captioners

NAME = "compare-captioners"
LAKE = "studbook.lake"  # the run's tag with the lake that it is of
JSON, TABLE, IMAGES = "comparison.json", "captioners.csv", "images.parquet"  # artifacts


def run(lake: Lake, settings: Settings, plan_only: bool = False) -> None:
    rows = compared_rows.gather(lake, settings)
    asked = compared_rows.who(settings, rows)
    bands = {str(kind): band for kind, band in load_prompt(settings.captions.prompt).bands.items()}
    versions = (compare_captioners.MEASURES_VERSION, caption_words.WORDS_VERSION)
    identity = digest(*versions, settings.lake.root, settings.compare_captioners, bands, asked.names, asked.left_out, rows.content)
    if made := runs.finished(settings.mlflow, NAME, runs.DIGEST, f"{NAME}-{identity}"):
        print(f"{NAME}: nothing to do, MLflow run {made} compares these {len(asked.images)} images")
        return
    if plan_only:
        print(f"{NAME}: {', '.join(asked.names.values())} on {len(asked.images)} images are to be compared")
        return
    with waves.stage(lake, NAME, settings, {}):
        told, images = compare_captioners.compare(*compared_rows.for_kernel(rows, asked), bands, settings.compare_captioners.seed)
        told |= {"sample": asked.sample, "left_out": asked.left_out, "fingerprints": {name: one for one, name in asked.names.items()}}
        told |= {"tokenizers": sorted({row["tokenizer"] for row in rows.texts}), "prompt": settings.captions.prompt}
        made = record(settings, identity, told, images)
    print(
        f"{NAME}: {told['images']} of the sample's {told['sample']} images, asked of each of {', '.join(told['captioners'])}; MLflow run {made}"
    )
    print(
        "\n".join([*(f"  left out: {name}, asked about {count}" for name, count in asked.left_out.items()), *captioner_table.lines(told)])
    )


def record(settings: Settings, identity: str, told: dict[str, Any], images: list[dict[str, Any]]) -> str:
    """-> id of the run. It is finished last: one that a kill left open is taken up again."""
    client = runs.connect(settings.mlflow)
    run_id = runs.open_run(client, settings.mlflow, NAME, identity, {LAKE: settings.lake.root})
    params = settings.compare_captioners.model_dump() | {"prompt": told["prompt"], "images_compared": told["images"]}
    params |= {f"captioner {name}": fingerprint for name, fingerprint in told["fingerprints"].items()}
    runs.record(client, run_id, params, captioner_table.metrics(told))
    table = pd.DataFrame(captioner_table.rows(told), columns=captioner_table.COLUMNS)
    out = io.BytesIO()
    pd.DataFrame(images, columns=["image_id", "first", "second", "agreement"]).to_parquet(out, index=False)
    files = {JSON: json.dumps(told, indent=1).encode(), TABLE: table.to_csv(index=False).encode(), IMAGES: out.getvalue()}
    runs.put(client, run_id, files)
    client.set_terminated(run_id)
    return run_id


def latest(settings: Settings) -> str | None:
    """-> id of the newest run that compares captioners of this lake; None: there is none, or no store that answers."""
    return runs.finished(settings.mlflow, NAME, LAKE, settings.lake.root)


if __name__ == "__main__":
    command.main(__doc__, run)

"""A handful of images -> a new style: a new version of the centre set, with the mean of their stored vectors as one more centre.

    python -m jobs.add_style IMAGE... --config conf/demo.yaml
    python -m jobs.add_style --file ids.txt --note "ink wash" --config conf/demo.yaml

IMAGE is an id (hex, 8 digits or more), a file, or a key or address as a source gave it; --file holds such names, one a line. The new
centre takes the next free id; all other centres, their ids, the block list and the threshold stay as they are. What derives from the
champion becomes the champion (of another alias: takes that alias), so that `assign_styles`, which is cheap, is all that follows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pyspark.sql import functions as F

from conf.section import Mistake
from conf.settings import Settings, command_line, digest, stop
from jobs import centres, deny_lists, session, why
from jobs.checks import check
from jobs.lake import Lake
from udfs import style_fit
from udfs.style_centres import read_vectors

NAME = "add-style"
MANY = 1_000  # images of one style: more are a matter of the fit


def main() -> None:
    options = {
        "--file": {"metavar": "FILE", "help": "names of images, one a line"},
        "--note": {"default": "", "help": "what the style is; kept in the history of the set"},
    }
    settings, arguments = command_line(__doc__ or "", options={"images": {"nargs": "*", "metavar": "IMAGE"}, **options})
    try:
        check(settings)
        names = [*arguments.images, *(read_names(arguments.file) if arguments.file else [])]
        lake = Lake(session.start(settings.spark), settings)
        lake.create()
        run(lake, settings, names, arguments.note, arguments.plan)
    except Mistake as mistake:
        stop(str(mistake))


def run(lake: Lake, settings: Settings, names: list[str], note: str = "", plan_only: bool = False) -> None:
    parent = centres.current(settings)
    images = resolve(lake, names)
    ids = digest(sorted(image_id.hex() for image_id in images))  # a set lives on where an image is forgotten: it names none
    for event in parent.centres.history:
        if event.get("images") == ids:
            print(f"{NAME}: nothing to do, cluster {event['cluster']} of {parent.name} was made from these {len(images)} images")
            return
    vectors = read(lake, settings, images)
    told = f"{len(images)} images -> cluster {parent.centres.next_id} of a new version of {parent.name}"
    if plan_only:
        print(f"{NAME}: {told}, pending")
        return
    identity = digest("add", parent.fitted.sha256, ids)
    child = style_fit.extend(parent.centres, vectors, {"how": "add", "images": ids, "note": note, "parent": parent.name}, identity)
    made = centres.derive(settings, parent, child, {"added": parent.centres.next_id, "images": len(images), "note": note})
    spread = np.linalg.norm(vectors - vectors.mean(axis=0), axis=1).max()
    print(f"{NAME}: {told}; the farthest of them lies {spread:.3f} from it, none_above is {parent.centres.none_above:.3f}")
    print(f"{NAME}: {centres.tell_alias(settings, made)}; next: python -m jobs.assign_styles")


def read_names(file: str) -> list[str]:
    """A file of names, one a line -> names. Raises Mistake when it is not there."""
    if not Path(file).is_file():
        raise Mistake(f"--file: no file at {file}; expected ids, files or keys of images, one a line")
    return [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]


def resolve(lake: Lake, names: list[str]) -> dict[bytes, str]:
    """Names -> image_id -> its name. Raises Mistake for a name that no image, or more than one, has."""
    if not 0 < len(set(names)) <= MANY:
        raise Mistake(f"add style: given {len(set(names))} images, expected 1 to {MANY}: ids, files or keys, or --file with one a line")
    images: dict[bytes, str] = {}
    for name in names:
        found = why.find(lake, name)
        if len(found) != 1:
            told = ", ".join(one.hex()[:12] for one in found) or "none"
            raise Mistake(f"add style: {name!r} should name one image, and names {told}; give its whole id, a file, or a source's key")
        images[found[0]] = name
    return images


def read(lake: Lake, settings: Settings, images: dict[bytes, str]) -> np.ndarray:
    """-> their vectors, float32, in the order of their ids. Raises Mistake that names the images without one."""
    mine = deny_lists.allowed(lake, centres.vectors(lake, settings)).where(F.col("image_id").isin(*(bytearray(one) for one in images)))
    table = mine.toArrow().sort_by("image_id").combine_chunks()  # MANY rows at most
    lacking = sorted(images[one] for one in images.keys() - set(table.column("image_id").to_pylist()))
    if lacking:
        raise Mistake(
            f"add style: {len(lacking)} images have no vector of {centres.encoder(settings)}, or are denied: {', '.join(lacking[:20])}; "
            "run the stage embed first, or leave them out"
        )
    width = len(table.column("vector")[0].as_py()) // 2
    vectors = np.concatenate([read_vectors(chunk, width) for chunk in table.column("vector").chunks])
    if not np.isfinite(vectors).all():
        broken = [images[one] for one, row in zip(table.column("image_id").to_pylist(), vectors, strict=True) if not np.isfinite(row).all()]
        raise Mistake(f"add style: the stored vectors of {', '.join(broken[:20])} hold NaN or infinity; leave these images out")
    return vectors


if __name__ == "__main__":
    main()

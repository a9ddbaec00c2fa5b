"""A score head that was not trained here -> a registered version that the stage `score` can use: V7's own, once converted.

    python -m udfs.convert_weights score-head v2.ckpt head.safetensors
    python -m jobs.register_scorer head.safetensors --config my.yaml

The head reads the vectors of the build's `encoder`, which must be what it was trained on (V7's: OpenAI's CLIP ViT-L/14): its width is checked,
the rest is the caller's word. The first version is the champion, a later one a candidate, made champion by `jobs.promote_fitted`.
Nobody has measured it on held-out images of this lake, and the report says so; `jobs.score_bias` tells what it follows here.
"""

from __future__ import annotations

from pathlib import Path

from conf.section import Mistake
from conf.settings import Settings, command_line, digest, load_encoder, stop
from jobs import embedding, fitted
from udfs import score_head

NAME = "register-scorer"
FILE = "head.safetensors"
UNMEASURED = {"evaluation": "{}", "beats_baselines": "unknown", "export": "none", "manifest_sha256": "none", "made_from": "{}"}


def main() -> None:
    settings, arguments = command_line(__doc__ or "", {"head": "safetensors file under the names of udfs/score_head.py"})
    try:
        run(settings, Path(arguments.head), arguments.plan)
    except Mistake as mistake:
        stop(str(mistake))


def run(settings: Settings, head: Path, plan_only: bool = False) -> None:
    """Raises Mistake when the file is no head, or for vectors of another length."""
    if not head.is_file():
        raise Mistake(f"{NAME}: no file at {head}; python -m udfs.convert_weights makes one of V7's checkpoint")
    weights, encoder = head.read_bytes(), load_encoder(settings.encoder)
    width = _width(weights, head)
    if width != encoder.width:
        raise Mistake(
            f"{NAME}: {head} reads vectors of {width} numbers, encoder {encoder.name} gives {encoder.width}; set `encoder` to its own"
        )
    told = embedding.of_scorer(settings)
    identity = digest(NAME, fitted.hash_of({FILE: weights}), told)
    model = settings.score.model
    if (known := fitted.find(settings.mlflow, model, identity)) is not None:
        print(f"{NAME}: nothing to do, {known.name} is this head")
        return
    if plan_only:
        print(f"{NAME}: {head} is to be registered as a version of {model}")
        return
    tags = UNMEASURED | {"encoder": encoder.name, "encoder_fingerprint": told, "width": str(width)}
    made = fitted.register(settings.mlflow, model, {FILE: weights}, identity, {"file": head.name, "width": width}, {}, tags)
    print(f"{NAME}: {fitted.standing(settings.mlflow, made)}")


def _width(weights: bytes, head: Path) -> int:
    from safetensors import SafetensorError

    try:
        return int(score_head.load(weights).state_dict()["0.weight"].shape[1])
    except (SafetensorError, ValueError, RuntimeError) as error:  # RuntimeError: tensors of other shapes
        raise Mistake(f"{NAME}: {head} is no score head: {' '.join(str(error).split())[:300]}") from None


if __name__ == "__main__":
    main()

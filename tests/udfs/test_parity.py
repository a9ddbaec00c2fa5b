"""The released V7 pipeline, stated once more in numpy, against what this project computes.

What is restated, from the port of the team's notebook (github.com/fuhrriel/pony-captioner): L2-normalised CLIP vector -> Linear 768-1024,
ReLU, Linear 1024-512, ReLU, Linear 512-1; `int(max(0.0, min(0.99, raw)) * 10)`; CSD's backbone output before its projection, not
normalised, and its Euclidean distance to the centres that are not on the block list; the caption string.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from open_clip.transformer import VisionTransformer

from conf.enrichment import Encoder
from udfs import compose_prompt, score, score_bins, score_head, style_centres, tower_csd
from udfs.compose_prompt import Caption, Known
from udfs.convert_weights import convert
from udfs.reject import Reject
from udfs.score_bins import V7, bin_of

Floats = npt.NDArray[Any]


def v7_head(vectors: Floats, weights: dict[str, Floats]) -> Floats:
    x = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    x = np.maximum(x @ weights["0.weight"].T + weights["0.bias"], 0)
    x = np.maximum(x @ weights["3.weight"].T + weights["3.bias"], 0)
    return (x @ weights["6.weight"].T + weights["6.bias"])[:, 0]


def v7_bin(raw: float) -> int:
    return int(max(0.0, min(0.99, raw)) * 10)


def csd_backbone(image: Floats, w: dict[str, Floats], heads: int) -> Floats:
    """One image [3, side, side] -> what CSD hands to its projection: the class token after the last norm, as it is."""

    def norm(x: Floats, name: str) -> Floats:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    width, _, patch, _ = w["conv1.weight"].shape
    grid = image.shape[1] // patch
    patches = image.reshape(3, grid, patch, grid, patch).transpose(1, 3, 0, 2, 4).reshape(grid * grid, -1)
    x = np.concatenate([w["class_embedding"][None], patches @ w["conv1.weight"].reshape(width, -1).T]) + w["positional_embedding"]
    x = norm(x, "ln_pre")
    for layer in range(sum(name.endswith("ln_1.bias") for name in w)):
        at = f"transformer.resblocks.{layer}"
        qkv = norm(x, f"{at}.ln_1") @ w[f"{at}.attn.in_proj_weight"].T + w[f"{at}.attn.in_proj_bias"]
        q, k, v = qkv.reshape(len(x), 3, heads, width // heads).transpose(1, 2, 0, 3)
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(width // heads))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(x), width)
        x = x + mixed @ w[f"{at}.attn.out_proj.weight"].T + w[f"{at}.attn.out_proj.bias"]
        inner = norm(x, f"{at}.ln_2") @ w[f"{at}.mlp.c_fc.weight"].T + w[f"{at}.mlp.c_fc.bias"]
        inner = inner / (1 + np.exp(-1.702 * inner))  # quickgelu
        x = x + inner @ w[f"{at}.mlp.c_proj.weight"].T + w[f"{at}.mlp.c_proj.bias"]
    return norm(x[0], "ln_post")


def v7_cluster(feature: Floats, centres: Floats, block: set[int]) -> int:
    kept = [number for number in range(len(centres)) if number not in block]
    return kept[int(np.argmin(np.linalg.norm(centres[kept] - feature, axis=1)))]


def v7_caption(number: int, rating: str, cluster: int, content: str, style: str, tags: list[str]) -> str:
    return f"score_{number}, rating_{rating}, style_cluster_{cluster}, {content} {style}\n{', '.join(tags).lower()}"


def test_a_converted_v7_checkpoint_scores_as_the_maths_says(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = score_head.build(768)
    torch.save({"state_dict": {f"model.{name}": value for name, value in module.state_dict().items()}}, tmp_path / "v2.ckpt")
    told = convert("score-head", tmp_path / "v2.ckpt", tmp_path / "head.safetensors")
    assert told["unlike_the_released"] == {}
    weights = {name: value.numpy().astype(np.float64) for name, value in module.state_dict().items()}
    assert {name: value.shape for name, value in weights.items() if name.endswith("weight")} == {
        "0.weight": (1024, 768),
        "3.weight": (512, 1024),
        "6.weight": (1, 512),
    }
    vectors = np.random.default_rng(0).normal(size=(64, 768)).astype("<f2")  # as the table stores them
    expected = v7_head(vectors.astype(np.float64), weights)
    frame = pd.DataFrame({"image_id": [b"%032d" % n for n in range(64)], "vector": [v.tobytes() for v in vectors], "domain": None})
    found = pd.concat(score.score([frame], (tmp_path / "head.safetensors").read_bytes()))
    assert found.raw.to_numpy() == pytest.approx(expected, abs=1e-6)
    assert found.bin.tolist() == [v7_bin(raw) for raw in found.raw] and found.reject.isna().all()


@pytest.mark.parametrize(
    ("raw", "number"), [(0, 0), (0.0999, 0), (0.1, 1), (0.99, 9), (1, 9), (-0.5, 0), (0.3, 3), (0.7, 7), (5, 9), (-9, 0)]
)
def test_a_raw_score_falls_into_v7s_bin_at_every_edge(raw: float, number: int) -> None:
    assert bin_of(raw, "anything", V7) == score_head.score_bin(raw) == v7_bin(raw) == number


def test_ten_thousand_scores_fall_into_v7s_bins() -> None:
    for raw in np.random.default_rng(1).normal(0.5, 0.4, 10_000).astype(np.float32).tolist():
        assert bin_of(raw, None, V7) == v7_bin(raw)


def test_a_score_that_is_no_number_is_score_9_in_v7_and_a_reject_here() -> None:
    assert v7_bin(math.nan) == 9
    weights = safetensors.torch.save(score_head.build(4).state_dict())
    vectors = [np.array([1, 2, 3, 4], "<f2").tobytes(), np.array([np.nan, 0, 0, 0], "<f2").tobytes()]
    found = pd.concat(score.score([pd.DataFrame({"image_id": [b"a", b"b"], "vector": vectors, "domain": None})], weights))
    assert found.reject.iloc[1]["code"] == "not_finite" and np.isnan(found.bin.iloc[1]) and found.reject.iloc[0] is None
    for bins in (V7, score_bins.Bins("other:1", all=tuple(score_bins.STEPS))):
        with pytest.raises(Reject):
            bin_of(math.nan, None, bins)


def test_the_style_feature_of_a_converted_checkpoint_is_the_backbones_1024_numbers_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(4)
    vision = {"image_size": 28, "layers": 1, "width": 1024, "head_width": 64, "patch_size": 14}
    visual = VisionTransformer(28, 14, width=1024, layers=1, heads=16, mlp_ratio=4.0, output_dim=768)
    state = {
        f"module.backbone.{name}": value + torch.randn_like(value) * 0.02 for name, value in visual.state_dict().items() if name != "proj"
    }
    more = {f"module.last_layer_{name}": torch.randn(1024, 768) for name in ("style", "content")}
    torch.save({"model_state_dict": state | more, "args": argparse.Namespace(lr=1)}, tmp_path / "v3.pth")
    told = convert("csd", tmp_path / "v3.pth", tmp_path / "csd.safetensors")
    assert told["unlike_the_released"].keys() == {"layers", "image_size"}  # a small one of the true width
    asked = {"name": "csd", "kernel": "csd", "model": "tiny", "width": 1024, "image_size": 28, "sha256": told["output_sha256"]}
    asked |= {"weights": told["output"], "config": {"embed_dim": 768, "quick_gelu": True, "vision_cfg": vision}}
    images = np.random.default_rng(5).normal(size=(3, 3, 28, 28)).astype(np.float32)
    found = tower_csd.encode(tower_csd.load(Encoder.model_validate(asked).model_dump(), "cpu", "fp32"), images)
    weights = {name.removeprefix("module.backbone."): value.numpy().astype(np.float64) for name, value in state.items()}
    assert found.shape == (3, 1024)
    assert np.allclose(found, [csd_backbone(image.astype(np.float64), weights, 16) for image in images], atol=1e-4)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).min() > 10, "not normalised"


def test_the_block_list_leaves_1869_of_2048_centres_and_the_nearest_of_them_is_v7s() -> None:
    random = np.random.default_rng(2)
    centres = random.normal(size=(2048, 16)).astype(np.float32) * 10
    block = set(random.choice(2048, 179, replace=False).tolist())
    made = style_centres.Centres(
        centres, np.arange(2048), none_above=1.0, encoder="e", digest="d", next_id=2048, block=tuple(sorted(block))
    )
    assert made.allowed.sum() == len(made.without_blocked().ids) == 1869
    near_blocked = centres[sorted(block)[:40]] + random.normal(size=(40, 16)).astype(np.float32) * 0.01
    features = np.concatenate([near_blocked, random.normal(size=(60, 16)) * 10]).astype("<f2")
    batch = pa.RecordBatch.from_pydict({"image_id": [b"%d" % n for n in range(100)], "vector": [one.tobytes() for one in features]})
    files = style_centres.pack(made)
    rows = pa.Table.from_batches(style_centres.assign([batch], files, "v7")).to_pylist()
    expected = [v7_cluster(one.astype(np.float32), centres, block) for one in features]
    assert [row["cluster"] for row in rows] == expected
    euclid = [np.linalg.norm(centres[row["cluster"]] - one.astype(np.float64)) for row, one in zip(rows, features, strict=True)]
    assert [row["distance"] for row in rows] == pytest.approx(euclid, rel=1e-5)
    # ours says what V7 hid: these forty lie nearest to a centre that must not be used
    states = pa.Table.from_batches(style_centres.assign([batch], files, "states")).to_pylist()
    assert {row["state"] for row in states[:40]} == {"blocked"} and all(row["cluster"] is None for row in states[:40])


def test_the_mix_v7_composes_the_string_of_v7() -> None:
    known: tuple[Any, ...] = (7, "explicit", 1234, "A fox in snow.", "Digital painting, soft light.", ["Fox", "red fur", "character:Tod"])
    score_, rating, cluster, content, style, tags = known
    captions = [Caption(kind, kind, text) for kind, text in (("long", content), ("style", style), ("tags", ", ".join(tags)))]
    made = compose_prompt.compose(Known(b"f" * 32, score_, rating, cluster, captions), compose_prompt.V7, 7, 0, len, 768)
    assert made.text == v7_caption(*known)

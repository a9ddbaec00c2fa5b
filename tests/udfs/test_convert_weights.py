"""Checkpoints of torch become safetensors, exactly."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors import safe_open
from safetensors.torch import load_file

from tests.udfs.checkpoints import lightning, make_head, saved
from udfs import score_head
from udfs.convert_weights import convert, main

CSD_WIDTH, CSD_OUT = 64, 12


@pytest.fixture
def head() -> torch.nn.Module:
    return make_head()


@pytest.fixture(scope="module")
def tower() -> VisionTransformer:
    torch.manual_seed(1)
    return VisionTransformer(image_size=28, patch_size=14, width=CSD_WIDTH, layers=2, heads=1, mlp_ratio=4.0, output_dim=CSD_OUT)


def style_state(tower: VisionTransformer, prefix: str = "module.") -> dict[str, torch.Tensor]:
    """As CSD saves itself: the projection taken out of the tower, twice, and fitted."""
    state = {f"{prefix}backbone.{name}": value for name, value in tower.state_dict().items() if name != "proj"}
    assert tower.proj is not None
    return state | {f"{prefix}last_layer_style": tower.proj.detach() * 2, f"{prefix}last_layer_content": tower.proj.detach() * 3}


def test_v7s_head_in_lightnings_checkpoint_comes_out_to_the_bit(head: torch.nn.Module, tmp_path: Path) -> None:
    before = copy.deepcopy(head.state_dict())
    source = saved(tmp_path / "v2.ckpt", lightning(head) | {"state_dict": {f"model.{name}": value for name, value in before.items()}})
    told = convert("score-head", source, tmp_path / "head.safetensors")
    found = load_file(tmp_path / "head.safetensors")
    assert list(found) and {name: value.dtype for name, value in found.items()} == dict.fromkeys(score_head.NAMES, torch.float32)
    assert all(torch.equal(found[name], value) for name, value in before.items())
    assert score_head.load((tmp_path / "head.safetensors").read_bytes())[0].in_features == 48
    assert (told["sizes"], told["unlike_the_released"], told["tensors"]) == ({"width": 48}, {"width": 48}, 6)
    assert "argparse.Namespace" in told["foreign"] and "torch.device" in told["foreign"]


def test_both_hashes_are_told_and_the_same_input_gives_the_same_bytes(
    head: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = saved(tmp_path / "v2.ckpt", lightning(head)), tmp_path / "new/head.safetensors"
    digests = set()
    for _ in range(3):
        assert main(["score-head", str(source), str(target)]) == 0
        told = json.loads(capsys.readouterr().out)
        digests.add(told["output_sha256"])
    assert digests == {hashlib.sha256(target.read_bytes()).hexdigest()}
    assert told["input_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    with safe_open(target, "pt") as file:
        assert json.loads(file.metadata()["converted_from"]) == {"kind": "score-head", "sha256": told["input_sha256"], "converter": 1}
    assert [path.name for path in target.parent.iterdir()] == ["head.safetensors"]


def test_a_head_of_half_precision_is_widened_and_a_bare_state_dict_will_do(head: torch.nn.Module, tmp_path: Path) -> None:
    half = {name: value.to(torch.bfloat16) for name, value in head.state_dict().items()}
    convert("score-head", saved(tmp_path / "half.pt", half), tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], value.float()) for name, value in half.items())


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict"])
def test_the_style_model_becomes_open_clips_tower_and_a_projection(key: str, tower: VisionTransformer, tmp_path: Path) -> None:
    state = style_state(tower)
    source = saved(tmp_path / "style.pth", {key: state, "epoch": 1, "args": argparse.Namespace(lr=1)})
    told = convert("csd", source, tmp_path / "style.safetensors")
    found = load_file(tmp_path / "style.safetensors")
    assert torch.equal(found.pop("style_projection"), state["module.last_layer_style"])
    assert set(found) == set(tower.state_dict()) - {"proj"}
    assert all(torch.equal(value, tower.state_dict()[name]) for name, value in found.items())
    assert told["left_out"] == ["last_layer_content"]
    assert told["sizes"] == {"width": CSD_WIDTH, "layers": 2, "patch": 14, "image_size": 28, "projection": CSD_OUT}
    assert told["unlike_the_released"].keys() == {"width", "layers", "image_size", "projection"}


def test_views_into_one_storage_come_out_as_they_look(head: torch.nn.Module, tmp_path: Path) -> None:
    state = head.state_dict()
    state["3.weight"] = torch.randn(1024, 512).T  # not contiguous
    state["6.weight"] = torch.randn(4, 512)[2:3]  # from the middle
    convert("score-head", saved(tmp_path / "in.pt", {"state_dict": state}), tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_another_architecture_is_refused_by_its_names_and_shapes(head: torch.nn.Module, tower: VisionTransformer, tmp_path: Path) -> None:
    state = head.state_dict()
    fewer = {name: value for name, value in state.items() if name != "6.bias"} | {"9.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"lacks \['6\.bias'\], unknown are \['9\.weight'\]"):
        convert("score-head", saved(tmp_path / "a", fewer), tmp_path / "out")
    with pytest.raises(ValueError, match=r"3\.weight: given \[2, 2\] of float32, expected \[512, 1024\]"):
        convert("score-head", saved(tmp_path / "b", state | {"3.weight": torch.zeros(2, 2)}), tmp_path / "out")
    with pytest.raises(ValueError, match=r"0\.bias: given \[1024\] of int64"):
        convert("score-head", saved(tmp_path / "c", state | {"0.bias": torch.zeros(1024, dtype=torch.int64)}), tmp_path / "out")
    with pytest.raises(ValueError, match=r"not finite: \['6\.bias'\]"):
        convert("score-head", saved(tmp_path / "d", state | {"6.bias": torch.full((1,), torch.nan)}), tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected backbone\.\* of CLIP's visual tower and last_layer_style"):
        convert("csd", saved(tmp_path / "e", state), tmp_path / "out")
    wrong = {**style_state(tower), "module.last_layer_style": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"style_projection: given \[3, 3\] of float32, expected \[64, 3\]"):
        convert("csd", saved(tmp_path / "f", {"state_dict": wrong}), tmp_path / "out")


def test_the_command_says_what_it_wants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score-head"]) == 2
    assert "expected KIND IN OUT" in capsys.readouterr().err
    assert main(["csd", str(tmp_path / "no"), "out"]) == 2
    assert "no file at" in capsys.readouterr().err
    assert main(["vae", "a", "b"]) == 2
    assert "KIND: given 'vae', allowed ['csd', 'score-head']" in capsys.readouterr().err

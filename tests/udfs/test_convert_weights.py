"""Checkpoints of torch become safetensors, exactly; whatever else a checkpoint holds, nothing of it runs."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from udfs import score_head
from udfs.convert_weights import convert, main
from udfs.torch_checkpoint import Checkpoint

CSD_WIDTH, CSD_OUT = 64, 12


class ArgsLikeLightnings(dict[str, Any]):
    """A class that the unpickler must not look up."""


class Touch:
    """Makes the canary's file when it is unpickled by a real unpickler."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


class Evaluate(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.canary)!r}, 'w').close()",)


class SetState(Touch):
    """By a state that an object of this class would take."""

    def __reduce__(self) -> tuple[Any, ...]:
        return argparse.Namespace, (), {"canary": self.canary, "run": Touch(self.canary)}


@pytest.fixture
def head() -> torch.nn.Module:
    torch.manual_seed(0)
    return score_head.build(48)


@pytest.fixture(scope="module")
def tower() -> VisionTransformer:
    torch.manual_seed(1)
    return VisionTransformer(image_size=28, patch_size=14, width=CSD_WIDTH, layers=2, heads=1, mlp_ratio=4.0, output_dim=CSD_OUT)


def lightning(head: torch.nn.Module, **more: Any) -> dict[str, Any]:
    """What Lightning saves beside the weights."""
    state = OrderedDict((f"model.{name}", value) for name, value in head.state_dict().items())
    optimizer = torch.optim.AdamW(head.parameters())
    head(torch.randn(2, 48)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": state,
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": ArgsLikeLightnings(lr=1e-3, args=argparse.Namespace(path=Path("x"), device=torch.device("cpu"), sizes={1, 2})),
    } | more


def style_state(tower: VisionTransformer, prefix: str = "module.") -> dict[str, torch.Tensor]:
    """As CSD saves itself: the projection taken out of the tower, twice, and fitted."""
    state = {f"{prefix}backbone.{name}": value for name, value in tower.state_dict().items() if name != "proj"}
    assert tower.proj is not None
    return state | {f"{prefix}last_layer_style": tower.proj.detach() * 2, f"{prefix}last_layer_content": tower.proj.detach() * 3}


def saved(path: Path, thing: Any) -> Path:
    torch.save(thing, path)
    return path


def archive(path: Path, pickled: bytes, members: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A checkpoint made by hand."""
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in {"a/data.pkl": pickled, "a/version": b"3\n", **(members or {})}.items():
            file.writestr(name, data)
    return path


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


@pytest.mark.parametrize("hostile", [Touch, Evaluate])
@pytest.mark.parametrize("where", ["state_dict", "hyper_parameters"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_checkpoint_that_calls_something_is_refused_and_calls_nothing(
    hostile: type[Touch], where: str, protocol: int, head: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    thing = lightning(head)
    thing[where] = {**thing[where], "evil": hostile(canary)}
    torch.save(thing, tmp_path / "evil.ckpt", pickle_protocol=protocol)
    assert main(["score-head", str(tmp_path / "evil.ckpt"), str(tmp_path / "out")]) == 2
    assert "the file means to run code" in capsys.readouterr().err
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_the_canary_would_sing(tmp_path: Path) -> None:
    """The hostile pickles of these tests do run where a real unpickler reads them."""
    for hostile in (Touch, Evaluate):
        pickle.loads(pickle.dumps(hostile(tmp_path / hostile.__name__)))
        assert (tmp_path / hostile.__name__).exists()


def test_a_state_that_hides_a_call_calls_nothing(head: torch.nn.Module, tmp_path: Path) -> None:
    source = saved(tmp_path / "evil.ckpt", lightning(head, callbacks=SetState(tmp_path / "canary")))
    with pytest.raises(ValueError, match=r"asks for posix\.system"):
        convert("score-head", source, tmp_path / "out")
    assert not (tmp_path / "canary").exists()


def test_a_class_in_the_state_dict_is_refused_by_its_name_and_never_imported(
    head: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "canarymodule.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\nclass Thing: pass\n")
    module = ModuleType("canarymodule")
    module.Thing = type("Thing", (), {"__module__": "canarymodule"})  # type: ignore[attr-defined]
    with monkeypatch.context() as known:
        known.setitem(sys.modules, "canarymodule", module)
        inside = saved(tmp_path / "inside.ckpt", {"state_dict": {**head.state_dict(), "0.bias": module.Thing()}})
        beside = saved(tmp_path / "beside.ckpt", {"state_dict": head.state_dict(), "callbacks": [module.Thing(), module.Thing]})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"'0\.bias' holds an object of canarymodule\.Thing, expected a tensor"):
        convert("score-head", inside, tmp_path / "out")
    assert convert("score-head", beside, tmp_path / "out")["foreign"] == ["canarymodule.Thing"]
    assert not (tmp_path / "canary").exists() and "canarymodule" not in sys.modules


def hand(name: bytes, arguments: bytes = b"(tR") -> bytes:
    """A pickle that calls a name, in a dict with a key."""
    return b"\x80\x02}X\x01\x00\x00\x00kc" + name + b"\n" + arguments + b"s."


PICKLES = {
    "a call of what a call gave": (
        b"\x80\x02cmodule\nfunction\n(tR(tR.",
        "expected a dict of torch.save, given an object of module.function",
    ),
    "a call of a number": (b"\x80\x02K\x01)R.", "it calls a int"),
    "a state set on a known name": (b"\x80\x02cbuiltins\nset\n}X\x01\x00\x00\x00xK\x01sb.", "given builtins.set"),
    "an extension code": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "a memo of four billion": (b"\x80\x02]r\xff\xff\xff\xff.", "given a list"),
    "a reference to nowhere": (b"\x80\x02X\x01\x00\x00\x00xQ.", "refers to something outside that is no storage"),
    "a bare persistent id": (b"Px\n.", "instruction PERSID"),
    "keys of one hash": (
        b"\x80\x02}(" + b"".join(b"\x8a\x09" + (k * (2**61 - 1)).to_bytes(9, "little") + b"N" for k in range(1, 64)) + b"u.",
        r"a key of 6\d bits",
    ),
    "a million sets": (b"\x80\x04(" + b"\x8f" * 1_000_001 + b"t.", "more than 1000000 instructions"),
    "tuples without end as a key": (b"\x80\x02}" + b")" + b"\x85" * 150_000 + b"K\x01s.", "a key of type tuple"),
    "a tuple of itself twice, forty times": (b"\x80\x02})" + b"2\x86" * 40 + b"K\x01s.", "a key of type tuple"),
    "a text of an exabyte": (b"\x80\x04\x8d" + b"\xff" * 6 + b"\x00\x00abc.", "no whole pickle"),
    "bytes that claim to be many": (b"\x80\x05\x96" + b"\xff" * 5 + b"\x00\x00\x00abc.", "no whole pickle"),
    "one list copied again and again": (
        b"\x80\x02](" + b"K\x01" * 2_000 + b"eq\x00" + b"cbuiltins\nlist\nh\x00\x85R0" * 600 + b"h\x00.",
        "containers from more than 1000000 items",
    ),
    "no end": (b"\x80\x02}", "no whole pickle"),
    "nothing": (b"", "no whole pickle"),
    "a pop below the floor": (b"\x80\x02000.", "no whole pickle"),
    "exec from Python 2": (hand(b"__builtin__\nexecfile"), "asks for __builtin__.execfile"),
    "a name with a path": (hand(b"os.path\njoin"), "asks for os.path.join"),
    "importlib": (hand(b"importlib\nimport_module"), "asks for importlib.import_module"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_made_by_hand_is_refused_in_a_moment(what: str, tmp_path: Path) -> None:
    pickled, message = PICKLES[what]
    with pytest.raises(ValueError, match=message):
        convert("score-head", archive(tmp_path / "x.ckpt", pickled), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_cut_and_every_changed_byte_of_a_pickle_is_taken_or_refused_but_nothing_else(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pt", {"state_dict": {"x": torch.zeros(2), "y": torch.ones(3, dtype=torch.float16)}, "more": {1, 2}})
    with zipfile.ZipFile(source) as file:
        pickled = file.read("a/data.pkl")
        members = {name: file.read(name) for name in file.namelist() if not name.endswith(("data.pkl", "version"))}
    changed = [pickled[:place] for place in range(0, len(pickled), 3)]
    for place in range(len(pickled)):
        changed += [pickled[:place] + bytes([pickled[place] ^ 0x11]) + pickled[place + 1 :]]
    refused = 0
    for one in changed:
        try:
            Checkpoint(archive(tmp_path / "b.pt", one, members)).close()
        except ValueError:
            refused += 1
    assert len(changed) / 2 < refused < len(changed)


def test_a_storage_whose_size_lies_and_a_tensor_beyond_its_storage_are_refused(head: torch.nn.Module, tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pt", {"state_dict": head.state_dict()})
    with zipfile.ZipFile(source) as file:
        whole = {name: file.read(name) for name in file.namelist()}
    pickled = whole.pop("a/data.pkl")
    whole.pop("a/version")
    cut = {name: data[:-4] if name.endswith("/data/0") else data for name, data in whole.items()}
    with pytest.raises(ValueError, match=r"said to hold 49152 x float32, its member data/0 has 196604 bytes"):
        convert("score-head", archive(tmp_path / "cut.pt", pickled, cut), tmp_path / "out")
    gone = {name: data for name, data in whole.items() if not name.endswith("/data/1")}
    with pytest.raises(ValueError, match="its member data/1 has None bytes"):
        convert("score-head", archive(tmp_path / "gone.pt", pickled, gone), tmp_path / "out")
    # 0.bias: 1024 of 1024 elements, from element 1 on
    beyond = re.sub(rb"(M\x00\x04tq.QK)\x00(M\x00\x04\x85)", b"\\1\x01\\2", pickled, count=1, flags=re.DOTALL)
    assert beyond != pickled
    with pytest.raises(ValueError, match=r"a tensor of shape \[1024\] in a storage of 1024 elements"):
        convert("score-head", archive(tmp_path / "beyond.pt", beyond, whole), tmp_path / "out")
    expanded = {**head.state_dict(), "6.bias": torch.zeros(1), "0.bias": torch.zeros(1).expand(1024)}
    with pytest.raises(ValueError, match="in a storage of 1 elements"):
        convert("score-head", saved(tmp_path / "expanded.pt", expanded), tmp_path / "out")


def test_a_storage_whose_bytes_are_damaged_is_refused(head: torch.nn.Module, tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pt", head.state_dict())
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    source.write_bytes(data)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        convert("score-head", source, tmp_path / "out")


def test_a_zip_bomb_and_names_that_leave_the_archive_are_refused(tmp_path: Path) -> None:
    pickled = pickle.dumps({}, protocol=2)
    bomb = archive(tmp_path / "bomb", pickled, {"a/data/0": bytes(2**24)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"'a/data\.pkl' is compressed"):
        Checkpoint(bomb)
    for name in ("../evil", "/etc/evil", "a/../../evil", "a//evil", "b/data/0", "a\\..\\evil", "a/data/../data.pkl"):
        with pytest.raises(ValueError, match="expected distinct names below one folder"):
            Checkpoint(archive(tmp_path / "names", pickled, {name: b"x"}))
    with pytest.warns(UserWarning), zipfile.ZipFile(archive(tmp_path / "twice", pickled), "a") as file:
        file.writestr("a/data.pkl", b"other")
    with pytest.raises(ValueError, match="expected distinct names"):
        Checkpoint(tmp_path / "twice")


def test_other_formats_are_named_and_the_way_out_is_said(head: torch.nn.Module, tmp_path: Path) -> None:
    state = head.state_dict()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before version 1\.6, expected the zip format; save it anew: .*weights_only=True"):
        convert("score-head", tmp_path / "old.pt", tmp_path / "out")
    save_file(state, tmp_path / "done.safetensors")
    with pytest.raises(ValueError, match="a safetensors file already"):
        convert("score-head", tmp_path / "done.safetensors", tmp_path / "out")
    (tmp_path / "bare").write_bytes(pickle.dumps(Touch(tmp_path / "canary"), protocol=4))
    with pytest.raises(ValueError, match="a bare pickle"):
        convert("score-head", tmp_path / "bare", tmp_path / "out")
    (tmp_path / "text").write_text("hello world")
    with pytest.raises(ValueError, match="no checkpoint of torch"):
        convert("score-head", tmp_path / "text", tmp_path / "out")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"TorchScript|is compressed"):
        convert("score-head", tmp_path / "program.pt", tmp_path / "out")
    assert not (tmp_path / "canary").exists()


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

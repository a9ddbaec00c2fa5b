"""The file around the pickle: storages that lie, damage, bombs, and other formats are refused by name."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.udfs.checkpoints import Touch, archive, make_head, saved
from udfs.convert_weights import convert
from udfs.torch_checkpoint import Checkpoint


@pytest.fixture
def head() -> torch.nn.Module:
    return make_head()


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
    # no linear layer: a ZeRO 3 training earlier in this process leaves its own function in the place of torch's
    program = torch.jit.trace(torch.nn.BatchNorm1d(2).eval(), torch.zeros(1, 2))
    torch.jit.save(program, tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"TorchScript|is compressed"):
        convert("score-head", tmp_path / "program.pt", tmp_path / "out")
    assert not (tmp_path / "canary").exists()

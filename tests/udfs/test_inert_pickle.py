"""Pickles in checkpoints are read as data: nothing of a hostile one runs, and none costs memory or time without end."""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.udfs.checkpoints import Evaluate, SetState, Touch, archive, lightning, make_head, saved
from udfs.convert_weights import convert, main
from udfs.torch_checkpoint import Checkpoint


@pytest.fixture
def head() -> torch.nn.Module:
    return make_head()


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

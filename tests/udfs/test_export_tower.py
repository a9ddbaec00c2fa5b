"""A tower exported once for all workers gives its own numbers; the real CLIP's do not depend on batch or order."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conf.settings import load_encoder
from udfs import engine, export_tower, tower_clip
from udfs.engine import How

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests/data/sample/images"
REAL = load_encoder("clip-vit-b-16-demo").model_dump()
TINY = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}}


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """An encoder of the true class with random weights, as a file of its visual tower."""
    torch.manual_seed(7)
    tower = tower_clip.skeleton(TINY, "fp32").to_empty(device="cpu")
    for weight in tower.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    save_file(tower.state_dict(), tmp_path / "tiny.safetensors")
    pinned = {
        "weights": str(tmp_path / "tiny.safetensors"),
        "sha256": hashlib.sha256((tmp_path / "tiny.safetensors").read_bytes()).hexdigest(),
    }
    return REAL | {"name": "tiny", "model": "tiny", "config": TINY, "width": 16, "image_size": 32} | pinned


def noise(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, 3, side, side)).astype(np.float32)


def test_two_workers_at_once_export_one_graph_that_gives_the_towers_vectors(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, cache = How("cpu", engine="onnxruntime", cache=str(tmp_path / "cache"), threads=1), tmp_path / "cache"
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(lambda _: engine.load(tower_clip, tiny, how), range(2)))
    assert len(list(cache.glob("*.onnx"))) == len(list(cache.glob("*.sha256"))) == 1
    batch = noise(5, 32)
    expected = tower_clip.encode(engine.load(tower_clip, tiny, How("cpu")), batch)
    for model in models:
        assert isinstance(model, engine.Graph)
        assert np.abs(tower_clip.encode(model, batch) - expected).max() < 1e-5
    # without a number of threads those of the task, which Spark tells in this variable; torch reads it by itself
    for given, found in (("1", 1), ("", 0)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        model = engine.load(tower_clip, tiny, how._replace(threads=None))
        assert model.session.get_session_options().intra_op_num_threads == found
    # a worker that finds the file needs neither torch nor the weights
    Path(tiny["weights"]).unlink()
    told = json.dumps([tiny, list(how)])
    child = (
        "import json, sys; from udfs import engine, tower_clip; encoder, how = json.loads(sys.argv[1]);"
        "engine.load(tower_clip, encoder, engine.How(*how)); print({'torch', 'open_clip', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", child, told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    # and one that finds another file says so
    (graph,) = cache.glob("*.onnx")
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(ValueError, match="delete both files"):
        engine.load(tower_clip, tiny, how)


def test_what_the_tower_refuses_the_export_refuses_in_the_same_words(tmp_path: Path) -> None:
    absent = REAL | {"name": "absent", "weights": str(tmp_path / "nowhere.safetensors")}
    with pytest.raises(ValueError, match=r"encoder 'absent': weights: no file at .*nowhere"):
        export_tower.exported(absent, str(tmp_path))
    assert not list(tmp_path.glob("*.onnx*.sha256"))


def test_another_version_of_a_library_or_kernel_is_another_graph(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    names = {export_tower._digest(tiny), export_tower._digest(tiny | {"sha256": "0" * 64})}
    monkeypatch.setattr(tower_clip, "KERNEL_VERSION", 99)
    names.add(export_tower._digest(tiny))
    monkeypatch.setattr(export_tower, "version", lambda name: "9.9")
    names.add(export_tower._digest(tiny))
    assert len(names) == 4


def test_a_cache_that_others_may_write_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export_tower.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = export_tower._folder(None)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="not a folder of this user alone"):
        export_tower._folder(None)


def test_a_graph_that_differs_from_its_tower_is_not_kept(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_tower, "CLOSE", 0.0)
    with pytest.raises(ValueError, match="differs from the tower by"):
        export_tower.export(tiny, tmp_path / "bad.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]


@pytest.fixture(scope="module")
def real() -> Any:
    return engine.load(tower_clip, REAL, How("cpu", engine="onnxruntime", threads=1))


@pytest.fixture(scope="module")
def prepared() -> np.ndarray:
    files = sorted(SAMPLE.iterdir())[::35][:7]
    return np.stack([tower_clip.prepare(Image.open(file).convert("RGB"), REAL) for file in files])


def test_the_real_graph_gives_the_vectors_of_eager_torch(real: Any, prepared: np.ndarray) -> None:
    eager = tower_clip.encode(tower_clip.load(REAL, "cpu", "fp32"), prepared[:3])
    assert np.abs(tower_clip.encode(real, prepared[:3]) - eager).max() < 1e-5  # the goal: 1e-4


def test_batch_and_order_move_no_number_by_more_than_1e_5_and_no_stored_one_by_more_than_a_unit(real: Any, prepared: np.ndarray) -> None:
    whole = tower_clip.encode(real, prepared)
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = np.concatenate([tower_clip.encode(real, prepared[order[:3]]), tower_clip.encode(real, prepared[order[3:]])])
    alone = np.concatenate([tower_clip.encode(real, prepared[at : at + 1]) for at in order[:2]])
    for found, at in ((shuffled, order), (alone, order[:2])):
        assert np.abs(found - whole[at]).max() < 1e-5
        first, second = (vectors.astype("<f2").view(np.int16).astype(int) for vectors in (found, whole[at]))
        assert np.abs(first - second).max() <= 1


@pytest.mark.proof  # the compiler takes a minute of CPU
def test_a_compiled_tower_gives_the_same_vectors_for_every_batch(tiny: dict[str, Any]) -> None:
    compiled = engine.load(tower_clip, tiny, How("cpu", compile=True, threads=1))
    eager = engine.load(tower_clip, tiny, How("cpu", threads=1))
    for count in (5, 3, 1, 4):
        batch = noise(count, 32)
        assert np.abs(tower_clip.encode(compiled, batch) - tower_clip.encode(eager, batch)).max() < 1e-5

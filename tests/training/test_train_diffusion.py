"""The image model's task and command: real images through petastorm, the kernel's decode, tiny parts of the true classes and DeepSpeed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conf.section import Mistake
from conf.settings import Settings, load
from training import engine, feed, image_model, loop, process_group, tracker, train_diffusion, trainer
from training.fit_image_model import FitImageModel
from training.result_files import hash_files
from udfs import image_files
from udfs.snapshot import id_sum

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests/data/sample"
TRAIN, HELD_OUT = 20, 6
SMALL = ("image_size=64", "text_length=24", "rows_per_step=8", "micro_batch=4", "learning_rate=0.002", "ema_decay=null", "epochs=4")


def read_sample(count: int) -> list[tuple[bytes, bytes]]:
    """-> (file's bytes, captions JSON) of the sample's first images; every third has no text but its tags, one none at all."""
    rows = []
    for number, line in enumerate((SAMPLE / "metadata.jsonl").read_text().splitlines()[:count]):
        told = json.loads(line)
        texts = [{"id": "a", "kind": "tags", "text": ", ".join(told["tags"]) or "untagged"}]
        texts += [] if number % 3 == 0 else [{"id": "b", "kind": "alt_text", "text": told["caption"] or told["title"] or told["style"]}]
        rows.append(((SAMPLE / told["file"]).read_bytes(), json.dumps([] if number == 3 else texts).encode()))
    return rows


def write_images(folder: Path, spoil: Callable[[dict[str, list[Any]]], object] | None = None) -> Path:
    """An export of sample images as jobs/export_images.py writes it; `spoil` may change the training rows first."""
    folder.mkdir(parents=True)
    sample, files = read_sample(TRAIN + HELD_OUT), []
    for bucket, part in (("train", sample[:TRAIN]), ("held_out", sample[TRAIN:])):
        columns: dict[str, list[Any]] = {
            "image_id": [hashlib.sha256(data).digest() for data, _ in part],
            "bytes": [data for data, _ in part],
            "captions": [captions for _, captions in part],
            **{name: [5] * len(part) for name in ("score", "style_cluster", "width", "height")},
            "rating": ["safe"] * len(part),
        }
        if spoil and bucket == "train":
            spoil(columns)
        table = pa.table(columns, schema=image_files.COLUMNS)
        for number, start in enumerate(range(0, table.num_rows, 8)):
            rows, path = table.slice(start, 8), folder / f"{bucket}-{number:05d}.parquet"
            pq.write_table(rows, path)
            about = {"rows": rows.num_rows, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            ids = f"{id_sum(rows.column('image_id').to_pylist()):016x}"
            files.append({"file": path.name, "bucket": bucket, "ids": ids, **about})
    manifest = {"export": "0123456789ab", "kind": "images", "rows": TRAIN + HELD_OUT, "made_from": {"images": 3}, "lake": "demo/lake"}
    manifest |= {"columns": {field.name: str(field.type) for field in image_files.COLUMNS}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def settings_of(*more: str) -> Settings:
    return load(ROOT / "conf/demo.yaml", [f"train_diffusion.{one}" for one in (*SMALL, *more)])


def make_task(settings: Settings, place: Path, ranks: process_group.Ranks | None = None) -> FitImageModel:
    export = train_diffusion.open_rows(settings, str(place))
    task = FitImageModel(settings.train_diffusion, export, settings.limits, ranks or engine.start("cpu"))
    task.start("cpu")
    return task


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "export")


@pytest.fixture(scope="module")
def task(place: Path) -> FitImageModel:
    return make_task(settings_of("no_text=0.3"), place)


def test_what_a_row_becomes_does_not_depend_on_the_rows_beside_it(task: FitImageModel) -> None:
    rows = feed.read_bucket(task.export, "train")
    whole = task.prepare(rows, 1)
    assert {name: (array.shape[1:], array.dtype.name) for name, array in whole.items()} == {
        "pixels": ((3, 64, 64), "uint8"),
        "tokens": ((24,), "int64"),
        "mask": ((24,), "int64"),
        "without_text": ((), "float32"),
        "text_cut": ((), "float32"),
    }
    order = np.random.default_rng(0).permutation(TRAIN)[:7]
    part = task.prepare({name: column[order] for name, column in rows.items()}, 1)
    assert all(np.array_equal(part[name], whole[name][order]) for name in whole)
    other = task.prepare(rows, 2)
    assert np.array_equal(other["pixels"], whole["pixels"]) and not np.array_equal(other["tokens"], whole["tokens"])


def test_rows_without_text_and_cut_texts_are_told(task: FitImageModel) -> None:
    rows = feed.read_bucket(task.export, "train")
    arrays = task.prepare(rows, 0)
    texts = task.frozen.tokenizer.batch_decode(arrays["tokens"], skip_special_tokens=True)
    assert [text == "" for text in texts] == arrays["without_text"].astype(bool).tolist()
    assert arrays["without_text"][list(rows["captions"]).index(b"[]")] == 1
    assert 2 <= arrays["without_text"].sum() <= 14 and 0 < arrays["text_cut"].sum() < TRAIN
    for text, cut, raw in zip(texts, arrays["text_cut"], rows["captions"], strict=True):
        found = [one["text"] for one in json.loads(raw) if one["text"].startswith(text)]
        assert text == "" or (found and cut == float(len(found[0].encode()) > 23))


def test_a_mix_composes_another_prompt_in_each_epoch_that_is_never_cut(place: Path) -> None:
    task = make_task(settings_of("mix=varied", "no_text=0.0"), place)
    rows = feed.read_bucket(task.export, "train")
    arrays = [task.prepare(rows, epoch) for epoch in (0, 1)]
    texts = [task.frozen.tokenizer.batch_decode(one["tokens"], skip_special_tokens=True) for one in arrays]
    assert sum(one != other for one, other in zip(*texts, strict=True)) > TRAIN // 2
    assert all(one["text_cut"].sum() == 0 for one in arrays) and any("score_5" in text for text in texts[0])
    order = np.random.default_rng(0).permutation(TRAIN)[:7]
    part = task.prepare({name: column[order] for name, column in rows.items()}, 1)
    assert np.array_equal(part["tokens"], arrays[1]["tokens"][order])


def test_a_rows_loss_is_reproducible_and_reaches_only_what_is_trained(place: Path) -> None:
    task = make_task(settings_of("lora={rank: 2}", "checkpointing=true"), place)
    model = task.build()
    rows = {name: column[:4] for name, column in feed.read_bucket(task.export, "train").items()}
    inputs = {name: torch.from_numpy(array) for name, array in task.prepare(rows, 0).items()}
    torch.manual_seed(1)
    first = task.losses(model, inputs)
    torch.manual_seed(1)
    assert torch.equal(first["loss"], task.losses(model, inputs)["loss"])
    assert first["loss"].shape == (4,) and first["loss"].dtype == torch.float32 and set(first) == {"loss", "without_text", "text_cut"}
    first["loss"].sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {name for name, p in model.named_parameters() if p.requires_grad} and all("lora" in name for name in touched)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_held_out_losses_are_the_same_at_any_number_of_ranks(task: FitImageModel, place: Path, world: int) -> None:
    """With 6 rows in batches of 4 a rank of 3 or more has only rows that do not count, and as many forward passes."""
    model = task.build()
    passes: list[int] = []
    shares = []
    for rank in range(world):
        one = make_task(settings_of(f"rows_per_step={4 * world}"), place, process_group.Ranks(rank, world))
        calls: list[int] = []
        with model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1)):
            shares.append(one.held_out_share(model))
        passes.append(len(calls))
    assert len(set(passes)) == 1
    assert np.array_equal(sum(shares), task.held_out_share(model))


def test_the_command_trains_in_full_and_registers_what_diffusers_loads(
    task: FitImageModel, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import AuraFlowTransformer2DModel

    store = (
        f"mlflow.tracking_uri=sqlite:///{tmp_path}/mlflow.db",
        f"mlflow.artifacts={tmp_path}/artifacts",
        f"training.root={tmp_path}/trainings",
    )
    section = [f"train_diffusion.{one}" for one in (*SMALL, "epochs=8", "times=uniform")]
    sets = [part for one in (*store, *section) for part in ("--set", one)]
    monkeypatch.setattr("sys.argv", ["train_diffusion", str(place), "--config", str(ROOT / "conf/demo.yaml"), *sets])
    trainer.main(train_diffusion, None)
    client = tracker.connect(load(ROOT / "conf/demo.yaml", store).mlflow)
    version = client.get_model_version_by_alias("image-model", "champion")
    files = Path(client.download_artifacts(version.run_id, "", str(tmp_path)))
    assert {path.name for path in files.iterdir()} >= {
        "image_model",
        "manifest.json",
        "config.yaml",
        "held_out_losses.parquet",
        "evaluation.json",
    }
    about = json.loads((files / "image_model/image_model.json").read_text())
    assert (about["what"], about["base"], about["base_sha256"]) == ("AuraFlow transformer", "tiny random model", None)
    hashes = hash_files(files / "image_model")
    del hashes["image_model.json"]
    assert about["files"] == hashes and "transformer/diffusion_pytorch_model.safetensors" in hashes
    assert version.tags["base"] == "tiny random model" and version.tags["what"] == about["what"]
    metrics = json.loads((files / "evaluation.json").read_text())
    loaded = AuraFlowTransformer2DModel.from_pretrained(files / "image_model", subfolder="transformer", local_files_only=True)
    assert task.evaluate(loaded) == metrics
    assert metrics["held_out_loss"] < 0.95 * task.evaluate(task.build())["held_out_loss"]
    assert metrics["held_out_loss"] == pytest.approx(np.mean([metrics[f"loss_t_q{n}"] for n in (1, 2, 3, 4)]))
    losses = pq.read_table(files / "held_out_losses.parquet").to_pydict()
    assert losses["image_id"] == feed.read_bucket(task.export, "held_out")["image_id"].tolist()
    assert np.mean(losses["loss"]) == pytest.approx(metrics["held_out_loss"], rel=1e-5)
    printed = capsys.readouterr().out
    assert "train diffusion: starts from tiny random model" in printed and "registered image-model version 1 as champion" in printed
    trainer.main(train_diffusion, None)
    assert capsys.readouterr().out == "train diffusion: nothing to do, version 1 was made from this export (champion)\n"


def test_trained_adapters_are_written_as_the_pipeline_loads_them(place: Path, tmp_path: Path) -> None:
    from diffusers.loaders import AuraFlowLoraLoaderMixin

    settings = settings_of("lora={rank: 2, alpha: 4, layers: [to_q, proj_out]}", "learning_rate=0.05", "zero_stage=3", "epochs=2")
    task = make_task(settings, place)
    outcome = loop.run(task, settings.train_diffusion, tmp_path / "training", task.ranks, None)
    (tmp_path / "result").mkdir()
    tags = train_diffusion.write_result(tmp_path / "result", settings, task.export, task, outcome)
    assert tags["what"] == "LoRA of an AuraFlow transformer" and float(tags["held_out_loss"]) == pytest.approx(
        outcome.metrics["held_out_loss"]
    )
    fresh: Any = image_model.load_transformer(settings.train_diffusion)
    state, metadata = AuraFlowLoraLoaderMixin.lora_state_dict(str(tmp_path / "result/image_model"), return_lora_metadata=True)
    AuraFlowLoraLoaderMixin.load_lora_into_transformer(state, fresh, metadata=metadata)
    assert task.evaluate(fresh) == pytest.approx(outcome.metrics, rel=1e-5)
    assert task.evaluate(image_model.load_transformer(settings.train_diffusion)) != pytest.approx(outcome.metrics, rel=1e-3)


def test_the_digest_is_of_what_is_trained_and_not_of_how(place: Path) -> None:
    def digest(*more: str) -> str:
        settings = settings_of(*more)
        return train_diffusion.training_digest(settings, train_diffusion.open_rows(settings, str(place)))

    same = [digest(*more) for more in ((), ("micro_batch=2", "zero_stage=3"), ("checkpointing=true", "ranks=2"))]
    assert len(set(same)) == 1
    others = [digest(one) for one in ("lora={}", "image_size=128", "no_text=0.2", "times=uniform", "captions={tags: 1.0}", "mix=v7")]
    assert len({same[0], *others}) == 7


def test_a_misspelt_kind_of_caption_stops_the_training_at_its_start(place: Path) -> None:
    with pytest.raises(Mistake, match=r"given \['alt'\]; of 6 held-out images none has \['alt'\], they have \['alt_text', 'tags'\]"):
        make_task(settings_of("captions={alt: 1.0}"), place)


def test_an_image_that_does_not_decode_stops_the_training_with_its_name_and_code(tmp_path: Path) -> None:
    def spoil(columns: dict[str, list[Any]]) -> None:
        columns["bytes"][0] = columns["bytes"][0][:200]

    task = make_task(settings_of(), write_images(tmp_path / "export", spoil))
    broken = task.export and feed.read_bucket(task.export, "train")["image_id"][0].hex()
    with pytest.raises(Mistake, match=rf"image {broken}: (decode_failed|header_broken): .*it was exported"):
        for _ in feed.batches(task.plan, task.prepare, 2):
            pass

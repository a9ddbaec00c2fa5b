"""An images export and settings -> the Task of training an image model: what the one loop needs to know of it.

A row: its file's bytes are decoded and cut by the feed's threads, one of its captions is chosen for (seed, epoch, image) and tokenized
there; VAE and text encoder give latents and text states on the device; the transformer answers the velocity of a mix of latents and
noise, and the row's loss is its mean squared error. Held-out rows are measured on noise and times that never change, in four quarters of t.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from conf.build import Limits
from conf.loops import TrainDiffusion
from training import adapters, captions, feed, flow_matching, image_model, process_group
from training.exports import Export
from training.image_model_cost import forward_flops
from training.image_pixels import read_pixels

if TYPE_CHECKING:
    import torch

TRAIN, HELD_OUT = "train", "held_out"
METRIC = "held_out_loss"
COLUMNS = {
    **{"image_id": "binary", "bytes": "binary", "captions": "binary"},
    **{"score": "int32", "rating": "string", "style_cluster": "int32", "width": "int32", "height": "int32"},
}
READ = ("image_id", "bytes", "captions", "score", "rating", "style_cluster")  # columns that a row is made from
TIME_MEANS = tuple(f"loss_t_q{quarter + 1}" for quarter in range(flow_matching.QUARTERS))


class HeldOut(NamedTuple):
    """Held-out rows: ids [n], and the mean loss of each row, and by quarter of t [n, 4]."""

    image_id: npt.NDArray[Any]
    loss: npt.NDArray[np.float64]
    by_quarter: npt.NDArray[np.float64]


class FitImageModel:
    """Task of the loop (training/task.py). `ranks`: where this process stands; every rank makes one."""

    name = "train diffusion"
    metric = METRIC
    larger_is_better = False

    def __init__(self, settings: TrainDiffusion, export: Export, limits: Limits, ranks: process_group.Ranks) -> None:
        self.settings, self.export, self.ranks = settings, export, ranks
        self.limits = limits.model_dump()
        self.frozen = image_model.load_frozen(settings)
        self.plan = plan_rows(settings, export, ranks)
        self.device: torch.device | str = "cpu"
        self.measured: HeldOut | None = None  # by the last evaluation
        self._tokenizing = threading.Lock()  # a fast tokenizer that pads is not safe in two threads
        self._held_out: feed.Rows | None = None

    @property
    def train_flops(self) -> float:
        """Backward costs two forwards, or one where only adapters are trained (they themselves are left out: some percent at rank 16)."""
        config = image_model.transformer_config(self.settings)
        backward = 2.0 if self.settings.lora is None else 1.0
        return (1.0 + backward) * forward_flops(config, self.settings.image_size, self.settings.text_length)

    def build(self) -> torch.nn.Module:
        transformer: Any = image_model.load_transformer(self.settings)
        if self.settings.lora is not None:
            transformer = adapters.add_adapters(transformer, self.settings.lora)
        if self.settings.checkpointing:
            transformer.enable_gradient_checkpointing()
        return transformer

    def start(self, device: torch.device | str) -> None:
        self.device = device
        self.frozen.vae.to(device)
        self.frozen.text_encoder.to(device)
        rows = self._rows_held_out()
        pairs = zip(rows["captions"], rows["image_id"], strict=True)
        mix = self.settings.mix
        shares = self.settings.captions if mix is None else captions.MIXES[mix].lengths
        known = [captions.read(raw, image_id) for raw, image_id in pairs]
        missing = captions.check_kinds(known, shares, mix)
        if missing and self.ranks.rank == 0:
            print(f"{self.name}: {missing}", flush=True)

    def prepare(self, rows: feed.Rows, epoch: int) -> feed.Arrays:
        """-> pixels uint8 [n, 3, size, size], tokens and mask int64 [n, text_length], without_text and text_cut float32 [n] (0 or 1)."""
        return self._arrays(rows, self.settings.seed, epoch, self.settings.no_text)

    def losses(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        x, states = self._encode(inputs)
        noise = torch.randn_like(x)
        t = flow_matching.draw_times(len(x), self.settings.times, self.settings.time_shift, x.device)
        answer = predict(model, flow_matching.mix(x, noise, t), states, t)
        return {"loss": flow_matching.losses(answer, x, noise), **{name: inputs[name] for name in ("without_text", "text_cut")}}

    def evaluate(self, model: Any) -> dict[str, float]:
        share = self.held_out_share(model)
        table = np.array(process_group.total(share.ravel().tolist(), self.device)).reshape(share.shape)
        self.measured = HeldOut(self._rows_held_out()["image_id"], table.mean(1), table)
        return {METRIC: float(table.mean()), **dict(zip(TIME_MEANS, table.mean(0).tolist(), strict=True))}

    def held_out_share(self, model: Any) -> npt.NDArray[np.float64]:
        """-> losses [n, quarters] of the held-out rows that fall to this rank, 0 for the others'.

        Each rank takes every world-th batch. All batches are of one size and every rank has as many (the last ones with rows that are
        another's too, which do not count): with ZeRO 3 a forward pass is a collective.
        """
        rows, size = self._rows_held_out(), self.settings.micro_batch
        count = feed.count(rows)
        table = np.zeros((count, flow_matching.QUARTERS))
        for one in range(-(-count // (size * self.ranks.world))):
            first = (one * self.ranks.world + self.ranks.rank) * size
            places = np.arange(first, first + size)
            losses = self._fixed_losses(model, {name: column[places % count] for name, column in rows.items()})
            table[places[places < count]] = losses[places < count]
        return table

    def _fixed_losses(self, model: Any, rows: feed.Rows) -> npt.NDArray[np.float64]:
        """-> losses [n, quarters] on each image's own noise, times and text: the same for any seed, so that versions compare row by row."""
        import torch

        arrays = self._arrays(rows, seed=0, epoch=0, no_text=0.0)
        x, states = self._encode({name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()})
        columns = []
        for quarter in range(flow_matching.QUARTERS):
            draws = [flow_matching.fixed_draw(image_id, quarter, tuple(x.shape[1:])) for image_id in rows["image_id"]]
            t = torch.tensor([time for time, _ in draws], device=x.device)
            noise = torch.stack([noise for _, noise in draws]).to(x.device)
            with torch.no_grad():
                answer = predict(model, flow_matching.mix(x, noise, t), states, t)
            columns.append(flow_matching.losses(answer, x, noise))
        return torch.stack(columns, 1).double().cpu().numpy()

    def _encode(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        with torch.no_grad():
            x = image_model.latents(self.frozen.vae, inputs["pixels"])
            return x, image_model.text_states(self.frozen.text_encoder, inputs["tokens"], inputs["mask"])

    def _arrays(self, rows: feed.Rows, seed: int, epoch: int, no_text: float) -> feed.Arrays:
        ids, settings = rows["image_id"], self.settings
        pixels = [read_pixels(data, one, settings.image_size, self.limits) for data, one in zip(rows["bytes"], ids, strict=True)]
        texts = [self._text({name: rows[name][number] for name in READ}, seed, epoch, no_text) for number in range(len(ids))]
        tokens, mask, cut = self._tokenize(texts)
        empty = np.array([text == "" for text in texts], dtype=np.float32)
        return {"pixels": np.stack(pixels), "tokens": tokens, "mask": mask, "without_text": empty, "text_cut": cut}

    def _text(self, row: dict[str, Any], seed: int, epoch: int, no_text: float) -> str:
        settings = self.settings
        if settings.mix is None:
            return captions.choose(row["captions"], row["image_id"], seed, epoch, settings.captions, no_text)
        marks = (int(row["score"]), str(row["rating"]), int(row["style_cluster"]))
        return captions.compose(
            row["captions"], row["image_id"], marks, seed, epoch, settings.mix, no_text, self._count, settings.text_length
        )

    def _count(self, text: str) -> int:
        with self._tokenizing:
            return len(self.frozen.tokenizer(text)["input_ids"])

    def _tokenize(self, texts: list[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """-> tokens and mask [n, text_length], and 1 for each text that was cut. As AuraFlowPipeline.encode_prompt does."""
        with self._tokenizing:
            made = self.frozen.tokenizer(
                texts, truncation=True, max_length=self.settings.text_length, padding="max_length", return_tensors="np"
            )
        cut = np.array([bool(encoding.overflowing) for encoding in made.encodings], dtype=np.float32)
        return made["input_ids"].astype(np.int64), made["attention_mask"].astype(np.int64), cut

    def _rows_held_out(self) -> feed.Rows:
        if self._held_out is None:
            self._held_out = feed.read_bucket(self.export, HELD_OUT, READ, self.settings.held_out)
        return self._held_out


def plan_rows(settings: TrainDiffusion, export: Export, ranks: process_group.Ranks) -> feed.Plan:
    """The rows of the first epoch."""
    cut = (settings.rows_per_step, settings.micro_batch, ranks.rank, ranks.world)
    return feed.Plan(export, TRAIN, settings.seed, 0, *cut, apart=HELD_OUT)


def predict(model: Any, mixed: torch.Tensor, states: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """z_t [n, ...], text states and t [n] -> the velocity, in the model's precision. `model`: the transformer, wrapped or not."""
    dtype = next(model.parameters()).dtype
    answer: torch.Tensor = model(hidden_states=mixed.to(dtype), encoder_hidden_states=states.to(dtype), timestep=t, return_dict=False)[0]
    return answer

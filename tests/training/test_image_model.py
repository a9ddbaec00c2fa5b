"""The parts of an image model, tiny but of the true classes: against the sampler's pipeline, peft's loader and torch's FLOP counter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conf.loops import TrainDiffusion
from conf.section import Mistake
from training import adapters, image_model, image_model_cost, zero_memory
from training.fit_image_model import predict
from training.image_pixels import cut, read_pixels

SETTINGS = TrainDiffusion(image_size=64, text_length=24)
LORA = TrainDiffusion.Lora(rank=4, alpha=8, layers=("to_q", "to_add_out", "proj_out", "ff.linear_1"))
LIMITS = {"formats": ("PNG", "JPEG"), "max_bytes": 2**20, "max_pixels": 10**6, "max_frames": 1, "min_side": 8}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # as training.engine does: threads that wait for a busy core spin


@pytest.fixture(scope="module")
def frozen() -> image_model.Frozen:
    return image_model.load_frozen(SETTINGS)


@pytest.fixture
def transformer() -> Any:
    return image_model.load_transformer(SETTINGS)


def inputs(size: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    side = size // 8
    return torch.randn(2, 4, side, side, generator=generator), torch.randn(2, 24, 32, generator=generator), torch.tensor([0.2, 0.9])


def give_weights(adapted: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random values for the adapters, which begin as no change at all -> what training would give."""
    torch.manual_seed(9)
    weights = {name: torch.randn_like(p) for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.load_state_dict(weights, strict=False)
    return weights


def test_the_tiny_parts_are_the_same_whatever_the_random_state_and_leave_it_alone(transformer: Any, frozen: image_model.Frozen) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, frozen_again = image_model.load_transformer(SETTINGS), image_model.load_frozen(SETTINGS)
    assert torch.equal(state, torch.get_rng_state())
    for one, other in ((transformer, again), (frozen.vae, frozen_again.vae), (frozen.text_encoder, frozen_again.text_encoder)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not any(p.requires_grad for part in frozen[:2] for p in part.parameters())


def test_text_states_are_those_that_the_samplers_pipeline_makes(transformer: Any, frozen: image_model.Frozen) -> None:
    from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler

    texts = ["a grey cat", "", "a cat that is longer than twenty-four bytes"]
    pipeline = AuraFlowPipeline(frozen.tokenizer, frozen.text_encoder, frozen.vae, transformer, FlowMatchEulerDiscreteScheduler())
    expected = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=24)[0]
    tokens = frozen.tokenizer(texts, truncation=True, max_length=24, padding="max_length", return_tensors="pt")
    states = image_model.text_states(frozen.text_encoder, tokens["input_ids"], tokens["attention_mask"])
    assert torch.equal(states, expected)
    assert states.shape == (3, 24, 32)
    assert states[1, 1:].abs().max() == 0 and states[2].abs().min(1).values.max() > 0


def test_the_byte_tokenizer_gives_back_any_text(frozen: image_model.Frozen) -> None:
    text = "Ein Käse, 猫 & \U0001f431\n"
    assert frozen.tokenizer.decode(frozen.tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_latents_go_back_through_the_pipelines_decoding(frozen: image_model.Frozen) -> None:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    x = image_model.latents(frozen.vae, pixels)
    assert x.shape == (2, 4, 8, 8) and x.dtype == torch.float32
    middle = frozen.vae.encode(pixels / 127.5 - 1).latent_dist.mean
    assert torch.allclose(x / frozen.vae.config.scaling_factor, middle, atol=1e-6)  # what AuraFlowPipeline hands to decode
    assert frozen.vae.config.scaling_factor == 0.13025


def test_in_bf16_the_vae_stays_in_fp32_and_the_rest_follows() -> None:
    settings = SETTINGS.model_copy(update={"precision": "bf16"})
    frozen, transformer = image_model.load_frozen(settings), image_model.load_transformer(settings)
    assert (frozen.vae.dtype, frozen.text_encoder.dtype, next(transformer.parameters()).dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    )
    assert predict(transformer, *inputs()).dtype == torch.bfloat16


def test_a_small_picture_takes_the_positions_at_the_centre_of_the_grid(transformer: Any) -> None:
    """The policy is the release's. Gradients say which of the 96 x 96 learned positions a picture trains."""
    for size in (64, 512, 1536):
        transformer.zero_grad()
        side = size // 8
        transformer.pos_embed(torch.zeros(1, 4, side, side)).sum().backward()
        trained = transformer.pos_embed.pos_embed.grad[0].abs().sum(1).reshape(96, 96) > 0
        rows, columns = trained.any(1).nonzero().ravel().tolist(), trained.any(0).nonzero().ravel().tolist()
        first = 48 - size // 32
        assert rows == columns == list(range(first, first + size // 16))


def test_a_picture_beyond_the_grid_is_refused_by_settings_and_by_a_model_with_a_smaller_one(transformer: Any) -> None:
    with pytest.raises(ValueError, match="image_size: given 1552, expected a multiple of 16 up to 1536"):
        TrainDiffusion(image_size=1552)
    with pytest.raises(ValueError, match="image_size: given 520"):
        TrainDiffusion(image_size=520)
    small = type(transformer)(**image_model.TINY_CONFIGS["transformer"] | {"pos_embed_max_size": 64})
    image_model.check_grid(small.config, 128)
    with pytest.raises(Mistake, match="given 144, but the model has 8 x 8 positions of 16 pixels: at most 128"):
        image_model.check_grid(small.config, 144)


def test_a_folder_in_diffusers_layout_gives_the_same_model_and_a_name_by_content(
    transformer: Any, frozen: image_model.Frozen, tmp_path: Path
) -> None:
    for name, part in zip(image_model.PARTS, (transformer, frozen.vae, frozen.text_encoder, frozen.tokenizer), strict=True):
        part.save_pretrained(tmp_path / "one" / name)
        part.save_pretrained(tmp_path / "two" / name)
    settings = SETTINGS.model_copy(update={"pretrained": str(tmp_path / "one")})
    loaded, loaded_frozen = image_model.load_transformer(settings), image_model.load_frozen(settings)
    assert torch.equal(predict(loaded, *inputs()), predict(transformer, *inputs()))
    assert loaded_frozen.tokenizer("a cat")["input_ids"] == frozen.tokenizer("a cat")["input_ids"]
    assert all(torch.equal(a, b) for a, b in zip(loaded_frozen.vae.parameters(), frozen.vae.parameters(), strict=True))
    sizes = image_model_cost.measure(settings, image_model_cost.read_configs(settings.pretrained or ""), None)
    assert sizes.parameters == sum(p.numel() for p in transformer.parameters())
    first = image_model.fingerprint(str(tmp_path / "one"))
    assert first == image_model.fingerprint(str(tmp_path / "two"))
    (tmp_path / "two/vae/config.json").write_text("{}")
    image_model.fingerprint.cache_clear()
    assert first != image_model.fingerprint(str(tmp_path / "two"))


def test_a_folder_that_lacks_parts_is_a_mistake_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    with pytest.raises(Mistake, match="has no transformer, text_encoder, tokenizer; give a local folder in diffusers' layout"):
        image_model.load_transformer(SETTINGS.model_copy(update={"pretrained": str(tmp_path)}))


def test_a_saved_transformer_is_what_diffusers_loads(transformer: Any, tmp_path: Path) -> None:
    from diffusers import AuraFlowTransformer2DModel

    weights = {name: p.detach() * 1.5 for name, p in transformer.named_parameters()}
    image_model.save_transformer(tmp_path, weights, SETTINGS)
    transformer.load_state_dict(weights)
    loaded = AuraFlowTransformer2DModel.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(predict(loaded, *inputs()), predict(transformer, *inputs()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_adapters_alone_are_trained_and_change_nothing_at_first(transformer: Any) -> None:
    before = predict(transformer, *inputs())
    adapted = adapters.add_adapters(transformer, LORA)
    assert torch.equal(predict(adapted, *inputs()), before)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    layers = {name.partition(".lora_")[0] for name in trained}
    assert {"proj_out", "joint_transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.ff.linear_1"} <= layers
    assert not any("ff_context" in layer or "to_k" in layer for layer in layers)


def test_saved_adapters_load_through_the_pipeline_and_give_the_same_answers(
    transformer: Any, frozen: image_model.Frozen, tmp_path: Path
) -> None:
    from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler

    before = predict(transformer, *inputs())
    adapted = adapters.add_adapters(transformer, LORA)
    file = adapters.save(tmp_path, give_weights(adapted), LORA)
    expected = predict(adapted, *inputs())
    assert not torch.allclose(expected, before, atol=1e-2)
    fresh = image_model.load_transformer(SETTINGS)
    pipeline = AuraFlowPipeline(frozen.tokenizer, frozen.text_encoder, frozen.vae, fresh, FlowMatchEulerDiscreteScheduler())
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert torch.allclose(predict(pipeline.transformer, *inputs()), expected, atol=1e-6)
    pipeline.unload_lora_weights()
    assert torch.equal(predict(pipeline.transformer, *inputs()), before)


def test_a_layer_that_the_model_does_not_have_is_a_mistake_with_real_names(transformer: Any) -> None:
    with pytest.raises(Mistake, match=r"given \['to_query'\], which no linear layer ends with.*attn\.to_q.*proj_out"):
        adapters.match(transformer, ("to_query", "to_q"))


@pytest.mark.parametrize(("size", "length"), [(64, 24), (256, 40)])
def test_the_flops_by_formula_are_those_that_torch_counts(transformer: Any, size: int, length: int) -> None:
    settings = SETTINGS.model_copy(update={"image_size": size, "text_length": length})
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the counter does not know the CPU's own kernel
        counted = image_model_cost.count_flops(lambda: transformer(**image_model_cost.row_of(transformer, settings)))
    assert counted == image_model_cost.forward_flops(transformer.config, size, length)


def test_the_plan_of_the_real_model_says_its_parameters_memory_and_flops() -> None:
    full = image_model_cost.measure(TrainDiffusion(), image_model_cost.AURAFLOW_CONFIGS, None)
    assert (full.parameters, full.trained) == (6_858_605_568, 6_858_605_568)
    assert full.forward == image_model_cost.forward_flops(image_model_cost.AURAFLOW_CONFIGS["transformer"], 512, 768)
    assert full.step / full.forward == pytest.approx(3.0, abs=0.01)
    # 2 bytes of weights, 2 of gradients, 4 masters, 8 moments, 4 moving average
    assert zero_memory.memory(full.parameters, full.trained, "bf16", True, 0, 64) == 20 * full.parameters
    assert zero_memory.memory(full.parameters, full.trained, "bf16", True, 1, 64) == (4 + 16 / 64) * full.parameters
    assert zero_memory.memory(full.parameters, full.trained, "bf16", True, 2, 64) == (2 + 18 / 64) * full.parameters
    assert zero_memory.memory(full.parameters, full.trained, "bf16", True, 3, 64) == 20 / 64 * full.parameters
    assert zero_memory.memory(full.parameters, full.trained, "fp32", False, 0, 1) == 16 * full.parameters
    assert zero_memory.memory(full.parameters, full.trained, "fp32", False, 1, 1) == 20 * full.parameters


def test_adapters_spare_the_weights_gradients_and_checkpointing_costs_a_second_forward_pass() -> None:
    """At AuraFlow's widths, with few layers."""
    short = {"transformer": {"num_mmdit_layers": 1, "num_single_dit_layers": 2}, "text_encoder": {"num_layers": 1}}
    configs = {part: config | short.get(part, {}) for part, config in image_model_cost.AURAFLOW_CONFIGS.items()}
    lora, again = (image_model_cost.measure(TrainDiffusion(checkpointing=on), configs, TrainDiffusion.Lora()) for on in (False, True))
    assert lora.trained == 3 * 4 * 16 * (3072 + 3072)
    assert lora.step / lora.forward == pytest.approx(2.0, abs=0.1)
    assert again.step / again.forward == pytest.approx(3.0, abs=0.1)
    assert zero_memory.memory(lora.parameters, lora.trained, "bf16", True, 3, 1) == 2 * lora.parameters + 18 * lora.trained


def test_pixels_are_the_centred_square_of_the_upright_picture() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    for picture in (wide, wide.rotate(90, expand=True)):
        pixels = cut(picture, 64)
        assert pixels.shape == (3, 64, 64) and pixels.dtype == np.uint8
        assert (pixels[:, 4:-4, 4:-4].reshape(3, -1).T == (0, 0, 255)).all()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8))
    resized = np.asarray(noise.resize((128, 64), Image.Resampling.LANCZOS).crop((32, 0, 96, 64))).transpose(2, 0, 1)
    assert np.abs(cut(noise, 64).astype(int) - resized).max() <= 1
    assert cut(Image.new("RGB", (20, 10), "blue"), 64).shape == (3, 64, 64)


def test_bytes_that_do_not_decode_name_the_image_and_the_code() -> None:
    with pytest.raises(Mistake, match=f"image {b'x'.hex()}: not_an_image: "):
        read_pixels(b"no image at all", b"x", 64, LIMITS)

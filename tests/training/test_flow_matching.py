"""Flow matching: our times and signs against the sampler's own."""

from __future__ import annotations

import hashlib

import pytest
import torch

from training import flow_matching


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("shift", [1.0, 1.73])
def test_the_samplers_own_steps_along_our_velocity_end_at_the_image(pair: tuple[torch.Tensor, torch.Tensor], shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    x, noise = pair
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(7)
    z = noise
    for timestep in scheduler.timesteps:
        t = (timestep / 1000).expand(2)  # as AuraFlowPipeline tells its transformer
        assert torch.allclose(z, flow_matching.mix(x, noise, t), atol=1e-5)
        z = scheduler.step(noise - x, timestep, z, return_dict=False)[0]
    assert torch.allclose(z, x, atol=1e-5)


def test_our_mix_is_the_samplers_noising_and_our_shift_its_shift(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    x, noise = pair
    plain, shifted = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=1.73)
    assert torch.allclose(flow_matching.shift_times(plain.sigmas, 1.73), shifted.sigmas)
    timesteps = shifted.timesteps[[100, 900]]
    assert torch.allclose(shifted.scale_noise(x, timesteps, noise), flow_matching.mix(x, noise, timesteps / 1000), atol=1e-6)


def test_the_true_velocity_has_no_loss_and_a_rows_loss_is_its_own_mean(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, noise = pair
    assert flow_matching.losses(noise - x, x, noise).tolist() == [0.0, 0.0]
    answer = noise - x
    answer[1] += 2.0
    assert flow_matching.losses(answer.double(), x, noise).tolist() == pytest.approx([0.0, 4.0], abs=1e-5)
    assert flow_matching.losses(answer.bfloat16(), x, noise).dtype == torch.float32


def test_times_are_drawn_as_named_and_shifted_towards_the_noise() -> None:
    torch.manual_seed(0)
    uniform, normal, shifted = (
        flow_matching.draw_times(20_000, *how, "cpu") for how in (("uniform", 1.0), ("logit_normal", 1.0), ("uniform", 3.0))
    )
    for t in (uniform, normal, shifted):
        assert t.shape == (20_000,) and t.min() >= 0 and t.max() <= 1
    quarters = torch.tensor([0.25, 0.5, 0.75])
    assert torch.allclose(uniform.quantile(quarters), quarters, atol=0.02)
    assert torch.allclose(torch.logit(normal).std(), torch.tensor(1.0), atol=0.02)
    assert torch.allclose(normal.quantile(quarters), torch.sigmoid(torch.tensor([-0.6745, 0.0, 0.6745])), atol=0.02)
    assert torch.allclose(shifted.quantile(quarters), torch.tensor([0.5, 0.75, 0.9]), atol=0.02)


def test_the_fixed_draw_of_an_image_is_the_same_ever_after_and_lies_in_its_quarter() -> None:
    ids = [hashlib.sha256(b"%d" % n).digest() for n in range(100)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    times = torch.tensor([[flow_matching.fixed_draw(one, quarter, (4, 2, 2))[0] for quarter in range(4)] for one in ids])
    assert torch.equal(state, torch.get_rng_state())
    assert ((times * 4).long() == torch.arange(4)).all()
    assert times.std(0).min() > 0.05
    t, noise = flow_matching.fixed_draw(ids[0], 2, (4, 2, 2))
    assert t == times[0, 2] and torch.equal(noise, flow_matching.fixed_draw(ids[0], 2, (4, 2, 2))[1])
    assert not torch.equal(noise, flow_matching.fixed_draw(ids[0], 1, (4, 2, 2))[1])

"""The table of an objective against the diffusers scheduler and the papers' formulas."""

import pytest
import torch
from diffusers import DDPMScheduler

from train_dreambooth_lora_sdxl import Batch, UserError, diffusion_loss, make_objective

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("rescale", [False, True])
def test_columns_are_the_schedulers(prediction_type, rescale):
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=rescale, **SDXL)
    a, b, c, d, _, t_cond = make_objective(scheduler)
    x, noise, t = torch.randn(1000, 4, 2, 2), torch.randn(1000, 4, 2, 2), torch.arange(1000)
    wide = (slice(None), None, None, None)
    torch.testing.assert_close(a[wide] * x + b[wide] * noise, scheduler.add_noise(x, noise, t), rtol=1e-4, atol=1e-4)
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(x, noise, t)
    torch.testing.assert_close(c[wide] * x + d[wide] * noise, target, rtol=1e-4, atol=1e-4)
    assert (t_cond == t).all()


def test_trap_3_min_snr_weights():
    for rescale in (False, True):
        scheduler = DDPMScheduler(rescale_betas_zero_snr=rescale, **SDXL)
        alphas = scheduler.alphas_cumprod.double()
        snr = alphas / (1 - alphas)
        epsilon = make_objective(scheduler, 5.0).weight.double()
        expected = torch.minimum(snr, torch.tensor(5.0)) / snr.clamp(min=1e-30)
        torch.testing.assert_close(epsilon[snr > 0], expected[snr > 0], rtol=1e-5, atol=0)
        velocity = make_objective(
            DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=rescale, **SDXL), 5.0
        )
        torch.testing.assert_close(
            velocity.weight.double(), torch.minimum(snr, torch.tensor(5.0)) / (snr + 1), rtol=1e-5, atol=1e-12
        )
        assert velocity.weight.isfinite().all() and epsilon.isfinite().all()


def test_an_unknown_prediction_is_refused():
    with pytest.raises(UserError, match="sample"):
        make_objective(DDPMScheduler(prediction_type="sample", **SDXL))


def batch(rows, instance_rows, weight):
    zeros = torch.zeros(rows, 4, 2, 2)
    return Batch(torch.randn(rows, 4, 2, 2), zeros, (zeros, zeros), zeros, torch.tensor(weight), instance_rows)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_traps_1_2_prior_preservation_is_mean_plus_weighted_mean(gamma, kind, size):
    """The usual formula, written out: mean over instance rows + w * mean over class rows, each min-SNR weighted."""
    objective = make_objective(DDPMScheduler(prediction_type=kind, **SDXL), gamma)
    rows = batch(2 * size, size, [1.0] * size + [0.7] * size)
    told = []
    torch.manual_seed(5)
    loss = diffusion_loss(lambda x, t, text, ids: told.append((x, t)) or 0.1 * x, objective, rows)
    torch.manual_seed(5)
    torch.randn_like(rows.mean)
    noise = torch.randn_like(rows.mean)
    x, t = told[0]
    column = objective.weight[t]
    wide = (slice(None), None, None, None)
    target = objective.c[t][wide] * rows.mean + objective.d[t][wide] * noise
    row_loss = column * ((0.1 * x - target) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, row_loss[:size].mean() + 0.7 * row_loss[size:].mean())


def test_latents_are_sampled_anew_each_time():
    objective = make_objective(DDPMScheduler(**SDXL))
    rows = batch(2, 2, [1.0, 1.0])._replace(std=torch.ones(2, 4, 2, 2))
    losses = {float(diffusion_loss(lambda x, t, text, ids: x, objective, rows)) for _ in range(3)}
    assert len(losses) == 3

"""The table of an objective against diffusers' schedulers and the papers' formulas, in float64 and at both ends."""

import json
import shutil

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer
from train_dreambooth_lora_sdxl import Batch, UserError, diffusion_loss, make_coefficients

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDE = (slice(None), None, None, None)


def make_objective(scheduler, **flags):
    args = trainer.make_parser().parse_args(["--pretrained_model_name_or_path", "x"])
    for name, value in flags.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return trainer.make_objective(args, scheduler)


def snr_of(scheduler) -> torch.Tensor:
    alphas = scheduler.alphas_cumprod.double()
    return alphas / (1 - alphas)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("rescale", [False, True])
def test_columns_are_the_schedulers(prediction_type, rescale):
    """In float64; the ends apart, where little noise and little signal would be lost among the others."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=rescale, **SDXL)
    a, b, c, d, _, t_cond, _ = make_coefficients(scheduler)
    x, noise = torch.randn(2, 1000, 4, 2, 2, dtype=torch.float64)
    t, exact = torch.arange(1000), {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(a[WIDE] * x + b[WIDE] * noise, scheduler.add_noise(x, noise, t), **exact)
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(x, noise, t)
    torch.testing.assert_close(c[WIDE] * x + d[WIDE] * noise, target, **exact)
    assert (t_cond == t).all()
    assert float(b[0]) == pytest.approx(0.00085**0.5, rel=1e-4)  # beta_start is all the noise that there is
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert float(a[999]) == pytest.approx(0 if rescale else float((1 - betas).prod().sqrt()), rel=1e-4)
    if rescale:
        assert torch.equal(a[999] * x[999] + b[999] * noise[999], noise[999])
        assert prediction_type == "epsilon" or torch.equal(c[999] * x[999] + d[999] * noise[999], -x[999])


@pytest.mark.parametrize("kind", [EDMDPMSolverMultistepScheduler, EDMEulerScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_is_the_schedulers_preconditioning(kind, prediction_type):
    """Model input, what the model is told, and loss: that of the scheduler's denoised latents."""
    scheduler = kind(prediction_type=prediction_type)
    table = make_coefficients(scheduler)
    sigma = scheduler.sigmas[:-1].flip(0).double()
    count = len(sigma)
    assert sigma[0] == pytest.approx(0.002, rel=1e-3) and sigma[-1] == pytest.approx(80, rel=1e-3)
    x, noise, answer = (torch.randn(count, 4, 2, 2, dtype=torch.float64) for _ in range(3))
    noisy = x + sigma[WIDE] * noise
    fed = table.a[WIDE] * x + table.b[WIDE] * noise
    torch.testing.assert_close(fed, scheduler.precondition_inputs(noisy, sigma[WIDE]))
    torch.testing.assert_close(table.t_cond, scheduler.precondition_noise(sigma))
    denoised = scheduler.precondition_outputs(noisy, answer, sigma[WIDE])
    ours = table.weight[WIDE] * (answer - table.c[WIDE] * x - table.d[WIDE] * noise) ** 2
    torch.testing.assert_close(ours, (denoised - x) ** 2, rtol=1e-8, atol=1e-12)


def test_trap_3_min_snr_weights():
    for rescale in (False, True):
        scheduler = DDPMScheduler(rescale_betas_zero_snr=rescale, **SDXL)
        snr = snr_of(scheduler)
        epsilon = make_coefficients(scheduler, 5.0).weight
        expected = torch.minimum(snr, torch.tensor(5.0)) / snr.clamp(min=1e-30)
        torch.testing.assert_close(epsilon[snr > 0], expected[snr > 0], rtol=1e-12, atol=0)
        velocity = make_coefficients(
            DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=rescale, **SDXL), 5.0
        )
        torch.testing.assert_close(
            velocity.weight, torch.minimum(snr, torch.tensor(5.0)) / (snr + 1), rtol=1e-12, atol=1e-15
        )
        assert velocity.weight.isfinite().all() and epsilon.isfinite().all()


PAPERS = {
    "debiased": lambda snr: 1 / snr.sqrt(),  # arXiv:2310.08442, of epsilon's loss
}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("rescale", [False, True])
def test_other_weightings_are_the_papers_and_the_same_for_velocity(name, rescale):
    """A velocity's loss with its weight is that of epsilon: with one answer, turned into the other, both agree."""
    epsilon = DDPMScheduler(rescale_betas_zero_snr=rescale, **SDXL)
    velocity = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=rescale, **SDXL)
    snr = snr_of(epsilon)
    inside = snr > 0
    ours = make_coefficients(epsilon, None, name)
    torch.testing.assert_close(ours.weight[inside], PAPERS[name](snr[inside]), rtol=1e-12, atol=0)
    theirs = make_coefficients(velocity, None, name)
    assert theirs.weight.isfinite().all() and ours.weight.isfinite().all()
    x, noise, answer = (torch.randn(1000, 4, dtype=torch.float64) for _ in range(3))
    a, b = theirs.a[:, None], theirs.b[:, None]
    as_velocity = (answer - b * (a * x + b * noise)) / a  # epsilon = a v + b model_input
    target = theirs.c[:, None] * x + theirs.d[:, None] * noise
    first = ours.weight[:, None] * (answer - noise) ** 2
    second = theirs.weight[:, None] * (as_velocity - target) ** 2
    torch.testing.assert_close(first[inside], second[inside], rtol=1e-6, atol=1e-9)


def test_edm_style_is_epsilons_plain_loss():
    assert (make_coefficients(DDPMScheduler(**SDXL), edm_style=True).weight == 1).all()
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, **SDXL)
    weight = make_coefficients(scheduler, edm_style=True).weight
    torch.testing.assert_close(weight, scheduler.alphas_cumprod.double(), rtol=1e-9, atol=1e-15)
    assert weight[-1] == 0


def test_what_contradicts_is_refused():
    with pytest.raises(UserError, match="sample"):
        make_coefficients(DDPMScheduler(prediction_type="sample", **SDXL))
    for flags in ({"snr_gamma": 5.0}, {"weighting": "debiased"}):
        with pytest.raises(UserError, match="weights by the EDM formulas"):
            make_coefficients(EDMEulerScheduler(), **flags)
    with pytest.raises(UserError, match="--prediction_type v_prediction cannot be had of an EDM model"):
        trainer.with_prediction(EDMEulerScheduler(), "v_prediction", False)
    with pytest.raises(UserError, match="--rescale_betas_zero_snr needs --prediction_type v_prediction"):
        trainer.with_prediction(EulerDiscreteScheduler(**SDXL), None, True)
    with pytest.raises(UserError, match="EDMEulerScheduler knows nothing of it"):
        trainer.with_prediction(EDMEulerScheduler(), None, True)
    with pytest.raises(UserError, match="beyond the model's last timestep"):
        make_objective(DDPMScheduler(num_train_timesteps=100, **SDXL), min_timestep=100)


def test_another_prediction_and_zero_snr_come_from_the_scheduler():
    scheduler = trainer.with_prediction(EulerDiscreteScheduler(**SDXL), "v_prediction", True)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.timestep_spacing == "trailing"
    assert make_coefficients(scheduler).snr[-1] < 1e-7 and make_coefficients(scheduler).weight.isfinite().all()
    untouched = EulerDiscreteScheduler(**SDXL)
    assert trainer.with_prediction(untouched, None, False) is untouched


def test_the_huber_loss_is_square_near_and_linear_far():
    """arXiv:2403.16728, and torch's own: near nothing as half a square is to it, far away with its slope."""
    distance, delta = trainer.DISTANCES["huber"], torch.tensor(0.1, dtype=torch.float64)
    error = torch.tensor([-30.0, 1e-4, 30.0], dtype=torch.float64)
    expected = 2 * delta * ((error**2 + delta**2).sqrt() - delta)
    torch.testing.assert_close(distance(error, delta), expected)
    assert distance(error, delta)[1] == pytest.approx(1e-8, rel=1e-3)
    theirs = torch.nn.functional.huber_loss(error, torch.zeros(3, dtype=torch.float64), reduction="none", delta=0.1)
    assert distance(error, delta)[2] == pytest.approx(2 * float(theirs[2]), rel=1e-2)


@pytest.mark.parametrize("rescale", [False, True])
def test_the_huber_schedule(rescale):
    snr = snr_of(DDPMScheduler(rescale_betas_zero_snr=rescale, **SDXL))
    deltas = trainer.huber_deltas(snr, 0.1)
    torch.testing.assert_close(deltas, 0.9 / (1 + 1 / snr.sqrt()) ** 2 + 0.1)
    assert deltas[-1] == pytest.approx(0.1, abs=0.01)




@pytest.mark.parametrize(("low", "high"), [(0, 999), (100, 899), (500, 500)])
def test_all_timesteps_between_the_bounds_come_alike(low, high):
    objective = make_objective(DDPMScheduler(**SDXL), min_timestep=low, max_timestep=high)
    rows, seen = batch(500, 500, [1.0] * 500), []
    for seed in range(40):
        torch.manual_seed(seed)
        diffusion_loss(lambda x, t, *rest: seen.append(t) or x, objective, rows)
    counts = torch.bincount(torch.cat(seen), minlength=1000)
    assert counts[:low].sum() == counts[high + 1:].sum() == 0 and counts[low:high + 1].min() > 0
    mean = float((counts * torch.arange(1000)).sum() / counts.sum())
    assert abs(mean - (low + high) / 2) < 10


@pytest.mark.parametrize("kind", [DDPMScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_by_default_all_timesteps_come(kind):
    objective = make_objective(kind(**(SDXL if kind is DDPMScheduler else {"sigma_data": 0.5})))
    assert objective.timesteps == range(len(objective.table.a))


def batch(rows, instance_rows, weight):
    zeros = torch.zeros(rows, 4, 2, 2)
    return Batch(torch.randn(rows, 4, 2, 2), zeros, (zeros, zeros), zeros, torch.tensor(weight), instance_rows)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_traps_1_2_prior_preservation_is_mean_plus_weighted_mean(gamma, kind, size):
    """The usual formula, written out: mean over instance rows + w * mean over class rows, each min-SNR weighted."""
    objective = make_objective(DDPMScheduler(prediction_type=kind, **SDXL), snr_gamma=gamma)
    rows = batch(2 * size, size, [1.0] * size + [0.7] * size)
    told = []
    torch.manual_seed(5)
    loss = diffusion_loss(lambda x, t, text, ids: told.append((x, t)) or 0.1 * x, objective, rows)
    torch.manual_seed(5)
    torch.randn_like(rows.mean)
    noise = torch.randn_like(rows.mean)
    x, t = told[0]
    column = objective.table.weight[t]
    target = objective.table.c[t][WIDE] * rows.mean + objective.table.d[t][WIDE] * noise
    row_loss = ((0.1 * x - target) ** 2).mean(dim=(1, 2, 3))
    weighted = column * row_loss
    torch.testing.assert_close(loss.total, weighted[:size].mean() + 0.7 * weighted[size:].mean())
    torch.testing.assert_close(loss.rows, row_loss[:size])
    assert (loss.timesteps == t[:size]).all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("loss_type", trainer.LOSS_TYPES)
def test_everything_together_written_out(kind, loss_type):
    """Weighting, Huber, offset, a class row and a mask in one loss."""
    flags = {"noise_offset": 0.3, "loss_type": loss_type, "loss_weighting": "debiased"}
    scheduler = DDPMScheduler(prediction_type=kind, **SDXL)
    objective, table = make_objective(scheduler, **flags), make_coefficients(scheduler, None, "debiased")
    mask = torch.rand(2, 1, 2, 2)
    rows = batch(2, 1, [1.0, 0.4])._replace(mask=mask)
    told = []
    torch.manual_seed(7)
    loss = diffusion_loss(lambda x, t, text, ids: told.append((x, t)) or torch.ones_like(x), objective, rows)
    torch.manual_seed(7)
    torch.randn_like(rows.mean)
    noise = torch.randn_like(rows.mean)
    noise = noise + 0.3 * torch.randn(2, 4, 1, 1)
    x, t = told[0]
    a, b, c, d = (column[t][WIDE].float() for column in table[:4])
    torch.testing.assert_close(x, a * rows.mean + b * noise)
    error = 1 - (c * rows.mean + d * noise)
    delta = trainer.huber_deltas(table.snr, 0.1)[t][WIDE].float()
    root = (error**2 + delta**2).sqrt() - delta
    distance = {"l2": error**2, "huber": 2 * delta * root}[loss_type]
    each = table.weight[t].float() * (distance * mask).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.total, each[0] + 0.4 * each[1])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weighting", [{"snr_gamma": 5.0}, {"loss_weighting": "debiased"}], ids=str)
def test_weighted_timesteps_beside_masks_and_class_rows_written_out(kind, weighting):
    """Mean over the subject's rows + 0.4 * mean over the class's, each the mean over places times mask and weight."""
    scheduler = DDPMScheduler(prediction_type=kind, **SDXL)
    objective = make_objective(scheduler, **weighting)
    mask = torch.rand(4, 1, 2, 2)
    rows = batch(4, 2, [1.0, 1.0, 0.4, 0.4])._replace(mask=mask)
    told = []
    torch.manual_seed(11)
    loss = diffusion_loss(lambda x, t, text, ids: told.append((x, t)) or 0.3 * x, objective, rows)
    torch.manual_seed(11)
    torch.randn_like(rows.mean)
    noise = torch.randn_like(rows.mean)
    x, t = told[0]
    torch.testing.assert_close(x, scheduler.add_noise(rows.mean, noise, t))
    target = noise if kind == "epsilon" else scheduler.get_velocity(rows.mean, noise, t)
    snr = snr_of(scheduler)[t].float()
    of_epsilon = snr.clamp(max=5) / snr if "snr_gamma" in weighting else 1 / snr.sqrt()
    weight = of_epsilon if kind == "epsilon" else of_epsilon * snr / (snr + 1)
    each = [(mask[i] * (0.3 * x[i] - target[i]) ** 2).mean() * weight[i] for i in range(4)]
    torch.testing.assert_close(loss.total, (each[0] + each[1]) / 2 + 0.4 * (each[2] + each[3]) / 2)


def test_the_huber_loss_turns_linear_where_the_paper_says():
    scheduler = DDPMScheduler(**SDXL)
    objective = make_objective(scheduler, loss_type="huber")
    rows, told = batch(8, 8, [1.0] * 8), []
    torch.manual_seed(13)
    loss = diffusion_loss(lambda x, t, text, ids: told.append(t) or torch.zeros_like(x), objective, rows)
    torch.manual_seed(13)
    torch.randn_like(rows.mean)
    noise = torch.randn_like(rows.mean)
    sigma = 1 / snr_of(scheduler)[told[0]].sqrt()
    delta = (0.9 / (1 + sigma) ** 2 + 0.1).view(-1, 1, 1, 1).float()
    torch.testing.assert_close(loss.rows, (2 * delta * ((noise**2 + delta**2).sqrt() - delta)).mean(dim=(1, 2, 3)))


class TwoModels(torch.nn.Module):
    """A model whose adapters add a number."""

    def __init__(self) -> None:
        super().__init__()
        self.change, self.on = torch.nn.Parameter(torch.tensor(0.5)), True

    def without_adapters(self):
        from contextlib import contextmanager

        @contextmanager
        def off():
            self.on = False
            yield
            self.on = True

        return off()

    def forward(self, x, t, text, ids):
        return 0.2 * x + text[0] + self.change * self.on


def test_the_base_model_is_the_target_of_the_class_prompts_rows():
    objective = make_objective(DDPMScheduler(**SDXL), with_prior_preservation=True, class_prompt="a dog")
    model, rows = TwoModels(), batch(4, 2, [1.0, 1.0, 0.7, 0.7])
    torch.manual_seed(1)
    ours = diffusion_loss(model, objective, rows)
    plain = objective._replace(prior=trainer.NoPrior(None))
    torch.manual_seed(1)
    subject = diffusion_loss(model, plain, rows).rows.mean()
    torch.testing.assert_close(ours.total, subject + 0.7 * model.change.square())  # it moved by that from the base
    ours.total.backward()
    assert model.change.grad.isfinite() and model.on


def test_latents_are_sampled_anew_each_time():
    objective = make_objective(DDPMScheduler(**SDXL))
    rows = batch(2, 2, [1.0, 1.0])._replace(std=torch.ones(2, 4, 2, 2))
    losses = {float(diffusion_loss(lambda x, t, text, ids: x, objective, rows).total) for _ in range(3)}
    assert len(losses) == 3


# ------------------------------------------------------------------------------------------- whole runs


def with_scheduler(tiny, folder, scheduler):
    """The tiny model with another scheduler and a VAE with moments, as Playground v2.5 has them."""
    shutil.copytree(tiny, folder)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    vae = json.loads((folder / "vae" / "config.json").read_text())
    vae |= {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2]}
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    return folder


def drawn_by_a_user(folder, output, prompt, scheduler=None):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.scheduler = scheduler or pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(output, weight_name=trainer.LORA_FILE)
    seeded = torch.Generator().manual_seed(1)
    return pipeline(prompt, num_inference_steps=25, generator=seeded, height=16, width=16).images[0].tobytes()


@pytest.mark.parametrize("scheduler", [EDMDPMSolverMultistepScheduler(), EDMEulerScheduler()])
def test_an_edm_model_trains_and_draws_as_a_user_draws(train, tiny, tmp_path, scheduler):
    base = with_scheduler(tiny, tmp_path / "base", scheduler)
    flags = {"pretrained_model_name_or_path": base, "validation_prompt": "a dog", "num_validation_images": 1}
    output = train(**flags, max_train_steps=3, do_edm_style_training=True)
    picture = Image.open(output / "validation/step-000003/00.png").tobytes()
    assert picture == drawn_by_a_user(base, output, "a dog")


def test_another_prediction_draws_with_it_and_the_card_says_so(train, tiny):
    flags = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "validation_prompt": "a dog"}
    output = train(**flags, num_validation_images=1, max_train_steps=2)
    scheduler = trainer.with_prediction(
        StableDiffusionXLPipeline.from_pretrained(tiny).scheduler, "v_prediction", True
    )
    picture = Image.open(output / "validation/step-000002/00.png").tobytes()
    assert picture == drawn_by_a_user(tiny, output, "a dog", scheduler)
    card = (output / "README.md").read_text()
    assert "rescale_betas_zero_snr=True" in card and 'prediction_type="v_prediction"' in card


@pytest.mark.parametrize("encoders", [False, True])
def test_the_class_is_preserved_without_pictures(train, tmp_path, encoders):
    """No picture is drawn, and resuming is exact."""
    flags = {"with_prior_preservation": True, "train_text_encoder": encoders, "text_encoder_lr": 1e-3}
    flags |= {"learning_rate": 1e-3, "max_train_steps": 4, "checkpointing_steps": 2, "aspect_ratio_buckets": "auto"}
    flags |= {"class_prompt": "a photo of a dog"}
    whole = load_file(train(**flags, output_dir=tmp_path / "a") / trainer.LORA_FILE)
    train(**{**flags, "max_train_steps": 2}, output_dir=tmp_path / "b")
    resumed = load_file(train(**flags, output_dir=tmp_path / "b", resume_from_checkpoint="latest") / trainer.LORA_FILE)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not list((tmp_path / "a").rglob("generated-*"))


def test_with_a_heavy_weight_the_class_moves_less(train, tmp_path):
    """At least three times less: predictions for the class prompt with and without the adapters."""
    flags = {"with_prior_preservation": True, "class_prompt": "a photo of a dog", "max_train_steps": 10}
    flags |= {"cache_latents_dir": tmp_path / "cache"}
    drift = {}
    for weight in (0, 100):
        output = train(**flags, prior_loss_weight=weight, output_dir=tmp_path / str(weight))
        run = trainer.start(train.args(init_lora=output / trainer.LORA_FILE, output_dir=tmp_path / "probe"))
        model = trainer.load_trainable(run).eval()
        table = trainer.encode_prompts(run, ["a photo of a dog"], False, run.dtype)
        torch.manual_seed(0)
        inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), table.of("a photo of a dog"), torch.full((1, 6), 16.0)
        with torch.no_grad():
            trained = model(*inputs)
            with model.without_adapters():
                drift[weight] = (trained - model(*inputs)).square().mean().item()
    assert 0 < drift[100] < drift[0] / 3, drift


def test_losses_are_told_by_range_of_timesteps(train):
    output = train(max_train_steps=20, train_batch_size=5, max_timestep=499, log_level="warning")
    entries = trainer.read_history(output)
    names = {name for entry in entries for name in entry if name.startswith("loss/")}
    assert names == {"loss/timesteps 0-249", "loss/timesteps 250-499"}
    run = trainer.start(train.args())
    progress = trainer.Progress(run, None, trainer.Schedule(10, 1.0, 1, 1), 0)
    seen = [(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 249, 250])), (torch.tensor([7.0]), torch.tensor([999]))]
    progress.seen = [(1, (), trainer.Loss(rows.mean(), rows, timesteps)) for rows, timesteps in seen]
    expected = {"loss/timesteps 0-249": 2.0, "loss/timesteps 250-499": 5.0, "loss/timesteps 750-999": 7.0}
    assert progress.loss_by_timestep() == expected

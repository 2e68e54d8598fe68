"""Fit and drift, and a plan by pictures."""

import statistics

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer

FLAGS = {"monitor_steps": 2, "class_prompt": "a photo of a dog"}


def parts(train, **flags):
    run = trainer.start(train.args(**FLAGS, **flags))
    subject = trainer.instance_samples(run.args)
    table = trainer.build_text(run, [subject[0].prompt, "a photo of a dog"], False, run.dtype)
    cache = trainer.build_cache(run, subject, [(16, 16)] * len(subject), table)
    objective, model = trainer.make_objective(run.args, run.scheduler), trainer.load_trainable(run)
    return run, cache, table, objective, model


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_fit_is_the_loss_and_drift_is_nothing_before_training(train, kind):
    """Against diffusers' add_noise and velocity, over eight levels of noise."""
    flags = {"prediction_type": kind, "train_batch_size": 5, "random_flip": True}
    run, cache, table, objective, model = parts(train, **flags)
    told = trainer.make_monitor(run, model, cache, table, objective)(2, trainer.Average())
    assert told["monitor/drift"] == 0
    ddpm = DDPMScheduler.from_config(run.scheduler.config)
    first, losses = [views[0] for views in cache.views.values()], []
    latents, ids = cache.moments(first)[0], cache.add_time_ids[first]
    for t in range(62, 1000, 125):
        generator = torch.Generator().manual_seed(trainer.position_seed(run.seed, "monitor", t))
        noise, steps = torch.randn(latents.shape, generator=generator), torch.tensor([t] * 5)
        target = noise if kind == "epsilon" else ddpm.get_velocity(latents, noise, steps)
        noisy = objective.table.a[t] * latents + objective.table.b[t] * noise
        with torch.no_grad():
            answer = model(noisy, steps, table.at([0] * 5), ids)
        losses.append(float((answer - target).square().mean()))
    assert told["monitor/fit"] == pytest.approx(statistics.mean(losses), rel=1e-4)
    with torch.no_grad():
        for name, adapter in model.adapters.items():
            adapter.add_(0.1 if "lora_B" in name else 0)
    assert trainer.make_monitor(run, model, cache, table, objective)(2, trainer.Average())["monitor/drift"] > 0
    assert trainer.make_monitor(run, model, cache, table, objective)(3, trainer.Average()) == {}


def test_looking_changes_nothing_and_the_curves_go_on_after_a_stop(train, tmp_path):
    flags = {"max_train_steps": 14, "checkpointing_steps": 7, "lora_dropout": 0.2, "train_text_encoder": True}
    plain = load_file(train(**flags, output_dir=tmp_path / "a") / trainer.LORA_FILE)
    watched = train(**flags, **FLAGS, output_dir=tmp_path / "b")
    lora = load_file(watched / trainer.LORA_FILE)
    assert all(torch.equal(plain[name], lora[name]) for name in plain)
    train(**{**flags, "max_train_steps": 7}, **FLAGS, output_dir=tmp_path / "c")
    resumed = train(**flags, **FLAGS, output_dir=tmp_path / "c", resume_from_checkpoint="latest")
    curves = [
        [(entry["step"], entry["monitor/fit"], entry["monitor/drift"], entry.get("monitor/rest")) for entry in told]
        for told in ([e for e in trainer.read_history(output) if "monitor/fit" in e] for output in (watched, resumed))
    ]
    assert curves[0] == curves[1] and [step for step, *_ in curves[0]] == [2, 4, 6, 8, 10, 12, 14]
    fits = [fit for _, fit, _, _ in curves[0]]
    assert curves[0][-1][3] == pytest.approx(statistics.pvariance(fits[-5:]) / statistics.pvariance(fits))
    assert curves[0][0][2] < curves[0][-1][2] and "monitor/drift" in (watched / "report.html").read_text()


def test_only_the_subjects_pictures_are_measured(train):
    """Rows of the class stand behind them on the same shelf."""
    run, cache, table, objective, model = parts(train, train_batch_size=5)
    alone = trainer.make_monitor(run, model, cache, table, objective)(2, trainer.Average())
    subject = trainer.instance_samples(run.args)
    others = [sample._replace(prompt="a photo of a dog", is_class=True) for sample in subject]
    cache = trainer.build_cache(run, subject + others, [(16, 16)] * len(subject), table)
    assert trainer.make_monitor(run, model, cache, table, objective)(2, trainer.Average()) == alone


def test_the_class_prompt_is_needed_and_then_does_something(train, capsys):
    with pytest.raises(trainer.UserError, match="--monitor_steps needs --class_prompt"):
        train.args(monitor_steps=5)
    train.args(**FLAGS)
    assert "does nothing" not in capsys.readouterr().out


def test_steps_per_image(train):
    args = train.args(max_train_steps=None, steps_per_image=100, train_batch_size=2)
    assert trainer.plan_steps(args, 5, 1).total_steps == 250  # each of five is seen 100 times
    assert trainer.plan_steps(args, 5, 2).total_steps == 125
    args = train.args(max_train_steps=None, steps_per_image=100, train_batch_size=2, repeats=4)
    assert trainer.plan_steps(args, 20, 1).total_steps == 250  # repeats are views of the same five
    with pytest.raises(trainer.UserError, match="--steps_per_image and --max_train_steps both"):
        train.args(steps_per_image=100)


def test_a_run_plans_its_own_length(train):
    """--steps_per_image auto: as many looks for three pictures as for five, more for many; repeats are looks, too."""
    flags = {"max_train_steps": None, "steps_per_image": "auto", "train_batch_size": 2}
    args = train.args(**flags, lr_scheduler="cosine")
    plans = {rows: trainer.plan_steps(args, rows, 1) for rows in (3, 5, 40)}
    assert {rows: plan.total_steps for rows, plan in plans.items()} == {3: 500, 5: 500, 40: 2000}
    assert {rows: plan.warmup_steps for rows, plan in plans.items()} == {3: 25, 5: 25, 40: 100}
    assert trainer.plan_steps(train.args(**flags, repeats=4), 12, 1).total_steps == 500
    assert trainer.plan_steps(train.args(**flags, lr_scheduler="cosine", lr_warmup_steps=10), 5, 1).warmup_steps == 10
    with pytest.raises(trainer.UserError, match="'lots' is not a whole number .* nor auto"):
        train.args(max_train_steps=None, steps_per_image="lots")


def test_the_speed_is_that_of_training_alone(train, monkeypatch):
    """Pictures are drawn between two reports; that time does not count. By a clock that only these two move."""
    clock, real = [0.0], trainer.diffusion_loss

    def takes(seconds):
        clock[0] += seconds

    monkeypatch.setattr(trainer.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(trainer, "make_validator", lambda *rest: lambda step: takes(1000))
    monkeypatch.setattr(trainer, "diffusion_loss", lambda *rest: takes(0.5) or real(*rest))
    output = train(max_train_steps=10, train_batch_size=2, validation_steps=5, validation_prompt="a dog")
    (entry,) = trainer.read_history(output)
    assert entry["step"] == 10 and entry["samples_per_second"] == 4

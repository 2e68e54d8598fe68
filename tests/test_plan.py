"""How long a run is, and how fast it says that it is."""

import pytest

import train_dreambooth_lora_sdxl as trainer


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

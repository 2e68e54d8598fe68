"""Whole runs on the tiniest model: what they leave, where they resume from, that they stop well."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer


def adapters(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / trainer.LORA_FILE)


def assert_equal(first: dict, second: dict) -> None:
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_seed_decides_everything(train, tmp_path):
    first, second, other = (train(output_dir=tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert_equal(adapters(first), adapters(second))
    assert not torch.equal(*(next(iter(adapters(folder).values())) for folder in (first, other)))


def test_accumulation_changes_nothing_but_the_size_of_a_step(train, tmp_path):
    """One step of two micro-batches is the mean of their losses: the same rows and noise, split differently, agree."""
    started = trainer.start(train.args())
    model = trainer.load_trainable(started)
    samples = trainer.instance_samples(started.args)
    table = trainer.encode_prompts(started, [samples[0].prompt], False, torch.float32)
    cache = trainer.encode_latents(started, samples, [(16, 16)] * 5, table)
    objective = trainer.make_objective(started.args, started.scheduler)
    order = trainer.BatchSampler([range(5)], (), 2, 1)
    for n in range(4):
        torch.manual_seed(trainer.position_seed(1, "noise", n))
        (trainer.diffusion_loss(model, objective, cache.batch(table, order, n)).total / 4).backward()
    gradients = {name: parameter.grad for name, parameter in model.adapters.items()}
    out = train(
        gradient_accumulation_steps=4, max_train_steps=1, learning_rate=1e-2, adam_weight_decay=0, max_grad_norm=1e9
    )
    moved = adapters(out)
    for name, gradient in gradients.items():
        before, after = model.adapters[name].detach(), moved[name.replace(".default", "")]
        big = gradient.abs() > 1e-5  # AdamW's first step is lr * sign(gradient)
        torch.testing.assert_close((after - before)[big], -1e-2 * gradient.sign()[big], rtol=1e-2, atol=1e-5)


WARM_UP, LAST = 4, 12
SCHEDULES = {  # what is left of the rate at each share of the way from the end of the warm-up to the last step
    "constant": lambda share: 1,
    "constant_with_warmup": lambda share: 1,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "cosine_with_restarts": lambda share: (1 + math.cos(math.pi * (2 * share % 1))) / 2,
    "polynomial": lambda share: (1 - share) ** 3,
}


@pytest.mark.parametrize("name", trainer.SCHEDULES)
def test_the_learning_rate_goes_the_way_that_its_flags_say(train, name):
    flags = {"lr_scheduler": name, "lr_warmup_steps": WARM_UP, "lr_num_cycles": 2, "lr_power": 3}
    run = trainer.start(train.args(max_train_steps=LAST, learning_rate=1e-3, **flags))
    schedule = trainer.plan_steps(run.args, 5, 1)
    state = trainer.make_state(run, trainer.load_trainable(run), schedule, {})
    rates = []
    for _ in range(LAST):
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.optimizer.step()
        state.lr_scheduler.step()
    warm_up = 0 if name == "constant" else WARM_UP
    expected = [step / WARM_UP if step < warm_up else SCHEDULES[name]((step - warm_up) / (LAST - warm_up))
                for step in range(LAST)]
    assert rates == pytest.approx([1e-3 * share for share in expected], abs=2e-7)  # polynomial ends at 1e-7, not 0
    assert set(SCHEDULES) == set(trainer.SCHEDULES)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_warm_up_as_long_as_the_run_becomes_a_tenth_of_it(train, capsys, optimizer):
    """The default is 500; the polynomial schedule divides by what remains, and asks the optimizer for its rate."""
    flags = {"lr_scheduler": "polynomial", "max_train_steps": 10, "optimizer": optimizer, "learning_rate": 1e-3}
    output = train(**flags, lr_warmup_steps=10)
    assert "--lr_warmup_steps 10 is the whole run of 10 steps; a tenth" in capsys.readouterr().out
    assert trainer.read_history(output)[-1]["lr/unet"] == pytest.approx(1e-7)
    assert trainer.plan_steps(train.args(**flags), 5, 1).warmup_steps == 1


def test_checkpoints_are_whole_pruned_and_leave_others_alone(train):
    output = Path(train.flags["output_dir"])
    (output / "checkpoint-best").mkdir(parents=True)
    train(max_train_steps=6, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(folder.name for folder in output.glob("checkpoint-*")) == [
        "checkpoint-5",
        "checkpoint-6",
        "checkpoint-best",
    ]
    assert {path.name for path in (output / "checkpoint-6").iterdir()} == {"state.pt", trainer.LORA_FILE}
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]


def test_trap_32_resume_from_odd_places(train, tmp_path):
    output = train(max_train_steps=2, checkpointing_steps=2)
    before = adapters(output)
    train(max_train_steps=2, resume_from_checkpoint="latest")  # already finished: nothing to do, everything written
    assert_equal(before, adapters(output))
    (output / "checkpoint-2").rename(tmp_path / "elsewhere")
    train(max_train_steps=2, resume_from_checkpoint=f"{tmp_path / 'elsewhere'}/")
    train(max_train_steps=1, resume_from_checkpoint="latest")  # an empty folder begins anew
    state = tmp_path / "elsewhere" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(trainer.UserError, match="nothing sound is there"):
        train(max_train_steps=4, resume_from_checkpoint=str(tmp_path / "elsewhere"))


def test_a_checkpoint_of_another_rank_is_refused(train, tmp_path):
    output = train(checkpointing_steps=2)
    with pytest.raises(trainer.UserError, match="--rank was 4 and is now 8"):
        train(rank=8, output_dir=tmp_path / "other", resume_from_checkpoint=output / "checkpoint-2")


def test_a_failed_write_keeps_the_checkpoint_before(train, monkeypatch):
    output = train(max_train_steps=2, checkpointing_steps=1, checkpoints_total_limit=1)
    monkeypatch.setattr(torch, "save", lambda *rest: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError):
        train(max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1, resume_from_checkpoint="latest")
    monkeypatch.undo()
    assert [folder.name for folder in trainer.list_checkpoints(output)] == ["checkpoint-2"]
    train(max_train_steps=3, resume_from_checkpoint="latest")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("encoders", [False, True])
def test_trap_10_validation_draws_what_a_user_draws(train, tiny, precision, encoders):
    prompt = "a photo of sks dog on grass"
    output = train(
        mixed_precision=precision,
        train_text_encoder=encoders,
        validation_prompt=prompt,
        num_validation_images=2,
        lora_dropout=0.5,
        max_train_steps=3,
        learning_rate=0.05,
        text_encoder_lr=0.05,
        lora_alpha=8,
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tiny, torch_dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    for step, loaded in ((0, False), (3, True)):
        if loaded:
            pipeline.load_lora_weights(output, weight_name=trainer.LORA_FILE)
        for index in range(2):
            drawn = pipeline(
                prompt, num_inference_steps=25, generator=torch.Generator().manual_seed(1 + index), height=16, width=16
            ).images[0]
            ours = Image.open(output / "validation" / f"step-{step:06d}" / f"{index:02d}.png")
            # a CPU without bf16 rounds by where a weight lies in memory
            worst = np.abs(np.asarray(ours, dtype=int) - np.asarray(drawn, dtype=int)).max()
            assert worst <= (0 if precision == "no" else 2)
    assert (output / "validation/step-000000/00.png").read_bytes() != (
        output / "validation/step-000003/00.png"
    ).read_bytes()
    assert Image.open(output / "progress.png").width > 2 * 192


def test_several_prompts_with_a_negative_one_as_a_user_draws_them(train, tiny, tmp_path):
    """Of the command line and a file; two seeds each, at a size, number of steps and guidance of their own."""
    options = "--n a red mug --w 24 --h 24 --s 7 --l 3"
    (tmp_path / "prompts.txt").write_text(f"a cat in the snow {options}\n\na dog on grass {options}\n")
    words = [f"--validation_prompt=a dog on grass {options}", f"--validation_prompt={tmp_path / 'prompts.txt'}"]
    args = trainer.parse_args([*train.words(num_validation_images=2, max_train_steps=1), *words])
    trainer.main(args)
    output = Path(args.output_dir)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    index = 0
    for prompt in ("a dog on grass", "a cat in the snow"):
        for seed in (1, 2):
            drawn = pipeline(
                prompt,
                negative_prompt="a red mug",
                num_inference_steps=7,
                guidance_scale=3,
                generator=torch.Generator().manual_seed(seed),
                height=24,
                width=24,
            ).images[0]
            assert Image.open(output / f"validation/step-000000/{index:02d}.png").tobytes() == drawn.tobytes()
            index += 1
    assert len(list((output / "validation/step-000001").iterdir())) == 4
    assert Image.open(output / "progress.png").height > 4 * 192
    card = (output / "README.md").read_text()
    assert card.count("text: a cat in the snow") == card.count("text: a dog on grass") == 2
    settings = trainer.yaml.safe_load((output / trainer.CONFIG_FILE).read_text())
    assert settings["validation_prompt"] == [word.partition("=")[2] for word in words]
    again = trainer.parse_args(["--config", str(output / trainer.CONFIG_FILE), "--validation_prompt=a mug"])
    assert again.validation_prompt == ["a mug"]  # the command line wins


def test_validation_without_zeros_for_the_empty_prompt(train, tiny, tmp_path):
    import json

    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    output = train(
        pretrained_model_name_or_path=base, validation_prompt="a dog", num_validation_images=1, max_train_steps=1
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    drawn = pipeline(
        "a dog", num_inference_steps=25, generator=torch.Generator().manual_seed(1), height=16, width=16
    ).images[0]
    assert Image.open(output / "validation/step-000000/00.png").tobytes() == drawn.tobytes()


def times(loss: trainer.Loss, factor: float) -> trainer.Loss:
    return loss._replace(total=loss.total * factor)


def test_trap_27_a_loss_that_is_not_finite_ends_the_run_and_nothing_is_overwritten(train, monkeypatch):
    output = train(max_train_steps=2, checkpointing_steps=2)
    before = adapters(output)
    real = trainer.diffusion_loss
    monkeypatch.setattr(trainer, "diffusion_loss", lambda *rest: times(real(*rest), math.nan))
    told = r"step 3 has loss nan, with .*\.png \(\"a photo of sks dog\"\).*--mixed_precision bf16 helps"
    with pytest.raises(trainer.TrainingError, match=told):
        train(max_train_steps=30, checkpointing_steps=2, checkpoints_total_limit=1, resume_from_checkpoint="latest")
    assert_equal(before, adapters(output))
    assert [folder.name for folder in trainer.list_checkpoints(output)] == ["checkpoint-2"]
    assert_equal(before, load_file(output / "checkpoint-2" / trainer.LORA_FILE))


def test_class_pictures_are_seeded_by_number_and_a_stopped_drawing_goes_on(train, tmp_path):
    flags = {
        "with_prior_preservation": True,
        "class_prompt": "a photo of a dog",
        "num_class_images": 5,
        "sample_batch_size": 2,
    }
    train(**flags, class_data_dir=tmp_path / "a", max_train_steps=1)
    names = [f"generated-{i:05d}.png" for i in range(5)]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    pixels = [Image.open(tmp_path / "a" / name).tobytes() for name in names]
    assert len(set(pixels)) == 5
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / names[0]).rename(tmp_path / "b" / names[0])
    (tmp_path / "b" / "own.jpg").write_bytes((tmp_path / "a" / names[1]).read_bytes())
    train(**flags, class_data_dir=tmp_path / "b", max_train_steps=1)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [*names[:4], "own.jpg"]
    again = [Image.open(tmp_path / "b" / name) for name in names[1:4]]
    for image, before in zip(again, pixels[1:4], strict=True):  # another batch size may round differently
        assert max(abs(x - y) for x, y in zip(image.tobytes(), before, strict=True)) <= 2


def test_class_pictures_have_a_precision_of_their_own(train, tmp_path, monkeypatch):
    """UNet, text and VAE, beside a run in float32."""
    dtypes, draw, decode_latents = [], trainer.generate_latents, trainer.decode_latents

    def noted_draw(run, model, table, prompt, *rest):
        dtypes.extend([model.unet.dtype, table.of(prompt.text)[0].dtype])
        return draw(run, model, table, prompt, *rest)

    def noted_decode(vae, latents):
        dtypes.append(vae.dtype)
        return decode_latents(vae, latents)

    monkeypatch.setattr(trainer, "generate_latents", noted_draw)
    monkeypatch.setattr(trainer, "decode_latents", noted_decode)
    flags = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 1}
    run = trainer.start(train.args(**flags, class_data_dir=tmp_path, prior_generation_precision="bf16"))
    trainer.generate_class_images(run, run.args)
    assert run.dtype == torch.float32 and dtypes == [torch.bfloat16] * 3


def test_scale_lr_leaves_the_arguments_alone(train):
    args = train.args(scale_lr=True, train_batch_size=2, gradient_accumulation_steps=3, train_text_encoder=True)
    before = dict(vars(args))
    model = trainer.load_trainable(trainer.start(args))
    groups = trainer.make_optimizer(args, model, 6).param_groups
    assert [group["lr"] for group in groups] == [6e-2, 6 * 5e-6]
    assert [group["weight_decay"] for group in groups] == [1e-4, 1e-3]
    assert sum(len(group["params"]) for group in groups) == len(model.adapters)
    assert vars(args) == before


def test_another_vae_is_used(train, tiny, tmp_path):
    vae = trainer.load_part(trainer.Source(str(tiny)), "vae", torch.float32)
    with torch.no_grad():
        vae.quant_conv.weight.mul_(0.5)
    vae.save_pretrained(tmp_path / "vae")
    plain, other = (
        train(output_dir=tmp_path / name, **flags)
        for name, flags in (("a", {}), ("b", {"pretrained_vae_model_name_or_path": tmp_path / "vae"}))
    )
    assert not all(torch.equal(x, y) for x, y in zip(adapters(plain).values(), adapters(other).values(), strict=True))


def test_downloads_are_looked_for_in_the_cache_folder(train, tiny, tmp_path):
    """Laid out as the Hub's client leaves them, while the Hub is out of reach."""
    for name, folder in (("tiny", tiny), ("vae", tiny / "vae")):
        repository = tmp_path / "downloads" / f"models--me--{name}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    flags = {"pretrained_model_name_or_path": "me/tiny", "pretrained_vae_model_name_or_path": "me/vae"}
    output = train(**flags, cache_dir=tmp_path / "downloads")
    assert_equal(adapters(output), adapters(train(output_dir=tmp_path / "local")))
    with pytest.raises(trainer.UserError, match="me/tiny or its VAE cannot be loaded"):
        train(**flags)


def test_tf32_is_allowed_where_that_is_asked_for(train):
    matmul = torch.backends.cuda.matmul
    trainer.start(train.args())
    assert not matmul.allow_tf32
    trainer.start(train.args(allow_tf32=True))
    allowed, matmul.allow_tf32 = matmul.allow_tf32, False
    assert allowed


@pytest.mark.parametrize("is_absolute", [False, True])
def test_the_tracker_writes_where_it_is_told_to(train, tmp_path, is_absolute):
    output = train(report_to="tensorboard", logging_dir=tmp_path / "curves" if is_absolute else "curves")
    assert list((tmp_path if is_absolute else output).glob("curves/*/events.out.tfevents.*"))
    assert not (output / "logs").exists()


def test_dataloader_workers_change_nothing(train, tmp_path):
    first, second = (train(output_dir=tmp_path / str(workers), dataloader_num_workers=workers) for workers in (0, 3))
    assert_equal(adapters(first), adapters(second))


def start_and_signal(train, signum: int, **flags) -> tuple[subprocess.Popen, str]:
    """Start a long run in a process of its own, signal it once it has made steps, and wait for its end."""
    output = Path(train.flags["output_dir"])
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *train.words(max_train_steps=100_000, checkpointing_steps=5, **flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    deadline = time.time() + 120
    while not list(output.glob("checkpoint-*")) and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signum)
    return process, process.communicate(timeout=60)[0]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_trap_33_a_signal_saves_and_says_how_to_go_on(train, name):
    signum = getattr(signal, name)
    process, told = start_and_signal(train, signum, checkpoints_total_limit=1)
    output = Path(train.flags["output_dir"])
    assert process.returncode == 128 + signum, told
    assert "Traceback" not in told and "--resume_from_checkpoint latest" in told
    (checkpoint,) = trainer.list_checkpoints(output)
    assert_equal(adapters(output), load_file(checkpoint / trainer.LORA_FILE))
    command = next(line for line in told.splitlines() if "--resume_from_checkpoint" in line).split()
    step = int(checkpoint.name[11:])
    again = subprocess.run(
        [sys.executable, *command[2:], f"--max_train_steps={step + 2}"], capture_output=True, text=True, cwd=ROOT
    )
    assert again.returncode == 0, again.stderr


def test_exit_codes_of_a_process(train, tmp_path):
    broken = tmp_path / "pictures"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"x")
    told = train.shell(instance_data_dir=broken)
    assert (
        told.returncode == 2 and told.stderr.startswith("error: --instance_data_dir") and told.stderr.count("\n") == 1
    )
    assert not Path(train.flags["output_dir"]).exists()


def test_output_of_a_run_is_plan_progress_summary(train):
    told = train.shell(log_level="info", validation_prompt="a dog", num_validation_images=1)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "Subject",
        "Base",
        "LoRA",
        "Optimizer",
        "Steps",
        "From",
        "Output",
        "Cache",
        "Done",
        "LoRA",
        "Pictures",
        "Card",
    ]
    assert "Training" in told.stderr and "warn" not in told.stderr.lower()
    assert re.search(r"loss=[\d.]+, lr=1.0e-02, pictures/s=[\d.e+]+, GB=\d", told.stderr)
    assert all("Training" in line or not line for line in told.stderr.replace("\r", "\n").splitlines())


def test_notebook_launcher(train, tmp_path):
    """What a Colab cell does."""
    cell = f"""
import accelerate, train_dreambooth_lora_sdxl as trainer
def function():
    trainer.main(trainer.parse_args({train.words()!r}))
accelerate.notebook_launcher(function, num_processes=1)
"""
    told = subprocess.run(
        [sys.executable, "-c", cell],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert told.returncode == 0, told.stderr
    assert (Path(train.flags["output_dir"]) / trainer.LORA_FILE).exists()


def test_a_new_run_in_an_old_folder_sets_the_old_one_aside(train, capsys):
    """Its checkpoints would be taken for the new run's, and the new ones removed as the oldest."""
    flags = {"validation_prompt": "a dog", "num_validation_images": 1, "checkpointing_steps": 2, "log_level": "info"}
    output = train(**flags, max_train_steps=6, validation_steps=2)
    capsys.readouterr()
    train(**flags, max_train_steps=4, validation_steps=4, checkpoints_total_limit=1, seed=2)
    assert f"of {output} are now in {output}/earlier-1" in capsys.readouterr().out
    assert [folder.name for folder in trainer.list_checkpoints(output)] == ["checkpoint-4"]
    assert [folder.name for folder in trainer.list_checkpoints(output / "earlier-1")] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert sorted(path.name for path in (output / "validation").iterdir()) == ["step-000000", "step-000004"]
    train(**flags, max_train_steps=6, resume_from_checkpoint="latest", seed=2)
    assert [path.name for path in (output / "earlier-2").iterdir()] == ["README.md"]
    train(**flags, max_train_steps=2)
    assert (output / "earlier-3" / "checkpoint-6").exists()


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(train, capsys):
    """They would be pruned as the newest, or taken for the latest."""
    flags = {"checkpointing_steps": 2, "log_level": "info"}
    output = train(**flags, max_train_steps=6)
    train(**flags, max_train_steps=4, resume_from_checkpoint="checkpoint-2", checkpoints_total_limit=1)
    assert [folder.name for folder in trainer.list_checkpoints(output)] == ["checkpoint-4"]
    kept = [folder.name for folder in trainer.list_checkpoints(output / "earlier-1")]
    assert kept == ["checkpoint-4", "checkpoint-6"] and "checkpoint-4, checkpoint-6" in capsys.readouterr().out


def test_a_refused_resume_leaves_the_run_as_it_was(train):
    output = train(checkpointing_steps=2)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(trainer.UserError, match="--rank was 4 and is now 8"):
        train(rank=8, resume_from_checkpoint="latest")
    after = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after.get(path)} == set()


def test_another_vae_is_refused_on_resume(train, tiny, tmp_path):
    train(checkpointing_steps=2)
    shutil.copytree(tiny / "vae", tmp_path / "other-vae")
    with pytest.raises(trainer.UserError, match="the VAE was model and is now other-vae"):
        train(pretrained_vae_model_name_or_path=tmp_path / "other-vae", resume_from_checkpoint="latest")


def test_a_launchers_accumulation_divides_nothing_again(train, monkeypatch):
    plain = load_file(train(gradient_accumulation_steps=2) / trainer.LORA_FILE)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told = load_file(train(gradient_accumulation_steps=2, output_dir=train.folder / "b") / trainer.LORA_FILE)
    assert all(torch.equal(plain[name], told[name]) for name in plain)


def test_one_pass_and_a_prompt_that_no_caption_has_are_warned_about(train, pictures, tmp_path, capsys):
    captioned = tmp_path / "captioned"
    shutil.copytree(pictures, captioned)
    for path in captioned.glob("*.png"):
        path.with_suffix(".txt").write_text("a red thing")
    output = train(max_train_steps=None, instance_data_dir=captioned)
    told = capsys.readouterr().out
    assert "one pass over the pictures is far too little" in told and "--instance_prompt is in none of them" in told
    assert "Use `a red thing` in your prompt" in (output / "README.md").read_text()
    train(max_train_steps=None, steps_per_image=2)
    assert "far too little" not in capsys.readouterr().out


def test_pictures_of_a_telephone_are_named(train, tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    with pytest.raises(trainer.UserError, match=r"holds no picture .*; IMG_1.HEIC must be converted, to .jpg"):
        train.args(instance_data_dir=tmp_path)

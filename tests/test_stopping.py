"""Runs that are stopped, killed, starved of disk, or given numbers that are not finite: nothing is lost."""

import argparse
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, reset_accelerate
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer


def adapters(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / trainer.LORA_FILE)


def same(first: Path, second: Path) -> bool:
    ours, theirs = adapters(first), adapters(second)
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


CHANGES = {
    "--learning_rate was 0.01 and is now 0.02": {"learning_rate": 0.02},
    "--seed was 1 and is now 2": {"seed": 2},
    "--snr_gamma was None and is now 5.0": {"snr_gamma": 5},
    "--gradient_accumulation_steps times processes was 1 and is now 2": {"gradient_accumulation_steps": 2},
    "--mixed_precision was no and is now bf16": {"mixed_precision": "bf16"},
    r"other pictures or prompts than before \(with another prompt: 0.png, 1.png": {
        "instance_prompt": "a photo of sks cat"
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny, pictures):
    """A run of two steps with a checkpoint at each."""
    import conftest

    conftest.reset_accelerate()
    train = conftest.Trainer(tiny, pictures, tmp_path_factory.mktemp("trained"))
    return train(checkpointing_steps=1)


@pytest.mark.parametrize("told", CHANGES)
def test_what_may_not_change_is_refused_with_both_values(train, trained, told):
    with pytest.raises(trainer.UserError, match=told):
        train(**CHANGES[told], max_train_steps=3, resume_from_checkpoint=trained / "checkpoint-1")


def test_what_may_change_does(train, trained):
    train(
        max_train_steps=3,
        resume_from_checkpoint=trained / "checkpoint-1",
        validation_prompt="a dog",
        num_validation_images=1,
        checkpointing_steps=1,
        gradient_checkpointing=True,
    )


def test_latest_passes_over_a_checkpoint_that_is_not_sound(train, tmp_path, capsys):
    whole = train(max_train_steps=3, output_dir=tmp_path / "whole")
    output = train(checkpointing_steps=1)
    state = output / "checkpoint-2" / "state.pt"
    state.write_bytes(state.read_bytes()[:-300])
    train(max_train_steps=3, resume_from_checkpoint="latest")
    assert "checkpoint-2 is no sound checkpoint" in capsys.readouterr().out
    assert same(output, whole)


def test_latest_in_an_empty_folder_begins_anew_with_one_line(train, capsys):
    train(resume_from_checkpoint="latest", log_level="info")
    assert "no checkpoint in" in capsys.readouterr().out


def test_a_checkpoint_cannot_run_code(train, tmp_path, trained):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for content in (pickle.dumps(Canary()), None):
        if content:
            (folder / "state.pt").write_bytes(content)
        else:
            torch.save({**torch.load(trained / "checkpoint-1" / "state.pt"), "step": Canary()}, folder / "state.pt")
        with pytest.raises(trainer.UserError, match="nothing sound"):
            train(resume_from_checkpoint=folder)
        assert not (tmp_path / "canary").exists()
    torch.load(folder / "state.pt", weights_only=False)
    assert (tmp_path / "canary").exists()  # the trap was armed


def test_minutes_stop_a_run(train, tmp_path):
    with pytest.raises(trainer.Stopped, match="Stopped after step 1;") as stopped:
        train(max_train_steps=50, max_train_minutes=1e-6)
    assert stopped.value.exit_code == 0
    output = Path(train.flags["output_dir"])
    assert [folder.name for folder in trainer.list_checkpoints(output)] == ["checkpoint-1"]
    train(max_train_steps=3, resume_from_checkpoint="latest")
    assert [folder.name for folder in trainer.list_checkpoints(output)] == ["checkpoint-1", "last-3"]
    assert same(output, train(max_train_steps=3, output_dir=tmp_path / "whole"))


PHASES = {  # what is called while the signal comes, and in which call; three are for class pictures
    "caching": ("encode_image", 3),
    "class pictures": ("save_picture", 2),
    "first validation": ("decode_latents", 4),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_before_training_keeps_what_was_made(train, tmp_path, monkeypatch, phase):
    flags = {
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "class",
        "class_prompt": "a dog",
        "num_class_images": 3,
        "sample_batch_size": 1,
        "validation_prompt": "a dog",
        "num_validation_images": 2,
    }
    whole = train(**flags, output_dir=tmp_path / "whole")
    for path in (tmp_path / "class").iterdir():
        path.unlink()
    name, at = PHASES[phase]
    real, calls = getattr(trainer, name), []

    def signalled(*arguments):
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(trainer, name, signalled)
    with pytest.raises(trainer.Stopped, match="before training began") as stopped:
        train(**flags)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert not leftovers(tmp_path) and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    assert same(train(**flags), whole)


def test_a_signal_in_a_validation_ends_after_the_picture(train, monkeypatch):
    real, drawn = trainer.generate_latents, []

    def draw(run, *others):
        drawn.append(run)
        if len(drawn) == 2 + 1:  # two pictures before the first step
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(run, *others)

    monkeypatch.setattr(trainer, "generate_latents", draw)
    with pytest.raises(trainer.Stopped, match="Stopped after step 2") as stopped:
        train(max_train_steps=9, validation_prompt="a dog", num_validation_images=2, validation_steps=1)
    assert stopped.value.exit_code == 128 + signal.SIGUSR1 and len(drawn) == 3


def test_a_second_ctrl_c_ends_at_once_and_a_signal_that_comes_twice_does_not():
    """A cluster sends SIGTERM to all processes, and the launcher hands it on once more."""
    stop = trainer.StopSignals()
    stop.message = None  # it trains
    stop.handle(signal.SIGTERM, None)
    stop.handle(signal.SIGTERM, None)
    assert stop.signum == signal.SIGTERM
    with pytest.raises(trainer.Stopped, match="at once"):
        stop.handle(signal.SIGINT, None)


def test_a_second_run_in_one_folder_is_refused_until_the_first_is_dead(train):
    output = Path(train.flags["output_dir"])
    first = subprocess.Popen([sys.executable, str(SCRIPT), *train.words(max_train_steps=100_000)])
    try:
        deadline = time.time() + 120
        while not (output / trainer.CONFIG_FILE).exists() and time.time() < deadline:
            time.sleep(0.2)
        with pytest.raises(trainer.UserError, match="--output_dir .* in use by another run"):
            train()
    finally:
        first.kill()
        first.wait()
    train()


def test_a_signal_after_training_ends_at_once():
    stop = trainer.StopSignals()
    stop.message = trainer.AFTER_TRAINING
    with pytest.raises(trainer.Stopped, match="Checkpoint and LoRA are written") as stopped:
        stop.handle(signal.SIGTERM, None)
    assert stopped.value.exit_code == 128 + signal.SIGTERM


def test_a_finished_run_is_not_trained_again(train, monkeypatch, capsys):
    """Whatever --checkpointing_steps is, the last step has a checkpoint."""
    output = train(max_train_steps=3)
    before = adapters(output)
    monkeypatch.setattr(trainer, "diffusion_loss", lambda *_: pytest.fail("it trains"))
    train(max_train_steps=3, resume_from_checkpoint="latest", output_kohya_format=True, log_level="info")
    told = capsys.readouterr()
    assert (output / trainer.KOHYA_FILE).exists() and "in all, none of them taken now" in told.out
    assert "Training" not in told.err
    assert all(torch.equal(before[name], tensor) for name, tensor in adapters(output).items())


def test_a_restart_loop_needs_no_seed(train, tmp_path):
    """The seed that was drawn for a run is that of its restarts, also where the newest checkpoint is broken."""
    output = train(seed=None, checkpointing_steps=1, max_train_steps=2)
    (output / "checkpoint-2" / "state.pt").write_bytes(b"x")
    train(seed=None, max_train_steps=3, resume_from_checkpoint="latest")
    seed = trainer.yaml.safe_load((output / trainer.CONFIG_FILE).read_text())["seed"]
    assert same(output, train(seed=seed, max_train_steps=3, output_dir=tmp_path / "whole"))


def test_what_an_earlier_run_made_is_moved_not_overwritten(train):
    output = train()
    before = (output / trainer.LORA_FILE).read_bytes()
    train(seed=2)
    assert (output / "earlier-1" / trainer.LORA_FILE).read_bytes() == before
    assert (output / "earlier-1" / "last-2").exists() and (output / "earlier-1" / "README.md").exists()
    assert (output / trainer.LORA_FILE).read_bytes() != before


def test_two_runs_may_write_the_same_file_at_once(tmp_path):
    """Though their processes have the same number, as in two containers."""
    path = tmp_path / "key.safetensors"
    with trainer.atomic_write(path, shared=True) as first, trainer.atomic_write(path, shared=True) as second:
        first.write_text("whole")
        second.write_text("whole")
    assert path.read_text() == "whole" and not leftovers(tmp_path)


@pytest.mark.parametrize("told", ["DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_memory_that_ran_out_by_any_name_is_told(train, monkeypatch, told):
    def fail(*_):
        raise RuntimeError(told)

    monkeypatch.setattr(trainer, "diffusion_loss", fail)
    with pytest.raises(trainer.TrainingError, match="cpu is out of memory .*--gradient_checkpointing"):
        train()


def test_the_command_that_goes_on_can_be_pasted(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "my loras" / "dog"
    with pytest.raises(trainer.Stopped) as stopped:
        train(max_train_steps=50, max_train_minutes=1e-6, output_dir=output)
    words = shlex.split(str(stopped.value).split("\n")[-1])
    assert words[:2] == ["accelerate", "launch"] and Path(words[2]) == SCRIPT
    assert (tmp_path / words[4] / "").samefile(output / trainer.CONFIG_FILE)


def test_a_killed_runs_leftovers_are_swept(train):
    output = Path(train.flags["output_dir"])
    (output / ".checkpoint-7.tmp").mkdir(parents=True)
    (output / ".checkpoint-7.tmp" / "state.pt").touch()
    train()
    assert not leftovers(output)


SMALL_DISK = """
import sys
sys.path.insert(0, sys.argv[1])
import train_dreambooth_lora_sdxl as trainer
with trainer.one_sentence():
    trainer.main(trainer.parse_args(sys.argv[2:]))
"""


@pytest.mark.parametrize(("kilobytes", "what"), [(8, "cache"), (300, "checkpoint"), (700, "a later checkpoint")])
def test_a_full_disk_is_one_sentence_and_what_was_there_is_whole(train, tmp_path, kilobytes, what):
    """In a tmpfs of so many kilobytes, mounted in a namespace of its own."""
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    words = train.words(output_dir=small / "out", checkpointing_steps=2, max_train_steps=8, rank=8)
    script = (
        f'mount -t tmpfs -o size={kilobytes}k tmpfs {small} && "$@"; code=$?; cp -r {small}/out {kept} && exit $code'
    )
    told = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", SMALL_DISK, str(SCRIPT.parent), *words],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 1, told.stderr
    error = told.stderr.replace("\r", "\n").splitlines()[-1]
    assert error.startswith("error: ") and "MB" in error and "free" in error and "Traceback" not in told.stderr
    assert not leftovers(kept)
    for checkpoint in trainer.list_checkpoints(kept):
        torch.load(checkpoint / "state.pt")
    assert bool(trainer.list_checkpoints(kept)) == (what == "a later checkpoint"), told.stderr


FILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import train_dreambooth_lora_sdxl as trainer
real, room = trainer.write_loras, int(sys.argv[2])
def write_loras(run, folder, model):
    if folder == run.output:  # the final save: something else has taken the disk meanwhile
        with open(run.output / "ballast", "wb") as ballast:
            ballast.write(bytes(max(0, trainer.free_bytes(run.output) - room)))
    real(run, folder, model)
trainer.write_loras = write_loras
with trainer.one_sentence():
    trainer.main(trainer.parse_args(sys.argv[3:]))
"""


def test_a_disk_that_is_full_at_the_final_save_leaves_the_last_checkpoint_whole(train, tmp_path):
    """And once there is room, the run goes on from it."""
    small, kept, steps = tmp_path / "small", tmp_path / "kept", {"max_train_steps": 3, "checkpointing_steps": 2}
    small.mkdir()
    whole = train(**steps, output_dir=tmp_path / "whole")
    room = (whole / trainer.LORA_FILE).stat().st_size // 2
    words = [str(room), *train.words(**steps, output_dir=small / "out")]
    script = f'mount -t tmpfs -o size=20m tmpfs {small} && "$@"; code=$?; cp -r {small}/out {kept} && exit $code'
    told = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", FILLED, str(SCRIPT.parent), *words],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 1, told.stderr
    error = told.stderr.replace("\r", "\n").splitlines()[-1]
    assert re.match(rf"error: .*{trainer.LORA_FILE} needs [\d.]+ MB, but [\d.]+ MB are free", error), told.stderr
    assert "Traceback" not in told.stderr and not leftovers(kept) and not (kept / trainer.LORA_FILE).exists()
    assert [folder.name for folder in trainer.list_checkpoints(kept)] == ["checkpoint-2"]
    train(**steps, output_dir=kept, resume_from_checkpoint="latest")
    assert same(kept, whole)


def test_a_gradient_that_overflows_is_named_too(train, monkeypatch):
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    real = trainer.diffusion_loss

    def overflowing(*arguments):
        told = real(*arguments)
        return told._replace(total=Overflow.apply(told.total))

    monkeypatch.setattr(trainer, "diffusion_loss", overflowing)
    with pytest.raises(trainer.TrainingError, match=r"step 1 has gradient norm (nan|inf), with .*\.png"):
        train()
    assert not (Path(train.flags["output_dir"]) / trainer.LORA_FILE).exists()


def test_a_collapsed_scaler_stops_with_advice(train):
    class Scaler:
        def get_scale(self):
            return 0.5

    run = trainer.start(train.args())
    progress = trainer.Progress(run, None, trainer.Schedule(10, 1.0, 1, 1), 0)
    progress.scaler = Scaler()
    loss = trainer.Loss(torch.tensor(1.0), torch.ones(1), torch.zeros(1, dtype=torch.long))
    progress.seen, progress.norms = [(1, ("a",), loss)], [(1, torch.tensor(math.inf))]
    with pytest.raises(trainer.TrainingError, match="scaler came down to 0.5.*bf16"):
        progress.report()


def test_a_scaler_skips_gradients_but_not_losses(train):
    """A gradient that overflows is the scaler's; a loss that is not finite is named."""

    class Scaler:
        def get_scale(self):
            return 1024.0

    def loss(value):
        return trainer.Loss(torch.tensor(value), torch.ones(1), torch.zeros(1, dtype=torch.long))

    batch = trainer.Batch(*[None] * 6, ("a.png",))
    progress = trainer.Progress(trainer.start(train.args()), None, trainer.Schedule(10, 1.0, 1, 1), 0)
    progress.scaler = Scaler()
    progress.add(trainer.Batch(*[None] * 6, ("innocent.png",)), loss(1.0))
    progress.end_step(torch.tensor(math.inf))
    progress.add(batch, loss(math.nan))
    progress.end_step(torch.tensor(math.nan))
    assert "step 2 has loss nan, with a.png" in progress.nonfinite_message([1.0, math.nan], [math.inf, math.nan])


@pytest.fixture
def with_scaler(monkeypatch):
    """Give accelerate fp16 and a gradient scaler on the CPU, which it refuses; the scale is told at each call."""
    make = trainer.make_accelerator

    def on_the_cpu(args, scale):
        reset_accelerate()  # the run before this one left fp16 there
        accelerator = make(argparse.Namespace(**{**vars(args), "mixed_precision": "no"}))
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
        return accelerator

    return lambda scale: monkeypatch.setattr(trainer, "make_accelerator", lambda args: on_the_cpu(args, scale))


def steps_taken(state) -> int:
    """How many of its steps the optimizer of a checkpoint has taken."""
    (taken,) = {int(moments["step"]) for moments in state["optimizer"]["state"].values()}
    return taken


def test_steps_that_overflow_in_fp16_are_left_out_by_the_scaler(train, with_scaler):
    """Their infinite norms are logged, and the run goes on."""
    with_scaler(2.0**36)
    output = train(mixed_precision="fp16", max_train_steps=20, checkpointing_steps=10)
    early, late = (torch.load(folder / "state.pt") for folder in trainer.list_checkpoints(output))
    assert early["scaler"]["scale"] == 2.0**26 and steps_taken(early) == 0  # each of ten halved it
    assert not any(tensor.any() for name, tensor in early["adapters"].items() if "lora_B" in name)
    assert 0 < steps_taken(late) < 10 and late["scaler"]["scale"] < 2.0**26
    assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in adapters(output).values())
    history = trainer.read_history(output)
    assert [entry["step"] for entry in history] == [10, 20]
    assert not math.isfinite(history[0]["grad_norm"]) and all(math.isfinite(entry["loss"]) for entry in history)


def test_a_resumed_run_in_fp16_goes_on_with_the_scaler_of_the_one_before(train, with_scaler, tmp_path):
    """Stopped after overflows and good steps; after two more the scale grows, and is too large once more."""
    flags = {"mixed_precision": "fp16", "max_train_steps": 8, "checkpointing_steps": 4, "lora_dropout": 0.2}
    with_scaler(2.0**24)
    whole = train(**flags, output_dir=tmp_path / "whole")
    with_scaler(2.0**16)  # which the checkpoint's replaces
    resumed = train(**flags, output_dir=tmp_path / "resumed", resume_from_checkpoint=whole / "checkpoint-4")
    assert same(whole, resumed)
    folders = whole / "checkpoint-4", whole / "checkpoint-8", resumed / "checkpoint-8"
    before, ours, theirs = (torch.load(folder / "state.pt") for folder in folders)
    assert 0 < steps_taken(before) < 4 and 0 < steps_taken(ours) - steps_taken(before) < 4
    assert before["scaler"]["_growth_tracker"] > 0 and ours["scaler"] == theirs["scaler"] != before["scaler"]
    for one, other in zip(trainer.tree_leaves(ours), trainer.tree_leaves(theirs), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_every_adapter_learns(train, monkeypatch):
    """Where B begins at zero, A moves from the second step on."""
    seen = []
    real = trainer.share_gradients
    monkeypatch.setattr(trainer, "share_gradients", lambda accelerator, adapters: (
        seen.append([adapter.grad.abs().max() for adapter in adapters]), real(accelerator, adapters)))  # fmt: skip
    train(max_train_steps=21, train_text_encoder=True)
    assert torch.tensor(seen).amax(0).min() > 0


def test_nothing_commands_the_terminal(train, capsys):
    train(instance_prompt="a \x1b[31mred\x07 dog\nLoRA stolen", log_level="info")
    told = capsys.readouterr().out
    assert "\x1b" not in told and r"\x1b[31mred\x07 dog LoRA stolen" in told


def test_what_is_only_to_look_at_costs_no_run(train, pictures, tmp_path, monkeypatch, capsys):
    """The pictures are moved and the file of prompts is removed while it trains; then the last validation fails."""
    import shutil

    moved, prompts = tmp_path / "moved", tmp_path / "prompts.txt"
    shutil.copytree(pictures, moved)
    prompts.write_text("a dog")
    real, calls = trainer.diffusion_loss, []

    def loss(*arguments):
        calls.append(None)
        if len(calls) == 2:
            shutil.rmtree(moved)
            prompts.unlink()
        return real(*arguments)

    flags = {"instance_data_dir": moved, "validation_prompt": prompts, "num_validation_images": 1}
    flags |= {"output_kohya_format": True, "checkpointing_steps": 3, "max_train_steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "diffusion_loss", loss)
        output = train(**flags)
    assert (output / trainer.KOHYA_FILE).exists() and (output / "README.md").exists()
    shutil.copytree(pictures, moved)
    prompts.write_text("a dog")
    real_decode, decoded = trainer.decode_latents, []

    def decode(*arguments):
        decoded.append(None)
        if len(decoded) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_decode(*arguments)

    monkeypatch.setattr(trainer, "decode_latents", decode)
    with pytest.raises(trainer.TrainingError, match="cpu is out of memory .*--gradient_checkpointing"):
        train(**flags, output_dir=tmp_path / "small")
    assert same(output, tmp_path / "small")



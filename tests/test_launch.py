"""`accelerate launch` in the ways in which people use it: quiet, with a configuration file, on two processes."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")
ALONE = (*LAUNCH, "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")


def test_accelerate_launch(train):
    told = train.shell(*ALONE, log_level="info")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("Subject") and "warn" not in told.stderr.lower()


def test_trap_5_accelerates_own_configuration_is_respected(train, tmp_path):
    """The file that write_basic_config() writes, with bf16 in it."""
    from accelerate.utils import write_basic_config

    config = tmp_path / "default_config.yaml"
    write_basic_config(mixed_precision="bf16", save_location=str(config))
    assert yaml.safe_load(config.read_text())["mixed_precision"] == "bf16"
    told = train.shell(*LAUNCH, "--config_file", str(config), log_level="info")
    assert told.returncode == 0, told.stderr
    assert "in bf16 on cpu" in told.stdout
    assert {t.dtype for t in load_file(Path(train.flags["output_dir"]) / trainer.LORA_FILE).values()} == {
        torch.float32
    }


@pytest.fixture(scope="module")
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_traps_7_31_34_37_two_processes_equal_one_with_twice_the_accumulation(train, tmp_path, free_port):
    flags = {
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "with_prior_preservation": True,
        "class_prompt": "a photo of a dog",
        "num_class_images": 3,
        "validation_prompt": "a dog",
        "num_validation_images": 3,
        "train_text_encoder": True,
        "random_flip": True,
        "learning_rate": 1e-3,
    }
    alone = train(
        **flags, output_dir=tmp_path / "alone", class_data_dir=tmp_path / "c1", gradient_accumulation_steps=4
    )
    # accelerate launch starts several processes for GPUs and MPI alone; torchrun, which it calls there, does it here
    two = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}")
    told = train.shell(
        *two,
        **flags,
        output_dir=tmp_path / "two",
        class_data_dir=tmp_path / "c2",
        gradient_accumulation_steps=2,
        log_level="info",
        env={"ACCELERATE_USE_CPU": "true"},
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("Subject") == 1 and "which is 6 passes" in told.stdout
    for index in range(3):
        first, second = (
            Image.open(tmp_path / folder / f"generated-{index:05d}.png").tobytes() for folder in ("c1", "c2")
        )
        assert max(abs(x - y) for x, y in zip(first, second, strict=True)) <= 2
    first, second = (load_file(folder / trainer.LORA_FILE) for folder in (alone, tmp_path / "two"))
    worst = max((first[name] - second[name]).abs().max().item() for name in first)
    assert worst < 1e-4, worst  # class pictures of another batch may differ by a grey level
    assert len(list((tmp_path / "two" / "validation").rglob("*.png"))) == 6
    assert (tmp_path / "two" / "checkpoint-4" / "state.pt").exists()


def test_gradients_are_shared_in_one_flat_tensor_of_four_bytes_a_parameter(train):
    """Once a step, whatever the accumulation; the frozen base is neither wrapped nor sent."""
    model = trainer.load_trainable(trainer.start(train.args(mixed_precision="bf16")))
    adapters = list(model.adapters().values())
    for number, adapter in enumerate(adapters):
        adapter.grad = torch.full_like(adapter, number)
    sent = []

    class TwoRanks:
        num_processes = 2

        def reduce(self, tensor, reduction):
            sent.append(tensor.nbytes)
            assert reduction == "mean" and tensor.dtype == torch.float32
            return tensor / 2

    trainer.share_gradients(TwoRanks(), adapters)
    assert sent == [4 * sum(adapter.numel() for adapter in adapters)]
    assert all((adapter.grad == number / 2).all() for number, adapter in enumerate(adapters))

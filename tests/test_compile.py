"""torch.compile, as accelerate is configured: it trains, validates, saves the same keys, resumes."""

import shutil

import pytest
import torch
from conftest import build_tiny, reset_accelerate
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

import train_dreambooth_lora_sdxl as trainer

FLAGS = {"max_train_steps": 4, "validation_prompt": "a dog", "num_validation_images": 1, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def nothing_compiled():
    """No test finds what another compiled, or the limit of graphs nearer for it."""
    torch._dynamo.reset()


def lora(output):
    return load_file(output / trainer.LORA_FILE)


def worst_difference(first, second) -> float:
    assert set(first) == set(second)
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("kind", ["regional", "full"])
def test_a_compiled_run_learns_the_same_and_resumes(train, tmp_path, monkeypatch, kind):
    """With the backend that needs no C++ compiler; inductor is tested below."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(kind == "regional"))
    compiled = train(**FLAGS, output_dir=tmp_path / "compiled", checkpointing_steps=2)
    resumed = train(**FLAGS, output_dir=tmp_path / "again", resume_from_checkpoint=compiled / "checkpoint-2")
    assert worst_difference(lora(compiled), lora(resumed)) == 0
    monkeypatch.undo()
    plain = train(**FLAGS, output_dir=tmp_path / "plain")
    assert worst_difference(lora(compiled), lora(plain)) < 1e-4
    assert len(list((compiled / "validation").rglob("*.png"))) == 2


@pytest.fixture
def deep(tmp_path):
    """Two levels with attention, as SDXL has: the repeated block comes in two widths."""
    return build_tiny(
        tmp_path / "deep",
        block_out_channels=(16, 32, 64),
        attention_head_dim=[2, 4, 8],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
    )


def test_buckets_are_compiled_for_once_more_and_not_once_each(train, tmp_path, monkeypatch, pictures, deep):
    """A run and a resumed one have the same bits; the backend counts its graphs."""
    counter, compile_, batch = CompileCounterWithBackend("aot_eager"), torch.compile, trainer.LatentDataset.batch
    backends, shapes, compiled = [], [], []

    def count_graphs(function, backend, **options):
        backends.append(backend)
        return compile_(function, backend=counter, **options)

    def note(*arguments, **more):
        made = batch(*arguments, **more)
        shapes.append(made.mean.shape)
        compiled.append(counter.frame_count)
        return made

    monkeypatch.setattr(torch, "compile", count_graphs)
    monkeypatch.setattr(trainer.LatentDataset, "batch", note)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for width in (16, 32, 48):
        Image.open(pictures / "0.png").resize((width, 16)).save(folder / f"{width}.png")
    flags = {"pretrained_model_name_or_path": deep, "instance_data_dir": folder, "train_batch_size": 1}
    flags |= {"max_train_steps": 6, "checkpointing_steps": 3, "aspect_ratio_buckets": "16x16,32x16,48x16"}
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    whole = train(**flags, output_dir=tmp_path / "whole")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    reset_accelerate()
    resumed = train(**flags, output_dir=tmp_path / "resumed", resume_from_checkpoint=whole / "checkpoint-3")
    assert worst_difference(lora(whole), lora(resumed)) == 0
    assert set(backends) == {"inductor", "aot_eager"} and len(set(shapes[:3])) == 3
    before, first, second, *later = compiled
    assert before == 0 < first < second <= 2 * first and len(later) == 6 and set(later) == {second}


def test_only_the_repeated_blocks_are_compiled_regionally(train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    run = trainer.start(train.args())
    compiled = [module for module in trainer.load_trainable(run).modules() if module._compiled_call_impl is not None]
    assert compiled and {type(module).__name__ for module in compiled} == {"BasicTransformerBlock"}


def test_inductor_compiles(train, tmp_path, monkeypatch):
    assert shutil.which("g++") or shutil.which("clang++"), "inductor needs a C++ compiler on the CPU"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    compiled = train(**FLAGS, mixed_precision="bf16", output_dir=tmp_path / "compiled")
    assert all(torch.isfinite(tensor).all() and tensor.abs().max() > 0 for tensor in lora(compiled).values())


def test_a_packed_base_compiles_too(train, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    flags = {**FLAGS, "base_precision": "nf4", "max_train_steps": 2, "gradient_checkpointing": True}
    compiled = train(**flags, output_dir=tmp_path / "compiled")
    monkeypatch.undo()
    assert worst_difference(lora(compiled), lora(train(**flags, output_dir=tmp_path / "plain"))) < 1e-4

"""torch.compile: by flag and by accelerate's configuration; it trains, validates, saves the same keys, resumes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer

FLAGS = {"max_train_steps": 4, "validation_prompt": "a dog", "num_validation_images": 1, "learning_rate": 1e-3}


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


def test_only_the_repeated_blocks_are_compiled_regionally(train, monkeypatch):
    run = trainer.start(train.args(torch_compile="regional"))
    compiled = [module for module in trainer.load_trainable(run).modules() if module._compiled_call_impl is not None]
    assert compiled and {type(module).__name__ for module in compiled} == {"BasicTransformerBlock"}


def test_the_flag_compiles_with_inductor(train, tmp_path):
    assert shutil.which("g++") or shutil.which("clang++"), "inductor needs a C++ compiler on the CPU"
    compiled = train(**FLAGS, torch_compile="regional", mixed_precision="bf16", output_dir=tmp_path / "compiled")
    assert all(torch.isfinite(tensor).all() and tensor.abs().max() > 0 for tensor in lora(compiled).values())


def test_a_packed_base_compiles_too(train, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    flags = {**FLAGS, "base_precision": "nf4", "max_train_steps": 2, "gradient_checkpointing": True}
    compiled = train(**flags, output_dir=tmp_path / "compiled")
    monkeypatch.undo()
    assert worst_difference(lora(compiled), lora(train(**flags, output_dir=tmp_path / "plain"))) < 1e-4

"""A run that stops and goes on equals one that never stopped, bit for bit: every pair of what might break that."""

import os
import signal
from pathlib import Path

import pytest
import torch
from pairs import assert_covers, flags_of, rows_of
from PIL import Image
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

import train_dreambooth_lora_sdxl as trainer

FEATURES = {
    "stop": {  # five pictures, two a batch: the second step is never an epoch's end
        "mid-epoch, fewer steps": {},
        "mid-epoch, SIGTERM": {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
        "mid-epoch, a crash later": {"lr_scheduler": "linear", "lr_warmup_steps": 0},
        "an epoch's end, SIGTERM": {"train_batch_size": 5},
    },
    "accumulation": {"none": {}, "of 3": {"gradient_accumulation_steps": 3}},
    "dropout": {"none": {}, "inputs": {"lora_dropout": 0.3}, "captions": {"caption_dropout": 0.5}},
    "crops": {"centre": {"center_crop": True}, "random, two a picture": {"repeats": 2}},
    "flips": {"none": {}, "random": {"random_flip": True}},
    "buckets": {"one": {}, "three": {"aspect_ratio_buckets": "16x16,24x16,16x24"}},
    "prior": {
        "none": {},
        "pictures": {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 3},
    },
    "text": {"frozen": {}, "LoRA": {"train_text_encoder": True}},
    "optimizer": {"adamw": {}, "adamw8bit": {"use_8bit_adam": True, "rank": 64}},  # smaller tensors stay in 32 bits
    "in between": {
        "nothing": {},
        "validation": {
            "validation_prompt": "a dog --s 2",
            "validation_steps": 1,
            "num_validation_images": 1,
        },
    },
    "precision": {
        "fp32": {},
        "bf16": {"mixed_precision": "bf16"},
        "nf4": {"base_precision": "nf4", "mixed_precision": "bf16"},
    },
}
ROWS = rows_of(FEATURES)
AT, LAST = 2, 4  # steps
MACHINES = {"samples_per_second", "peak_memory_gb"}  # of history.jsonl: what no two runs share


class CrashError(Exception):
    """A run that ends as nobody foresaw."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, Path]:
    """A cache for all rows, and class pictures, which nobody needs to draw."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "class").mkdir()
    for index, colour in enumerate(("brown", "gray", "white")):
        Image.new("RGB", (20 + 8 * index, 28), colour).save(folder / "class" / f"{index}.png")
    return {"cache_latents_dir": folder / "cache", "class_data_dir": folder / "class"}


def at_step(patch, number: int, act) -> None:
    """Do something in the middle of a step, between its gradients and its update."""
    real, looks = trainer.share_gradients, []

    def look(*arguments) -> None:
        looks.append(arguments)
        if len(looks) == number:
            act()
        real(*arguments)

    patch.setattr(trainer, "share_gradients", look)


def stop_in_the_middle(train, patch, how: str, **flags) -> None:
    """Train until the step at which the run is to stop."""
    if how == "fewer steps":
        train(**flags, max_train_steps=AT)
    elif how == "SIGTERM":
        at_step(patch, AT, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(trainer.Stopped, match=f"after step {AT};"):
            train(**flags, max_train_steps=LAST)
    else:
        at_step(patch, LAST, lambda: (_ for _ in ()).throw(CrashError()))
        with pytest.raises(CrashError):
            train(**flags, max_train_steps=LAST)


def assert_same(first: object, second: object) -> None:
    """Two trees are alike, tensors bit for bit."""
    (ours, shape), (theirs, other_shape) = tree_flatten(first), tree_flatten(second)
    assert shape == other_shape
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one, other) and one.dtype == other.dtype if isinstance(one, torch.Tensor) else one == other


def history(output: Path) -> list[dict[str, float]]:
    return [{key: entry[key] for key in entry.keys() - MACHINES} for entry in trainer.read_history(output)]


def test_every_pair_is_there():
    assert_covers(FEATURES, [], ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[" | ".join(row) for row in ROWS])
def test_trap_30_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(train, shared, tmp_path, monkeypatch, row):
    how, flags = row[0].partition(", ")[2], flags_of(FEATURES, row)
    shared = shared if "class_prompt" in flags else {"cache_latents_dir": shared["cache_latents_dir"]}
    drawing = {flag: flags.pop(flag) for flag in FEATURES["in between"][row[-2]]}  # of the stopped run alone
    flags |= {**shared, "checkpointing_steps": 2, "text_encoder_lr": 1e-2}
    whole = train(**flags, max_train_steps=LAST, output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_in_the_middle(train, patch, how, **flags, **drawing)
    output = Path(train.flags["output_dir"])
    assert [folder.name for folder in trainer.list_checkpoints(output)] == [f"checkpoint-{AT}"]
    train(**flags, **drawing, max_train_steps=LAST, resume_from_checkpoint="latest")
    ours, theirs = (load_file(folder / trainer.LORA_FILE) for folder in (whole, output))
    assert_same(ours, theirs)
    assert all(tensor.abs().max() > 0 for tensor in ours.values())  # every adapter learnt something
    assert ("text_encoder_2." in " ".join(ours)) == ("train_text_encoder" in flags)
    states = [torch.load(folder / f"checkpoint-{LAST}" / "state.pt") for folder in (whole, output)]
    assert_same(*states)
    kinds = {leaf.dtype for leaf in tree_flatten(states[0]["optimizer"])[0] if isinstance(leaf, torch.Tensor)}
    assert (torch.uint8 in kinds) == ("use_8bit_adam" in flags)
    assert [entry["step"] for entry in history(whole)] == [AT, LAST] and history(whole) == history(output)

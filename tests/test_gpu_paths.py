"""What exists for GPUs, as far as a CPU shows it: moves, copies, precision, graphs, what is decoded and written."""

import os
import threading
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train_dreambooth_lora_sdxl as trainer


def same(first: Path, second: Path) -> bool:
    ours, theirs = (load_file(folder / trainer.LORA_FILE) for folder in (first, second))
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


PRIOR = {"with_prior_preservation": True, "class_prompt": "a dog", "sample_batch_size": 1}


@pytest.mark.parametrize("recomputed", [False, True])
def test_models_are_moved_as_often_for_many_pictures_as_for_few(train, tmp_path, monkeypatch, recomputed):
    """The UNet and the VAE, where class pictures and latents are made and where a validation is."""
    counts = []
    for kind in (AutoencoderKL, UNet2DConditionModel):
        real = kind.to
        monkeypatch.setattr(
            kind, "to", lambda self, *rest, real=real, **more: counts.append(1) or real(self, *rest, **more)
        )
    real_move = trainer.move_frozen
    monkeypatch.setattr(trainer, "move_frozen", lambda *rest: counts.append(1) or real_move(*rest))
    seen = []
    for number in (2, 8):
        flags = {"num_class_images": number, "class_data_dir": tmp_path / f"class {number}", "max_train_steps": 1}
        flags |= {"validation_prompt": "a dog", "num_validation_images": number, "gradient_checkpointing": recomputed}
        train(**PRIOR, **flags, output_dir=tmp_path / str(number))
        seen.append(len(counts))
        counts.clear()
    assert seen[0] == seen[1] <= 16


def test_class_pictures_go_on_from_their_latents(train, tmp_path, monkeypatch):
    """A run that is killed while they are generated, or while they are decoded, generates none again."""
    flags = {**PRIOR, "num_class_images": 4, "class_data_dir": tmp_path / "class", "max_train_steps": 1}
    made, draw, save_picture = [], trainer.generate_latents, trainer.save_picture

    def noted(*rest):
        made.append(1)
        if len(made) == 3:
            raise RuntimeError("power")
        return draw(*rest)

    def saved(image, path, *rest):
        if path.name == "generated-00002.png" and len(made) < 6:
            made.append(1)
            raise RuntimeError("power")
        save_picture(image, path, *rest)

    monkeypatch.setattr(trainer, "generate_latents", noted)
    monkeypatch.setattr(trainer, "save_picture", saved)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="power"):
            train(**flags)
    train(**flags)
    assert len(made) == 6 and len(list((tmp_path / "class").glob("*.png"))) == 4
    whole = train(**{**flags, "class_data_dir": tmp_path / "again"}, output_dir=tmp_path / "whole")
    for path in (tmp_path / "class").glob("*.png"):
        assert Image.open(path).tobytes() == Image.open(tmp_path / "again" / path.name).tobytes()
    assert same(whole, Path(train.flags["output_dir"]))
    cached = {load_file(path).keys() == {"latents"} for path in (whole / "cache").glob("*.safetensors")}
    assert cached == {False}  # what was decoded is removed


def test_only_checkpoints_and_loras_are_written_through_to_the_disk(train, tmp_path, monkeypatch):
    """Not each cached view; and a file system that refuses ends nothing."""
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(1) or real(handle))
    counts = []
    for variants in (1, 6):
        monkeypatch.setattr(trainer, "CACHED_CROPS", variants)
        train(random_flip=True, output_dir=tmp_path / str(variants))
        counts.append(len(synced))
        synced.clear()
    assert counts[0] == counts[1] > 0

    def refuse(handle):
        raise OSError("not here")

    monkeypatch.setattr(os, "fsync", refuse)
    assert (train(output_dir=tmp_path / "refused") / trainer.LORA_FILE).exists()


def test_the_next_batch_is_read_while_this_one_is_computed(train, tmp_path, monkeypatch):
    """Where the latents are too many for the device: by another thread, one step ahead, to the same bits."""
    flags = {"max_train_steps": 6, "gradient_accumulation_steps": 2, "random_flip": True, "caption_dropout": 0.5}
    resident = train(**flags, output_dir=tmp_path / "resident")
    monkeypatch.setattr(trainer, "PRELOAD_BYTES", 0)
    threads, ahead, real, batch = [], [], trainer.TensorCache.get, trainer.LatentDataset.batch

    def noted(self, key):
        threads.append(threading.current_thread() is threading.main_thread())
        return real(self, key)

    def looked_at(self, table, order, n, stride=1):
        made = batch(self, table, order, n, stride)
        ahead.append(set(self.view.pending) == set(self.views_at(order, n + stride)))
        ahead.append(set(table.row.pending) == set(self.prompts_at(table, order, n + stride)))
        return made

    monkeypatch.setattr(trainer.TensorCache, "get", noted)
    monkeypatch.setattr(trainer.LatentDataset, "batch", looked_at)
    of_disk = train(**flags, output_dir=tmp_path / "disk")
    assert same(resident, of_disk) and len(ahead) == 24 and all(ahead)
    assert threads.count(False) > 8


def test_a_view_that_is_gone_is_told_though_a_thread_reads_it(train, monkeypatch):
    monkeypatch.setattr(trainer, "PRELOAD_BYTES", 0)
    real = trainer.diffusion_loss

    def loss(*arguments):
        for path in Path(train.flags["output_dir"], "cache").glob("*.safetensors"):
            path.unlink()
        return real(*arguments)

    monkeypatch.setattr(trainer, "diffusion_loss", loss)
    with pytest.raises(trainer.TrainingError, match="was removed or broken while training"):
        train(max_train_steps=10)


def test_pictures_are_decoded_once_and_not_again_while_their_files_stay(train, pictures, tmp_path, monkeypatch):
    import shutil

    made, decoded, real = tmp_path / "made", [], trainer.load_picture
    shutil.copytree(pictures, made)
    monkeypatch.setattr(trainer, "load_picture", lambda path, *rest: decoded.append(Path(path).name) or real(path))
    monkeypatch.setattr(trainer, "KNOWN_PICTURES", trainer.KnownPictures())
    flags = {"instance_data_dir": made, "cache_latents_dir": tmp_path / "cache", "repeats": 2, "random_flip": True}
    first = train(**flags)
    assert sorted(decoded) == [f"{i}.png" for i in range(5)]
    decoded.clear()
    trainer.KNOWN_PICTURES = trainer.KnownPictures()  # another process
    second = train(**flags, output_dir=tmp_path / "second")
    assert decoded == [] and same(first, second)
    Image.new("RGB", (40, 40), "red").save(made / "3.png")
    train(**flags, output_dir=tmp_path / "third")
    assert decoded == ["3.png"]
    (tmp_path / "cache" / trainer.KnownPictures.file).write_text("[broken")
    trainer.KNOWN_PICTURES = trainer.KnownPictures()
    train(**flags, output_dir=tmp_path / "fourth")
    assert len(decoded) == 6


class Backend:
    """Memory of a GPU, as torch.cuda tells it."""

    def __init__(self) -> None:
        self.now, self.calls = 0, []

    def max_memory_allocated(self) -> int:
        return self.now

    def empty_cache(self) -> None:
        self.calls.append("empty")

    def reset_peak_memory_stats(self) -> None:
        self.calls.append("reset")


def test_each_phase_has_its_own_peak_and_gives_back_what_it_reserved():
    memory = trainer.PhaseMemory(torch.device("cpu"))
    memory.begin("training")
    assert memory.measure() == {}
    memory.backend = Backend()
    for phase, peak in (("latents", 2e9), ("training", 5e9), ("validation", 7e9), ("training", 4e9)):
        memory.begin(phase)
        memory.backend.now = peak
    assert memory.measure() == {"latents": 2.0, "training": 5.0, "validation": 7.0}
    assert memory.backend.calls == ["empty", "reset"] * 4
    assert trainer.peak_memory_gb(memory) == 5.0


def test_the_phases_of_a_run_in_order(train, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(trainer.PhaseMemory, "begin", lambda self, phase: begun.append(phase))
    flags = {**PRIOR, "num_class_images": 1, "class_data_dir": tmp_path / "class", "validation_prompt": "a dog"}
    train(**flags, num_validation_images=1)
    validated = ["validation", "training"]
    assert begun == ["class pictures", "prompts", "latents", "training", *validated * 2]


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_a_precision_of_accelerates_that_is_not_trained_in_is_refused(train, monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", name)
    with pytest.raises(trainer.UserError, match=f"configured with mixed_precision {name}, .*--mixed_precision bf16"):
        train.args()
    assert train.args(mixed_precision="bf16").mixed_precision == "bf16"


class Products(TorchDispatchMode):
    """The dtypes of what matrix products and convolutions are computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition("::")[2].split(".")[0] in ("mm", "addmm", "bmm", "convolution"):
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [{}, {"lora_layers": "full"}, {"use_dora": True}], ids=["linear", "all", "DoRA"])
def test_all_adapters_compute_in_half_precision(train, flags):
    """peft computes convolutions and DoRA in float32 where it is not under autocast."""
    run = trainer.start(train.args(mixed_precision="bf16", **flags))
    model = trainer.load_trainable(run).train()
    inputs = (
        torch.randn(1, 4, 8, 8),
        torch.tensor([5]),
        (torch.randn(1, 24, 128).bfloat16(), torch.randn(1, 64).bfloat16()),
        torch.ones(1, 6),
    )
    with Products() as products:
        model(*inputs).float().square().mean().backward()
    assert products.dtypes == {torch.bfloat16}
    gradients = {adapter.grad.dtype for adapter in model.adapters.values() if adapter.grad is not None}
    assert gradients == {torch.float32}


def test_convolutions_learn_as_peft_does(train):
    model = trainer.load_trainable(trainer.start(train.args(lora_layers="full", lora_dropout=0.0)))
    with torch.no_grad():
        for adapter in model.adapters.values():
            adapter.normal_(0, 0.1)
    text = torch.randn(1, 24, 128), torch.randn(1, 64)
    inputs, found = (torch.randn(1, 4, 8, 8), torch.tensor([5]), text, torch.ones(1, 6)), []
    for lean in (True, False):
        model.use_fused_lora(lean)
        model.zero_grad()
        answer = model(*inputs)
        answer.square().mean().backward()
        found.append([answer, *(adapter.grad for adapter in model.adapters.values())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- compilation


def test_all_that_recompiles_together_stays_below_the_limit(train, tmp_path, monkeypatch, pictures, capsys):
    """Buckets, the base model's answers, validation, evaluation mode."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for width in (16, 32, 48, 64):
        Image.open(pictures / "0.png").resize((width, 16)).save(folder / f"{width}.png")
    flags = {"aspect_ratio_buckets": "16x16,32x16,48x16,64x16", "instance_data_dir": folder, "train_batch_size": 1}
    flags |= {"with_prior_preservation": True, "class_prompt": "a dog", "max_train_steps": 8}
    train(**flags, validation_prompt="a dog", num_validation_images=1, log_level="info")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Compiled")]
    assert 1 < int(line.split()[1]) < 20
    torch._dynamo.reset()

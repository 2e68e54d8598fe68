"""The peak memory of every phase of a run on SDXL itself, computed; with --measure, a step held against what happens.

    python benchmarks/memory.py                        # the table of README, about 5 minutes on a CPU
    python benchmarks/memory.py --measure --resolution 512 --recipes half    # a real step with random weights

Computed means: shapes only, in torch's FakeTensorMode, every storage counted; workspaces, fragmentation and a GPU's
own context come on top. Measured means: the same step with real tensors, counted alike, beside what the process or the
GPU says and the seconds it took. Please send back what it says on your card.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from full_size import write_configuration

import train_dreambooth_lora_sdxl as trainer

RECIPES = {
    "half, all kept": [],
    "half, 50 of 87 blocks": ["--checkpoint_blocks=50"],
    "half": ["--gradient_checkpointing"],
    "fp8": ["--gradient_checkpointing", "--base_precision=fp8"],
    "int8": ["--gradient_checkpointing", "--base_precision=int8"],
    "nf4": ["--gradient_checkpointing", "--base_precision=nf4"],
    "nf4, all kept": ["--base_precision=nf4"],
}


def start(base: Path, folder: Path, flags: list[str], resolution: int) -> trainer.Run:
    """A run of batch 1, rank 4, in bf16, with validation and prior preservation, one class picture at a time."""
    common = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": ROOT / "examples" / "toy_world" / "subjects" / "sks_dog",
        "instance_prompt": "a photo of sks dog",
        "validation_prompt": "a photo of sks dog in a bucket",
        "output_dir": folder / "out",
        "resolution": resolution,
        "train_batch_size": 1,
        "mixed_precision": "bf16",
        "report_to": "none",
    }
    return trainer.start(trainer.parse_args([*(f"--{key}={value}" for key, value in common.items()), *flags]))


def computed(run: trainer.Run) -> dict[str, int]:
    """Bytes of every phase, class pictures included."""
    args = argparse.Namespace(**{**vars(run.args), "with_prior_preservation": True, "sample_batch_size": 1})
    drawn = trainer.estimate_memory(trainer.replace(run, args=args))["class pictures"]
    return {**trainer.estimate_memory(run), "class pictures": drawn}


def random_weights(
    source: trainer.Source, part: str, dtype: torch.dtype, device: torch.device | None = None
) -> object:
    """A part with random weights, instead of load_part."""
    model = trainer.sketch(source, part).to(dtype).to_empty(device=device or "cpu")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.fill_(1.0) if "norm" in name and name.endswith("weight") else tensor.normal_(0, 0.01)
    return model.eval()


def measured(run: trainer.Run) -> dict[str, float]:
    """Bytes that a real training step makes: tensors counted, growth of the process or the GPU; and its seconds."""
    trainer.load_part = random_weights
    shape = (1, 4, run.args.resolution // 8, run.args.resolution // 8)
    device, gpu = run.device, run.device.type == "cuda"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with trainer.MemoryMeter() as meter:
        model = trainer.load_trainable(run).train()
        rows = (
            torch.randn(1, 77, 2048, dtype=run.dtype, device=device),
            torch.randn(1, 1280, dtype=run.dtype, device=device),
        )
        batch = trainer.Batch(
            *torch.rand(2, *shape, device=device),
            rows,
            torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], device=device),
            torch.ones(1, device=device),
            1,
        )
        objective = trainer.make_objective(run.scheduler, device=device)
        optimizer = trainer.make_optimizer(run.args, model, 1)
        meter.peak = meter.bytes
        for _ in range(2):
            began = time.perf_counter()
            trainer.diffusion_loss(model, objective, batch).backward()
            torch.nn.utils.clip_grad_norm_(list(model.adapters().values()), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "tensors": meter.peak,
        "process or GPU": torch.cuda.max_memory_allocated() if gpu else peak,
        "seconds": seconds,
    }


def main() -> None:
    """Print a row a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--measure", action="store_true", help="run a real step too; one recipe at a time is best")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_configuration(folder / "sdxl")
        for recipe in args.recipes:
            run = start(base, folder, RECIPES[recipe], args.resolution)
            peaks = computed(run)
            told = "  ".join(f"{phase} {peak / 1e9:.2f}" for phase, peak in peaks.items())
            print(f"{recipe:26} run {max(peaks.values()) / 1e9:.2f} GB = {told}", flush=True)
            if args.measure:
                found = measured(run)
                share = 100 * (peaks["training"] / found["tensors"] - 1)
                print(
                    f"{'':26} a real step: tensors {found['tensors'] / 1e9:.2f} GB (computed {share:+.1f} %), "
                    f"process or GPU {found['process or GPU'] / 1e9:.2f} GB, {found['seconds']:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()

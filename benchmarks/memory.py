"""The peak memory of every phase of a run on SDXL itself, computed; with --measure, a step held against what happens.

    python benchmarks/memory.py                        # the table of README, about 5 minutes on a CPU
    python benchmarks/memory.py --measure --resolution 512 --recipes half    # a real step with random weights

Computed means: shapes only, on torch's meta device, every storage counted; workspaces, fragmentation and a GPU's
own context come on top. Measured means: the same step with real tensors, counted alike, beside what the process or the
GPU says. Please send back what it says on your card.
"""

import argparse
import os
import resource
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

import estimate_memory
import torch
from full_size import start_run, training_step, write_configuration

import train_dreambooth_lora_sdxl as trainer

RECIPES = {
    "half, all kept": [],
    "half, 50 of 87 blocks": ["--gradient_checkpointing=50"],
    "half": ["--gradient_checkpointing"],
    "int8": ["--gradient_checkpointing", "--base_precision=int8"],
    "nf4": ["--gradient_checkpointing", "--base_precision=nf4"],
    "nf4, all kept": ["--base_precision=nf4"],
}


def computed(run: trainer.Run) -> dict[str, int]:
    """Bytes of every phase, class pictures included."""
    costs = estimate_memory.estimate_memory(run)
    costs["class pictures"] = estimate_memory.estimate_phase(with_prior(run), "class pictures")
    return {phase: cost.peak for phase, cost in costs.items()}


def with_prior(run: trainer.Run) -> trainer.Run:
    """The same run with class pictures: a step has two rows."""
    return estimate_memory.with_flags(run, with_prior_preservation=True, class_data_dir="class", class_prompt="a dog")


def measured(run: trainer.Run) -> dict[str, float]:
    """Bytes that two real training steps make: tensors counted, and the growth of the process or the GPU."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with estimate_memory.MemoryMeter() as meter:
        step = training_step(run)
        meter.begin()
        step()
        step()  # the moments are there
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    on_gpu = run.device.type == "cuda"
    return {"tensors": meter.peak, "process or GPU": torch.cuda.max_memory_allocated() if on_gpu else grown}


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
            run = start_run(base, folder, RECIPES[recipe], args.resolution)
            peaks = computed(run)
            told = "  ".join(f"{phase} {peak / 1e9:.2f}" for phase, peak in peaks.items())
            two_rows = estimate_memory.estimate_phase(with_prior(run), "training").peak
            told += f"; training with class pictures {two_rows / 1e9:.2f}"
            print(f"{recipe:26} run {max(peaks.values()) / 1e9:.2f} GB = {told}", flush=True)
            if args.measure:
                found = measured(run)
                share = 100 * (peaks["training"] / found["tensors"] - 1)
                print(
                    f"{'':26} a real step: tensors {found['tensors'] / 1e9:.2f} GB (computed {share:+.1f} %), "
                    f"process or GPU {found['process or GPU'] / 1e9:.2f} GB",
                    flush=True,
                )


if __name__ == "__main__":
    main()

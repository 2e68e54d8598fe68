"""What it takes from the command to the end of a run of one step, beside what its libraries take to be imported.

    python benchmarks/startup.py             # about 2 minutes

In turns: a process that imports torch, diffusers, transformers, peft and accelerate and loads the toy world's UNet;
the trainer with a warm cache and one step, which ends with its LoRA file and card written; and `--help`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy_world"
BARE = f"""
import torch, transformers, peft, accelerate, diffusers
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
UNet2DConditionModel.from_pretrained({str(TOY / "model" / "unet")!r})
"""


def seconds_of(command: list[str]) -> float:
    """Run a command that must succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return time.perf_counter() - began


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory() as folder:
        script = [sys.executable, str(ROOT / "train_dreambooth_lora_sdxl.py")]
        run = {
            "pretrained_model_name_or_path": TOY / "model",
            "instance_data_dir": TOY / "subjects" / "sks_dog",
            "instance_prompt": "a photo of sks dog",
            "resolution": 64,
            "max_train_steps": 1,
            "report_to": "none",
            "seed": 0,
            "output_dir": folder,
        }
        commands = {
            "imports and UNet": [sys.executable, "-c", BARE],
            "a run of one step": [*script, *(f"--{key}={value}" for key, value in run.items())],
            "--help": [*script, "--help"],
        }
        rows = [[seconds_of(command) for command in commands.values()] for _ in range(turns + 1)]
    rows = rows[1:]  # the first fills the cache, Python's own too
    for name, found in zip(commands, zip(*rows, strict=True), strict=True):
        print(f"{name:20}{statistics.median(found):6.2f} s")
    ratio = statistics.median(run / bare for bare, run, _ in rows)
    print(f"a run of one step takes {100 * ratio:.0f} % of imports and UNet")


if __name__ == "__main__":
    main()

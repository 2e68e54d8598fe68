"""Kill a run at random moments, again and again: does the next start always go on, and end as if nothing had been?

    python benchmarks/torture.py --kills 200             # about 20 minutes on two CPU cores

A run on the toy world, with class pictures, encoding, a checkpoint at every step, two of them kept, validation and
final saving, is started and killed by SIGKILL after a random time, and started again with the same command, until it
is finished; then the next one begins. After each kill no file under a final name may be broken; each finished LoRA has
to equal that of the run that nobody disturbed, bit for bit.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy_world"
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer


def words_of(folder: Path) -> list[str]:
    """The command line, the same for a first and for a next start."""
    flags = {
        "pretrained_model_name_or_path": TOY / "model",
        "instance_data_dir": TOY / "subjects" / "sks_dog",
        "instance_prompt": "a photo of a sks dog",
        "class_data_dir": folder / "class",
        "class_prompt": "a photo of a dog",
        "num_class_images": 3,
        "sample_batch_size": 1,
        "output_dir": folder / "out",
        "resolution": 64,
        "train_batch_size": 1,
        "max_train_steps": 20,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
        "validation_prompt": "a photo of a sks dog in a bucket",
        "num_validation_images": 1,
        "validation_steps": 10,
        "resume_from_checkpoint": "latest",
        "report_to": "none",
        "log_level": "error",
        "seed": 0,
    }
    return ["--with_prior_preservation", *(f"--{key}={value}" for key, value in flags.items())]


def start(folder: Path) -> int:
    """Fork a run, which saves the seconds of importing torch; returns its process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)
        trainer.main(trainer.parse_args(words_of(folder)))
        code = 0
    finally:
        os._exit(code)


def killed_after(process: int, seconds: float) -> bool:
    """Whether the kill came before the end. Raises RuntimeError where the run ended badly by itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"a run ended with status {status}")
            return False
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1] == signal.SIGKILL


def check(folder: Path) -> str:
    """Read every file that bears a final name; returns how far the run had come."""
    files = [path for path in folder.rglob("*") if path.is_file() and "/." not in str(path.relative_to(folder.parent))]
    for path in files:
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.name == "state.pt":
            torch.load(path, weights_only=True)
    names = {path.name for path in files}
    stages = {"state.pt": "training", trainer.CONFIG_FILE: "first steps", "generated-00002.png": "encoding"}
    if (folder / "out" / trainer.LORA_FILE).exists():
        return "final saving"
    return next((stage for name, stage in stages.items() if name in names), "class pictures")


def main() -> None:
    """Kill, check, go on; print where the kills fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments, fell, finished = random.Random(args.seed), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        undisturbed, folder = Path(name, "undisturbed"), Path(name, "tortured")
        began = time.monotonic()
        killed_after(start(undisturbed), 600)
        length = time.monotonic() - began
        wanted = load_file(undisturbed / "out" / trainer.LORA_FILE)
        while fell.total() < args.kills:
            if killed_after(start(folder), moments.uniform(0, length * moments.choice((0.1, 1)))):
                fell[check(folder)] += 1
                continue
            found = load_file(folder / "out" / trainer.LORA_FILE)
            if set(found) != set(wanted) or not all(torch.equal(found[key], wanted[key]) for key in wanted):
                raise RuntimeError(f"after {fell.total()} kills a finished LoRA differs from the undisturbed one")
            finished += 1
            shutil.rmtree(folder)
        killed_after(start(folder), 600)
        found = load_file(folder / "out" / trainer.LORA_FILE)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    print(f"{fell.total()} kills, {finished + 1} runs finished, each equal to the undisturbed one; no trace was left")
    print("they fell while: " + ", ".join(f"{stage} {count}" for stage, count in fell.most_common()))


if __name__ == "__main__":
    main()

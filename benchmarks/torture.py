"""Kill a run at random moments, again and again: does the next start always go on, and end as if nothing had been?

    python benchmarks/torture.py --kills 200             # about 20 minutes on two CPU cores

A run on the toy world, with class pictures, encoding, a checkpoint at every step, two of them kept, validation and
final saving, is started and killed by SIGKILL, and started again with the same command, until it is finished; then the
next one begins. Half of the kills come after a random time; the others wait for the name of an unfinished file or
folder to appear: while a checkpoint is written, while an old one is removed, while the LoRA is saved at the end. After
each kill no file under a final name may be broken, and the next start has to go on from the newest checkpoint that was
there; each finished LoRA has to equal that of the run that nobody disturbed, bit for bit.
"""

import argparse
import collections
import functools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy_world"
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer

STEPS, FOREVER = 20, 600.0  # of a run; seconds
MOMENTS = ("any", "writing", "removing", "saving", "any", "any")  # in turn
NAMES = {"writing": "writing a checkpoint", "removing": "removing a checkpoint", "saving": "saving the LoRA"}


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
        "max_train_steps": STEPS,
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
        trainer.resume = noting(trainer.resume, folder / "resumed")
        trainer.main(trainer.parse_args(words_of(folder)))
        code = 0
    finally:
        os._exit(code)


def noting(resume: Callable[..., int], note: Path) -> Callable[..., int]:
    """The trainer's own resume, which leaves the step that it found in a file."""

    def noted(*arguments: Any) -> int:
        step = resume(*arguments)
        note.write_text(str(step))
        return step

    return noted


def unfinished(output: Path, what: str, step: int) -> Path | None:
    """What is being written, removed or saved right now, once that step has come; what was left before is swept."""
    names = os.listdir(output) if (output.parent / "resumed").exists() else []
    if what == "saving":
        return output / f".{trainer.LORA_FILE}.tmp" if f".{trainer.LORA_FILE}.tmp" in names else None
    whole = max((trainer.step_of(Path(name)) or 0 for name in names), default=0)
    for name in names:
        found = re.fullmatch(r"\.(?:checkpoint|last)-(\d+)\.tmp", name)  # so is an old one before it is removed
        if found and step <= max(whole, int(found[1])) and (int(found[1]) > whole) == (what == "writing"):
            return output / name
    return None


def killed(process: int, seconds: float, is_due: Callable[[], Path | None] = lambda: None) -> str | None:
    """Kill a run after a time, or once what is due is there; returns whether it still was then ("in" or "after"), or
    None where the run had ended. Raises RuntimeError where it ended badly by itself.
    """
    deadline, place = time.monotonic() + seconds, None
    while place is None and time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"a run ended with status {status}")
            return None
        place = is_due()
        time.sleep(0 if place else 0.0002)  # to remove a checkpoint takes a millisecond
    os.kill(process, signal.SIGKILL)
    if os.waitpid(process, 0)[1] != signal.SIGKILL:
        return None
    return "in" if place and place.exists() else "after"


def newest(folder: Path) -> int:
    """The step of the newest checkpoint; 0 is none."""
    checkpoints = trainer.list_checkpoints(folder / "out")
    return torch.load(checkpoints[-1] / "state.pt", weights_only=True)["step"] if checkpoints else 0


def check_start(folder: Path, wanted: int) -> bool:
    """Whether a run came so far as to look for checkpoints. Raises RuntimeError unless it went on from that step."""
    note = folder / "resumed"
    step = note.read_text() if note.exists() else ""
    note.unlink(missing_ok=True)
    if step and int(step) != wanted:
        raise RuntimeError(f"a run went on from step {step} instead of {wanted}, the newest checkpoint's")
    return bool(step)


def check_end(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    """A finished run left the LoRA that was wanted, bit for bit, and nothing unfinished. Raises RuntimeError."""
    found = load_file(folder / "out" / trainer.LORA_FILE)
    if set(found) != set(wanted) or not all(torch.equal(found[key], wanted[key]) for key in wanted):
        raise RuntimeError("a finished LoRA differs from the undisturbed one")
    left = [path for path in folder.rglob("*.tmp") if "cache" not in path.parts]  # which others may be writing to
    if left:
        raise RuntimeError(f"a finished run left {left[0]} behind")


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
    moments, fell, finished, went_on = random.Random(args.seed), collections.Counter(), 0, 0
    with tempfile.TemporaryDirectory() as name:
        undisturbed, folder = Path(name, "undisturbed"), Path(name, "tortured")
        began = time.monotonic()
        killed(start(undisturbed), FOREVER)
        length = time.monotonic() - began
        wanted = load_file(undisturbed / "out" / trainer.LORA_FILE)
        while fell.total() < args.kills or folder.exists():
            before, what = newest(folder), MOMENTS[fell.total() % len(MOMENTS)]
            folder.mkdir(exist_ok=True)
            process = start(folder)
            if fell.total() == args.kills:  # what is left is to be finished
                how = killed(process, FOREVER)
            elif what == "any":
                how = killed(process, moments.uniform(0, length * moments.choice((0.1, 1))))
            else:
                is_due = functools.partial(unfinished, folder / "out", what, moments.randint(1, STEPS))
                how = killed(process, FOREVER, is_due)
            went_on += check_start(folder, before) and before > 0
            if how:
                stage = check(folder)
                fell[NAMES[what] if how == "in" else stage] += 1
                continue
            check_end(folder, wanted)
            finished += 1
            shutil.rmtree(folder)
    print(f"{fell.total()} kills, {finished} runs finished, each equal to the undisturbed one; no trace was left")
    places = ", ".join(f"{stage} {count}" for stage, count in fell.most_common())
    print(f"{went_on} starts went on from a checkpoint, each from the newest; the kills fell while: {places}")


if __name__ == "__main__":
    main()

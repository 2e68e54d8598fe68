"""Does it learn the subject, keep the place, and leave the class alone? On the toy world, as a table of numbers.

    python benchmarks/learning.py --out /tmp/learning            # about 45 minutes on two CPU cores
    python benchmarks/learning.py --methods bf16 int8 nf4        # does a quantized base learn as well?

Every row is a training run of train_dreambooth_lora_sdxl.py with the same flags, judged over 60 pictures of prompts
with the six places and 60 of the class prompt, drawn by diffusers' pipeline with load_lora_weights. crafts.py compares
more methods, over steps and seeds.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1")
ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy_world"
sys.path.insert(0, str(TOY))

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from judge import Judge
from PIL import Image
from scene import PLACES, SUBJECTS, sheet

FLAGS = {
    "resolution": 64,
    "rank": 8,
    "learning_rate": 2e-3,
    "max_train_steps": 550,
    "train_batch_size": 5,
    "seed": 0,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "report_to": "none",
    "checkpointing_steps": 10_000,
}
PRIOR = {"with_prior_preservation": True, "num_class_images": 100, "sample_batch_size": 10}
METHODS = {"plain": {}, "prior": PRIOR, "text encoder": {"train_text_encoder": True, "text_encoder_lr": 3e-4}}
PRECISIONS = {
    "bf16": {"mixed_precision": "bf16"},
    **{name: {"mixed_precision": "bf16", "base_precision": name} for name in ("int8", "nf4")},
}


def train(subject: str, method: str, seed: int, out: Path) -> Path:
    """Train one method on one subject; returns the folder with the LoRA."""
    class_name, folder = SUBJECTS[subject], out / f"{subject}-{method.replace(' ', '-')}-{seed}"
    flags = {
        "pretrained_model_name_or_path": TOY / "model",
        "instance_data_dir": TOY / "subjects" / subject,
        "instance_prompt": f"a photo of a sks {class_name}",
        "output_dir": folder,
        **FLAGS,
        **{**METHODS, **PRECISIONS}[method],
        "seed": seed,
    }
    if "with_prior_preservation" in flags:
        flags |= {"class_data_dir": out / f"{class_name}-pictures", "class_prompt": f"a photo of a {class_name}"}
    finished = folder / "finished"  # a LoRA alone may be that of a run that was stopped
    if finished.exists():
        return folder
    words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items()]
    subprocess.run([sys.executable, str(ROOT / "train_dreambooth_lora_sdxl.py"), *words], check=True)
    finished.touch()
    return folder


def draw(pipeline: StableDiffusionXLPipeline, prompts: list[str]) -> list[Image.Image]:
    """One picture a prompt, seeded by its number, as a user draws."""
    images = []
    for first in range(0, len(prompts), 10):
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(prompts[first : first + 10]))]
        images += pipeline(prompts[first : first + 10], num_inference_steps=25, generator=generators).images
    return images


def measure(subject: str, lora: Path | None, judge: Judge, a_place: int) -> tuple[dict[str, float], list[Image.Image]]:
    """Percentages over that many pictures a place, and as many of the class; and the first picture of every place.

    Drift is how far the class's pictures are from those that the untrained model draws with the same seeds: the root
    of the mean square, of 255 grey levels.
    """
    class_name = SUBJECTS[subject]
    pipeline = StableDiffusionXLPipeline.from_pretrained(TOY / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    count = a_place * len(PLACES)
    before = draw(pipeline, [f"a photo of a {class_name}"] * count)
    if lora:
        pipeline.load_lora_weights(lora)
    images = draw(pipeline, [f"a photo of a sks {class_name} {place}" for place in PLACES for _ in range(a_place)])
    shown = judge(images)
    after = draw(pipeline, [f"a photo of a {class_name}"] * count)
    kept = judge(after)
    distance = np.stack(after).astype(float) - np.stack(before)
    share = {
        "subject shown": sum(verdict.subjects[subject] > 0.5 for verdict in shown) / count,
        "place right": sum(verdict.place == PLACES[i // a_place] for i, verdict in enumerate(shown)) / count,
        "class shows subject": sum(verdict.subjects[subject] > 0.5 for verdict in kept) / count,
        "class right": sum(verdict.class_name == class_name for verdict in kept) / count,
    }
    percent = {name: 100 * value for name, value in share.items()}
    return {**percent, "drift": float(np.sqrt((distance**2).mean()))}, images[::a_place]


def main() -> None:
    """Print the table and save the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("/tmp/learning"))
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", default=["untrained", *METHODS])
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method and subject")
    parser.add_argument("--max_train_steps", type=int, default=FLAGS["max_train_steps"])
    parser.add_argument("--pictures", type=int, default=10, help="a place; six times as many in all")
    args = parser.parse_args()
    strangers = set(args.methods) - {"untrained", *METHODS, *PRECISIONS}
    if strangers:
        parser.error(f"no such method: {', '.join(strangers)}")
    FLAGS["max_train_steps"] = args.max_train_steps
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    judge, rows, pictures = Judge(), [], []
    for method in args.methods:
        for subject in args.subjects:
            measured = []
            for seed in range(args.seeds) if method != "untrained" else [0]:
                lora = train(subject, method, seed, args.out) if method != "untrained" else None
                shares, images = measure(subject, lora, judge, args.pictures)
                measured.append(shares)
                print(subject, method, seed, {name: round(share, 1) for name, share in shares.items()}, flush=True)
            rows.append((f"{subject}, {method}", measured))
            pictures += images
    sheet([picture.resize((128, 128), Image.Resampling.LANCZOS) for picture in pictures], len(PLACES)).save(
        args.out / "sheet.png"
    )
    names = list(rows[0][1][0])
    print("\nmean of the seeds, and their spread\n" + " | ".join(["run".ljust(24), *names]))
    for label, measured in rows:
        columns = [[shares[name] for shares in measured] for name in names]
        told = [f"{np.mean(column):.0f}" + f" ± {np.std(column):.0f}" * (len(column) > 1) for column in columns]
        print(" | ".join([label.ljust(24), *(text.rjust(len(name)) for text, name in zip(told, names, strict=True))]))


if __name__ == "__main__":
    main()

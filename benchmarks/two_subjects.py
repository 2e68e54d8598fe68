"""Two subjects in one LoRA: does each word show its own subject, and only that? On the toy world.

    python benchmarks/two_subjects.py --out /tmp/two_subjects     # about 20 minutes on two CPU cores

Runs of --subjects with both subjects and class pictures, each judged over 18 pictures a prompt in six places. "ohwx
dog" and "sks mug" have the word of the other subject: they should show none.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import subprocess

import crafts
import torch
import yaml
from learning import TOY
from scene import PLACES, SUBJECTS

WORDS = {"sks_dog": "sks", "sks_mug": "ohwx"}
PROMPTS = ("sks dog", "ohwx mug", "ohwx dog", "sks mug", "dog", "mug")
FLAGS = {**crafts.FLAGS, "with_prior_preservation": True, "lr_scheduler": "cosine", "checkpointing_steps": 10_000}


def train(seed: int, args: argparse.Namespace) -> Path:
    """Train both subjects in one run; returns its folder."""
    out = args.out
    folder, subjects = out / f"run-{seed}", out / "subjects.yaml"
    if (folder / "finished").exists():
        return folder
    entries = [{"folder": str(TOY / "subjects" / name), "prompt": f"a photo of a {WORDS[name]} {noun}",
                "class_prompt": f"a photo of a {noun}"} for name, noun in SUBJECTS.items()]
    subjects.write_text(yaml.safe_dump(entries))
    flags = {**FLAGS, "pretrained_model_name_or_path": TOY / "model", "subjects": subjects, "output_dir": folder,
             "class_data_dir": out / "class", "cache_latents_dir": out / "cache", "seed": seed,
             "max_train_steps": args.steps, "num_class_images": args.class_pictures}
    words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items()]
    ended = subprocess.run([sys.executable, ROOT / "train_dreambooth_lora_sdxl.py", *words], capture_output=True,
                           text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    (folder / "finished").touch()
    return folder


def study(seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train, and return for each prompt how many per cent of its pictures show what."""
    torch.set_num_threads(1)
    eyes, found = crafts.Eyes(args.pictures), {}
    folder = train(seed, args)
    for prompt in PROMPTS:
        places = [place for place in PLACES for _ in range(eyes.a_place)]
        verdicts = eyes.judge(eyes.draw([f"a photo of a {prompt} {place}" for place in places], range(len(places)),
                                        folder))
        noun = prompt.split()[-1]
        found[prompt] = {
            **{name: 100 * sum(v.subjects[name] > 0.5 for v in verdicts) / len(verdicts) for name in SUBJECTS},
            "class": 100 * sum(v.class_name == noun for v in verdicts) / len(verdicts),
            "place": 100 * sum(v.place == place for v, place in zip(verdicts, places, strict=True)) / len(verdicts)}
    return found


def table(studies: Sequence[dict[str, dict[str, float]]]) -> str:
    """Return a row a prompt."""
    lines = ["| a photo of a | shows the dog | shows the mug | class right | place right |", "|---|--:|--:|--:|--:|"]
    for prompt in PROMPTS:
        cells = [crafts.told([found[prompt][name] for found in studies]) for name in (*SUBJECTS, "class", "place")]
        lines.append(f"| {prompt} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Study three seeds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("two_subjects"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--class_pictures", type=int, default=100)
    parser.add_argument("--pictures", type=int, default=3, help="pictures of a prompt in each place")
    parser.add_argument("--measured", action="store_true", help="print the table of two_subjects.jsonl again")
    args = parser.parse_args()
    if args.measured:
        print(table([json.loads(line) for line in Path(__file__).with_suffix(".jsonl").read_text().splitlines()]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    studies = [study(0, args)]  # which generates the class pictures for all
    with ProcessPoolExecutor(2) as pool:
        studies += pool.map(study, range(1, args.seeds), [args] * (args.seeds - 1))
    (args.out / "two_subjects.jsonl").write_text("".join(json.dumps(found) + "\n" for found in studies))
    print(table(studies))


if __name__ == "__main__":
    main()

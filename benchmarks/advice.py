"""Does tools/evaluate.py advise well? On the toy world, where a judge knows what a picture shows.

    python benchmarks/advice.py --out /tmp/advice        # about 40 minutes on two CPU cores

Both subjects, three seeds, plain and with class pictures: 200 steps, a checkpoint every 50. The truth is the judge's
score (benchmarks/crafts.py): the mean of subject shown, place right and class kept, in per cent. The table says how
much of the best score among all checkpoints and strengths an advice loses.

In the place of DINOv2 and CLIP the tool has the features of the judge, which know how the subjects look, or, to see
what that is worth, those of a classifier that was trained on drawn scenes without the subjects.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

import crafts
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from judge import NO_COLOUR, Eye, Judge, disturb, to_pixels
from PIL import Image
from scene import CLASSES, COLOURS, PLACES, SUBJECTS, Scene, draw, random_scene
from torch import Tensor, nn

METHODS, STRENGTHS = ("plain", "prior pictures"), (0.6, 0.8, 1.0)


def train_eye(path: Path) -> Eye:
    """Train a classifier of class, colour and place on drawn scenes, none of which shows a subject; or read it."""
    eye = Eye()
    if not path.exists():
        torch.manual_seed(1)
        generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(7)
        scenes: list[Scene] = [random_scene(rng, any_colour=0.25) for _ in range(3200)]
        pixels = to_pixels([draw(scene) for scene in scenes])
        targets = torch.tensor([[CLASSES.index(scene.class_name), PLACES.index(scene.place),
                                 list(COLOURS).index(scene.colour) if isinstance(scene.colour, str) else NO_COLOUR]
                                for scene in scenes])
        optimizer = torch.optim.AdamW(eye.parameters(), lr=1e-3)
        for _ in range(8):
            for rows in torch.randperm(len(scenes), generator=generator).split(64):
                classes, colours, places, _ = eye(disturb(pixels[rows], generator))
                loss = sum(F.cross_entropy(answer, targets[rows, i])
                           for i, answer in enumerate((classes, places, colours)))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        torch.save(eye.state_dict(), path)
    eye.load_state_dict(torch.load(path, weights_only=True))
    return eye.eval()


class ToyEncoder:
    """In the place of DINOv2: features of a classifier. In that of CLIP: what it takes class and place for."""

    def __init__(self, eye: Eye, is_clip: bool) -> None:
        self.eye, self.is_clip = eye, is_clip

    @torch.no_grad()
    def images(self, paths: Sequence[Path]) -> Tensor:
        """Encode pictures to (N, features)."""
        pixels = to_pixels([Image.open(path) for path in paths])
        classes, _, places, _ = self.eye(pixels)
        features = torch.cat([classes.softmax(1), places.softmax(1)], 1) if self.is_clip else \
            self.eye.features(pixels * 2 - 1)
        return nn.functional.normalize(features, dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Encode texts to (N, features): which class and place they name."""
        return nn.functional.normalize(torch.tensor([[float(name in text) for name in (*CLASSES, *PLACES)]
                                                     for text in texts]), dim=1)


def truth(folder: Path, subject: str, judge: Judge) -> float:
    """Return the judge's score of a cell's pictures."""
    paths = sorted(folder.glob("*.png"))
    prompts = [Image.open(path).info["prompt"].split(" --n")[0] for path in paths]
    verdicts = list(zip(prompts, judge([Image.open(path) for path in paths]), strict=True))
    shown = [(prompt, verdict) for prompt, verdict in verdicts if "sks" in prompt]
    of_class = [verdict for prompt, verdict in verdicts if "sks" not in prompt]
    shares = ([verdict.subjects[subject] > 0.5 for _, verdict in shown],
              [verdict.place in prompt for prompt, verdict in shown],
              [v.class_name == SUBJECTS[subject] and v.subjects[subject] < 0.5 for v in of_class])
    return 100 * float(np.mean([np.mean(share) for share in shares]))


def study(run: crafts.Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train a run and evaluate it; return the tool's rows, each with its true score."""
    torch.set_num_threads(1)
    out = args.out
    crafts.train(run, out, args.steps)
    folder, class_name = run.folder(out), SUBJECTS[run.subject]
    prompts = out / f"{run.subject}.txt"
    prompts.write_text("\n".join(f"a photo of a sks {class_name} {place}" for place in PLACES))
    options = evaluate.make_parser().parse_args([
        str(folder), "--prompts", str(prompts), "--num_images", str(args.pictures), "--batch_size",
        str(args.pictures), "--strengths", *map(str, STRENGTHS)])
    judge, found = Judge(), {"run": run[:3]}
    for name, eye in (("knows the look", judge.eye), ("knows class, colour, place", train_eye(out / "eye.pt"))):
        encoders = [functools.partial(ToyEncoder, eye, is_clip) for is_clip in (False, True)]
        found[name] = evaluate.evaluate(options, *encoders)
        for row in found[name]:
            (pictures,) = (folder / "evaluation" / "pictures").glob(f"{row['checkpoint']}-{row['strength']:g}-*")
            row["score"] = truth(pictures, run.subject, judge)
    return json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 5))


def lost(rows: Sequence[dict[str, Any]], chosen: dict[str, Any]) -> float:
    """Return the points that a choice loses against the best."""
    return max(row["score"] for row in rows) - chosen["score"]


def table(studies: Sequence[dict[str, Any]]) -> str:
    """Return a row for each way to choose: points lost over the runs, mean and spread, and at most."""
    knowing, unknowing = [name for name in studies[0] if name != "run"]
    last = studies[0][knowing][-1]["checkpoint"]
    ways = {f"the advice, where the encoder {knowing}": (knowing, lambda rows: evaluate.rank(rows)[0]),
            f"the advice, where it {unknowing}": (unknowing, lambda rows: evaluate.rank(rows)[0]),
            "the last checkpoint at 1.0": (knowing, lambda rows: next(
                row for row in rows if row["checkpoint"] == last and row["strength"] == 1.0)),
            "most DINO-I": (knowing, lambda rows: max(rows, key=lambda row: row["dino_i"])),
            "most CLIP-T": (knowing, lambda rows: max(rows, key=lambda row: row["clip_t"]))}
    lines = ["| choice | points lost | at most | runs |", "|---|--:|--:|--:|"]
    for name, (encoder, choose) in ways.items():
        points = [lost(entry[encoder], choose(entry[encoder])) for entry in studies]
        lines.append(f"| {name} | {crafts.told(points, 1)} | {max(points):.1f} | {len(points)} |")
    return "\n".join(lines)


def main() -> None:
    """Study all runs, two at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("advice"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=3, help="pictures of a prompt")
    parser.add_argument("--measured", action="store_true", help="print the table of advice.jsonl again")
    args = parser.parse_args()
    record = Path(__file__).with_suffix(".jsonl")
    if args.measured:
        print(table([json.loads(line) for line in record.read_text().splitlines()]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    train_eye(args.out / "eye.pt")
    runs = [crafts.Run(subject, method, seed)
            for seed in range(args.seeds) for method in args.methods for subject in args.subjects]
    with ProcessPoolExecutor(2) as pool:
        studies = list(pool.map(study, runs, [args] * len(runs)))
    (args.out / "advice.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in studies))
    print(table(studies))


if __name__ == "__main__":
    main()

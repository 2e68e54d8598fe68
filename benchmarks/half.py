"""Half of the steps: is a recipe as good after 100 steps as plain training after 200? On subjects of its own.

    python benchmarks/half.py --out /tmp/half         # about 20 minutes on two CPU cores

The recipe was chosen on the dog and the mug of the toy world (`--chosen` trains it there, too). It is tested on a cat,
a car and a duck, on which nothing was chosen, with five seeds. All are judged as in crafts.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import crafts
import torch
from judge import Judge
from scene import SUBJECTS, UNSEEN, write_subjects

crafts.METHODS["half"] = {"with_prior_preservation": True, "loss_weighting": "debiased", "learning_rate": 4e-3,
                          "lr_scheduler": "cosine"}
STEPS = {"plain": 200, "half": 100}
NAMES = ("subject shown", "place right", "class kept", "drift")


def study(run: crafts.Run, args: argparse.Namespace) -> dict[str, object]:
    """Train a run of an unseen subject, and judge its checkpoints."""
    torch.set_num_threads(1)
    subjects = SUBJECTS if run.subject in SUBJECTS else UNSEEN
    crafts.SUBJECTS = subjects
    crafts.some_pictures = lambda subject, count, out: args.out / "subjects" / subject
    eyes = crafts.Eyes(args.pictures)
    eyes.judge = Judge(subjects)
    found = crafts.study(run, args.out, args.steps or STEPS[run.method], eyes)
    return {"run": run[:3], "curve": found.curve, "seconds": found.seconds}


def table(studies: Sequence[dict[str, object]]) -> str:
    """Return a row a method and number of steps, over the unseen subjects and seeds."""
    lines = ["| method | steps | " + " | ".join(NAMES) + " | runs |", "|---|--:|--:|--:|--:|--:|--:|"]
    kinds = dict.fromkeys((entry["run"][1], step) for entry in studies for step in map(int, entry["curve"]))
    for method, step in sorted(kinds):
        curves = [{int(at): seen for at, seen in entry["curve"].items()} for entry in studies
                  if entry["run"][1] == method]
        cells = [crafts.told([curve[step][name] for curve in curves]) for name in NAMES]
        lines.append(f"| {method} | {step} | " + " | ".join(cells) + f" | {len(curves)} |")
    return "\n".join(lines)


def main() -> None:
    """Study all runs, two at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("half"))
    parser.add_argument("--chosen", action="store_true", help="the subjects that the recipe was chosen on")
    parser.add_argument("--subjects", nargs="+", help="default: all")
    parser.add_argument("--methods", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="another number of steps for all")
    parser.add_argument("--pictures", type=int, default=3, help="pictures of a prompt in each place")
    parser.add_argument("--measured", action="store_true", help="print the table of half.jsonl again")
    args = parser.parse_args()
    record = Path(__file__).with_suffix(".jsonl")
    if args.measured:
        print(table([json.loads(line) for line in record.read_text().splitlines()]))
        return
    subjects = SUBJECTS if args.chosen else UNSEEN
    write_subjects(args.out / "subjects", subjects=subjects)
    Judge(subjects)
    runs = [crafts.Run(subject, method, seed)
            for seed in range(args.seeds) for method in args.methods for subject in args.subjects or subjects]
    with ProcessPoolExecutor(2) as pool:
        studies = list(pool.map(study, runs, [args] * len(runs)))
    (args.out / "half.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in studies))
    print(table(studies))


if __name__ == "__main__":
    main()

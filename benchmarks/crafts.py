"""Which craft changes what is learnt, after how many steps, and at what cost? On the toy world, over seeds.

    python benchmarks/crafts.py --out /tmp/crafts                              # every method: a night on two cores
    python benchmarks/crafts.py --out /tmp/crafts --methods plain min-SNR DoRA --seeds 1
    python benchmarks/crafts.py --measured > benchmarks/crafts.md              # the tables again, in seconds

The rate is constant after its warm-up, so that a checkpoint is what a run of so many steps leaves, and one run tells a
whole curve. What was found stays in --out, and what was found here lies beside, in crafts.jsonl, a line a run: a study
that was stopped goes on, a larger one begins with it, and two processes with other methods each may fill it together.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.update(HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "toy_world"))

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from judge import Judge
from learning import ROOT, TOY
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from scene import PLACES, SUBJECTS

FLAGS = {
    "resolution": 64,
    "rank": 8,
    "learning_rate": 2e-3,
    "train_batch_size": 5,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 20,
    "report_to": "none",
    "checkpointing_steps": 50,
    "sample_batch_size": 10,
    "num_class_images": 100,
}
TOKENS = "<s0><s1>"
METHODS = {
    "plain": {},
    "prior pictures": {"with_prior_preservation": True},
    "prior base_model": {"with_prior_preservation": True, "class_data_dir": None},
    "text encoders": {"train_text_encoder": True, "text_encoder_lr": 3e-4},
    "new tokens": {"train_text_encoder_ti": True, "train_text_encoder_frac": 1.0, "token_lr": 3e-3},
    "min-SNR": {"snr_gamma": 5},
    "debiased": {"loss_weighting": "debiased"},
    "huber": {"loss_type": "huber"},
    "noise offset": {"noise_offset": 0.05},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "attention+ff": {"lora_layers": "attention+ff"},
    "full": {"lora_layers": "full"},
    "EMA": {"use_ema": True},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1},
    "schedule-free": {"optimizer": "schedule_free"},
    "adafactor": {"optimizer": "adafactor"},
    "auto, 5 pictures": {"steps_per_image": "auto", "pictures": 5},
    "auto, 3 pictures": {"steps_per_image": "auto", "pictures": 3, "train_batch_size": 3},
    "bf16": {"mixed_precision": "bf16"},
    "bf16 autocast": {"mixed_precision": "bf16", "autocast": True},
    "fp16": {"mixed_precision": "fp16"},
    "fp16 autocast": {"mixed_precision": "fp16", "autocast": True},
    "base in int8": {"base_precision": "int8"},
    "base in nf4": {"base_precision": "nf4"},
}
REMOVED = ("prior dco", "p2", "smooth l1", "perturbation", "earlier", "later", "PiSSA", "OLoRA", "orthogonal",
           "kaiming", "lion 8 bit", "lion 8 bit at 1e-4", "base in fp8",  # up to 3cef2f2: removed for what they show
           "logit-normal", "LoRA+", "LoRA+, same rate")  # up to 1e5b301
NO_FLAGS = ("pictures", "autocast")  # what this file does for a method
PICTURED = ("plain", "prior pictures", "prior base_model", "text encoders", "debiased", "DoRA", "EMA", "prodigy")


class Run(NamedTuple):
    """One training run of the study."""

    subject: str
    method: str
    seed: int
    rate: float | None = None  # another than the flags'

    def folder(self, out: Path) -> Path:
        """Where it is kept."""
        method = self.method if self.rate is None else f"rate {self.rate:g}"
        return out / f"{self.subject}-{method.replace(' ', '-')}-{self.seed}"

    def flags(self, out: Path, steps: int) -> dict[str, object]:
        """Its command line."""
        class_name, method = SUBJECTS[self.subject], METHODS[self.method]
        word = "TOK" if "train_text_encoder_ti" in method else "sks"
        prior = {"class_prompt": f"a photo of a {class_name}", "class_data_dir": out / f"{class_name}-pictures"}
        prior = prior if "with_prior_preservation" in method else {}
        flags = {**FLAGS, **prior, **method}
        return {
            "pretrained_model_name_or_path": TOY / "model",
            "instance_data_dir": some_pictures(self.subject, method.get("pictures"), out),
            "instance_prompt": f"a photo of a {word} {class_name}",
            "output_dir": self.folder(out),
            "cache_latents_dir": out / "cache",
            "seed": self.seed,
            **({} if "steps_per_image" in method else {"max_train_steps": steps}),
            **{name: value for name, value in flags.items() if value is not None and name not in NO_FLAGS},
        }


def some_pictures(subject: str, count: int | None, out: Path) -> Path:
    """A folder with all of a subject's pictures, or with the first few."""
    folder = TOY / "subjects" / subject
    if count is None:
        return folder
    some = out / f"{subject}-first-{count}"
    some.mkdir(exist_ok=True)
    for path in sorted(folder.iterdir())[:count]:
        shutil.copy(path, some)
    return some


def train(run: Run, out: Path, steps: int) -> float:
    """Train unless it is done; returns its seconds of processor time, on one thread."""
    finished = run.folder(out) / "finished"  # a LoRA alone may be that of a run that was stopped
    if not finished.exists():
        flags, began = run.flags(out, steps), processor_seconds()
        words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items()]
        method, environment = METHODS[run.method], {**os.environ, "OMP_NUM_THREADS": "1"}
        script = ROOT / "train_dreambooth_lora_sdxl.py"
        if "mixed_precision" in method:  # which accelerate has on GPUs only
            script = ROOT / "benchmarks" / "half_precision.py"
            environment |= {"AUTOCAST": "1"} if method.get("autocast") else {}
        ended = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environment)
        if ended.returncode:
            raise SystemExit(ended.stderr)
        finished.write_text(str(processor_seconds() - began))
    return float(finished.read_text())


def processor_seconds() -> float:
    """What all finished children have used; other work on the machine hardly changes it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Found(NamedTuple):
    """What a run took and what was seen of it."""

    seconds: float  # of a processor
    machine: str  # by its kernels; other machines' seconds are other seconds
    curve: dict[int, dict[str, float]]  # what was judged, by step
    monitor: dict[int, dict[str, float]]  # fit, drift and their rest at these steps, up to 3cef2f2


class Record:
    """What was found, in a file of one line a run: that of this repository is read, that of --out written as well."""

    def __init__(self, out: Path, steps: int, pictures: int) -> None:
        self.file, self.how = out / "runs.jsonl", {"steps": steps, "pictures": pictures}
        self.found: dict[Run, list[Found]] = defaultdict(list)  # once a machine
        for path in (Path(__file__).with_suffix(".jsonl"), self.file):
            for line in path.read_text().splitlines() if path.exists() else ():
                entry = json.loads(line)
                if entry["how"] == self.how:
                    curve, monitor = ({int(step): seen for step, seen in part.items()} for part in entry["seen"])
                    self.found[Run(*entry["run"])] += [Found(entry["seconds"], entry["machine"], curve, monitor)]

    def add(self, run: Run, found: Found) -> None:
        """Write one down."""
        self.found[run] += [found]
        line = {"run": run, "how": self.how, "seconds": found.seconds, "machine": found.machine,
                "seen": [found.curve, found.monitor]}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Eyes:
    """Draws with a LoRA as a user does, and judges what it shows."""

    def __init__(self, a_place: int) -> None:
        self.judge, self.a_place, self.before = Judge(), a_place, {}

    def draw(self, prompts: Sequence[str], seeds: Iterable[int], lora: Path | None) -> list[Image.Image]:
        """One picture a prompt; eight steps of DPM-Solver++ are as good here as 25 of Euler."""
        pipeline = StableDiffusionXLPipeline.from_pretrained(TOY / "model", torch_dtype=torch.float32)
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        if lora:
            pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
        if lora and (lora / "embeddings.safetensors").exists():
            rows = load_file(lora / "embeddings.safetensors")
            words = TOKENS.replace("><", "> <").split()
            for name, end in (("clip_l", ""), ("clip_g", "_2")):
                encoder, tokenizer = getattr(pipeline, f"text_encoder{end}"), getattr(pipeline, f"tokenizer{end}")
                pipeline.load_textual_inversion(rows[name], token=words, text_encoder=encoder, tokenizer=tokenizer)
            pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(list(prompts), num_inference_steps=8, generator=generators).images

    def look(self, run: Run, lora: Path) -> dict[str, float]:
        """Percentages, and the drift of the class's pictures in grey levels; kept beside the LoRA."""
        kept = lora / "judged.json"
        if not kept.exists():
            class_name, places = SUBJECTS[run.subject], [place for place in PLACES for _ in range(self.a_place)]
            word = TOKENS if "train_text_encoder_ti" in METHODS[run.method] else "sks"
            prompts = [f"a photo of a {word} {class_name} {place}" for place in places]
            of_class, seeds = [f"a photo of a {class_name}"] * len(places), range(len(places))
            if class_name not in self.before:
                self.before[class_name] = np.stack(self.draw(of_class, seeds, None)).astype(float)
            drawn = self.draw([*prompts, *of_class], [*seeds, *seeds], lora)
            after = drawn[len(places):]
            shown, seen = self.judge(drawn[: len(places)]), self.judge(after)
            share = {
                "subject shown": [verdict.subjects[run.subject] > 0.5 for verdict in shown],
                "place right": [verdict.place == place for verdict, place in zip(shown, places, strict=True)],
                "class kept": [v.class_name == class_name and v.subjects[run.subject] < 0.5 for v in seen],
            }
            percent = {name: 100 * float(np.mean(values)) for name, values in share.items()}
            drift = float(np.sqrt(((np.stack(after) - self.before[class_name]) ** 2).mean()))
            kept.write_text(json.dumps({**percent, "drift": drift}))
        return json.loads(kept.read_text())


def study(run: Run, out: Path, steps: int, eyes: Eyes) -> Found:
    """Train a run, and judge all its checkpoints."""
    seconds = train(run, out, steps)
    history = {entry["step"]: entry for entry in map(json.loads, (run.folder(out) / "history.jsonl").open())}
    if "steps_per_image" in METHODS[run.method]:  # its length is its own: only the end is judged
        folders = {max(history): run.folder(out)}
    else:
        every = range(FLAGS["checkpointing_steps"], steps + 1, FLAGS["checkpointing_steps"])
        folders = {step: run.folder(out) / f"checkpoint-{step}" for step in every}
    curve = {step: eyes.look(run, folder) for step, folder in folders.items()}
    rounded = {name: round(value) for name, value in curve[max(curve)].items()}
    print(*run, rounded, f"{seconds:.0f} s", file=sys.stderr, flush=True)
    return Found(seconds, torch.backends.cpu.get_cpu_capability(), curve, {})


def steps_to(curve: dict[int, dict[str, float]], percent: float) -> float:
    """The first step that was judged to show the subject so often; nan if none was."""
    return next((step for step, seen in curve.items() if seen["subject shown"] >= percent), float("nan"))


def score(seen: dict[str, float]) -> float:
    """What a user wants of a checkpoint, 0 to 100: the subject, where the prompt says, and the class as it was."""
    return (seen["subject shown"] + seen["place right"] + seen["class kept"]) / 3


RULES = {  # from loss on the subject (fit) and change of the class (drift), by step, to a step
    "the last": lambda seen: max(seen),
    "DVAR < 0.15": lambda seen: next((s for s, e in seen.items() if e.get("monitor/rest", 1) < 0.15), max(seen)),
    "least fit + drift": lambda seen: min(seen, key=lambda s: seen[s]["monitor/fit"] + seen[s]["monitor/drift"]),
    "least fit": lambda seen: min(seen, key=lambda s: seen[s]["monitor/fit"]),
}


def stopping(runs: Iterable[Found]) -> str:
    """How much of the best step's score each rule for choosing a step loses: mean, spread and worst over the runs; and
    how much less than the last step, with the error of the mean.
    """
    rows = ["| rule | points lost | worst | better than the last by |", "|---|---|---|---|"]
    chosen = {name: np.array([score(found.curve[rule(found.monitor)]) for found in runs])
              for name, rule in RULES.items()}
    best = np.array([max(map(score, found.curve.values())) for found in runs])
    for name, scores in chosen.items():
        gain, lost = scores - chosen["the last"], best - scores
        error = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else math.nan
        rows.append(f"| {name} | {told(lost)} | {max(lost):.0f} | {gain.mean():.1f} ± {error:.1f} |")
    return "\n".join(rows)


def told(values: Sequence[float], digits: int = 0) -> str:
    """Mean and spread."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def pace_of(runs: Iterable[Found]) -> dict[str, float]:
    """The mean seconds of these runs, by machine."""
    runs = list(runs)
    return {machine: np.mean([found.seconds for found in runs if found.machine == machine])
            for machine in {found.machine for found in runs}}


def table(studies: dict[str, list[Found]], pace: dict[str, float]) -> str:
    """A row a method: what the last checkpoint shows, over subjects, seeds and machines, and its time over pace's."""
    names = ("subject shown", "place right", "class kept", "drift")
    rows = ["| method | " + " | ".join((*names, "steps to 90 %", "time", "runs")) + " |", "|---" * 8 + "|"]
    for method, runs in studies.items():
        lasts = [found.curve[max(found.curve)] for found in runs]
        reached = [steps_to(found.curve, 90) for found in runs]
        known = [step for step in reached if step == step]  # nan is not itself
        late = f"{told(known)}" if known else "never"
        late += f" ({len(known)} of {len(reached)})" if 0 < len(known) < len(reached) else ""
        cells = [told([last[name] for last in lasts]) for name in names]
        times = [found.seconds / pace[found.machine] for found in runs if found.machine in pace]
        cells += [late, told(times, 2) if times else "", str(len(runs))]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


PAGE = """# What each method changes

Printed by `python benchmarks/crafts.py --measured` from `crafts.jsonl`, where each run has a line. On the toy world,
both subjects, the seeds 0, 1 and 2 (a run on a machine with other kernels is another run): 200 steps of 5 pictures at
a constant rate of 2e-3 after 20 steps of warm-up, rank 8, and what `METHODS` in `crafts.py` adds for a method.

Mean ± spread over the runs. Shown, right and kept are % of 18 pictures a run, told by a classifier that has seen
drawn scenes only: of "a photo of sks dog" in six places how many show the subject, and the place; of "a photo of a
dog" how many show a dog that is not the subject. Drift is how far the latter moved from what the untrained model
draws with the same seeds, in grey levels of 255. Then the steps after which 90 % showed the subject (looked at every
50), and in how many of the runs; and processor time, where plain is 1 (that of class pictures is with the run that
drew them).

{methods}

The trainer has these no longer, as they were not better than what it keeps (measured with commits up to 1e5b301):

{removed}

## When to stop

Without prior, at rates of 5e-4, 1e-3 and 2e-3: a step's score is the mean of shown, right and kept; this is what a
rule for choosing one of the steps 50, 100, 150 and 200 loses against the best of them, over {runs} runs. Fit is the
loss on the subject's pictures at fixed noise, drift the change of the predictions for the class prompt. No rule is
better than the last step by enough, so the flag that computed them, `--monitor_steps`, was removed.

{rules}
"""


def picture(studies: dict[str, list[Found]], side: int = 420, edge: int = 46) -> Image.Image:
    """The trade-off: for each method a line over its steps, how far the class drifts (across), subject shown (up)."""
    colours = ("#0b57d0", "#c5221f", "#188038", "#e37400", "#8430ce", "#00838f", "#5f6368", "#b80672")
    page = Image.new("RGB", (side + 2 * edge + 150, side + 2 * edge), "white")
    pen = ImageDraw.Draw(page)
    pen.rectangle((edge, edge, edge + side, edge + side), outline="#888")
    for share in (0, 25, 50, 75, 100):
        pen.text((edge + side * share / 100 - 6, edge + side + 6), str(share), fill="black")
        pen.text((edge - 26, edge + side * (1 - share / 100) - 6), str(share), fill="black")
    pen.text((edge, 8), "subject shown, % (up) against drift of the class, grey levels (across);", fill="black")
    pen.text((edge, 22), f"a dot every {FLAGS['checkpointing_steps']} steps, mean of both subjects and all seeds",
             fill="black")
    for (method, runs), colour in zip(studies.items(), colours, strict=False):
        means = [[np.mean([found.curve[step][name] for found in runs]) for name in ("drift", "subject shown")]
                 for step in runs[0].curve]
        line = [(edge + side * x / 100, edge + side * (1 - y / 100)) for x, y in [(0.0, 0.0), *means]]
        pen.line(line, fill=colour, width=3)
        for i, (x, y) in enumerate(line):
            radius = 6 if i == len(line) - 1 else 3
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        row = edge + 22 * list(studies).index(method)
        pen.rectangle((edge + side + 20, row, edge + side + 34, row + 12), fill=colour)
        pen.text((edge + side + 42, row), method, fill="black")
    return page


def main() -> None:
    """Print the table and draw the trade-off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("/tmp/crafts"))
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=3, help="a place; six times as many in all")
    parser.add_argument("--measured", action="store_true", help="train nothing: tell what was found before")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    record, eyes = Record(args.out, args.steps, args.pictures), None
    wanted = [Run(subject, method, seed)
              for method in args.methods for seed in range(args.seeds) for subject in args.subjects]
    for run in wanted if not args.measured else ():
        if not record.found[run]:
            eyes = eyes or Eyes(args.pictures)
            record.add(run, study(run, args.out, args.steps, eyes))
    told_of = [found for run, runs in record.found.items() if run.rate is not None for found in runs]
    studies = {method: [found for run in wanted if run.method == method for found in record.found[run]]
               for method in args.methods}
    studies = {method: runs for method, runs in studies.items() if runs}
    pace = pace_of(studies.get("plain", ()))
    if args.measured:
        removed = {method: [found for run, runs in record.found.items() if run.method == method for found in runs]
                   for method in REMOVED}
        print(PAGE.format(methods=table(studies, pace), removed=table(removed, pace), runs=len(told_of),
                          rules=stopping(told_of)), end="")
    else:
        print(table(studies, pace))
    shown = PICTURED if args.measured else args.methods
    curves = {method: runs for method, runs in studies.items() if method in shown and len(runs[0].curve) > 1}
    picture(dict(list(curves.items())[:8])).save(args.out / "trade_off.png")


if __name__ == "__main__":
    main()

"""Measure a run's checkpoints: how well each shows the subject, follows the prompt and leaves the class alone.

    python tools/evaluate.py lora-sks-dog
    python tools/evaluate.py lora-sks-dog --checkpoints 200 400 --strengths 0.7 1.0 --prompts living

For every checkpoint and strength the same prompts are generated with the same seeds. The run's folder gets
evaluation/: the pictures, grid.png, evaluation.csv and an advice. What was generated is not generated again.

    DINO-I, CLIP-I  mean cosine similarity to the training pictures (arXiv:2208.12242, section 4.2)
    CLIP-T          the same to the prompt without the rare word
    memorised       share of pictures that are nearer to a training picture than any two of those are to each other
    drift           1 - cosine similarity of pictures of the class to those of the base model with the same seeds
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
import transformers
from PIL import Image, ImageDraw, ImageOps
from report import read_settings
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import train_dreambooth_lora_sdxl as trainer

PLACES = ("on a beach at sunset", "in deep snow", "in a busy street at night", "on a wooden table by a window",
          "in a field of sunflowers", "on a mountain above the clouds")
PROMPT_SETS = {
    "objects": (*(f"a photo of a {{}} {place}" for place in PLACES), "a {} made of glass", "a {} covered in moss",
                "a {} with a red ribbon", "a pencil drawing of a {}", "a {} floating on a lake",
                "a {} beside a stack of old books"),
    "living": (*(f"a photo of a {{}} {place}" for place in PLACES), "a {} wearing a yellow raincoat",
               "a {} with a crown of flowers", "a {} asleep on a sofa", "an oil painting of a {}",
               "a {} swimming in a lake", "a {} reading a newspaper")}
LIVING = {"animal", "baby", "bear", "bird", "boy", "cat", "child", "cow", "dog", "duck", "face", "fox", "girl",
          "hamster", "horse", "kitten", "man", "person", "pet", "puppy", "rabbit", "woman"}
USUAL = {"a", "an", "the", "my", "in", "of", "photo", "picture", "image", "portrait", "drawing", "painting", "style"}
CLASS_PICTURES = 8  # at least, of the class without the rare word
COLUMNS = ("checkpoint", "strength", "pictures", "dino_i", "dino_i_std", "clip_i", "clip_i_std", "clip_t",
           "clip_t_std", "memorised", "drift", "drift_std")


class Subject(NamedTuple):
    """What the prompts call the subject: the rare word, and the class that follows it."""

    word: str
    noun: str


class Cell(NamedTuple):
    """What pictures are generated with: the LoRA of a checkpoint at a strength, or the base model (strength 0)."""

    checkpoint: str
    strength: float
    folder: Path  # of the LoRA


class Picture(NamedTuple):
    """A picture to generate: where it is kept, its prompt, and its seed."""

    path: Path
    prompt: trainer.ValidationPrompt
    seed: int

    @property
    def label(self) -> str:
        """What the file says of itself, by which it is known again."""
        p = self.prompt
        return (f"{p.text} --n {p.negative_prompt} --w {p.width} --h {p.height} --d {self.seed} "
                f"--s {p.num_inference_steps} --l {p.guidance_scale:g}")


def find_subject(args: argparse.Namespace, word: str | None) -> Subject:
    """Tell the rare word of the instance prompt and its class. Raises UserError."""
    words = re.findall(r"[^\s,.]+", args.instance_prompt or "")
    usual = USUAL | set(re.findall(r"[^\s,.]+", (args.class_prompt or "").lower()))
    tokens = [token.strip() for token in args.token_abstraction.split(",")] if args.train_text_encoder_ti else []
    rare = word or next((w for w in words if w in tokens or w.lower() not in usual), "")
    trainer.refuse(rare not in words, f"the rare word of the instance prompt {args.instance_prompt!r} is not known; "
                   "name it with --word.")
    return Subject(rare, " ".join(words[words.index(rare) + 1:]) or "picture")


def choose_prompts(args: argparse.Namespace, subject: Subject, which: str | None) -> list[trainer.ValidationPrompt]:
    """Return the prompts: those of the run's validation, of a built-in set, or of a .txt file. Raises UserError."""
    own = [prompt for prompt in trainer.validation_prompts(args) if subject.word in prompt.text]
    which = which or ("validation" if own else "living" if subject.noun.split()[-1] in LIVING else "objects")
    if which == "validation":
        trainer.refuse(not own, f"--prompts validation: the run has no validation prompt with {subject.word!r}.")
        return own
    if which in PROMPT_SETS:
        usual = own[0] if own else trainer.parse_prompt(args, "a", "")
        name = f"{subject.word} {subject.noun}"
        return [usual._replace(text=text.format(name), negative_prompt="", seed=None) for text in PROMPT_SETS[which]]
    args.validation_prompt = [which]
    found = trainer.validation_prompts(args)
    bare = [prompt.text for prompt in found if subject.word not in prompt.text]
    trainer.refuse(bare, f"--prompts {which}: {trainer.some(bare)!r} without the rare word {subject.word!r}.")
    return found


def find_cells(output: Path, wanted: Sequence[str], strengths: Sequence[float]) -> list[Cell]:
    """Return checkpoints times strengths, the oldest first. Raises UserError."""
    folders = {folder.name: folder for folder in trainer.list_checkpoints(output)}
    trainer.refuse(not folders, f"{output} has no checkpoint; train with a smaller --checkpointing_steps.")
    names = {str(trainer.step_of(folder)): folder for folder in folders.values()} | folders
    unknown = [name for name in wanted if name not in names]
    trainer.refuse(unknown, f"--checkpoints {trainer.some(unknown)}: {output} has {', '.join(folders)}.")
    chosen = dict.fromkeys(names[name] for name in wanted or folders)
    return [Cell(folder.name, strength, folder) for folder in chosen for strength in strengths]


def plan_pictures(out: Path, cell: Cell, counts: dict[trainer.ValidationPrompt, int],
                  run: trainer.Run) -> list[Picture]:
    """Return the pictures of a cell, so many of each prompt. Raises UserError for a file of somebody else's there."""
    lora = (cell.folder / trainer.LORA_FILE).read_bytes() if cell.strength else b""  # another run may have its name
    made_by = hashlib.sha256(lora + run.base.name.encode() + run.vae.name.encode()).hexdigest()[:8]
    folder = out / "pictures" / f"{cell.checkpoint}-{cell.strength:g}-{made_by}"
    pictures = []
    for index, (prompt, count) in enumerate(counts.items()):
        first = run.seed if prompt.seed is None else prompt.seed
        name = hashlib.sha256(repr(prompt).encode()).hexdigest()[:6]
        pictures += [Picture(folder / f"{index:02d}-{i:02d}-{name}.png", prompt, first + i) for i in range(count)]
    for picture in (picture for picture in pictures if picture.path.exists()):
        try:
            is_own = Image.open(picture.path).info.get("prompt") == trainer.printable(picture.label)
        except OSError:
            is_own = False
        trainer.refuse(not is_own, f"{picture.path} is not of this evaluation; move it away.")
    return pictures


def load_lora(model: trainer.TrainableSDXL, folder: Path) -> None:
    """Put a checkpoint's LoRA, and its new tokens if there are any, into the model. Raises UserError."""
    trainer.load_init_lora(folder / trainer.LORA_FILE, model)
    if (folder / trainer.EMBEDDINGS_FILE).exists():
        rows = trainer.load_file(folder / trainer.EMBEDDINGS_FILE)
        for name, encoder in zip(("clip_l", "clip_g"), model.text_encoders, strict=True):
            encoder.get_input_embeddings().rows.data.copy_(rows[name])


def generate(run: trainer.Run, work: Sequence[tuple[Cell, list[Picture]]], batch_size: int) -> None:
    """Generate the pictures that are missing, in the memory of a validation; a second call goes on."""
    missing = [(cell, picture) for cell, pictures in work for picture in pictures if not picture.path.exists()]
    total = sum(len(pictures) for _, pictures in work)
    if not missing:
        return
    texts = {text for _, picture in missing for text in (picture.prompt.text, picture.prompt.negative_prompt)}
    prompts = trainer.encode_prompts(run, sorted(texts), run.text.is_trained, run.dtype)
    model, vae = trainer.load_trainable(run), trainer.load_vae(run.vae, run.dtype, run.device)
    scales, loaded = [layer.scaling["default"] for layer in model.layers], None
    bar = trainer.progress_bar(total, "Pictures", total - len(missing))
    for cell, batch in batches(missing, batch_size):
        if cell.folder != loaded and cell.strength:
            set_scales(model, scales, 1.0)
            load_lora(model, cell.folder)
            loaded = cell.folder
        set_scales(model, scales, cell.strength)
        with trainer.inference_adapters(model):
            latents = trainer.generate_latents(run, model, prompts, batch[0].prompt, [p.seed for p in batch])
        with trainer.offloaded(run, model):
            images = trainer.decode_latents(vae, [latents])
        for picture, image in zip(batch, images, strict=True):
            trainer.save_picture(image, picture.path, picture.label)
        bar.update(len(batch))
    bar.close()


def set_scales(model: trainer.TrainableSDXL, scales: Sequence[float], strength: float) -> None:
    """Let the LoRA count so much."""
    for layer, scale in zip(model.layers, scales, strict=True):
        layer.scaling["default"] = scale * strength


def batches(missing: Sequence[tuple[Cell, Picture]], size: int) -> Iterator[tuple[Cell, list[Picture]]]:
    """Divide pictures into batches of one cell and prompt."""
    for (cell, _), group in itertools.groupby(missing, lambda entry: (entry[0], entry[1].prompt)):
        pictures = [picture for _, picture in group]
        yield from ((cell, pictures[first:first + size]) for first in range(0, len(pictures), size))


class Encoder:
    """A pretrained encoder of pictures and, if it is CLIP, of texts; features are normalized."""

    def __init__(self, name: str, flag: str, device: torch.device) -> None:
        try:
            self.model = AutoModel.from_pretrained(name).eval().to(device)
            self.processor = AutoImageProcessor.from_pretrained(name, use_fast=False)
        except (OSError, ValueError, ImportError) as error:
            raise trainer.UserError(f"--{flag} {name} cannot be loaded ({trainer.first_line(error)}); name a folder, "
                                    "or a model of the Hub that is within reach.") from error
        self.name, self.device = name, device

    @torch.no_grad()
    def images(self, paths: Sequence[Path], size: int = 16) -> Tensor:
        """Encode pictures to (N, features)."""
        rows = []
        for first in range(0, len(paths), size):
            images = [trainer.load_picture(path) for path in paths[first:first + size]]
            pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
            is_clip = hasattr(self.model, "get_image_features")
            found = self.model.get_image_features(pixel_values=pixels) if is_clip else self.model(pixel_values=pixels)
            rows.append(getattr(found, "pooler_output", found).float().cpu())
        return nn.functional.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Encode texts to (N, features)."""
        ids = AutoTokenizer.from_pretrained(self.name)(list(texts), padding=True, truncation=True, return_tensors="pt")
        found = self.model.get_text_features(**ids.to(self.device))
        return nn.functional.normalize(getattr(found, "pooler_output", found).float().cpu(), dim=1)


def spread(values: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation."""
    return float(values.mean()), float(values.std(correction=0))


def memorised(pictures: Tensor, training: Tensor) -> float:
    """Return the share of pictures (N, d) that are nearer to a training picture than any two of those (M, d) are."""
    if len(training) < 2:
        return float("nan")
    between = (training @ training.T - 2 * torch.eye(len(training))).max()
    return float(((pictures @ training.T).amax(1) > between).float().mean())


def measure(work: Sequence[tuple[Cell, list[Picture]]], class_prompt: str, training: Sequence[Path], subject: Subject,
            image_encoder: Callable[[], Any], clip: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return a row of COLUMNS for each cell but the base model; one encoder is in memory at a time."""
    encoder, features = image_encoder(), {}
    for cell, pictures in work:
        features[cell] = encoder.images([picture.path for picture in pictures])
    own, base = encoder.images(training), next(cell for cell, _ in work if not cell.strength)
    encoder = clip()
    own_clip, rows = encoder.images(training), []
    for cell, pictures in work:
        if cell == base:
            continue
        is_class = torch.tensor([picture.prompt.text == class_prompt for picture in pictures])
        shown = [picture for picture in pictures if picture.prompt.text != class_prompt]
        clip_features = encoder.images([picture.path for picture in shown])
        texts = encoder.texts([re.sub(rf"{re.escape(subject.word)}\s*", "", p.prompt.text) for p in shown])
        dino, of_class = features[cell][~is_class], features[cell][is_class]
        measured = {"dino_i": spread((dino @ own.T).mean(1)), "clip_i": spread((clip_features @ own_clip.T).mean(1)),
                    "clip_t": spread((clip_features * texts).sum(1)),
                    "drift": spread(1 - (of_class * features[base]).sum(1))}
        rows.append({"checkpoint": cell.checkpoint, "strength": cell.strength, "pictures": len(shown),
                     "memorised": memorised(dino, own),
                     **{name: mean for name, (mean, _) in measured.items()},
                     **{f"{name}_std": std for name, (_, std) in measured.items()}})
    return rows


def rank(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows on the Pareto front of subject (DINO-I) and prompt (CLIP-T) fidelity, the best first.

    What is best weighs both by their spread within a checkpoint, so that noise decides nothing.
    """
    front = [row for row in rows if not any(other["dino_i"] >= row["dino_i"] and other["clip_t"] >= row["clip_t"]
                                            and other != row for other in rows)]
    units = {name: sum(row[f"{name}_std"] for row in rows) / len(rows) or 1.0 for name in ("dino_i", "clip_t")}
    return sorted(front, key=lambda row: -sum(row[name] / unit for name, unit in units.items()))


def advise(rows: Sequence[dict[str, Any]], output: Path) -> str:
    """Say which checkpoint and strength are the best compromise, the second best, and how to use the first."""
    best, *others = rank(rows)
    second = f"; then {others[0]['checkpoint']} at {others[0]['strength']:g}" if others else ""
    return f"""Best compromise of subject and prompt: {best['checkpoint']} at strength {best['strength']:g}{second}.
    pipeline.load_lora_weights({str(output / best['checkpoint'])!r},
                               weight_name="{trainer.LORA_FILE}", adapter_name="subject")
    pipeline.set_adapters("subject", {best['strength']:g})"""


def write_table(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write evaluation.csv."""
    with trainer.atomic_write(out / "evaluation.csv") as unfinished, open(unfinished, "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()}
                        for row in rows)


def write_grids(out: Path, work: Sequence[tuple[Cell, list[Picture]]], class_prompt: str, side: int = 256,
                head: int = 20) -> list[Path]:
    """Write a grid for each prompt: checkpoints down, strengths across. Returns their paths."""
    cells = {(cell.checkpoint, cell.strength): pictures for cell, pictures in work if cell.strength}
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    prompts = list(dict.fromkeys(p.prompt for pictures in cells.values() for p in pictures))
    paths = []
    for number, prompt in enumerate(prompt for prompt in prompts if prompt.text != class_prompt):
        sheet = Image.new("RGB", (len(columns) * side, head + len(rows) * (side + head)), "white")
        draw = ImageDraw.Draw(sheet)
        draw.text((4, 4), trainer.printable(prompt.text), fill="black")
        for (checkpoint, strength), pictures in cells.items():
            left, top = columns.index(strength) * side, head + rows.index(checkpoint) * (side + head)
            image = trainer.load_picture(next(p.path for p in pictures if p.prompt == prompt))
            sheet.paste(ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS), (left, top + head))
            draw.text((left + 4, top + 4), f"{checkpoint} at {strength:g}", fill="black")
        paths.append(out / ("grid.png" if len(prompts) <= 2 else f"grid-{number:02d}.png"))
        with trainer.atomic_write(paths[-1]) as unfinished:
            sheet.save(unfinished, format="PNG")
    return paths


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the --output_dir of the run")
    parser.add_argument("--base", metavar="ID|DIR|FILE", help="the base model; default: that of the run")
    parser.add_argument("--checkpoints", nargs="+", default=[], metavar="STEP", help="steps or names; default: all")
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.6, 0.8, 1.0], metavar="S",
                        help="how much the LoRA counts (default: 0.6 0.8 1.0)")
    parser.add_argument("--prompts", metavar="|".join(["validation", *PROMPT_SETS, "FILE.txt"]),
                        help="default: the validation prompts, else the set for the subject's class")
    parser.add_argument("--word", help="the rare word, which chooses among several subjects; default: the first "
                        "unusual one of the instance prompt")
    parser.add_argument("--num_images", type=int, default=4, metavar="N", help="pictures of each prompt (default: 4)")
    parser.add_argument("--batch_size", type=int, default=1, metavar="N",
                        help="pictures generated at once (default: 1)")
    parser.add_argument("--image_encoder", default="facebook/dinov2-small", metavar="ID|DIR",
                        help="encoder of DINO-I and drift (default: %(default)s)")
    parser.add_argument("--clip", default="openai/clip-vit-base-patch32", metavar="ID|DIR",
                        help="CLIP of CLIP-I and CLIP-T (default: %(default)s)")
    return parser


def evaluate(options: argparse.Namespace, image_encoder: Callable[[], Any] | None = None,
             clip: Callable[[], Any] | None = None) -> list[dict[str, Any]]:
    """Generate, measure, and write evaluation/. Returns the rows. Raises UserError.

    image_encoder, clip: make other encoders than those that options name.
    """
    args, _ = read_settings(options.folder)
    args.output_dir, args.report_to, args.log_level = str(options.folder), "none", "info"
    args.init_lora = args.resume_from_checkpoint = None
    args.pretrained_model_name_or_path = options.base or args.pretrained_model_name_or_path
    trainer.quiet_libraries("info")
    transformers.utils.logging.disable_progress_bar()
    trainer.refuse(min(options.strengths) <= 0, "--strengths must be above 0; the base model is always generated.")
    trainer.refuse(min(options.num_images, options.batch_size) < 1, "--num_images and --batch_size must be above 0.")
    subjects = trainer.subjects_of(args)
    own = next((own for own in subjects if (options.word or "\0") in (own.instance_prompt or "").split()), subjects[0])
    subject, out = find_subject(own, options.word), options.folder / "evaluation"
    cells = find_cells(options.folder, options.checkpoints, options.strengths)
    prompts = choose_prompts(args, subject, options.prompts)
    training = list(dict.fromkeys(sample.path for sample in trainer.samples_of(own)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image_encoder = image_encoder or (lambda: Encoder(options.image_encoder, "image_encoder", device))
    clip = clip or (lambda: Encoder(options.clip, "clip", device))
    image_encoder(), clip()  # before minutes of generating
    run = trainer.start(args)
    class_prompt = prompts[0]._replace(text=own.class_prompt or f"a photo of a {subject.noun}", seed=None)
    counts = dict.fromkeys(prompts, options.num_images) | {class_prompt: max(CLASS_PICTURES, options.num_images)}
    base = Cell("base", 0.0, cells[0].folder)
    work = [(base, plan_pictures(out, base, {class_prompt: counts[class_prompt]}, run))]
    work += [(cell, plan_pictures(out, cell, counts, run)) for cell in cells]
    trainer.print_rows([("Subject", f'"{subject.word}" is the rare word, "{subject.noun}" the class'),
                        ("Pictures", f"{sum(len(pictures) for _, pictures in work)}: {len(prompts)} prompts and "
                         f"\"{class_prompt.text}\", {len(cells)} checkpoints and strengths"), ("Output", str(out))])
    generate(run, work, options.batch_size)
    rows = measure(work, class_prompt.text, training, subject, image_encoder, clip)
    write_table(out, rows)
    grids = write_grids(out, work, class_prompt.text)
    advice = advise(rows, options.folder)
    with trainer.atomic_write(out / "advice.txt") as unfinished:
        unfinished.write_text(advice + "\n", encoding="utf-8")
    names = ("checkpoint", "strength", "dino_i", "clip_i", "clip_t", "memorised", "drift")
    print("  ".join(f"{name:>12}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]:>12}" if isinstance(row[name], str) else f"{row[name]:12.3f}" for name in names))
    print(f"{advice}\n{out / 'evaluation.csv'}, {grids[0]}{' and more' * (len(grids) > 1)}")
    return rows


def main() -> None:
    """Evaluate as the command line says."""
    options = make_parser().parse_args()
    with trainer.one_sentence():
        try:
            evaluate(options)
        except KeyboardInterrupt:
            raise trainer.Stopped(signal.SIGINT, "Stopped; what was generated is kept, and the same command goes on."
                                  ) from None


if __name__ == "__main__":
    main()

#!/usr/bin/env python
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.8",
#     "diffusers>=0.36",
#     "transformers>=4.57.1",
#     "accelerate>=1.8",
#     "peft>=0.18",
#     "bitsandbytes>=0.50",
#     "huggingface_hub>=0.36",
#     "safetensors>=0.4.5",
#     "tensorboard>=2.18",
#     "wandb>=0.19",
#     "pillow>=10.1",
#     "numpy>=2.0",
#     "pyyaml>=6.0",
#     "tqdm>=4.67",
# ]
# ///
r"""Teach Stable Diffusion XL a new subject from three to five pictures: DreamBooth with LoRA, in one file.

Three commands that work as they stand:

    # the small SDXL that comes with this repository, on a laptop's CPU, two to three minutes
    accelerate launch train_dreambooth_lora_sdxl.py --config examples/toy_world/sks_dog.yaml

    # SDXL itself: five pictures in dog/, 1024 px, one card of 16 GB or more
    accelerate launch train_dreambooth_lora_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir lora-trained-xl \
        --train_batch_size 1 --gradient_accumulation_steps 4 --max_train_steps 500 --mixed_precision fp16 \
        --validation_prompt "a photo of sks dog in a bucket" --seed 0

    # the same again from where it was stopped
    accelerate launch train_dreambooth_lora_sdxl.py --config lora-trained-xl/training_config.yaml \
        --resume_from_checkpoint latest

How the file is ordered: flags, main, objective, training loop; pictures and the checks of the command line, which run
before the heavy imports; models, text, adapters, quantization, caches, optimizer, checkpoints, validation, files.

The result is pytorch_lora_weights.safetensors, which StableDiffusionXLPipeline.load_lora_weights reads, a model card,
and the pictures that were generated during training. A switch --name of a configuration is undone with --no-name.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import csv
import ctypes
import difflib
import errno
import functools
import hashlib
import html
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import select
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from PIL import Image, ImageCms, ImageDraw, ImageOps, PngImagePlugin
from PIL import __version__ as PIL_VERSION  # noqa: N812
from safetensors import SafetensorError, safe_open

if os.name == "posix":
    import fcntl
else:
    import msvcrt

LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
EMBEDDINGS_FILE, CONFIG_FILE, HISTORY_FILE = "embeddings.safetensors", "training_config.yaml", "history.jsonl"
STATE_FILE = "state.pt"
OUTPUT_FILES = (LORA_FILE, KOHYA_FILE, EMBEDDINGS_FILE, CONFIG_FILE, HISTORY_FILE, "README.md", "progress.png")
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")  # if they exist
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
CAPTION_SUFFIXES = (".caption", ".txt")  # the last one wins
TOKENIZERS, TEXT_ENCODERS = ("tokenizer", "tokenizer_2"), ("text_encoder", "text_encoder_2")
SDXL_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"  # the configuration of single files
BASE_FLAG, VAE_FLAG = "--pretrained_model_name_or_path", "--pretrained_vae_model_name_or_path"
PRELOAD_BYTES = 128 * 2**20  # cached latents up to this size are kept on the device, more are read from the disk
LOG_STEPS = 10  # optimizer steps between two logs: each waits for the GPU
AUTO_EXPOSURES = 1000  # of all pictures together, in a run of --steps_per_image auto (benchmarks/crafts.py)
INFERENCE_STEPS, GUIDANCE_SCALE = 25, 5.0  # of class and validation pictures
CACHED_CROPS, MAX_UPSCALE = 8, 2.0  # of a picture, if crop or flip are random; with buckets
ALL_BLOCKS, TIME_IS_UP = 10**6, 1000  # more than any UNet has; beside the numbers of signals
GB = 1e9

logger = logging.getLogger("dreambooth")


class UserError(Exception):
    """A mistake that the user can mend: one sentence that names the flag or file and the cure."""

    exit_code = 2


class TrainingError(Exception):
    """A run that went wrong by itself: one sentence with the cause and what helps."""

    exit_code = 1


class HubError(Exception):
    """A failure of the Hub after or before a sound run: one sentence with what is safe where, and how to push it."""

    exit_code = 3


class Stopped(BaseException):  # noqa: N818 (not an error, and `except Exception` must not swallow it)
    """A run that a signal or the clock ended after everything was saved. Exit code 128 + signal, or 0."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum if signum != TIME_IS_UP else 0


@contextmanager
def one_sentence() -> Iterator[None]:
    """Print what ends a run as one sentence on stderr and exit with its code."""
    try:
        yield
    except (UserError, TrainingError, HubError, Stopped) as ending:
        rank = os.environ.get("LOCAL_RANK", "0")
        if rank == "0" or isinstance(ending, TrainingError):  # mistakes are the same on all ranks
            label = "" if isinstance(ending, Stopped) else "error: " if rank == "0" else f"error on rank {rank}: "
            print(label, printable(str(ending)), sep="", file=sys.stderr)
        sys.exit(ending.exit_code)


def is_first_rank() -> bool:
    """Return True on the main process; known before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """Escape control characters and broken bytes, so that a file's name cannot command the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some(names: Iterable[str]) -> str:
    """Join the first five names for a sentence."""
    names = list(names)
    return ", ".join(names[:5]) + " and more" * (len(names) > 5)


def warn(message: str, *values: object) -> None:
    """Log a warning."""
    logger.warning("warning: " + message, *values)


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print a small table, leaving out rows without text."""
    logger.info("\n".join(f"{name:10}{text}".replace("\n", " ") for name, text in rows if text))


# --------------------------------------------------------------------------------------------------------------- flags
# The command line: types of values, one entry a flag, and what contradicts what.


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with the nearest flag for a mistyped one."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing a usage of a hundred flags."""
        raise UserError(message)

    def refuse_unknown(self, words: Sequence[str], where: str) -> NoReturn:
        """Raise UserError for unknown flags, each with the nearest known one, or with what replaced it."""
        flags = [option for action in self._actions for option in action.option_strings]
        found = []
        for word in [word for word in words if word.startswith("-")] or words:  # not the values of unknown flags
            name = re.sub("^--(no-)?", "", word.split("=")[0])
            for cure, names in DROPPED_FLAGS.items():
                refuse(name in names.split(), f"--{name} was removed: {cure}.")
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
            found.append(f"{word} (did you mean {near[0]}?)" if near else word)
        raise UserError(f"{where} does not know {', '.join(found)}.")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that does not repeat each switch as --no-switch."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        usage = super()._format_action_invocation(action)
        return usage.split(", --no-")[0] if isinstance(action, argparse.BooleanOptionalAction) else usage


class OptionalValue(argparse.BooleanOptionalAction):
    """--flag, --no-flag, --flag True and --flag False, as old commands write, and --flag VALUE if it has a type."""

    def __init__(self, option_strings: Sequence[str], dest: str, value_type: Callable[[str], Any] | None = None,
                 metavar: str | None = None, **keywords: Any) -> None:
        super().__init__(option_strings, dest, **keywords)
        self.nargs, self.value_type, self.metavar = "?", value_type, metavar

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        """Set the flag."""
        value = {None: True, "true": True, "false": False}.get(values if values is None else str(values).lower())
        if str(option_string).startswith("--no-"):
            value = {True: False, False: True}.get(value)
        elif value is None and self.value_type:
            try:
                value = self.value_type(values)
            except argparse.ArgumentTypeError as error:
                parser.error(f"argument {option_string}: {error}, nor True or False")
        if value is None:
            parser.error(f"argument {option_string}: '{values}' is neither True nor False")
        setattr(namespace, self.dest, value)


def number(kind: type, low: float, strict: bool = False, high: float = 10**9,
           cure: str = "") -> Callable[[str], float]:
    """Make an argparse type: an int or float that is at least (if strict, above) low, and at most high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (strict and value == low):  # nan is in no order
            noun, least = "a whole number" if kind is int else "a number", "above" if strict else "of at least"
            raise argparse.ArgumentTypeError(f"'{text}' is not {noun} {least} {low} and at most {high}{cure}")
        return value

    return parse


def steps_or_share(text: str) -> int | float:
    """An argparse type: optimizer steps, or a share of them below 1."""
    try:
        return number(int, 0)(text.removesuffix(".0"))  # YAML writers make 100 a float
    except argparse.ArgumentTypeError as error:
        with suppress(ValueError):
            if 0 < float(text) < 1:
                return float(text)
        raise argparse.ArgumentTypeError(f"{error}, nor a share of the steps such as 0.1") from None


def square_side(text: str) -> int:
    """An argparse type: the side of a square in pixels, also as 1024x1024 or 1024,1024."""
    sides = re.fullmatch(r"\(?(\d\d+) *[xX×*,] *(\d\d+)\)?", text)
    if sides and sides[1] != sides[2]:
        raise argparse.ArgumentTypeError(f"'{text}' is no square: give one side; --aspect_ratio_buckets "
                                         f"{sides[1]}x{sides[2]} trains on pictures of that shape")
    return number(int, 8, high=16384)(sides[1] if sides else text)


def count_or_auto(text: str) -> int | str:
    """An argparse type: a count, or the word auto."""
    try:
        return text if text == "auto" else number(int, 1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor auto") from None


def bucket_list(text: str) -> str:
    """An argparse type: auto, or sizes in pixels, multiples of 8."""
    sizes = [] if text == "auto" else [re.fullmatch(r"(\d{2,5})x(\d{2,5})", size.strip()) for size in text.split(",")]
    if not all(found and int(found[1]) % 8 == int(found[2]) % 8 == 0 for found in sizes):
        raise argparse.ArgumentTypeError(f"'{text}' is neither auto nor sizes such as 1024x1024,832x1216, each side a "
                                         "multiple of 8")
    return text


def patterns(text: str) -> str:
    """An argparse type: regular expressions, separated by commas."""
    try:
        re.compile(text.replace(",", "|"))
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no pattern ({error})") from None
    return text


class BlockRule(NamedTuple):
    """A block of the UNet by the beginning of its name, with its own rank and learning rate."""

    block: str
    rank: int | None
    rate: float | None


def block_rules(text: str) -> tuple[BlockRule, ...]:
    """Parse BLOCK[=RANK[:RATE]],...; an argparse error names the rule that is wrong."""
    rules = []
    for rule in text.split(",") if text else ():
        found = re.fullmatch(r"((?:down_blocks|up_blocks|mid_block)[\w.]*)(?:=(\d{1,4})(?::(\S+))?)?", rule.strip())
        try:
            rules.append(BlockRule(found[1], found[2] and int(found[2]), found[3] and POSITIVE(found[3])))
        except (TypeError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(f"'{rule}' is not BLOCK, BLOCK=RANK or BLOCK=RANK:RATE, such as "
                                             "up_blocks.0=16:2e-4") from None
    return tuple(rules)


def block_rules_text(text: str) -> str:
    """An argparse type: rules for blocks of the UNet, kept as they are written."""
    block_rules(text or " ")  # none at all is a mistake
    return text


def adam_keywords(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return the keywords of an optimizer like Adam."""
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, **more}


class OptimizerKind(NamedTuple):
    """Where an optimizer is found, what it is made with, and the bytes of its state for a trained parameter."""

    module: str
    name: str
    state_bytes: int
    keywords: Callable[[argparse.Namespace], dict[str, Any]] = adam_keywords
    finds_rate: bool = False  # by itself: all groups have one
    averages: bool = False  # the adapters by itself


OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim", "AdamW", 8,  # fused: one launch for a thousand small tensors
                           lambda args: adam_keywords(args, fused=True)),
    "adamw8bit": OptimizerKind("bitsandbytes.optim", "AdamW8bit", 2),
    "prodigy": OptimizerKind("prodigyopt", "Prodigy", 16, lambda args: adam_keywords(  # arXiv:2306.06101
        args, beta3=args.prodigy_beta3, decouple=args.prodigy_decouple, safeguard_warmup=args.prodigy_safeguard_warmup,
        use_bias_correction=args.prodigy_use_bias_correction), finds_rate=True),
    "adafactor": OptimizerKind("transformers", "Adafactor", 0, lambda args: {  # arXiv:1804.04235
        "eps": (1e-30, 1e-3), "scale_parameter": False, "relative_step": False, "warmup_init": False}),
    "schedule_free": OptimizerKind("schedulefree", "AdamWScheduleFree", 8,  # arXiv:2405.15682
                                   lambda args: adam_keywords(args, warmup_steps=0), averages=True)}
COUNT, INDEX = number(int, 1), number(int, 0)
SEED = number(int, 0, high=2**63 - 1, cure="; leave it out to have one drawn at random")
FEW = number(int, 1, high=10**5)  # of what is listed before anything else happens
SHARE = number(float, 0, strict=True, high=1)
POSITIVE, NOT_NEGATIVE = number(float, 0, strict=True), number(float, 0)
SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}
ATTENTION = ("to_k", "to_q", "to_v", r"to_out\.0")
LINEAR = (*ATTENTION, r"ff\.net\.0\.proj", r"ff\.net\.2", r"attentions\.\d+\.proj_in", r"attentions\.\d+\.proj_out")
LORA_LAYERS = {  # by the ends of their names
    "attention": ATTENTION, "attention+ff": LINEAR,
    "full": (*LINEAR, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out",
             r"samplers\.0\.conv", "linear_1", "linear_2")}
LOSS_TYPES = ("l2", "huber")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PATH_FLAGS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "single_file_config", "cache_dir",
              "instance_data_dir", "subjects", "dataset_name", "class_data_dir", "masked_loss", "cache_latents_dir",
              "output_dir", "logging_dir", "resume_from_checkpoint", "init_lora")
SECRET_FLAGS = ("hub_token",)  # never written, logged or uploaded
RESUME_FLAGS = (  # what may not change between start and resume
    "resolution", "caption_dropout", "background_loss_weight", "with_prior_preservation", "base_precision",
    "train_batch_size", "rank", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_layers",
    "lora_unet_blocks", "train_text_encoder", "train_text_encoder_frac", "train_text_encoder_ti", "token_abstraction",
    "initializer_concept", "token_lr", "learning_rate", "text_encoder_lr", "scale_lr", "lr_scheduler",
    "lr_warmup_steps", "lr_num_cycles", "lr_power", "optimizer", "prodigy_beta3", "prodigy_decouple",
    "prodigy_use_bias_correction", "prodigy_safeguard_warmup", "use_ema", "adam_beta1", "adam_beta2", "adam_epsilon",
    "adam_weight_decay", "adam_weight_decay_text_encoder", "max_grad_norm", "prediction_type",
    "rescale_betas_zero_snr", "do_edm_style_training", "snr_gamma", "loss_weighting", "loss_type",
    "noise_offset", "min_timestep", "max_timestep", "revision", "variant")
DROPPED_FLAGS = {  # of earlier versions, by what to do instead
    "tools/estimate_memory.py takes the same flags, and --budget GB": "estimate_memory vram_budget",
    "accelerate does it: accelerate launch --dynamo_backend inductor, with --dynamo_use_regional_compilation for the "
    "repeated blocks alone, or --dynamo_mode reduce-overhead for CUDA graphs": "torch_compile cuda_graph",
    "it did not help (benchmarks/crafts.md)":
        "loraplus_lr_ratio timestep_bias lora_init input_perturbation dco_beta",
    "--use_ema has the decay of diffusers' EMAModel": "ema_half_life",
    "the Huber loss has c = 0.1": "huber_c",
    "each word of --token_abstraction has two new tokens": "num_new_tokens_per_abstraction",
    "eight crops of a picture are encoded; --repeats adds more": "cache_variants",
    "with buckets a picture is enlarged at most twice": "max_upscale",
    "SDXL reads the penultimate layers of its text encoders": "clip_skip",
    "--masked_loss DIR does the same": "mask_dir",
    "--gradient_checkpointing N does the same": "checkpoint_blocks",
    "--lora_layers takes attention+ff and full, --lora_unet_blocks those of B-LoRA (docs/methods.md)": "lora_preset",
    "--with_prior_preservation uses the base model's predictions without --class_data_dir": "prior_preservation",
    "--train_text_encoder_frac holds for new tokens, too": "train_text_encoder_ti_frac",
    "--loss_type huber uses the schedule by signal-to-noise ratio": "huber_schedule",
    "a step that is not finite ends the run, and the last checkpoint is whole": "on_nan max_skipped_steps",
    "weights that are pickles are read without running code": "allow_pickle",
    "--checkpointing_steps and --validation_steps set the intervals": "checkpointing_minutes monitor_steps",
    "add pictures that are to be public to the repository by hand": "card_data_samples",
    "--validation_prompt reads a .txt file, too, and options after a prompt, such as --n blurry --s 30 --l 7 --w 768":
        "validation_prompts validation_negative_prompt validation_num_inference_steps validation_guidance_scale "
        "validation_resolution"}


def make_parser() -> Parser:  # noqa: PLR0915 (a table)
    """Make the parser of the command line; one entry a flag."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False,
                    usage="accelerate launch train_dreambooth_lora_sdxl.py FLAGS")
    parser.add_argument("--config", metavar="FILE", nargs="+", action="extend",
                        help="YAML files of flags; later ones override earlier ones, and the command line all")

    add = parser.add_argument_group("base model").add_argument
    add(BASE_FLAG, metavar="ID|DIR|FILE", help="SDXL: Hub id, diffusers folder or .safetensors file (required)")
    add(VAE_FLAG, metavar="ID|DIR|FILE", help="another VAE, such as madebyollin/sdxl-vae-fp16-fix")
    add("--single_file_config", metavar="ID|DIR",
        help="pipeline whose configuration a single file has; default: SDXL base 1.0 from the Hub")
    add("--revision", metavar="NAME", help="branch, tag or commit of the base model")
    add("--variant", metavar="NAME", help="variant of the base model's files, such as fp16")
    add("--cache_dir", metavar="DIR", help="folder for downloaded models and data sets")

    add = parser.add_argument_group("pictures").add_argument
    add("--instance_data_dir", metavar="DIR", help="folder with pictures of the subject")
    add("--subjects", metavar="FILE",
        help="instead of a folder: a YAML list of subjects, each with folder, prompt, class_prompt and repeats")
    add("--dataset_name", metavar="ID|DIR", help="instead of a folder: a data set of the Hub or a local one")
    add("--dataset_config_name", metavar="NAME", help="configuration of the data set")
    add("--dataset_split", metavar="NAME", default="train", help="split of the data set")
    add("--image_column", metavar="NAME", default="image", help="column of the data set with pictures")
    add("--caption_column", metavar="NAME", help="column with captions; default: the instance prompt")
    add("--instance_prompt", metavar="TEXT",
        help='prompt with a rare word: "a photo of sks dog"; not needed if every picture has a caption')
    add("--recursive", **SWITCH, help="also read pictures in sub-folders")
    add("--caption_dropout", type=number(float, 0, high=1), default=0.0, metavar="P",
        help="probability of training a picture on the empty prompt")
    add("--repeats", type=FEW, default=1, metavar="N", help="copies of a picture, each with own crops and flips")
    add("--resolution", type=square_side, default=1024, metavar="PIXELS", help="side of the square; a multiple of 8")
    add("--masked_loss", action=OptionalValue, value_type=str, default=False, metavar="DIR",
        help="weight the loss by masks, where white is the subject: transparency, files such as dog_mask.png, or DIR: "
             "a folder of masks with the pictures' names")
    add("--background_loss_weight", type=SHARE, default=0.1, metavar="W",
        help="weight of the background with --masked_loss")
    add("--aspect_ratio_buckets", type=bucket_list, metavar="auto|LIST",
        help="keep the shapes of pictures: SDXL's buckets for the resolution, or a list such as 1024x1024,832x1216")
    add("--center_crop", **SWITCH, help="crop the centre instead of a random part")
    add("--random_flip", **SWITCH, help="mirror half of the crops")
    add("--image_interpolation_mode", default="lanczos", choices=[m.name.lower() for m in Image.Resampling],
        help="filter for resizing")
    add("--cache_latents_dir", metavar="DIR",
        help="folder for encoded pictures and prompts, which runs can share; default: cache in --output_dir")
    add("--dataloader_num_workers", type=INDEX, default=0, metavar="N",
        help="threads that decode pictures while the VAE encodes")

    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", **SWITCH,
        help="keep what the model knows of --class_prompt: by pictures of the class with --class_data_dir, else by "
             "the base model's predictions")
    add("--class_prompt", metavar="TEXT", help='prompt without the rare word: "a photo of a dog"')
    add("--class_data_dir", metavar="DIR", help="folder of class pictures; missing ones are generated into it")
    add("--num_class_images", type=FEW, default=100, metavar="N", help="number of class pictures in the folder")
    add("--prior_loss_weight", type=NOT_NEGATIVE, default=1.0, metavar="W",
        help="weight of the prior preservation loss")
    add("--sample_batch_size", type=COUNT, default=4, metavar="N", help="class pictures generated at once")
    add("--prior_generation_precision", choices=["no", "fp32", "fp16", "bf16"],
        help="precision for generating class pictures; default: that of training")

    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=number(int, 1, high=4096), default=4, metavar="R", help="rank of the LoRA matrices")
    add("--lora_alpha", type=POSITIVE, metavar="A", help="LoRA is scaled by alpha / rank; default: the rank")
    add("--lora_dropout", type=number(float, 0), default=0.0, metavar="P", help="dropout of the LoRA layers' inputs")
    add("--use_rslora", **SWITCH, help="scale by alpha / sqrt(rank) (arXiv:2312.03732)")
    add("--use_dora", **SWITCH, help="DoRA on the UNet (arXiv:2402.09353); text encoders have LoRA")
    add("--lora_layers", type=patterns, metavar="|".join([*LORA_LAYERS, "NAME,..."]), default="attention",
        help="layers of the UNet that get LoRA; NAME: the end of a layer's name, or a regular expression of it")
    add("--lora_unet_blocks", type=block_rules_text, metavar="BLOCK[=RANK[:RATE]],...",
        help="only in these blocks, such as up_blocks.0=16:2e-4,down_blocks.2")

    add = parser.add_argument_group("text encoders").add_argument
    add("--train_text_encoder", **SWITCH, help="LoRA on both text encoders, too")
    add("--train_text_encoder_ti", **SWITCH,
        help="pivotal tuning: new tokens whose embeddings are trained beside the UNet's LoRA")
    add("--train_text_encoder_frac", type=SHARE, metavar="SHARE",
        help="share of the steps after which text encoders or new tokens are frozen; default: 1, new tokens 0.5")
    add("--token_abstraction", default="TOK", metavar="WORD,...", help="words in prompts that new tokens replace")
    add("--initializer_concept", metavar="TEXT", help="words whose embeddings new tokens start from; default: random")
    add("--token_lr", type=POSITIVE, default=1e-3, metavar="RATE", help="learning rate of new tokens")

    add = parser.add_argument_group("length").add_argument
    add("--train_batch_size", type=number(int, 1, high=4096), default=4, metavar="N",
        help="pictures of the subject in a micro-batch, per process")
    add("--gradient_accumulation_steps", type=COUNT, default=1, metavar="N", help="micro-batches an optimizer step")
    add("--num_train_epochs", type=COUNT, default=1, metavar="N", help="epochs: passes over the pictures")
    add("--max_train_steps", type=COUNT, metavar="N", help="optimizer steps; overrides --num_train_epochs")
    add("--steps_per_image", type=count_or_auto, metavar="N|auto",
        help=f"instead: passes over the pictures; auto: {AUTO_EXPOSURES:,} for all pictures together, at least 100 "
             "for each, with a warm-up of a twentieth if the schedule has one")
    add("--max_train_minutes", type=POSITIVE, metavar="MINUTES", help="then stop with a checkpoint")
    add("--seed", type=SEED, metavar="N", help="default: random, and written to " + CONFIG_FILE)

    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=POSITIVE, default=1e-4, metavar="RATE", help="learning rate of the UNet's LoRA")
    add("--text_encoder_lr", type=POSITIVE, default=5e-6, metavar="RATE", help="that of the text encoders' LoRA")
    add("--scale_lr", **SWITCH, help="multiply learning rates by the pictures in an optimizer step")
    add("--lr_scheduler", choices=SCHEDULES, default="constant", help="schedule of diffusers.optimization")
    add("--lr_warmup_steps", type=steps_or_share, default=500, metavar="N",
        help="optimizer steps, or a share of them such as 0.1; constant has none")
    add("--lr_num_cycles", type=COUNT, default=1, metavar="N", help="cycles of cosine_with_restarts")
    add("--lr_power", type=POSITIVE, default=1.0, metavar="P", help="power of polynomial")
    add("--optimizer", type=str.lower, choices=list(OPTIMIZERS), default="adamw", help="name in upper or lower case")
    add("--use_8bit_adam", **SWITCH, help="the same as --optimizer adamw8bit")
    add("--prodigy_beta3", type=NOT_NEGATIVE, metavar="B", help="default: the square root of --adam_beta2")
    for name, text in (("decouple", "decoupled weight decay, as in AdamW"), ("use_bias_correction", "as in Adam"),
                       ("safeguard_warmup", "do not let the warm-up lower the rate that is found")):
        add(f"--prodigy_{name}", action=OptionalValue, default=True, metavar="BOOL", help=text)
    add("--use_ema", **SWITCH, help="exponential moving average of the LoRA (diffusers' EMAModel), in all files")
    add("--adam_beta1", type=NOT_NEGATIVE, default=0.9, metavar="B", help="of every optimizer like Adam")
    add("--adam_beta2", type=NOT_NEGATIVE, default=0.999, metavar="B", help="of every optimizer like Adam")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, metavar="E", help="of every optimizer like Adam")
    add("--adam_weight_decay", type=NOT_NEGATIVE, default=1e-4, metavar="W", help="weight decay of the UNet's LoRA")
    add("--adam_weight_decay_text_encoder", type=NOT_NEGATIVE, default=1e-3, metavar="W",
        help="weight decay of the text encoders' LoRA")
    add("--max_grad_norm", type=POSITIVE, default=1.0, metavar="NORM", help="gradients are clipped to this norm")

    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="default: that of the base model's scheduler")
    add("--rescale_betas_zero_snr", **SWITCH, help="zero terminal SNR for v-prediction (arXiv:2305.08891)")
    add("--do_edm_style_training", **SWITCH,
        help="weight a v-prediction model's loss as epsilon's; a model with an EDM scheduler needs no flag")
    add("--snr_gamma", type=POSITIVE, metavar="G", help="min-SNR weighting (arXiv:2303.09556); 5 is usual")
    add("--loss_weighting", choices=["debiased"], help="debiased estimation (arXiv:2310.08442), instead of min-SNR")
    add("--loss_type", choices=LOSS_TYPES, default="l2", help="huber (arXiv:2403.16728) is robust to outliers")
    add("--noise_offset", type=NOT_NEGATIVE, default=0.0, metavar="S", help="also learn brightness; 0.05 is usual")
    add("--min_timestep", type=INDEX, default=0, metavar="T", help="lowest timestep; 0 has the least noise")
    add("--max_timestep", type=INDEX, metavar="T", help="highest timestep; default: the last, usually 999")

    add = parser.add_argument_group("memory and speed").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: that of `accelerate config`")
    add("--gradient_checkpointing", action=OptionalValue, value_type=COUNT, default=False, metavar="N",
        help="compute activations again in the backward pass: about half the memory; N: in N blocks of the UNet only")
    add("--base_precision", choices=["auto", "int8", "nf4"], default="auto",
        help="storage of the frozen UNet's linear layers; auto: the mixed precision")
    add("--allow_tf32", **SWITCH, help="faster float32 matrix products on Ampere cards and later")
    add("--enable_xformers_memory_efficient_attention", **SWITCH, help="PyTorch's attention needs as little memory")
    add("--ddp_timeout", type=POSITIVE, default=600, metavar="SECONDS",
        help="how long a process waits for another")
    add("--local_rank", type=int, default=-1, metavar="N", help="set by old launchers; not needed")

    add = parser.add_argument_group("validation and logs").add_argument
    add("--validation_prompt", action="append", metavar="TEXT|FILE.txt",
        help="generate pictures before, during and after training; may be repeated. A file has a prompt a line and # "
             "comments. Options after a prompt, as in kohya's files: --n NEGATIVE --w WIDTH --h HEIGHT --d SEED --s "
             f"STEPS (default: {INFERENCE_STEPS}) --l GUIDANCE_SCALE (default: {GUIDANCE_SCALE:g})")
    add("--num_validation_images", type=COUNT, default=4, metavar="N",
        help="pictures of each prompt, always with the same seeds")
    add("--validation_epochs", type=COUNT, default=50, metavar="N", help="epochs between two validations")
    add("--validation_steps", type=COUNT, metavar="N",
        help="optimizer steps between two validations; overrides the epochs")
    add("--report_to", choices=[*TRACKERS, "all", "none"], default="tensorboard",
        help="all: those that are installed and logged in")
    add("--logging_dir", default="logs", metavar="DIR", help="in --output_dir unless absolute")
    add("--log_level", choices=["debug", "info", "warning", "error"], default="info",
        help="debug shows messages of the libraries")
    add("--dry_run", **SWITCH, help="check everything, print the plan, and stop")

    add = parser.add_argument_group("files").add_argument
    add("--output_dir", default="lora-dreambooth-model", metavar="DIR", help="a new one for each run")
    add("--output_kohya_format", **SWITCH, help=f"also write {KOHYA_FILE} for ComfyUI, A1111 and Forge")
    add("--lora_dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="dtype of the LoRA files")
    add("--checkpointing_steps", type=COUNT, default=500, metavar="N", help="optimizer steps between two checkpoints")
    add("--checkpoints_total_limit", type=COUNT, metavar="N", help="older checkpoints are removed")
    add("--resume_from_checkpoint", metavar="latest|NAME|DIR", help="continue a run exactly")
    add("--init_lora", metavar="FILE", help="start a new run from a LoRA file of diffusers or a web UI")
    add("--push_to_hub", **SWITCH, help="upload LoRA, model card and validation pictures, nothing else")
    add("--hub_model_id", metavar="ID", help="repository; default: the name of --output_dir, in your namespace")
    add("--hub_private_repo", **SWITCH, help="create a private repository")
    add("--hub_token", metavar="TOKEN", help="visible to others on this machine: prefer `hf auth login` or HF_TOKEN")
    for action in parser._actions:
        if action.default not in (None, False, argparse.SUPPRESS) and "default" not in action.help:
            action.help += " (default: %(default)s)"
    return parser


def config_as_words(parser: Parser, path: str) -> list[str]:
    """Read a YAML file of flags as words of a command line. Raises UserError naming the file and the key."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold lines of 'flag: value'.")
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    dropped = [key for key in values if key in " ".join(DROPPED_FLAGS.values()).split()]
    if dropped:  # of a run of an earlier version
        warn("--config %s: flags of an earlier version are ignored: %s.", path, ", ".join(dropped))
        values = {key: value for key, value in values.items() if key not in dropped}
    unknown = [f"--{key}" for key in values if key not in known]
    if unknown:
        parser.refuse_unknown(unknown, f"--config {path}")
    words = []
    for key, value in values.items():
        is_switch = isinstance(known[key], argparse.BooleanOptionalAction)
        is_value = getattr(known[key], "value_type", None) and not isinstance(value, bool)
        value = "no" if value is False and "no" in (known[key].choices or ()) else value  # YAML reads no as false
        if isinstance(known[key], argparse._AppendAction) and isinstance(value, list):
            words += [f"--{key}={entry}" for entry in value]
        elif isinstance(value, (dict, list)) or (
                not is_value and is_switch != isinstance(value, bool) and value is not None):
            wanted = "true or false" if is_switch else "one value"
            raise UserError(f"--config {path}: {key} takes {wanted}, not {value!r}.")
        elif value is not None:
            words.append(f"--{key}={value}" if is_value or not is_switch else f"--{'' if value else 'no-'}{key}")
    return words


def expand_path(flag: str, text: str) -> str:
    """Expand ~ and $VARIABLES as a shell does, unless the path exists as it is. Raises UserError."""
    if not re.search(r"^~|\$", text) or os.path.exists(text):
        return text
    path = os.path.expandvars(os.path.expanduser(text))
    unset = re.search(r"^~[^/]*|\$\w+|\$\{[^}]*\}?", path)
    if unset:
        kind = "user" if unset[0].startswith("~") else "variable"
        raise UserError(f"--{flag} {text}: the {kind} {unset[0]} is not set; set it, or write the path out.")
    return path


def parse_args(argv: Sequence[str] | None = None, with_weights: bool = True) -> argparse.Namespace:
    """Parse and check a command line. Raises UserError for whatever the arguments and the file system reveal.

    with_weights: the base model's files of weights must be there, too.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, words, named = make_parser(), [], {word.split("=")[0] for word in argv}
    configs = parser.parse_known_args(argv)[0].config or []
    unknown = [path for path in configs if path.startswith("--")]  # argparse takes an unknown --flag="a b" for a value
    if unknown:
        parser.refuse_unknown(unknown, "the command line")
    configs = [expand_path("config", path) for path in configs]
    for more in (*(config_as_words(parser, path) for path in configs), argv):
        if any(word.split("=")[0] == "--validation_prompt" for word in more):  # replaces the earlier ones
            words = [word for word in words if not word.startswith("--validation_prompt=")]
        words += more
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.refuse_unknown(unknown, "the command line")
    for flag in PATH_FLAGS:
        refuse(getattr(args, flag) == "", f"--{flag} is empty: is a variable of the shell not set?")
        if isinstance(getattr(args, flag), str):
            setattr(args, flag, expand_path(flag, getattr(args, flag)))
    for config in map(Path, configs if "--output_dir" not in named else ()):
        is_run = config.name == CONFIG_FILE and list_checkpoints(config.parent)
        refuse(is_run and config.parent.resolve() != Path(args.output_dir).resolve(), f"--config {config} is of a "
               f"run, but says --output_dir {args.output_dir}: was its folder moved? Add --output_dir with the one "
               "that is meant.")
    if str(args.resume_from_checkpoint).lower() in ("latest", "last"):
        args.resume_from_checkpoint = "latest"
    if args.use_8bit_adam and args.optimizer == "adamw":  # a synonym has one name from here on
        args.optimizer = "adamw8bit"
    quiet_libraries(args.log_level)
    check_args(args, with_weights)
    return args


# --------------------------------------------------------------------------------------------------------------- modes
# A mode that flags choose is an object with everything that it changes: to remove a mode, delete its class, its entry
# in the table and its flags. Their methods are called when torch is imported.

SPACED = (r"[^\W\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\ud7ff\uf900-\ufaff\uff66-\uffdc"
          r"\U0001b000-\U0001b2ff\U00020000-\U0003ffff]")
"""A letter or digit of a script with spaces between words: not Chinese, Japanese or Thai. Korean adds its particles to
words of other scripts.
"""


class FrozenText:
    """Frozen text encoders: each prompt is encoded once, before the UNet is loaded."""

    is_trained, share = False, 1.0  # whether encoders are trained, and for which share of the steps
    files = ()  # besides the LoRA

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.tokens = args, {}  # new tokens by the word that they replace

    def check(self) -> None:
        """Raise UserError for flags that contradict the mode."""
        if self.args.train_text_encoder_frac:
            warn("--train_text_encoder_frac does nothing without --train_text_encoder.")

    def check_share(self) -> None:
        """Raise UserError if a part of the training is to stop and the optimizer cannot do that."""
        name = self.args.optimizer
        refuse(self.share < 1 and OPTIMIZERS[name].averages, f"--train_text_encoder_frac {self.share:g} stops a part "
               f"of the training, which --optimizer {name} cannot do; use "
               "--train_text_encoder_frac 1, or another optimizer.")

    def new_tokens(self) -> list[str]:
        """Return all new tokens in order."""
        return list(itertools.chain(*self.tokens.values()))

    def replace_words(self, prompt: str) -> str:
        """Put new tokens in the place of their words, which may be any signs, but no part of a word."""
        for word, tokens in self.tokens.items():
            prompt = re.sub(rf"(?<!{SPACED}){re.escape(word)}(?!{SPACED})", "".join(tokens), prompt)
        return prompt

    def add_to(self, run: Run, encoders: Sequence[Any]) -> None:
        """Add what is trained to the frozen text encoders."""

    def rate(self) -> tuple[str, float, float]:
        """Return the name of the parameter group, its learning rate and weight decay."""
        return "text_encoder", self.args.text_encoder_lr, self.args.adam_weight_decay_text_encoder

    def embeddings(self, encoders: Sequence[Any]) -> dict[str, Tensor]:
        """Return the tensors of EMBEDDINGS_FILE; none: there is no such file."""
        return {}

    def usage(self, place: str, is_pushed: bool) -> list[str]:
        """Return lines of Python that load EMBEDDINGS_FILE into a pipeline."""
        return []

    def summary(self) -> str:
        """Say what is trained besides LoRA layers."""
        return ""


class LoraText(FrozenText):
    """LoRA on both text encoders."""

    is_trained = True

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.share = args.train_text_encoder_frac or 1.0

    def check(self) -> None:
        """Raise UserError for flags that contradict the mode."""
        self.check_share()
        refuse(self.share < 1 and choose_prior(self.args).is_base_model, "--with_prior_preservation without "
               "--class_data_dir compares with the base model, whose text encoders are gone after "
               f"--train_text_encoder_frac {self.share:g} of the steps; leave one out.")

    def add_to(self, run: Run, encoders: Sequence[Any]) -> None:
        """Add LoRA to the attention of the layers that SDXL reads."""
        for encoder in encoders:
            add_adapters(self.args, encoder)


class PivotalTuning(FrozenText):
    """New tokens, whose embeddings are trained beside the UNet's LoRA, and which replace words in prompts."""

    is_trained, files = True, (EMBEDDINGS_FILE,)

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.share, words = args.train_text_encoder_frac or 0.5, args.token_abstraction.split(",")
        self.tokens = {word.strip(): [f"<s{2 * i}>", f"<s{2 * i + 1}>"] for i, word in enumerate(words)}

    def check(self) -> None:
        """Raise UserError for flags that contradict the mode."""
        args = self.args
        refuse(args.train_text_encoder, "--train_text_encoder and --train_text_encoder_ti exclude each other: LoRA on "
               "the encoders, or new tokens.")
        self.check_share()
        refuse(args.init_lora, "--init_lora reads no new tokens, so --train_text_encoder_ti would begin them anew; "
               "leave one out.")
        refuse("" in self.tokens, "--token_abstraction has an empty word.")
        for prompt in filter(None, (own.class_prompt for own in subjects_of(args))):
            refuse(self.replace_words(prompt) != prompt, f'--class_prompt "{prompt}" has a word of '
                   "--token_abstraction, which is the subject's alone; leave it out there.")

    def add_to(self, run: Run, encoders: Sequence[Any]) -> None:
        """Give each encoder the new tokens: random ones of the size of the known ones, or a concept's."""
        for encoder, part in zip(encoders, TOKENIZERS, strict=True):
            tokenizer, known = load_part(run.base, part), encoder.get_input_embeddings()
            table, count = known.weight.detach().float(), len(self.new_tokens())
            if self.args.initializer_concept:
                ids = tokenizer(self.args.initializer_concept, add_special_tokens=False).input_ids
                rows = table[[ids[i % len(ids)] for i in range(count)]]
            else:
                rows = torch.randn(count, table.shape[1]).to(table.device) * table.std()
            encoder.set_input_embeddings(NewTokens(known, len(tokenizer), rows))
            if hasattr(encoder, "text_model"):  # SDXL's configuration pools at the highest id, now a new token
                encoder.text_model.eos_token_id = tokenizer.eos_token_id

    def rate(self) -> tuple[str, float, float]:
        """Return the name of the parameter group, its learning rate and weight decay."""
        return "tokens", self.args.token_lr, 0.0

    def embeddings(self, encoders: Sequence[Any]) -> dict[str, Tensor]:
        """Return the new rows of both encoders under the names that all readers know."""
        return {name: encoder.get_input_embeddings().rows.detach().cpu().contiguous()
                for name, encoder in zip(("clip_l", "clip_g"), encoders, strict=True)}

    def usage(self, place: str, is_pushed: bool) -> list[str]:
        """Return lines of Python that load EMBEDDINGS_FILE into a pipeline."""
        file = f"hf_hub_download({place!r}, {EMBEDDINGS_FILE!r})" if is_pushed else repr(f"{place}/{EMBEDDINGS_FILE}")
        code = f"""
from safetensors.torch import load_file
embeddings = load_file({file})
for name, encoder, tokenizer in (("clip_l", pipeline.text_encoder, pipeline.tokenizer),
                                 ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2)):
    pipeline.load_textual_inversion(embeddings[name], token=TOKENS, text_encoder=encoder, tokenizer=tokenizer)
pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id  # as in training"""
        code = code.strip().replace("TOKENS", str(self.new_tokens()))
        return ["from huggingface_hub import hf_hub_download"] * is_pushed + [code]

    def summary(self) -> str:
        """Say what is trained besides LoRA layers."""
        return f"{len(self.new_tokens())} new tokens in both text encoders"


TEXT_MODES = {"train_text_encoder_ti": PivotalTuning, "train_text_encoder": LoraText}  # by flag; the first one counts


def choose_text(args: argparse.Namespace) -> FrozenText:
    """Return the text mode that the flags choose."""
    return next((mode for flag, mode in TEXT_MODES.items() if getattr(args, flag)), FrozenText)(args)


class NoPrior:
    """No prior preservation: every row is the subject's."""

    is_base_model, rows = False, 1  # rows: of a batch, for each row of the subject

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def check(self) -> None:
        """Raise UserError for flags that contradict the mode."""
        idle = [flag for flag in ("class_data_dir", "class_prompt") if getattr(self.args, flag)]
        if idle:
            warn("--%s does nothing without --with_prior_preservation.", idle[0])

    def generate(self, run: Run) -> None:
        """Generate the class pictures that are missing."""

    def samples(self, subject: Sequence[Sample]) -> list[Sample]:
        """Return the samples of the class; their rows stand beside the subject's in every batch."""
        return []

    def row_losses(self, model: Any, inputs: tuple, target: Tensor, row_loss: Callable, count: int) -> Tensor:
        """Return the losses of all rows (B,); the first `count` are the subject's.

        inputs: noisy latents, timesteps, text, add_time_ids; row_loss: from prediction and target to losses of rows.
        """
        return row_loss(model(*inputs), target)

    def summary(self) -> str:
        """Say how the class is preserved."""
        return ""


class ClassPictures(NoPrior):
    """Prior preservation by pictures of the class (arXiv:2208.12242), which the base model generates if need be."""

    rows = 2

    def check(self) -> None:
        """Raise UserError for flags that contradict the mode."""
        refuse(not all(own.class_prompt for own in subjects_of(self.args)), "--with_prior_preservation needs "
               f'{"a class_prompt for each of --subjects" if self.args.subjects else "--class_prompt"}, such as '
               '"a photo of a dog".')

    def generate(self, run: Run) -> None:
        """Generate the class pictures that are missing."""
        for own in subjects_of(self.args):
            generate_class_images(run, own)

    def samples(self, subject: Sequence[Sample]) -> list[Sample]:
        """Return the pictures of the class, or of each subject's."""
        return [Sample(path, own.class_prompt, is_class=True) for own in subjects_of(self.args)
                for path in list_pictures("--class_data_dir", own.class_data_dir, own.recursive)]

    def summary(self) -> str:
        """Say how the class is preserved."""
        return f"{self.args.num_class_images} pictures of {class_prompts(self.args)}, generated if missing"


class BaseModelPrior(ClassPictures):
    """Prior preservation without class pictures: on the subject's pictures and the class prompt, the prediction of the
    base model, with its adapters off, is the target.
    """

    is_base_model = True

    def generate(self, run: Run) -> None:
        """Generate nothing."""

    def samples(self, subject: Sequence[Sample]) -> list[Sample]:
        """Return the subject's pictures under the class prompt."""
        prompts = {sample.path: sample.class_prompt for sample in subject}
        return [Sample(path, prompt, is_class=True) for path, prompt in prompts.items()]

    def row_losses(self, model: Any, inputs: tuple, target: Tensor, row_loss: Callable, count: int) -> Tensor:
        """Return the losses of all rows."""
        noisy, timesteps, text, add_time_ids = inputs
        with torch.no_grad(), model.without_adapters():
            known = model(noisy[count:], timesteps[count:], tuple(part[count:] for part in text), add_time_ids[count:])
        return row_loss(model(*inputs), torch.cat([target[:count], known.float()]))

    def summary(self) -> str:
        """Say how the class is preserved."""
        return f"the base model's predictions for {class_prompts(self.args)}"


def choose_prior(args: argparse.Namespace) -> NoPrior:
    """Return the kind of prior preservation that the flags choose."""
    if not args.with_prior_preservation:
        return NoPrior(args)
    return ClassPictures(args) if args.class_data_dir else BaseModelPrior(args)


class Lora:
    """LoRA (arXiv:2106.09685), which peft adds and which runs through fused kernels while it trains."""

    name, tags = "", ()  # in the plan; of the card

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def check(self) -> None:
        """Raise UserError for flags that contradict the mode."""

    def keywords(self) -> dict[str, Any]:
        """Return keywords of peft's LoraConfig."""
        return {}

    def initialize(self, layer: Any) -> None:
        """Set what peft leaves inexact in a new layer."""


class Dora(Lora):
    """DoRA (arXiv:2402.09353): LoRA with a trained magnitude for each row of a weight, on the UNet alone."""

    name, tags = "DoRA, ", ("dora",)

    def check(self) -> None:
        """Raise UserError for flags that contradict the mode."""
        refuse(self.args.base_precision != "auto", "--use_dora needs the weights unpacked, --base_precision "
               f"{self.args.base_precision} packs them; leave one out.")

    def keywords(self) -> dict[str, Any]:
        """Return keywords of peft's LoraConfig."""
        return {"use_dora": True}

    def initialize(self, layer: Any) -> None:
        """Set the magnitude to the exact norm: peft's is rounded to the base's dtype."""
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data = layer.base_layer.weight.detach().float().flatten(1).norm(dim=1).view_as(magnitude)


def choose_adapter(args: argparse.Namespace) -> Lora:
    """Return the kind of adapter of the UNet that the flags choose."""
    return Dora(args) if args.use_dora else Lora(args)


# ---------------------------------------------------------------------------------------------------------------- main
# The phases of a run, in the order in which they happen.


def main(args: argparse.Namespace) -> None:
    """Train as args say; with --dry_run, print the plan."""
    started = time.perf_counter()
    with StopSignals(args.max_train_minutes) as stop:
        run = start(args, stop)
        objective = make_objective(args, run.scheduler, run.device)
        if args.dataset_name:  # a folder was checked before
            with local_main_first(run.accelerator, run.waiting_group):
                fetch_dataset(args)
            check_subject(args)
        subject = instance_samples(args)
        run = replace(run, pictures=len({sample.path for sample in subject}))
        buckets = bucket_of_each(args, subject)
        schedule = plan_steps(args, len(subject), run.accelerator.num_processes)
        facts = plan_facts(run, schedule, subject, buckets)
        print_plan(run, facts, subject, buckets, schedule)
        if args.dry_run:
            return
        repo = create_repository(args) if args.push_to_hub and run.accelerator.is_main_process else args.output_dir
        with lock_output(run.output, run.cache.folder), trackers(run), translate_errors(run):
            step, stopped_by = run_training(run, objective, repo, subject, buckets, schedule, facts, started)
        run.accelerator.end_training()
        if stopped_by:
            command = f"accelerate launch {quoted(Path(__file__))} --config {quoted(run.output / CONFIG_FILE)}"
            raise Stopped(stopped_by, f"Stopped after step {step}; checkpoint and LoRA are written. Go on with\n"
                          f"    {command} --resume_from_checkpoint latest")


def run_training(run: Run, objective: Objective, repo: str, subject: Sequence[Sample], buckets: Sequence[Bucket],
                 schedule: Schedule, facts: dict[str, str], started: float) -> tuple[int, int]:
    """Run the phases of a training: each loads the models that it needs, and they are gone when it returns.

    Returns the last step, and the number of the signal that ended the run early, or 0.
    """
    args = run.args
    run.memory.begin("class pictures")
    run.prior.generate(run)
    samples = subject + run.prior.samples(subject)
    check_space(run.cache.folder, latent_bytes(run, buckets, len(samples) - len(subject)), "the cache")
    run.memory.begin("prompts")
    prompts = encode_prompts(run, prompts_of(run, samples), run.text.is_trained, run.dtype)
    run.memory.begin("latents")
    latents = encode_latents(run, samples, buckets, prompts)
    print_rows([("Cache", run.cache.report())])
    run.memory.begin("training")
    of_bucket = [[i for i, own in enumerate(buckets) if own == bucket] for bucket in dict.fromkeys(buckets)]
    sampler = BatchSampler(of_bucket, range(len(subject), len(samples)), args.train_batch_size, run.seed)
    model = load_trainable(run)
    batch_at = functools.partial(latents.batch, prompts, sampler, stride=run.accelerator.num_processes)
    step, loss, stopped_by = train(run, model, batch_at, objective, make_validator(run, model, prompts), prompts,
                                   schedule, latents.pictures)
    run.stop.message = AFTER_TRAINING
    if run.accelerator.is_main_process:
        gallery = write_card(run, repo, step, subject, facts) if not stopped_by else []
        address = push(args, repo, gallery) if args.push_to_hub and not stopped_by else ""
        print_summary(run, step, loss, (time.perf_counter() - started) / 60, address)
    return step, stopped_by


# ----------------------------------------------------------------------------------------------------------- objective
# An objective is a table of coefficients over the training timesteps; the loss is a weighted mean of rows.
# Shapes: latents (B, 4, h, w), timesteps and rows (B,), columns of the table (timesteps,).


class ObjectiveCoefficients(NamedTuple):
    """model_input = a * latents + b * noise; target = c * latents + d * noise. Columns (timesteps,), float64."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    weight: Tensor
    t_cond: Tensor  # what the model is given: the timestep itself, or a function of sigma
    snr: Tensor  # signal-to-noise ratio, squared


class Objective(NamedTuple):
    """What is trained: the coefficients, in float32 on the device, and how timesteps and noise are sampled."""

    table: ObjectiveCoefficients
    huber_delta: Tensor  # (timesteps,)
    timesteps: range  # those that are sampled, all alike
    noise_offset: float
    distance: Callable[[Tensor, Tensor], Tensor]
    prior: NoPrior


class Loss(NamedTuple):
    """The loss of a micro-batch, and what is logged of it."""

    total: Tensor
    rows: Tensor  # (instance_rows,) of the subject, before weights
    timesteps: Tensor


def make_objective(args: argparse.Namespace, scheduler: Any, device: torch.device | None = None) -> Objective:
    """Make the objective of the flags and the base model's scheduler. Raises UserError if they contradict."""
    exact = make_coefficients(scheduler, args.snr_gamma, args.loss_weighting, args.do_edm_style_training)
    last = len(exact.a) - 1  # 999, but EDMEulerScheduler has one more
    low, high = args.min_timestep, last if args.max_timestep is None else min(args.max_timestep, last)
    refuse(low > high, f"--min_timestep {low} is beyond the model's last timestep, {last}.")
    rounded = (column.float() if column.is_floating_point() else column for column in exact)
    return Objective(ObjectiveCoefficients(*(column.to(device) for column in rounded)),
                     huber_deltas(exact.snr).float().to(device), range(low, high + 1), args.noise_offset,
                     DISTANCES[args.loss_type], choose_prior(args))


def make_coefficients(scheduler: Any, snr_gamma: float | None = None, weighting: str | None = None,
                      edm_style: bool = False) -> ObjectiveCoefficients:
    """Make the table of what the scheduler's model predicts; timestep 0 has the least noise.

    Raises UserError for another prediction type than epsilon and v_prediction, or a weighting that does not fit.
    """
    kind = scheduler.config.get("prediction_type")
    refuse(kind not in ("epsilon", "v_prediction"), f"{BASE_FLAG} predicts '{kind}' with {type(scheduler).__name__}; "
           "only epsilon and v_prediction can be trained.")
    if "sigma_data" in scheduler.config:
        refuse(snr_gamma or weighting, f"--{'snr_gamma' if snr_gamma else 'loss_weighting'}: "
               f"{type(scheduler).__name__} weights by the EDM formulas, so leave it out.")
        return edm_coefficients(scheduler)
    alphas = scheduler.alphas_cumprod.double()
    a, b, snr = alphas.sqrt(), (1 - alphas).sqrt(), alphas / (1 - alphas)
    c, d = (torch.zeros_like(a), torch.ones_like(a)) if kind == "epsilon" else (-b, a)
    weight = loss_weight(snr, kind, snr_gamma, weighting, edm_style)
    return ObjectiveCoefficients(a, b, c, d, weight, torch.arange(len(a)), snr)


def edm_coefficients(scheduler: Any) -> ObjectiveCoefficients:
    """Make the table of an EDM model (arXiv:2206.00364, table 1): the loss is that of the denoised latents."""
    whole = scheduler.from_config(scheduler.config).sigmas  # inference leaves its own few in the scheduler
    sigma, data = whole[whole > 0].flip(0).double(), scheduler.config.sigma_data
    total = (sigma ** 2 + data ** 2).sqrt()
    c_skip, c_in = data ** 2 / total ** 2, 1 / total
    c_out = sigma * data / total * (1 if scheduler.config.prediction_type == "epsilon" else -1)
    return ObjectiveCoefficients(c_in, c_in * sigma, (1 - c_skip) / c_out, -c_skip * sigma / c_out, c_out ** 2,
                                 sigma.log() / 4, (data / sigma) ** 2)


def loss_weight(snr: Tensor, kind: str, snr_gamma: float | None, weighting: str | None, edm_style: bool) -> Tensor:
    """Weight squared errors in epsilon or velocity by what their errors in the denoised latents weigh.

    An error in epsilon is snr times that in the denoised latents, one in velocity snr + 1 times. min-SNR:
    arXiv:2303.09556; debiased estimation: arXiv:2310.08442; EDM style: the plain loss of epsilon. Finite at snr 0.
    """
    if snr_gamma is not None:
        denoised = snr.clamp(max=snr_gamma)
    elif weighting == "debiased":
        denoised = snr.sqrt()
    elif edm_style:
        denoised = snr
    else:
        return torch.ones_like(snr)
    return torch.where(snr > 0, denoised / snr, 1.0) if kind == "epsilon" else denoised / (snr + 1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda error, delta: error.square(),
    "huber": lambda error, delta: 2 * delta * ((error.square() + delta.square()).sqrt() - delta)}


def huber_deltas(snr: Tensor, huber_c: float = 0.1) -> Tensor:
    """Return the error at which the Huber loss turns linear, by timestep: the smaller the more noise there is.

    The schedule by signal-to-noise ratio of arXiv:2403.16728.
    """
    return (1 - huber_c) / (1 + snr.rsqrt()) ** 2 + huber_c  # 1 / sqrt(snr) is sigma; at snr 0 huber_c is left


def diffusion_loss(model: Any, objective: Objective, batch: Batch) -> Loss:
    """Return the loss of a micro-batch: the sum of weighted rows over the number of instance rows."""
    latents = batch.mean + batch.std * torch.randn_like(batch.mean)
    noise, table, device = torch.randn_like(latents), objective.table, latents.device
    if objective.noise_offset:  # so that brightness is learnt, too
        noise += objective.noise_offset * torch.randn_like(latents[:, :, :1, :1])
    timesteps = torch.randint(objective.timesteps.start, objective.timesteps.stop, (len(latents),), device=device)
    a, b, c, d, delta = (column[timesteps].view(-1, 1, 1, 1) for column in (*table[:4], objective.huber_delta))

    def per_sample_loss(prediction: Tensor, target: Tensor) -> Tensor:
        return (objective.distance(prediction.float() - target, delta) * batch.mask).flatten(1).mean(1)

    inputs = a * latents + b * noise, table.t_cond[timesteps], batch.text, batch.add_time_ids
    rows = objective.prior.row_losses(model, inputs, c * latents + d * noise, per_sample_loss, batch.instance_rows)
    total = (batch.weight * table.weight[timesteps] * rows).sum() / batch.instance_rows
    return Loss(total, rows[:batch.instance_rows].detach(), timesteps[:batch.instance_rows])


# ------------------------------------------------------------------------------------------------------- training loop
# Sample rows, loss, backward, clip, step; then log, save, validate when due. Rows and randomness of micro-batch n are
# functions of n and the seed: a checkpoint needs no random state, and one process equals several.


class Schedule(NamedTuple):
    """How long a run is, in optimizer steps."""

    total_steps: int
    steps_per_epoch: float
    samples_per_step: int
    validation_steps: int  # between two validations
    warmup_steps: int = 0


def plan_steps(args: argparse.Namespace, instance_rows: int, world: int) -> Schedule:
    """Compute the steps from epochs or --max_train_steps; an epoch need not be a whole number of steps."""
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * world
    steps_per_epoch = instance_rows / samples_per_step
    is_auto = args.steps_per_image == "auto"
    exposures = max(100, AUTO_EXPOSURES * args.repeats / instance_rows) if is_auto else args.steps_per_image
    passes = exposures / args.repeats if exposures else args.num_train_epochs
    total_steps = args.max_train_steps or math.ceil(passes * instance_rows / samples_per_step)  # exact if whole
    validation_steps = args.validation_steps or max(1, round(args.validation_epochs * steps_per_epoch))
    asked = args.lr_warmup_steps if args.lr_warmup_steps >= 1 else round(args.lr_warmup_steps * total_steps)
    warmup_steps = asked if asked < total_steps else total_steps // 10
    warmup_steps = min(warmup_steps, total_steps // 20) if is_auto else warmup_steps
    warmup_steps = 0 if args.lr_scheduler == "constant" else warmup_steps
    return Schedule(total_steps, steps_per_epoch, samples_per_step, validation_steps, warmup_steps)


def due(step: int, every: int, last: int | None = None) -> bool:
    """Return True if something that happens every so many steps, and perhaps at the last, happens now."""
    return step % every == 0 or step == last


def position_seed(*position: object) -> int:
    """Return a 63-bit seed for a position in the run: the same position gives the same seed on any machine."""
    return random.Random(repr(position)).getrandbits(63)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the host and a device; torch.manual_seed keeps a traceback for each device that is not there, each time."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def micro_batches(step: int, accumulation: int, accelerator: Accelerator) -> range:
    """Return the numbers of this rank's micro-batches in a step: alike on any number of ranks."""
    world = accelerator.num_processes
    return range(step * accumulation * world + accelerator.process_index, (step + 1) * accumulation * world, world)


def share_gradients(accelerator: Accelerator, adapters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all ranks: one all-reduce of 4 bytes a trained parameter, once a step."""
    if accelerator.num_processes > 1:
        gradients = [adapter.grad for adapter in adapters if adapter.grad is not None]  # none: of frozen encoders
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def train(run: Run, model: TrainableSDXL, batch_at: Callable[[int], Batch], objective: Objective,
          validate: Callable[[int], None], prompts: PromptEmbeddings, schedule: Schedule,
          pictures: dict[str, list[str]]) -> tuple[int, float, int]:
    """Train the adapters, resuming where a checkpoint ended.

    pictures: hash_pictures of the data. Returns the last step, its loss, and the number of the signal (or TIME_IS_UP)
    that ended the run early, or 0.
    """
    args, accelerator, last = run.args, run.accelerator, schedule.total_steps
    state = make_state(run, model, schedule, pictures)
    optimizer, lr_scheduler, ema, adapters = state.optimizer, state.lr_scheduler, state.ema, state.trained
    step, freeze_at = restore(run, state), round(run.text.share * last) if run.text.share < 1 else math.inf
    validate = ema.applied()(validate)
    if step == 0:
        validate(0)
    model.train()
    progress = Progress(run, lr_scheduler, schedule, step)
    validate = progress.paused()(validate)
    run.stop.message, stop = None, 0
    with progress.bar:
        while step < last and not stop:
            if step >= freeze_at:
                freeze_text_encoders(model, prompts, ema)
                freeze_at = math.inf
            progress.begin_step()
            for n in micro_batches(step, args.gradient_accumulation_steps, accelerator):
                batch = batch_at(n)
                seed_device(position_seed(run.seed, "noise", n), run.device)  # noise, timesteps, latents and dropout
                loss = diffusion_loss(model, objective, batch)
                accelerator.backward(loss.total / args.gradient_accumulation_steps)
                progress.add(batch, loss)
            share_gradients(accelerator, adapters)
            progress.end_step(accelerator.clip_grad_norm_(adapters, args.max_grad_norm))
            optimizer.step()
            ema.update(step)
            lr_scheduler.step()
            optimizer.zero_grad()
            step, stop = step + 1, run.stop.sync_stop_flags()
            saving = due(step, args.checkpointing_steps, last) or stop
            if saving or due(step, LOG_STEPS, last):
                progress.report()  # a loss that is not finite ends the run here, before anything is overwritten
            if step == last:
                save_loras(run, state)  # first: the disk may be too small for a checkpoint, the GPU for validation
            if saving:
                save_checkpoint(run, state, step, last)
            if due(step, schedule.validation_steps, last) and not stop:
                validate(step)
    save_loras(run, state)  # with the last pictures, or for all that a finished run was resumed for
    return step, progress.loss, stop if step < last else 0




def progress_bar(total: int, label: str, initial: int = 0, delay: float = 0) -> tqdm:
    """Return a bar on a terminal, a line twice a minute elsewhere; nothing on other ranks, below --log_level info, or
    if nothing is to be done.
    """
    idle = initial >= total or not logger.isEnabledFor(logging.INFO)
    return tqdm(total=total, desc=label, initial=initial, delay=delay, mininterval=0.5 if sys.stderr.isatty() else 30,
                dynamic_ncols=True, disable=idle)


class Progress:
    """The progress bar, and what was collected since the last report; only a report waits for the device."""

    def __init__(self, run: Run, lr_scheduler: Any, schedule: Schedule, step: int) -> None:
        self.timesteps, self.memory = run.scheduler.config.num_train_timesteps, run.memory
        self.accelerator, self.scaler, self.lr_scheduler = run.accelerator, run.accelerator.scaler, lr_scheduler
        self.samples_per_step = schedule.samples_per_step
        self.bar = progress_bar(schedule.total_steps, "Training", step)
        self.step, self.seen, self.loss = step, [], math.nan  # seen: of each micro-batch its step, names and loss
        self.norms, self.finite = [], deque(maxlen=5)
        self.reported, self.since = step, 0.0
        self.history = run.output / HISTORY_FILE
        if self.accelerator.is_main_process:
            lines = [json.dumps(entry) + "\n" for entry in read_history(run.output, before=step) if step]
            with atomic_write(self.history) as unfinished:
                unfinished.write_text("".join(lines), encoding="utf-8")

    def begin_step(self) -> None:
        """Start the clock of the speed, which stands between a report and the next step."""
        self.since = self.since or time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock of the speed for the block."""
        began = time.perf_counter()
        yield
        self.since += (time.perf_counter() - began) * bool(self.since)

    def add(self, batch: Batch, loss: Loss) -> None:
        """Keep a micro-batch's loss, on the device, for the next report."""
        self.seen.append((self.step + 1, batch.names, loss._replace(total=loss.total.detach())))

    def end_step(self, grad_norm: Tensor) -> None:
        """Count a step that has its gradients."""
        self.step += 1
        self.bar.update()
        self.norms.append((self.step, grad_norm))

    def report(self) -> None:
        """Log to bar and trackers, if there is news. Raises TrainingError if a number is not finite."""
        if not self.seen:
            return
        losses = torch.stack([loss.total for _, _, loss in self.seen])
        norms = torch.stack([norm.to(losses) for _, norm in self.norms])
        own = losses.mean() if self.scaler else losses.mean() + 0 * norms.sum()  # a scaler's norms overflow at times
        self.loss, now = self.accelerator.reduce(own, "mean").item(), time.perf_counter()
        if not math.isfinite(self.loss):
            raise TrainingError(self.nonfinite_message(losses.tolist(), norms.tolist()))
        self.finite.extend(losses.tolist())
        if self.scaler and self.scaler.get_scale() < 1:
            raise TrainingError(f"at step {self.step} the fp16 scaler came down to {self.scaler.get_scale():g}: every "
                                "gradient overflows. Use --mixed_precision bf16, or a lower --learning_rate.")
        groups = zip(self.lr_scheduler.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True)
        rates = {f"lr/{group['name']}": rate * group.get("d", 1) for group, rate in groups}  # d: what Prodigy found
        speed = (self.step - self.reported) * self.samples_per_step / (now - self.since)
        metrics = {"loss": self.loss, "grad_norm": float(norms[-1]), "peak_memory_gb": peak_memory_gb(self.memory),
                   "samples_per_second": speed, **rates, **self.loss_by_timestep()}
        self.accelerator.log(metrics, step=self.step)
        if self.accelerator.is_main_process:  # a full disk is reported where it matters
            with suppress(OSError), open(self.history, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **metrics}) + "\n")
        self.bar.set_postfix({"loss": f"{self.loss:.4f}", "lr": f"{next(iter(rates.values())):.1e}", "pictures/s":
                              f"{speed:.3g}", "GB": f"{metrics['peak_memory_gb']:.1f}"}, refresh=False)
        self.seen, self.norms = [], []
        self.reported, self.since = self.step, 0.0

    def loss_by_timestep(self) -> dict[str, float]:
        """Return the mean loss of the subject's rows in each quarter of the timesteps that was sampled."""
        timesteps = torch.cat([loss.timesteps for _, _, loss in self.seen])
        rows = torch.cat([loss.rows for _, _, loss in self.seen])
        quarter = (timesteps * 4 // self.timesteps).clamp(max=3)
        sums, counts = (torch.zeros(4, device=rows.device).index_add(0, quarter, part)
                        for part in (rows, torch.ones_like(rows)))
        sums, counts = self.accelerator.reduce(torch.stack([sums, counts]), "sum").tolist()
        bounds = [self.timesteps * i // 4 for i in range(5)]
        return {f"loss/timesteps {bounds[i]}-{bounds[i + 1] - 1}": sums[i] / counts[i] for i in range(4) if counts[i]}

    def nonfinite_message(self, losses: list[float], norms: list[float]) -> str:
        """Name the first step whose numbers are not finite, its pictures and prompts, and what helps."""
        bad = [(step, f"loss {loss}", names) for (step, names, _), loss in zip(self.seen, losses, strict=True)
               if not math.isfinite(loss)]
        norms = [] if self.scaler else norms  # which it lets overflow at times
        bad += [(step, f"gradient norm {norm}", sum((names for at, names, _ in self.seen if at == step), ()))
                for (step, _), norm in zip(self.norms, norms, strict=False) if not math.isfinite(norm)]
        found = [entry for part in gather_object([bad]) for entry in part]
        step, what, names = min(found, key=lambda entry: entry[:1])
        finite = ", ".join(f"{loss:.4g}" for loss in self.finite) or "none"
        return (f"step {step} has {what}, with {'; '.join(dict.fromkeys(names))} (finite losses before: {finite}). "
                "The last checkpoint is whole, nothing was written over it. A lower --learning_rate or "
                "--mixed_precision bf16 helps; or is one of these pictures odd?")


def read_history(output: Path, before: float = math.inf) -> list[dict[str, float]]:
    """Return what was logged up to a step, without a line that a kill cut off."""
    entries = []
    with suppress(FileNotFoundError):
        for line in (output / HISTORY_FILE).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                entries.append(json.loads(line))
    return [entry for entry in entries if entry["step"] <= before]


class PhaseMemory:
    """The peak of each phase in a GPU's memory, in GB; what a phase reserved is freed before the next."""

    def __init__(self, device: torch.device) -> None:
        self.backend = torch.get_device_module(device) if device.type == "cuda" else None
        self.phase, self.peaks = "", {}

    def begin(self, phase: str) -> None:
        """End the phase before, and begin another one, or continue one that was interrupted."""
        if self.backend:
            self.measure()
            self.backend.empty_cache()
            self.backend.reset_peak_memory_stats()
        self.phase = phase

    def measure(self) -> dict[str, float]:
        """Return the peaks so far, by phase."""
        if self.backend and self.phase:
            peak = self.backend.max_memory_allocated() / GB
            self.peaks[self.phase] = max(peak, self.peaks.get(self.phase, 0.0))
        return self.peaks


def peak_memory_gb(memory: PhaseMemory) -> float:
    """Return the most memory that training had in use on a GPU or, without one, this process."""
    if memory.backend:
        return memory.measure()["training"]
    if importlib.util.find_spec("resource") is None:  # Windows
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


# ------------------------------------------------------------------------------------------------------------ pictures
# Folders and data sets become samples: pictures with prompts, masks and buckets. No models, no torch.


class Sample(NamedTuple):
    """One picture with the prompt that it is trained with; repeats of a picture are samples of their own."""

    path: Path
    prompt: str
    is_class: bool
    repeat: int = 0
    class_prompt: str = ""  # of the subject's class


class View(NamedTuple):
    """A crop of a resized picture at top and left, in pixels, after it was mirrored or not."""

    top: int
    left: int
    flip: bool


Bucket = tuple[int, int]
"""Width and height in pixels, which all rows of a batch share."""


def match_name(path: Path) -> str:
    """Return a file's path without suffix in composed Unicode: the name by which captions and masks find pictures."""
    return unicodedata.normalize("NFC", path.with_suffix("").as_posix())


def files_in(folder: Path, recursive: bool) -> list[Path]:
    """Return the files of a folder by name, without hidden ones."""
    found = (path for path in folder.glob("**/*" if recursive else "*") if not path.is_dir())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def list_pictures(flag: str, folder: str | Path, recursive: bool = False, masks: bool = False) -> list[Path]:
    """Return the pictures of a folder by name, with or without the masks that lie beside them. Raises UserError."""
    refuse(not Path(folder).is_dir(), f"{flag} {folder}: no such folder.")
    files = [path for path in files_in(Path(folder), recursive) if path.suffix.lower() in PICTURE_SUFFIXES]
    return files if masks else split_masks(files)[0]


MASK_NAMES = (r"(.+)[-_. ](?:masks?|masklabel|condlabel)", r"(.+)\.\w+[-_. ]masks?", r"(|.*/)masks?[-_. ]([^/]+)",
              r"(|.*/)masks?/([^/]+)")  # of dog.png: dog_mask.png, dog.png.mask.png, mask_dog.png, masks/dog.png


def split_masks(files: Sequence[Path]) -> tuple[list[Path], dict[str, Path]]:
    """Divide files into pictures and, by the match_name of their picture, masks under other trainers' names."""
    names, masks, pictures = {match_name(path) for path in files}, {}, []
    for path in files:
        found = (re.fullmatch(pattern, match_name(path), re.IGNORECASE | re.DOTALL) for pattern in MASK_NAMES)
        owner = next((own for match in found if match and (own := "".join(match.groups())) in names), None)
        pictures += [path] * (owner is None)
        masks |= {owner: path} if owner and not path.stem.lower().endswith("condlabel") else {}
    return pictures, masks


def read_image(path: str | Path) -> Image.Image:
    """Read a file's first picture, turned as its EXIF says, with 8 bits a channel. Raises ValueError for pixels that
    are not integers of up to 16 bits.
    """
    with Image.open(path) as image:
        tags = getattr(image, "tag_v2", {})  # of TIFF: 258 are the bits, 339 the format, 262 whether 0 is white
        bits, is_inverted = max(tags.get(258, (16,))), tags.get(262) == 0
        if image.mode == "F" or set(tags.get(339, ())) - {1, 4} or (image.mode == "I" and bits > 16):
            raise ValueError("its pixels are not 8- or 16-bit integers; convert it to 8-bit sRGB")
        image.load()
        picture = ImageOps.exif_transpose(image)
    if picture.mode.startswith("I"):  # greyscale of 12 or 16 bits
        picture = picture.convert("I").point(lambda value: value * (256 / 2**bits)).convert("L")
        picture = ImageOps.invert(picture) if is_inverted else picture  # Pillow does so for 8 bits
    return picture.convert(f"{picture.mode[:-1]}A") if picture.mode in ("RGBa", "La") else picture


def unsupported_colours(path: str | Path, image: Image.Image) -> str:
    """Name the colour space of a picture that is open, if no embedded profile tells how to convert it; else ""."""
    if image.info.get("icc_profile"):
        return ""
    with open(path, "rb") as file:
        found = re.search(rb"cICP(.)(.)|colrnclx\0(.)\0(.)", file.read(4096), re.DOTALL)  # of PNG; of AVIF
    primaries, transfer = (ord(part) for part in found.groups() if part) if found else (1, 13)
    if primaries not in (1, 2) or transfer not in (1, 2, 6, 13, 14, 15):
        return f"the primaries {primaries} and transfer function {transfer} of ITU-T H.273"
    if "srgb" not in image.info and not found and abs(image.info.get("gamma", 1 / 2.2) * 2.2 - 1) > 0.05:
        return f"a gamma of {image.info['gamma']:g}"
    with suppress(Exception):  # a broken directory names nothing
        exif = image.getexif()
        tags = exif.get_ifd(0x8769)  # of cameras: ColorSpace 2, or the file R03 of DCF
        is_adobe = tags.get(0xA001) == 2 or 0xA005 in tags and exif.get_ifd(0xA005).get(1, "").startswith("R03")
        return "Adobe RGB" if is_adobe else ""
    return ""


def to_srgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to RGB by its colour profile, without its alpha. Raises ValueError if that cannot be."""
    data = picture.info.get("icc_profile")
    if not data and picture.mode != "LAB":
        return picture.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data) if data else ImageCms.createProfile("LAB"))
        kinds = {"GRAY": ("L", "1", "LA"), "RGB ": ("RGB", "1", "L", "LA", "P", "PA", "RGBA")}  # and what becomes them
        mode, *others = kinds.get(profile.profile.xcolor_space, (picture.mode,))
        plain = picture.convert(mode) if picture.mode in others else picture
        return ImageCms.profileToProfile(plain, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError) as error:
        raise ValueError(f"its colour profile cannot be used ({error}); convert it to sRGB") from error


def alpha_of(picture: Image.Image) -> Image.Image | None:
    """Return the alpha channel of a picture; None if it is opaque all over."""
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return None
    alpha = picture.convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema()[0] < 255 else None


def load_picture(path: str | Path) -> Image.Image:
    """Read a picture as sRGB: turned as its EXIF says, converted by its colour profile, 16 bits as 8, on white if
    transparent, the first frame if it moves. Raises ValueError for other numbers and colours.
    """
    with Image.open(path) as image:
        colours = unsupported_colours(path, image)
    if colours:
        raise ValueError(f"it is in {colours}, without a profile; convert it to sRGB")
    picture = read_image(path)
    alpha, opaque = alpha_of(picture), to_srgb(picture)
    if alpha is None:
        return opaque
    opaque.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), opaque).convert("RGB")


def picture_size(path: Path) -> tuple[int, int]:
    """Return width and height as they are seen, from the file's header but for a TIFF, which Pillow turns itself."""
    with Image.open(path) as image:
        if image.format == "TIFF":
            image.load()  # before it some versions have the size of the file
            return image.size
        return image.size[::-1] if image.getexif().get(0x0112) in (5, 6, 7, 8) else image.size


@functools.lru_cache(maxsize=64)
def masks_by_name(folder: str, recursive: bool, beside: bool) -> dict[str, Path]:
    """Return masks by the match_name of their pictures in the folder: those beside pictures, or all of a folder of
    masks. Raises UserError if there is no such folder.
    """
    files = [path.relative_to(folder) for path in list_pictures("--masked_loss", folder, recursive, masks=True)]
    bare = {re.sub("[-_. ]mask(s|label)?$", "", match_name(path), flags=re.IGNORECASE): path for path in files}
    return {name: Path(folder, path) for name, path in (split_masks(files)[1] if beside else bare).items()}


def find_mask(args: argparse.Namespace, path: Path) -> Path | None:
    """Return the file of a picture's mask, if it has one."""
    own = next(own for own in subjects_of(args) if path.is_relative_to(pictures_folder(own)))
    folder, beside = pictures_folder(own), own.masked_loss is True
    masks = masks_by_name(str(folder if beside else own.masked_loss), args.recursive, beside)
    return masks.get(match_name(path.relative_to(folder)))


def read_mask(path: Path) -> Image.Image:
    """Read a mask in grey: its alpha if it has one, else its brightness."""
    picture = read_image(path)
    mask = alpha_of(picture) or picture.convert("RGB").convert("L")
    return mask.point(lambda value: 255 * value) if mask.getextrema()[1] == 1 else mask  # 0 and 1, of programs


def load_mask(args: argparse.Namespace, path: Path) -> Image.Image | None:
    """Return where the subject of a picture is, in grey: its mask, or else its own alpha; None is everywhere.

    Raises UserError if the mask is of another shape.
    """
    found = find_mask(args, path)
    if found is None:
        return alpha_of(read_image(path)) if args.masked_loss is True else None
    mask, size = read_mask(found), picture_size(path)
    refuse(abs(mask.width * size[1] - mask.height * size[0]) > max(size) + max(mask.size),
           f"--masked_loss: {found.name} is {mask.width}x{mask.height}, which is another shape than its picture's "
           f"{size[0]}x{size[1]}.")
    return mask.resize(size, Image.Resampling.BILINEAR)


class KnownPictures:
    """Hashes of the pixels of pictures whose file has not changed since they were decoded with the same cache."""

    file, kept_bytes = "pictures.json", 2**29

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.decoded: dict[str, Image.Image] = {}  # those decoded last, until they are encoded

    @staticmethod
    def stamp(path: Path) -> str:
        """Return what changes when a file does: its place, size and time."""
        found = path.stat()
        return f"{path.resolve()} {found.st_size} {found.st_mtime_ns}"

    def key(self, path: Path) -> str:
        """Return a hash of a picture's pixels; decode it unless it is known. Raises what load_picture raises."""
        stamp = self.stamp(path)
        if stamp not in self.keys:
            picture = load_picture(path)
            if sum(kept.width * kept.height * 3 for kept in list(self.decoded.values())) < self.kept_bytes:
                self.decoded[stamp] = picture
            self.keys[stamp] = content_key(picture.size, picture.tobytes())
        return self.keys[stamp]

    def take(self, path: Path) -> Image.Image:
        """Return the picture, and keep it no longer."""
        return self.decoded.pop(self.stamp(path), None) or load_picture(path)

    def read(self, folder: Path) -> None:
        """Read the hashes in a cache, unless another version of Pillow decoded the pictures."""
        self.decoded.clear()
        with suppress(OSError, ValueError, TypeError, AttributeError):
            entries = json.loads((folder / self.file).read_text(encoding="utf-8"))
            if entries.pop("decoded by", None) == f"Pillow {PIL_VERSION}":
                self.keys |= {stamp: str(key) for stamp, key in entries.items()}

    def write(self, folder: Path) -> None:
        """Write all hashes into a cache."""
        self.decoded.clear()
        with best_effort("hashes of the pictures"), atomic_write(folder / self.file, shared=True) as unfinished:
            unfinished.write_text(json.dumps({"decoded by": f"Pillow {PIL_VERSION}", **self.keys}), encoding="utf-8")


KNOWN_PICTURES = KnownPictures()


def check_pictures(flag: str, pictures: Sequence[Path], read: Callable[[Path], Any] | None = None) -> None:
    """Decode every picture that is not known, and name all that are broken. Raises UserError."""

    def fault(path: Path) -> str | None:
        if not path.is_file():  # opening a pipe would wait for ever
            return f"{path.name!r} (a link to nowhere, or no file)"
        try:
            (read or KNOWN_PICTURES.key)(path)
        except Exception as error:  # Pillow's decoders raise whatever they like
            return f"{path.name!r} ({' '.join(str(error).split())})"
        return None

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        broken = [message for message in pool.map(fault, pictures) if message]
    refuse(broken, f"{flag}: {len(broken)} of {len(pictures)} pictures cannot be read; remove or mend "
           f"{', '.join(broken)}.")


SUBJECT_KEYS = {"folder": str, "prompt": str, "class_prompt": str, "repeats": int}


@functools.lru_cache(maxsize=1)  # the file may go while a run lasts
def read_subjects(path: str) -> list[dict[str, Any]]:
    """Read the list of --subjects. Raises UserError."""
    try:
        entries = yaml.safe_load(read_text(Path(path)))
    except yaml.YAMLError as error:
        raise UserError(f"--subjects {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    refuse(not isinstance(entries, list) or not entries, f"--subjects {path} must be a list of subjects.")
    for number_, entry in enumerate(entries, 1):
        keys = {key for key, kind in SUBJECT_KEYS.items() if isinstance(entry, dict) and type(entry.get(key)) is kind
                and entry[key]}
        refuse(not isinstance(entry, dict) or keys != entry.keys() or not {"folder", "prompt"} <= keys,
               f"--subjects {path}: subject {number_} needs folder and prompt, and may have class_prompt, all texts, "
               "and repeats, a whole number.")
        entry["folder"] = expand_path("subjects", entry["folder"])
    for key in ("folder", "prompt"):
        refuse(len({entry[key] for entry in entries}) < len(entries), f"--subjects {path}: each subject needs a {key} "
               "of its own.")
    return entries


def subjects_of(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the flags of each subject: the run's, with what --subjects says of it. Raises UserError.

    Its class pictures and masks are in a folder of its folder's name.
    """
    if not args.subjects:
        return [args]
    found = []
    for entry in read_subjects(args.subjects):
        places = {flag: str(Path(value, Path(entry["folder"]).name)) for flag in ("class_data_dir", "masked_loss")
                  if isinstance(value := getattr(args, flag), str)}
        found.append(argparse.Namespace(**{
            **vars(args), **places, "subjects": None, "instance_data_dir": entry["folder"],
            "instance_prompt": entry["prompt"], "class_prompt": entry.get("class_prompt"),
            "repeats": entry.get("repeats", 1)}))
    return found


def class_prompts(args: argparse.Namespace) -> str:
    """Return the class prompts of all subjects for a sentence."""
    return ", ".join(f'"{prompt}"' for prompt in dict.fromkeys(own.class_prompt for own in subjects_of(args)))


def pictures_folder(args: argparse.Namespace) -> Path:
    """Return where the subject's pictures are: the folder that was given, or that of a data set's copy."""
    if args.instance_data_dir is not None:
        return Path(args.instance_data_dir)
    source = args.dataset_name, args.dataset_config_name, args.dataset_split, args.image_column, args.caption_column
    name, parent = "dataset-" + hashlib.sha256(repr(source).encode()).hexdigest()[:16], cache_folder(args)
    version = dataset_version(args.dataset_name)
    copies = sorted(parent.glob(f"{name}-????????"), key=os.path.getmtime)  # without an unfinished one
    return copies[-1] if copies and not version else parent / f"{name}-{version or 'unknown0'}"


@functools.cache
def dataset_version(name: str) -> str:
    """Return what changes with a data set: a hash of local files, a commit on the Hub, or "" if that is not there."""
    if Path(name).is_dir():
        files = [(path, path.stat()) for path in sorted(Path(name).rglob("*")) if path.is_file()]
        seen = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files]
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:8]
    try:
        return HfApi().dataset_info(name, timeout=HUB_TIMEOUT).sha[:8]
    except Exception:  # no network, no such thing: whoever reads it says what is wrong
        return ""


def fetch_dataset(args: argparse.Namespace) -> None:
    """Write a data set's pictures, as they are, and captions into their folder. Raises UserError."""
    folder, captions = pictures_folder(args), []
    if folder.is_dir():
        return
    try:
        with atomic_write(folder, shared=True) as unfinished:
            unfinished.mkdir()
            for index, (data, caption) in enumerate(dataset_rows(args)):
                suffix = Image.open(io.BytesIO(data)).format.lower().replace("mpo", "jpg")
                name = f"{index:06d}.{suffix}"
                (unfinished / name).write_bytes(data)
                captions.append(json.dumps({"file_name": name, "text": caption}))
            (unfinished / "metadata.jsonl").write_text("\n".join(captions), encoding="utf-8")
    except TrainingError:  # the disk is full
        raise
    except Exception as error:  # its readers raise whatever they like
        raise UserError(f"--dataset_name {args.dataset_name} cannot be read ({first_line(error)}).") from error


def dataset_rows(args: argparse.Namespace) -> Iterator[tuple[bytes, str]]:
    """Yield the pictures of a data set as their files' bytes, with their captions, the first if there are several.

    Rows without a picture are left out with a warning. Raises ValueError for a column or a cell.
    """
    import datasets  # seconds that only this flag costs
    import fsspec

    image, caption, empty = args.image_column, args.caption_column, []
    rows = datasets.load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split,
                                 streaming=True, cache_dir=args.cache_dir)
    columns = rows.column_names or list(next(iter(rows), {}))  # of CSV or JSON, which names files
    for flag, column in (("image", image), ("caption", caption)):
        if column and column not in columns:
            raise ValueError(f"it has no column {column}; --{flag}_column is one of {', '.join(columns)}")
    for index, row in enumerate(rows.cast_column(image, datasets.Image(decode=False)) if rows.features else rows):
        cell = row[image] if isinstance(row[image], dict) else {"path": row[image]}
        texts = row[caption] if caption else ""
        text = (texts or [""])[0] if isinstance(texts, (list, tuple)) else texts or ""
        if not isinstance(text, str):
            raise ValueError(f"row {index}: its caption is no text but {type(text).__name__}")
        if cell.get("bytes"):
            yield cell["bytes"], text
        elif cell.get("path"):  # on this disk, on the Hub or in an archive
            with fsspec.open(cell["path"], "rb") as file:
                yield file.read(), text
        else:
            empty.append(str(index))
    if empty:
        warn("--dataset_name %s: rows without a picture are left out: %s.", args.dataset_name, some(empty))


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark. Raises UserError naming the fault and the cure."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); is it a text file of yours?") from error
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "CP1252"
        raise UserError(f"{path} is not in UTF-8 but looks like {encoding}: iconv -f {encoding} -t UTF-8 converts "
                        "it.") from None


def read_metadata(path: Path, pictures: Sequence[Path] = ()) -> dict[Path, str]:
    """Read the captions of metadata.jsonl or metadata.csv (file_name, text). Raises UserError with all its faults."""
    captions, faults, text, is_table = {}, [], read_text(path), path.suffix.lower() == ".csv"
    composed = {unicodedata.normalize("NFC", str(picture)): picture for picture in pictures}
    folder = os.path.abspath(path.parent)
    try:  # splitlines() would split within JSON's strings and a table's quotes
        rows = list(csv.DictReader(io.StringIO(text, newline=""))) if is_table else re.split("\r?\n", text)
    except csv.Error as error:
        raise UserError(f"{path} is no table of file_name and text ({error}); mend it.") from None
    for number_, row in enumerate(rows, 1 + is_table):
        try:
            entry = row if isinstance(row, dict) else json.loads(row.strip() or "null")
            if entry is None:  # an empty line
                continue
            # as it is written: the Hub's cache is links to elsewhere
            place = os.path.relpath(os.path.join(folder, entry["file_name"]), folder)
            picture, text = path.parent / place, entry["text"]
            picture = composed.get(unicodedata.normalize("NFC", str(picture)), picture)
            faulty = {
                "has no text": not isinstance(text, str),
                "is outside of the folder": Path(place).parts[:1] == ("..",),
                "is not there": not os.path.isfile(picture),  # is_file() raises for a name that is too long
                "is named twice": picture in captions}
            name = picture.name[:80].replace("\n", "\\n")
            faults += [f"line {number_}: {name} {fault}" for fault, is_so in faulty.items() if is_so][:1]
            captions[picture] = text
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            faults.append(f"line {number_}: no file_name and text ({type(error).__name__})")
    refuse(faults, f"{path}: {'; '.join(faults[:9])}{' and more' if len(faults) > 9 else ''}.")
    return captions


def caption_files(pictures: Sequence[Path]) -> dict[str, Path]:
    """Return the text files beside pictures by match_name: NAME.txt, NAME.png.txt or NAME.caption."""
    files = [path for folder in dict.fromkeys(path.parent for path in pictures) for path in files_in(folder, False)
             if path.suffix.lower() in CAPTION_SUFFIXES and path.is_file()]
    own = {path: path.with_suffix("") for path in sorted(files, key=lambda path: path.suffix.lower())}
    return {match_name(place if place.suffix.lower() in PICTURE_SUFFIXES else path): path
            for path, place in own.items()}


def read_captions(folder: Path, pictures: Sequence[Path]) -> dict[Path, str]:
    """Read the captions of a folder's pictures: of a metadata file, else of files beside them. Raises UserError."""
    named = {path.name.lower(): path for path in folder.iterdir() if path.is_file()}
    table = named.get("metadata.jsonl") or named.get("metadata.csv")
    if table:
        return read_metadata(table, pictures)
    beside = caption_files(pictures)
    return {path: read_text(beside[name]).strip() for path in pictures if (name := match_name(path)) in beside}


def subfolders_with_pictures(folder: Path) -> list[str]:
    """Return the sub-folders that hold pictures, at any depth, as paths in the folder."""
    pictures = list_pictures("", folder, recursive=True)
    return sorted({path.parent.relative_to(folder).as_posix() for path in pictures if path.parent != folder})


def kohya_repeats(subfolders: Iterable[str]) -> str:
    """Say what the number in a sub-folder's name, as kohya's trainers read it, is here; "" if there is none."""
    found = next(filter(None, (re.search(r"(?:^|/)(([1-9]\d*)_[^/]+)$", name) for name in subfolders)), None)
    return f"; the {found[2]} of '{found[1]}' is --repeats {found[2]} here, for all pictures" if found else ""


def skipped_files(folder: Path, recursive: bool) -> list[str]:
    """Return the files beside the pictures that are neither pictures nor captions, such as .heic."""
    known = {*PICTURE_SUFFIXES, *CAPTION_SUFFIXES, ".jsonl", ".csv"}
    return sorted(path.name for path in files_in(folder, recursive)
                  if path.suffix.lower() not in known and path.is_file())


def unused_files(args: argparse.Namespace) -> list[str]:
    """Return a sentence with a cure for each kind of file beside the subject's pictures that is not used."""
    folder = pictures_folder(args)
    pictures, masks = split_masks(list_pictures("--instance_data_dir", folder, args.recursive, masks=True))
    beside = caption_files(pictures)
    captions = [beside[name].name for name in sorted(set(beside) - set(map(match_name, pictures)))]
    own = [Path(value).resolve() for flag in ("class_data_dir", "masked_loss", "output_dir", "cache_latents_dir")
           if isinstance(value := getattr(args, flag), str)]
    inner = [name for name in subfolders_with_pictures(folder)
             if not any((folder / name).resolve().is_relative_to(path) for path in own)]
    others, repeats = skipped_files(folder, args.recursive), kohya_repeats(inner)
    sentences = {
        f"{some(sorted(path.name for path in masks.values()))}: left out, as masks by their names; --masked_loss uses "
        "them.": masks and args.masked_loss is not True,
        f"{some(captions)}: captions of no picture; a caption has the name of its picture.": captions,
        f"sub-folders have pictures, too ({some(inner)}), which are left out; --recursive looks into them{repeats}.":
            inner and not args.recursive,
        f"sub-folders are read{repeats}; the number itself does nothing.":
            repeats and args.recursive and args.repeats == 1,
        f"{some(others)} passed over, as only {', '.join(sorted(PICTURE_SUFFIXES))} are read; convert what is a "
        "picture.": others}
    return [sentence for sentence, applies in sentences.items() if applies]


def instance_samples(args: argparse.Namespace) -> list[Sample]:
    """Return the pictures of all subjects with their prompts, each as often as it repeats. Raises UserError."""
    samples, text = list(itertools.chain(*map(samples_of, subjects_of(args)))), choose_text(args)
    for word, (token, *_) in text.tokens.items():
        refuse(not any(token in text.replace_words(sample.prompt) for sample in samples), f"--token_abstraction "
               f"{word} is in no prompt or caption of the subject: write it in the place of the rare word, as in "
               '"a photo of TOK dog".')
    return samples


def samples_of(args: argparse.Namespace) -> list[Sample]:
    """Return the pictures of one subject with their prompts. Raises UserError."""
    folder, prompt = pictures_folder(args), args.instance_prompt
    pictures = list_pictures("--instance_data_dir", folder, args.recursive)
    captions = read_captions(folder, pictures)
    bare = [path.name for path in pictures if not captions.get(path)] if prompt is None else []
    refuse(bare, f"--instance_prompt is needed, as {len(bare)} of {len(pictures)} pictures have no caption: "
           f"{', '.join(bare[:5])}.")
    prompts = [(captions.get(path) or prompt).replace("{instance_prompt}", prompt or "") for path in pictures]
    return [Sample(path, own, is_class=False, repeat=repeat, class_prompt=args.class_prompt or "")
            for repeat in range(args.repeats)
            for path, own in zip(pictures, prompts, strict=True)]


class ValidationPrompt(NamedTuple):
    """A prompt to generate pictures of, with how; sizes in pixels."""

    text: str
    negative_prompt: str
    width: int
    height: int
    seed: int | None  # of its first picture; None is the run's
    num_inference_steps: int
    guidance_scale: float


PIXELS = number(int, 8, high=16384)
PROMPT_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {  # of kohya's prompt files
    "n": ("negative_prompt", str), "w": ("width", PIXELS), "h": ("height", PIXELS),
    "d": ("seed", number(int, 0, high=2**63 - 1, cure="; leave it out for the seed of the run")),
    "s": ("num_inference_steps", number(int, 1, high=1000)), "l": ("guidance_scale", NOT_NEGATIVE)}


def parse_prompt(args: argparse.Namespace, line: str, where: str) -> ValidationPrompt:
    """Parse a prompt with its options. Raises UserError naming where it stands."""
    text, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", line)
    refuse(options and not text.strip(), f"{where}: there is no prompt before --{''.join(options[:1])}.")
    settings = {}
    for option in options:
        letter, value = (*re.split(r"[\s=]+", option, maxsplit=1), "")[:2]
        letter = letter.lower()
        refuse(letter not in PROMPT_OPTIONS, f"{where}: --{letter} is not understood in a prompt; "
               f"{', '.join(f'--{name}' for name in PROMPT_OPTIONS)} are.")
        name, parse = PROMPT_OPTIONS[letter]
        try:
            settings[name] = parse(value.strip())
            if parse is PIXELS and settings[name] % 8:
                raise argparse.ArgumentTypeError(f"'{value.strip()}' is not a multiple of 8")
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{where}: --{letter}: {error}.") from None
    usual = ValidationPrompt(text.strip(), "", args.resolution, args.resolution, None, INFERENCE_STEPS, GUIDANCE_SCALE)
    return usual._replace(**settings)


def validation_prompts(args: argparse.Namespace) -> list[ValidationPrompt]:
    """Return the prompts of --validation_prompt, those of its files included. Raises UserError."""
    prompts = []
    for entry in args.validation_prompt or ():
        path = Path(expand_path("validation_prompt", entry)) if entry.endswith(".txt") else Path(entry)
        if not entry.endswith(".txt") and not (path.suffix and os.path.isfile(path)):
            prompts.append(parse_prompt(args, entry, f'--validation_prompt "{entry}"'))
            continue
        refuse(not path.is_file(), f"--validation_prompt {path}: no such file.")
        refuse(path.suffix != ".txt", f"--validation_prompt {path}: only .txt files with one prompt a line can be "
               "read.")
        lines = enumerate(re.split("\r?\n", read_text(path)), 1)
        of_file = [parse_prompt(args, line.strip(), f"--validation_prompt {path}: line {line_number}")
                   for line_number, line in lines if line.strip() and not line.strip().startswith("#")]
        refuse(not of_file, f"--validation_prompt {path} holds no prompt.")
        prompts += of_file
    return list(dict.fromkeys(prompts))


def make_buckets(spec: str | None, resolution: int) -> list[Bucket]:
    """Return the buckets of a run; auto: SDXL's (appendix I of its paper) at 1024 px, scaled for other resolutions.

    Sides in steps of a sixteenth of the resolution from half of it to twice it, area over 0.9 of its square.
    """
    if spec is None:
        return [(resolution, resolution)]
    if spec != "auto":
        return [tuple(map(int, size.strip().split("x"))) for size in spec.split(",")]
    step = max(8, resolution // 128 * 8)
    sides = range(resolution // 2 // step * step, 2 * resolution + 1, step)
    return [(width, height) for width in sides for height in sides if 0.9 < width * height / resolution**2 <= 1]


def choose_bucket(size: tuple[int, int], buckets: Sequence[Bucket], max_upscale: float) -> Bucket:
    """Return the bucket of nearest shape (and then largest area), smaller if the picture would grow by more."""
    shape = math.log(size[0] / size[1])
    width, height = min(buckets, key=lambda b: (abs(math.log(b[0] / b[1]) - shape), -b[0] * b[1]))
    excess = max(width / size[0], height / size[1]) / max_upscale
    if len(buckets) == 1 or excess <= 1:
        return width, height
    return max(64, int(width / excess) // 64 * 64), max(64, int(height / excess) // 64 * 64)


def bucket_of_each(args: argparse.Namespace, samples: Iterable[Sample]) -> list[Bucket]:
    """Return the bucket of each sample of the subject."""
    choices = make_buckets(args.aspect_ratio_buckets, args.resolution)
    return [choose_bucket(picture_size(sample.path), choices, MAX_UPSCALE) for sample in samples]


def resized(size: tuple[int, int], bucket: Bucket) -> tuple[int, int]:
    """Return width and height of a picture that just covers a bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


def choose_view(size: tuple[int, int], bucket: Bucket, center_crop: bool, random_flip: bool,
                rng: random.Random) -> View:
    """Choose where to crop a resized picture of that size (width, height), and whether to mirror it first."""
    spare_x, spare_y = size[0] - bucket[0], size[1] - bucket[1]
    flip = random_flip and rng.random() < 0.5
    if center_crop:
        return View(spare_y // 2, spare_x // 2, flip)
    return View(rng.randint(0, spare_y), rng.randint(0, spare_x), flip)


@functools.lru_cache(maxsize=64)
def shuffled(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the numbers 0 .. count - 1 in the order of an epoch."""
    order = list(range(count))
    random.Random(position_seed(seed, "order", epoch)).shuffle(order)
    return tuple(order)


class Row(NamedTuple):
    """A row of a micro-batch: a sample by number, and its epoch."""

    sample: int
    epoch: int


def row_at(samples: Sequence[int], seed: int, position: int) -> Row:
    """Return the row at a position of the endless sequence of shuffled epochs, in which all samples occur alike."""
    epoch, place = divmod(position, len(samples))
    return Row(samples[shuffled(len(samples), seed, epoch)[place]], epoch)


def plan_epoch(buckets: Sequence[Sequence[int]], batch_size: int, seed: int, epoch: int) -> list[list[Row]]:
    """Return the micro-batches that begin in an epoch: full, from one bucket each, in shuffled order.

    A batch that an epoch's end would cut short takes its last rows from the next epoch, so that every picture counts
    alike; a bucket of r rows gets r / batch_size batches an epoch on average.
    """
    batches = []
    for number_, bucket in enumerate(buckets):
        bucket_seed = position_seed(seed, number_)
        first, last = (e * len(bucket) // batch_size for e in (epoch, epoch + 1))
        for batch in range(first, last):
            positions = range(batch * batch_size, (batch + 1) * batch_size)
            batches.append([row_at(bucket, bucket_seed, position) for position in positions])
    return [batches[i] for i in shuffled(len(batches), position_seed(seed, "batches"), epoch)]


class BatchSampler:
    """Returns the rows of micro-batch n: batch_size rows of the subject, and as many of its class if there are any."""

    def __init__(self, buckets: Sequence[Sequence[int]], class_rows: Sequence[int], batch_size: int,
                 seed: int) -> None:
        self.buckets, self.class_rows = buckets, class_rows
        self.batch_size, self.seed = batch_size, seed
        self.plan = functools.lru_cache(maxsize=2)(functools.partial(plan_epoch, self.buckets, batch_size, seed))

    def batches_before(self, epoch: int) -> int:
        """Return how many micro-batches begin before an epoch."""
        return sum(epoch * len(bucket) // self.batch_size for bucket in self.buckets)

    def rows(self, n: int) -> list[Row]:
        """Return the rows of micro-batch n, a function of n alone."""
        epochs = range((n + 2) * self.batch_size)  # no epoch is shorter than one row
        epoch = bisect.bisect_right(epochs, n, key=self.batches_before) - 1
        rows = self.plan(epoch)[n - self.batches_before(epoch)]
        class_positions = range(n * self.batch_size, (n + 1) * self.batch_size) if self.class_rows else ()
        class_seed = position_seed(self.seed, "class")
        return rows + [row_at(self.class_rows, class_seed, position) for position in class_positions]


def content_key(*parts: object) -> str:
    """Return a hash of what a thing is made of: bytes, text, numbers."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(b"%d " % len(data))
        digest.update(data)
    return digest.hexdigest()[:40]


# -------------------------------------------------------------------------------------------------------------- checks
# Whatever flags and file system reveal is checked before the heavy imports: conflicts, packages, models, folders.

IDLE_FLAGS = {  # flags that do nothing unless the flag of their row has one of these values
    ("train_text_encoder", (True,)): ("text_encoder_lr", "adam_weight_decay_text_encoder"),
    ("train_text_encoder_ti", (True,)): ("token_abstraction", "initializer_concept", "token_lr"),
    ("push_to_hub", (True,)): ("hub_private_repo",), ("masked_loss", (True,)): ("background_loss_weight",),
    ("lr_scheduler", ("cosine_with_restarts",)): ("lr_num_cycles",), ("lr_scheduler", ("polynomial",)): ("lr_power",),
    ("optimizer", ("adamw", "adamw8bit", "prodigy", "schedule_free")): ("adam_beta1", "adam_beta2", "adam_epsilon"),
    ("optimizer", ("prodigy",)): ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction",
                                  "prodigy_safeguard_warmup")}


def refuse(condition: object, message: str) -> None:
    """Raise UserError if the condition holds."""
    if condition:
        raise UserError(message)


def check_args(args: argparse.Namespace, with_weights: bool = True) -> None:
    """Check flags, packages, models, folders and pictures. Raises UserError."""
    for cached in (masks_by_name, dataset_version, read_subjects):  # by an earlier run in the same notebook
        cached.cache_clear()
    broken = [name for name, value in vars(args).items() if re.search("[\ud800-\udfff]", str(value))]
    for name in broken:
        raise UserError(f"--{name} {getattr(args, name)!a} holds bytes that are no UTF-8; rename what it names.")
    refuse(not args.pretrained_model_name_or_path, f"{BASE_FLAG} is missing: which SDXL is to learn?")
    refuse(args.resolution % 8, f"--resolution {args.resolution} is not a multiple of 8; "
           f"{args.resolution // 8 * 8 + 8} is.")
    refuse(args.lora_dropout >= 1 or max(args.adam_beta1, args.adam_beta2) >= 1,
           "--lora_dropout, --adam_beta1 and --adam_beta2 must be below 1.")
    check_conflicts(args)
    for mode in (choose_prior(args), choose_text(args), choose_adapter(args)):
        mode.check()
    validation_prompts(args)
    warn_of_idle_flags(args)
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    refuse(precision not in ("no", "fp16", "bf16"), f"accelerate is configured with mixed_precision {precision}, in "
           "which this script does not train; add --mixed_precision bf16, fp16 or no (--base_precision int8 stores "
           "weights in 8 bits).")
    check_packages(args)
    check_models(args, with_weights)
    check_folders(args)


def check_conflicts(args: argparse.Namespace) -> None:
    """Check flags that contradict each other. Raises UserError."""
    rules = block_rules(args.lora_unet_blocks)
    kind, optimizer = OPTIMIZERS[args.optimizer], f"--optimizer {args.optimizer}"
    weighting = "--snr_gamma" if args.snr_gamma else "--loss_weighting"
    refuse(args.snr_gamma and args.loss_weighting,
           "--snr_gamma and --loss_weighting both weight the timesteps; give one of them.")
    refuse(args.do_edm_style_training and (args.snr_gamma or args.loss_weighting),
           f"--do_edm_style_training and {weighting} both weight the timesteps; give one of them.")
    refuse(args.steps_per_image and args.max_train_steps,
           "--steps_per_image and --max_train_steps both say how long it trains; give one of them.")
    refuse(args.max_timestep is not None and args.min_timestep > args.max_timestep,
           f"--min_timestep {args.min_timestep} is above --max_timestep {args.max_timestep}.")
    refuse(args.subjects and (args.instance_prompt or args.class_prompt or args.repeats != 1), "--subjects says "
           "prompts and repeats itself; leave --instance_prompt, --class_prompt and --repeats out.")
    refuse(any(rule.rank == 0 for rule in rules), "--lora_unet_blocks: a rank must be at least 1.")
    refuse(args.use_8bit_adam and args.optimizer != "adamw8bit",
           f"--use_8bit_adam and {optimizer} exclude each other; leave one out.")
    refuse(kind.averages and args.use_ema, f"--use_ema and {optimizer} both average the adapters; leave one out.")
    refuse(kind.averages and args.lr_scheduler not in ("constant", "constant_with_warmup"),
           f"{optimizer} needs no --lr_scheduler {args.lr_scheduler}; leave it out.")
    refuse(kind.averages and args.adam_beta1 == 0, f"{optimizer} averages with --adam_beta1, which must be above 0.")
    refuse(args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7,
           "--lr_scheduler polynomial ends at 1e-7, so --learning_rate must be above that.")
    rates = {"--text_encoder_lr": args.train_text_encoder and args.text_encoder_lr not in (5e-6, args.learning_rate),
             "--token_lr": args.train_text_encoder_ti and args.token_lr not in (1e-3, args.learning_rate),
             "--lora_unet_blocks": any(rule.rate for rule in rules)}
    for flag, differs in rates.items():
        refuse(kind.finds_rate and differs, f"{optimizer} finds one rate for all, and {flag} sets another; leave one "
               "out.")
    if kind.finds_rate and args.learning_rate < 0.1:
        warn("%s finds the rate by itself, as a multiple of --learning_rate: use --learning_rate 1, not %g.",
             optimizer, args.learning_rate)
    if kind.finds_rate and args.scale_lr:
        warn("--scale_lr does nothing with %s, which finds the rate by itself.", optimizer)


def warn_of_idle_flags(args: argparse.Namespace) -> None:
    """Warn of flags that were set and do nothing."""
    parser = make_parser()
    for (decides, values), flags in IDLE_FLAGS.items():
        value = getattr(args, decides)
        is_on = bool(value) if values == (True,) else value in values  # --masked_loss DIR is on, too
        for flag in () if is_on else flags:
            if getattr(args, flag) != parser.get_default(flag):
                needed = f"--{decides}" if values == (True,) else f"--{decides} {' or '.join(map(str, values))}"
                warn("--%s does nothing without %s.", flag, needed)
    for flag in ("num_class_images", "sample_batch_size", "prior_generation_precision"):
        if not args.class_data_dir and getattr(args, flag) != parser.get_default(flag):
            warn("--%s does nothing without --class_data_dir.", flag)


def check_packages(args: argparse.Namespace) -> None:
    """Check that optional packages that were asked for are there, and logins. Raises UserError."""
    needed = {"--use_8bit_adam" if args.use_8bit_adam else f"--optimizer {args.optimizer}":
              OPTIMIZERS[args.optimizer].module.partition(".")[0]}
    needed |= {"--base_precision nf4": "bitsandbytes"} if args.base_precision == "nf4" else {}
    needed |= {"--dataset_name": "datasets"} if args.dataset_name else {}
    needed |= {f"--report_to {args.report_to}": args.report_to} if args.report_to in TRACKERS else {}
    for flag, package in needed.items():
        refuse(importlib.util.find_spec(package) is None,
               f"{flag} needs a package that is not installed: pip install {package}")
    if is_tracked(args) and args.report_to in TRACKERS and not is_set_up(args.report_to):
        raise UserError(f"--report_to {args.report_to} has no login here{TRACKER_CURES[args.report_to]}.")
    refuse(args.enable_xformers_memory_efficient_attention and importlib.util.find_spec("xformers") is None,
           "--enable_xformers_memory_efficient_attention needs xformers, which is not installed; leave the flag out: "
           "PyTorch's own attention is already memory-efficient.")
    if args.push_to_hub:
        from huggingface_hub import get_token  # a third of a second that only a push costs

        refuse(not (args.hub_token or get_token()),
               "--push_to_hub needs a token: run `hf auth login` or set HF_TOKEN.")


TRACKER_CURES = {"wandb": "; run `wandb login`, or set WANDB_MODE=offline",
                 "comet_ml": "; run `comet login`, or set COMET_START_ONLINE=0"}


def is_set_up(tracker: str) -> bool:
    """Return True if an installed tracker has the login that it needs, or is offline; nobody is asked."""
    with suppress(Exception):  # these libraries change often, and a tracker that does not start is refused later
        if tracker == "wandb" and (os.environ.get("WANDB_MODE") or "online") in ("online", "run", "shared"):
            import wandb  # half a second that only this flag costs

            if hasattr(wandb, "setup") and wandb.setup().settings.mode in ("offline", "disabled"):
                return True
            asks_not = "prompt" in inspect.signature(wandb.login).parameters
            return bool(wandb.login(prompt=False, verify=False) if asks_not else wandb.api.api_key)
        if tracker == "comet_ml" and os.environ.get("COMET_START_ONLINE", "1").lower() not in ("0", "false"):
            import comet_ml

            return bool(comet_ml.get_config("comet.api_key"))
    return True


def is_tracked(args: argparse.Namespace) -> bool:
    """Return True if trackers are started: on the main process of a run that trains."""
    return is_first_rank() and not args.dry_run


def check_models(args: argparse.Namespace, with_weights: bool) -> None:
    """Check base model and VAE, if they are on this disk: whole, and SDXL's. Raises UserError."""
    parts = "unet", *TEXT_ENCODERS, *["vae"] * (not args.pretrained_vae_model_name_or_path)
    if Path(args.pretrained_model_name_or_path).is_dir():
        check_is_sdxl(args.pretrained_model_name_or_path)
    for flag, folders, needed in ((BASE_FLAG, parts, SDXL_KEYS), (VAE_FLAG, ("",), VAE_KEYS)):
        place = getattr(args, flag[2:])
        if not place:
            continue
        refuse(not Path(place).exists() and (place.startswith((".", "/", "~")) or place.count("/") != 1),
               f"{flag} {place}: no such folder or file, and no Hub id (owner/name).")
        if Path(place).is_file():
            check_single_file(flag, Path(place), needed)
        for part in folders if Path(place).is_dir() and with_weights else ():
            check_weights(flag, Path(place, part), args.variant if flag == BASE_FLAG else None)


def check_is_sdxl(name: str, index: Any = None) -> None:
    """Check that a model_index.json is of an SDXL pipeline; without one, that of a folder. Raises UserError."""
    try:
        index = index or json.loads(Path(name, "model_index.json").read_text(encoding="utf-8"))
        kind = index["_class_name"]
        encoders = [(index.get(part) or [None])[-1] for part in TEXT_ENCODERS]  # the refiner lacks the first
    except (OSError, ValueError, LookupError, TypeError):
        kind, encoders = "folder without a whole model_index.json", []
    refuse(not kind.startswith("StableDiffusionXL") or None in encoders,
           f"{BASE_FLAG} {name} is a {kind}, not SDXL, which this script trains.")


def check_weights(flag: str, folder: Path, variant: str | None) -> None:
    """Check that a part's folder has its configuration and weights of the variant, all whole. Raises UserError."""
    refuse(not (folder / "config.json").is_file(), f"{flag}: {folder} has no config.json; fetch it again.")
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    # model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors
    own = [path for path in files if path.stem.partition(".")[2].partition("-")[0] == (variant or "")]
    found = f"only {files[0].name}; is it another --variant?" if files else "none"
    refuse(not own, f"{flag}: there should be *.{f'{variant}.' if variant else ''}safetensors in {folder}, but there "
           f"are {found}.")
    for path in own:
        refuse(path.suffix == ".safetensors" and not tensor_names(path), f"{flag}: {path} is cut off or no "
               "safetensors file; fetch it again.")


VAE_KEYS = ("^encoder.conv_in.weight$", "^decoder.conv_out.weight$")  # what a single file of each kind has
SDXL_KEYS = ("^model.diffusion_model.input_blocks.0.0.weight", "^first_stage_model.encoder.conv_in.weight",
             "^conditioner.embedders.0.transformer.text_model.", "^conditioner.embedders.1.model.positional_embedding")


def check_single_file(flag: str, path: Path, needed: Sequence[str]) -> None:
    """Check a file as Civitai has them: safetensors, whole, with all that is needed. Raises UserError."""
    names = tensor_names(path)
    refuse(not names, f"{flag}: {path} is cut off or no safetensors file; fetch it again.")
    missing = next((key.strip("^$") for key in needed if not any(re.search(key, name) for name in names)), None)
    kind = "AutoencoderKL" if flag == VAE_FLAG else "SDXL model"
    refuse(missing, f"{flag}: {path} is not a complete {kind}, as it lacks {missing}; a LoRA, a UNet "
           "alone, a refiner or another model cannot be trained on.")
    refuse("edm_vpred.sigma_max" in names, f"{flag}: {path} is an EDM model with v-prediction (CosXL), which this "
           "script does not train.")


def tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file; none if it is another file, or was cut off."""
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []


def check_folders(args: argparse.Namespace) -> None:
    """Check where files come from and go to, and the pictures. Raises UserError."""
    KNOWN_PICTURES.read(cache_folder(args))
    output, lora = Path(args.output_dir), Path(args.init_lora or "")
    resumed = find_checkpoint(args.resume_from_checkpoint, output)
    if args.init_lora and not resumed:
        refuse(not tensor_names(lora), f"--init_lora {lora} is not a complete safetensors file; name a LoRA's on this "
               "disk.")
        refuse(lora.absolute().parent == output.absolute(), f"--init_lora {lora} is in --output_dir, where this run's "
               "own LoRA goes; choose another --output_dir.")
    for flag, folder in (("output_dir", output), ("output_dir", output / "validation"),
                         ("cache_latents_dir", cache_folder(args)), ("logging_dir", output / args.logging_dir)):
        check_writable(flag if getattr(args, flag) else "output_dir", folder)
    sources = (args.instance_data_dir, args.dataset_name, args.subjects)
    refuse(sources.count(None) != 2, "the pictures come from a folder, --instance_data_dir, or from --dataset_name or "
           "--subjects: give one of them.")
    for own in subjects_of(args) if args.dataset_name is None else ():
        check_apart(own)
        check_subject(own)
    if args.dataset_name is None:
        instance_samples(args)
    for own in subjects_of(args) if args.with_prior_preservation and args.class_data_dir else ():
        if Path(own.class_data_dir).exists():
            pictures = list_pictures("--class_data_dir", own.class_data_dir, args.recursive)
            if not pictures:
                check_not_in_subfolders("--class_data_dir", Path(own.class_data_dir))
            check_pictures("--class_data_dir", pictures)


def cache_folder(args: argparse.Namespace) -> Path:
    """Return the folder of encoded pictures and prompts."""
    return Path(args.cache_latents_dir or Path(args.output_dir, "cache"))


def check_apart(args: argparse.Namespace) -> None:
    """Check that no other pictures lie where those of the subject are looked for. Raises UserError."""
    subject = Path(args.instance_data_dir).resolve()
    for flag in ("class_data_dir", "masked_loss", "output_dir"):
        folder = Path(value if isinstance(value := getattr(args, flag), str) else "/").resolve()
        refuse(folder == subject or (args.recursive and folder.is_relative_to(subject)), f"--{flag} {folder} is in "
               "--instance_data_dir, where its pictures would be taken for the subject's; choose another.")
    refuse(args.recursive and args.class_data_dir and subject.is_relative_to(Path(args.class_data_dir).resolve()),
           f"--instance_data_dir {subject} is in --class_data_dir, where --recursive would take its pictures for the "
           "class's; choose another.")


def check_subject(args: argparse.Namespace) -> None:
    """Check that the subject's pictures are there and whole. Raises UserError."""
    folder, flag = pictures_folder(args), "--dataset_name" if args.dataset_name else "--instance_data_dir"
    pictures = list_pictures(flag, folder, args.recursive)
    if not pictures:
        check_not_in_subfolders("--instance_data_dir", folder)
        others = skipped_files(folder, args.recursive)
        convert = f"; {others[0]} must be converted, to .jpg for example" if others else ""
        raise UserError(f"{flag} {args.dataset_name or folder} holds no picture "
                        f"({', '.join(sorted(PICTURE_SUFFIXES))}){convert}.")
    check_pictures(flag, pictures)
    if args.masked_loss:
        check_masks(args, pictures)


def check_masks(args: argparse.Namespace, pictures: Sequence[Path]) -> None:
    """Check that all masks are whole and fit their pictures, and that there are some. Raises UserError."""
    beside = args.masked_loss is True
    folder = str(pictures_folder(args) if beside else args.masked_loss)
    check_pictures("--masked_loss", list(dict.fromkeys(masks_by_name(folder, args.recursive, beside).values())),
                   read_mask)
    bare = [path.name for path in pictures if load_mask(args, path) is None]
    refuse(len(bare) == len(pictures), f"--masked_loss finds no mask: no picture of {folder} "
           f"{'is transparent or has a mask beside it' if beside else 'has the name of a picture'}.")
    if bare:
        warn("--masked_loss: %d of %d pictures have no mask, and all of them counts as subject: %s", len(bare),
             len(pictures), ", ".join(bare[:5]))


def check_not_in_subfolders(flag: str, folder: Path) -> None:
    """Refuse a folder without pictures whose sub-folders have some. Raises UserError."""
    names = subfolders_with_pictures(folder)
    refuse(names, f"{flag} {folder} holds no picture, but its sub-folders do ({some(names)}): add --recursive, or "
           f"name one of them{kohya_repeats(names)}.")


def check_writable(flag: str, folder: Path) -> None:
    """Check that a folder can be made and written, as far as the existing part of its path tells. Raises UserError."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"--{flag} {folder} cannot be written ({error.strerror}); choose another.") from error


def find_checkpoint(name: str | None, output: Path) -> Path | None:
    """Return the checkpoint folder that --resume_from_checkpoint means; None to begin anew. Raises UserError."""
    if name is None or name == "latest":
        return (list_checkpoints(output) or [None])[-1] if name else None
    for path in (output / name, Path(name)):
        folder = path.parent if path.name == STATE_FILE else path
        if (folder / STATE_FILE).is_file():
            return folder
        if list_checkpoints(folder):  # a run's folder
            return list_checkpoints(folder)[-1]
        lora = folder / LORA_FILE if folder.is_dir() else folder
        refuse(tensor_names(lora), f"--resume_from_checkpoint {name} holds no state of this script's training, "
               f"which a LoRA does not bring along; --init_lora {lora} starts a new run from its weights.")
    found = ", ".join(folder.name for folder in list_checkpoints(output)) or "none"
    raise UserError(f"--resume_from_checkpoint {name} names no checkpoint; in {output} there are: {found}.")


def list_checkpoints(output: Path) -> list[Path]:
    """Return the whole checkpoints of an output folder, oldest first."""
    found = {path: step_of(path) for path in output.glob("*-*")}
    whole = [path for path, step in found.items() if step is not None and (path / STATE_FILE).is_file()]
    return sorted(whole, key=found.__getitem__)


def step_of(checkpoint: Path) -> int | None:
    """Return the step in a checkpoint's name: checkpoint-N, or last-N at the end; None for other names."""
    found = re.fullmatch(r"(?:checkpoint|last)-(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def steps_in(output: Path) -> dict[Path, int]:
    """Return the folders of checkpoints and validation pictures in an output folder, each with its step."""
    pictures = {path: re.fullmatch(r"step-(\d+)", path.name) for path in output.glob("validation/step-*")}
    steps = {path: step_of(path) for path in output.glob("*-*")}
    return {path: step for path, step in steps.items() if step is not None} | \
        {path: int(found[1]) for path, found in pictures.items() if found}


# ------------------------------------------------------------------------------------------------------ process set-up
# Signals, output and loggers, before anything heavy is imported.


def die_with_parent() -> None:
    """On Linux, be sent SIGTERM when `accelerate launch` dies, which forwards no signal; a shell may go (nohup)."""
    with suppress(OSError):
        if b"accelerate" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of linux/prctl.h


def handle_stop_signals(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Set a handler for STOP_SIGNALS and return the old ones; under nohup SIGHUP stays ignored."""
    before = {}
    for name in STOP_SIGNALS:
        signum = getattr(signal, name, None)  # None: another system's
        is_nohup = name == "SIGHUP" and signum and signal.getsignal(signum) is signal.SIG_IGN
        if signum and not is_nohup:  # a shell ignores SIGINT for every background job
            with suppress(ValueError):  # no handlers outside the main thread
                before[signum] = signal.signal(signum, handler)
    return before


class TolerantOutput(io.FileIO):
    """A stream that goes nowhere once its reader is gone: a closed terminal, `| head`, a full disk."""

    def write(self, data: Any) -> int:
        """Write what the reader takes; without a reader, nothing."""
        try:
            while (written := super().write(data)) is None:  # a non-blocking pipe with a slow reader
                select.select([], [self], [], 1)
            return written
        except OSError:
            return len(data)


def keep_writing() -> None:
    """Go on if stdout or stderr has no reader any more, or was closed from the start."""
    for descriptor in range(3) if os.name == "posix" else ():
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would take this number, and be printed into
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number_, name in ((1, "stdout"), (2, "stderr")) if os.name == "posix" else ():
        stream = getattr(sys, name) or open(number_, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (it stays)
        if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number_:  # a notebook's, or redirected
            continue
        stream.flush()
        raw = TolerantOutput(number_, "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw), stream.encoding, stream.errors,
            line_buffering=stream.line_buffering, write_through=stream.write_through))  # as PYTHONUNBUFFERED wants it


class Printer(logging.Handler):
    """Prints log messages to the present stdout, which notebooks and tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message, as far as stdout knows its letters: into a pipe Windows takes 256 of them."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(printable(record.getMessage()).encode(encoding, "backslashreplace").decode(encoding), flush=True)


def quiet_libraries(log_level: str) -> None:
    """Silence the libraries' messages, unless the level is debug; call it before they are imported."""
    talks = log_level == "debug"
    if not logger.handlers:
        logger.addHandler(Printer())
        logger.propagate = False
    logger.setLevel(log_level.upper() if is_first_rank() else logging.ERROR)
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "info" if talks else "error")
    os.environ.setdefault("WANDB_SILENT", "false" if talks else "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not talks:
        warnings.filterwarnings("ignore")
        for library in ("accelerate", "bitsandbytes", "diffusers", "httpx", "huggingface_hub", "peft", "transformers",
                        "wandb"):
            logging.getLogger(library).setLevel(logging.ERROR)


def hide_prints() -> AbstractContextManager:
    """Swallow what a library prints instead of logging it, unless the level is debug."""
    return nullcontext() if logger.isEnabledFor(logging.DEBUG) else redirect_stdout(io.StringIO())


def hide_token() -> None:
    """Move --hub_token from the command line, which every user of the machine can read, to the environment."""
    words = sys.argv[1:]
    flags = [i for i, word in enumerate(words) if word.split("=")[0] == "--hub_token"]
    if not flags or os.name != "posix":  # elsewhere exec starts a second process instead of replacing this one
        return
    position = flags[0]
    flag, equals, token = words.pop(position).partition("=")
    print("warning: others on this machine can see --hub_token on a command line; `hf auth login` or HF_TOKEN keep it "
          "to yourself.", file=sys.stderr)
    os.environ["HF_TOKEN"] = token if equals or position == len(words) else words.pop(position)
    os.execv(sys.executable, [sys.executable, sys.argv[0], *words])


if __name__ == "__main__":  # a mistake answers in half a second, not after the imports below
    keep_writing()
    hide_token()
    # the imports below take seconds, and an exception may fall into the interpreter's own clean-up
    handle_stop_signals(lambda signum, frame: os._exit(128 + signum))
    die_with_parent()
    with one_sentence():
        ARGS = parse_args()

import diffusers
import numpy as np
import peft
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
    broadcast,
    broadcast_object_list,
    compare_versions,
    gather_object,
)
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, get_session
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Text = tuple[Tensor, Tensor]
"""Rows of text: (prompt_embeds, pooled_prompt_embeds) if the encoders are frozen, else both tokenizers' ids."""


# -------------------------------------------------------------------------------------------------------------- models
# What all phases share, the one place that loads parts, and the one trainable module.


class Source(NamedTuple):
    """Where parts come from: a Hub id or folder with revision, variant and cache folder."""

    name: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    is_pipeline: bool = True

    def keywords(self, part: str) -> dict[str, Any]:
        """Return what every loader of a part needs besides the name."""
        place = {"subfolder": part} if self.is_pipeline else {}
        return {"revision": self.revision, "cache_dir": self.cache_dir, **place}


@dataclass(frozen=True)
class Run:
    """What all phases share: the flags, the machine, the seed, and what the base model's configuration says."""

    args: argparse.Namespace
    accelerator: Accelerator
    stop: StopSignals
    waiting_group: Any  # of the ranks' hosts; None for one process
    seed: int
    base: Source
    vae: Source
    cache: TensorCache
    memory: PhaseMemory
    text: FrozenText
    prior: NoPrior
    scheduler: Any
    zeros_for_empty_prompt: bool  # no negative prompt means zeros, as in SDXL base 1.0
    vae_factor: int  # pixels to a latent
    prompts: tuple[ValidationPrompt, ...] = ()
    pictures: int = 0  # of the subject; both are read once: their files may go while a run lasts

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir)

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of frozen weights: accelerate's precision, wherever it was configured."""
        return PRECISIONS.get(self.accelerator.mixed_precision, torch.float32)


PART_CLASSES = {
    "unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection, "tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
DIFFUSERS_DTYPE = "torch_dtype" if compare_versions("diffusers", "<", "0.40") else "dtype"
PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def start(args: argparse.Namespace, stop: StopSignals | None = None) -> Run:
    """Set accelerate up, agree on a seed, read the base model's configuration. Raises UserError; loads no weights."""
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    accelerator = make_accelerator(args)
    if args.enable_xformers_memory_efficient_attention:
        check_xformers(accelerator.device)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    quiet_libraries(args.log_level)  # a notebook's children know their ranks only now
    stop, seed = stop or StopSignals(), [choose_seed(args)]
    stop.cpu_group = make_cpu_group(accelerator, timedelta(seconds=args.ddp_timeout))
    # what a rank prepares for others, a data set or a single file, may take longer than a step
    waiting = make_cpu_group(accelerator, timedelta(days=7))
    with local_main_first(accelerator, waiting):
        base, vae = find_sources(args)
    scheduler, zeros, factor = load_base_config(base, vae)
    scheduler = with_prediction(scheduler, args.prediction_type, args.rescale_betas_zero_snr)
    return Run(args, accelerator, stop, waiting, broadcast_object_list(seed)[0], base, vae,
               TensorCache(cache_folder(args)), PhaseMemory(accelerator.device), choose_text(args), choose_prior(args),
               scheduler, zeros, factor, prompts=tuple(validation_prompts(args)))


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Set accelerate up. Raises UserError for what does not work here, TrainingError if no other process is found."""
    if args.local_rank >= 0 and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    project = ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir)))
    timeout = timedelta(seconds=args.ddp_timeout)
    try:
        reinit_process_group(timeout)
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, log_with=chosen_trackers(args), project_config=project,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
    except ValueError as error:
        cure = "; use --mixed_precision bf16 or no" if "precision" in str(error) else ""
        raise UserError(f"accelerate cannot start here ({first_line(error)}){cure}.") from error
    except RuntimeError as error:
        raise TrainingError(f"the processes did not find each other ({first_line(error)}); is every machine's address "
                            "and port right?") from error
    accelerator.gradient_accumulation_steps = 1  # the loop divides; a launcher's setting would divide again
    refuse(accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)),
           f"the launcher started {os.environ.get('WORLD_SIZE')} processes, but accelerate sees one: is there a GPU "
           "for each? Without any, set ACCELERATE_USE_CPU=true.")
    kind = accelerator.distributed_type.name
    refuse(kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"), f"accelerate is configured for {kind}, but shards of a few "
           "megabytes of adapters help nobody: choose plain multi-GPU in `accelerate config`.")
    return accelerator


def reinit_process_group(timeout: timedelta) -> None:
    """Join the processes of a launcher's restart under keys of their own. Raises RuntimeError.

    The launcher's store outlives a restart (torch 2.14, static rendezvous) with the addresses of the dead in it, and
    who reads one before its owner has written anew waits for nobody.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size,
                                       is_master=False, timeout=timeout)
    torch.distributed.init_process_group(store=torch.distributed.PrefixStore(f"restart {attempt}", store), rank=rank,
                                         world_size=world_size, timeout=timeout)


def make_cpu_group(accelerator: Accelerator, timeout: timedelta) -> Any:
    """Make a group through which the ranks' hosts agree or wait for each other; None for one process."""
    return torch.distributed.new_group(backend="gloo", timeout=timeout) if accelerator.num_processes > 1 else None


@contextmanager
def local_main_first(accelerator: Accelerator, cpu_group: Any) -> Iterator[None]:
    """Let each machine's first rank run the block before the others, which wait as long as the group does."""
    is_first = accelerator.is_local_main_process
    if cpu_group is not None and not is_first:
        torch.distributed.barrier(cpu_group)
    yield
    if cpu_group is not None and is_first:
        torch.distributed.barrier(cpu_group)


def check_xformers(device: torch.device) -> None:
    """Run xformers' attention once on this device. Raises UserError if its kernels cannot."""
    try:
        from xformers.ops import memory_efficient_attention

        row = torch.zeros(1, 8, 1, 64, device=device, dtype=torch.float16)
        memory_efficient_attention(row, row, row)
    except Exception as error:  # its wheels fail in many ways beside another torch
        raise UserError(f"--enable_xformers_memory_efficient_attention: no kernel of xformers runs on {device} here; "
                        "leave the flag out: PyTorch's own attention is already memory-efficient.") from error


def find_sources(args: argparse.Namespace) -> tuple[Source, Source]:
    """Return where base model and VAE come from; single files are unpacked once for all runs. Raises UserError."""
    base, other = Path(args.pretrained_model_name_or_path), args.pretrained_vae_model_name_or_path
    folder, name = Path(args.cache_dir or HF_HOME, "train_dreambooth_lora_sdxl"), args.pretrained_model_name_or_path
    if base.is_file():
        name = args.single_file_config or SDXL_CONFIG if args.dry_run else \
            str(unpack(base, folder, args.single_file_config, args.cache_dir))
    version = (None, None) if base.is_file() else (args.revision, args.variant)
    source = Source(name, *version, args.cache_dir)
    if not other or (Path(other).is_file() and args.dry_run):
        return source, source
    if Path(other).is_file():
        other = str(unpack(Path(other), folder, args.single_file_config or name, args.cache_dir))
    # the base model's revision and variant do not apply to another VAE
    return source, Source(other, None, None, args.cache_dir, False)


def unpack(path: Path, folder: Path, config: str | None, cache_dir: str | None) -> Path:
    """Make a diffusers folder of a single file, once: of a pipeline, or of a VAE with the configuration of another.

    diffusers does it, in the file's own dtype, but for the markers `v_pred` and `ztsnr`, which it ignores: a model
    with them predicts velocity, and its last timestep is pure noise. Raises UserError.
    """
    names = tensor_names(path)
    is_vae = not any(name.startswith("model.diffusion_model.") for name in names)
    made_of = content_key(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, config)
    unpacked = folder / f"unpacked-{path.stem}-{made_of[:12]}"
    if unpacked.is_dir():
        return unpacked
    check_space(folder, path.stat().st_size, "the single file, unpacked")
    sweep(folder, before=time.time() - 86400)
    kind, place = (AutoencoderKL, {"subfolder": "vae"}) if is_vae else (StableDiffusionXLPipeline, {})
    with safe_open(path, framework="pt") as file:
        dtypes = [file.get_slice(name).get_dtype() for name in names]
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(statistics.mode(dtypes), torch.float32)
    try:
        model = kind.from_single_file(str(path), config=config, cache_dir=cache_dir, torch_dtype=dtype, **place)
        if "v_pred" in names:
            extra = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in names else {}
            model.scheduler = type(model.scheduler).from_config(model.scheduler.config, prediction_type="v_prediction",
                                                                **extra)
        with atomic_write(unpacked, shared=True, size=path.stat().st_size) as unfinished:
            model.save_pretrained(unfinished)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, HfHubHTTPError) as error:
        wanted = config or "by default SDXL base 1.0 from the Hub"
        raise UserError(f"{path} cannot be unpacked ({first_line(error)}); is --single_file_config, {wanted}, of the "
                        "same kind and within reach?") from error
    return unpacked


@contextmanager
def reading(source: Source, part: str) -> Iterator[None]:
    """Turn what goes wrong while a part is read into one sentence. Raises UserError."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, HfHubHTTPError, pickle.UnpicklingError
            ) as error:
        raise UserError(f"the {part} of {source.name} cannot be loaded; is the name mistyped, private, or not in the "
                        f"cache while offline? ({first_line(error)})") from error


def load_part(source: Source, part: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Any:
    """Load a tokenizer, or a frozen model in its final dtype on its device.

    Raises UserError naming the base model, also if weights are missing, which libraries fill with random numbers.
    """
    keywords = source.keywords(part)
    if dtype is not None:
        keywords |= {"variant": source.variant, "dtype" if part in TEXT_ENCODERS else DIFFUSERS_DTYPE: dtype}
    with reading(source, part):
        if part in TOKENIZERS:
            tokenizer = PART_CLASSES[part].from_pretrained(source.name, **keywords)
            if tokenizer.model_max_length > 10**6:  # what is made of a folder without files
                raise ValueError("it has no vocabulary")
            return tokenizer
        loaded, info = PART_CLASSES[part].from_pretrained(source.name, output_loading_info=True, **keywords)
        if info["missing_keys"]:  # transformers 4 reads no first text encoder that transformers 5 saved, and goes on
            raise ValueError(f"{len(info['missing_keys'])} of its weights are missing, {min(info['missing_keys'])} "
                             "first; was it saved by a newer version of transformers or diffusers?")
    return loaded.requires_grad_(False).eval().to(device)


def meta_model(source: Source, part: str) -> nn.Module:
    """Make a part on the meta device, frozen, from its configuration file alone. Raises UserError."""
    kind, keywords = PART_CLASSES[part], source.keywords(part)
    with torch.device("meta"), reading(source, part):
        if part in TEXT_ENCODERS:
            return kind(CLIPTextConfig.from_pretrained(source.name, **keywords)).requires_grad_(False)
        return kind.from_config(kind.load_config(source.name, **keywords)).requires_grad_(False)


def vae_dtype(config: Any, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a VAE: float32 if its configuration says that it overflows in float16."""
    return torch.float32 if dtype == torch.float16 and config.get("force_upcast", True) else dtype


def load_vae(source: Source, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
    """Load the VAE in the dtype that it needs."""
    config = AutoencoderKL.load_config(source.name, **source.keywords("vae"))
    return load_part(source, "vae", vae_dtype(config, dtype), device)


def load_base_config(source: Source, vae: Source) -> tuple[Any, bool, int]:
    """Return the base model's scheduler, whether no negative prompt means zeros, and pixels to a latent.

    Raises UserError unless the model can be found and is SDXL.
    """
    try:
        index = DiffusionPipeline.load_config(source.name, revision=source.revision, cache_dir=source.cache_dir)
        check_is_sdxl(source.name, index)
        scheduler_class = getattr(diffusers, index["scheduler"][1])
        scheduler = scheduler_class.from_pretrained(source.name, **source.keywords("scheduler"))
        vae_config = AutoencoderKL.load_config(vae.name, **vae.keywords("vae"))
        unet_config = UNet2DConditionModel.load_config(source.name, **source.keywords("unet"))
        kind, channels = vae_config.get("_class_name", "AutoencoderKL"), vae_config.get("latent_channels", 4)
        refuse(kind != "AutoencoderKL" or channels != 4, f"the VAE of {vae.name} is of class {kind} with "
               f"{channels} latent channels; only an AutoencoderKL with 4 can be used, as SDXL's own or "
               "madebyollin/sdxl-vae-fp16-fix.")
        if vae != source:
            warn_of_scaling(source, vae, vae_config)
    except (OSError, ValueError, KeyError, AttributeError, HfHubHTTPError) as error:
        raise UserError(f"{BASE_FLAG} {source.name} or its VAE cannot be loaded; is it mistyped, private, or not in "
                        f"the cache while offline? ({first_line(error)})") from error
    refuse(unet_config["in_channels"] != 4, f"{BASE_FLAG} {source.name} is for inpainting or editing: its UNet takes "
           f"{unet_config['in_channels']} channels, not 4; use the base that it was made of.")
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    return scheduler, bool(index.get("force_zeros_for_empty_prompt", True)), factor


def warn_of_scaling(source: Source, vae: Source, config: dict[str, Any]) -> None:
    """Warn of a VAE with latents of another scale, such as Stable Diffusion 1.5's, which the UNet misreads."""
    with suppress(OSError, ValueError, HfHubHTTPError):  # a base model without a VAE
        own = AutoencoderKL.load_config(source.name, **source.keywords("vae"))
        scales = [of.get("scaling_factor", 0.18215) for of in (config, own)]
        if scales[0] != scales[1]:
            warn("%s %s scales its latents by %g and the base model's own VAE by %g: is it one of SDXL?", VAE_FLAG,
                 vae.name, *scales)


def with_prediction(scheduler: Any, prediction_type: str | None, zero_snr: bool) -> Any:
    """Return the scheduler with another prediction type or zero terminal SNR (arXiv:2305.08891). Raises UserError."""
    name = type(scheduler).__name__
    kind = prediction_type or scheduler.config.get("prediction_type", f"what {name} knows")
    refuse(prediction_type and "sigma_data" in scheduler.config, f"--prediction_type {prediction_type} cannot be had "
           f"of an EDM model ({name}); leave it out.")
    refuse(zero_snr and "rescale_betas_zero_snr" not in scheduler.config,
           f"--rescale_betas_zero_snr: the base model's {name} knows nothing of it.")
    refuse(zero_snr and kind == "epsilon", "--rescale_betas_zero_snr needs --prediction_type v_prediction: in pure "
           "noise, epsilon tells nothing.")
    spacing = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    return scheduler.from_config(scheduler.config, prediction_type=kind, **spacing) if prediction_type or zero_snr \
        else scheduler


class TrainableSDXL(nn.Module):
    """The UNet and, if they are trained, the text encoders: the one object that is trained, clipped and saved."""

    def __init__(self, unet: nn.Module, text_encoders: Sequence[nn.Module] = (), compiled: bool = False) -> None:
        super().__init__()
        self.unet, self.dtype = unet, unet.dtype
        self.text_encoders = nn.ModuleList(text_encoders)
        self.embed = functools.partial(encode_ids, self.text_encoders) if text_encoders else lambda text: text
        # everything that is trained, always float32
        self.adapters = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        self.layers = [layer for layer in self.modules() if hasattr(layer, "lora_A")]
        fused = [fused_lora_forward(layer, self.dtype, compiled) for layer in self.layers]
        self.forwards = {layer: forward for layer, (forward, _) in zip(self.layers, fused, strict=True)}
        pairs = [pair for _, copies in fused for pair in copies]
        self.masters, self.copies = [master for master, _ in pairs], [copy for _, copy in pairs]
        self.use_fused_lora(True)

    def use_fused_lora(self, fused: bool) -> None:
        """Run the adapters through fused kernels, or as peft does."""
        self.is_fused = fused
        for layer in self.layers:
            vars(layer).pop("forward", None)
            if fused and self.forwards[layer]:
                layer.forward = self.forwards[layer]

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Be the base model within the block."""
        for layer in self.layers:
            layer.forward = layer.base_layer.forward  # the module itself would become a child
        try:
            yield
        finally:
            self.use_fused_lora(self.is_fused)

    def scales(self) -> dict[str, float]:
        """Return the factor of each adapted module's B A, by component and module."""
        return {scale_name(f"{component}.{name}"): layer.scaling["default"]
                for component, part in self.adapted().items()
                for name, layer in part.named_modules() if hasattr(layer, "lora_A")}

    def adapted(self) -> dict[str, nn.Module]:
        """Return its parts that have LoRA, by the names that diffusers gives them."""
        parts = {"unet": self.unet, **dict(zip(TEXT_ENCODERS, self.text_encoders, strict=False))}
        return {name: part for name, part in parts.items() if hasattr(part, "peft_config")}

    def forward(self, model_input: Tensor, timesteps: Tensor, text: Text, add_time_ids: Tensor) -> Tensor:
        """Predict the target for noisy latents (B, 4, h, w), computed in the base's dtype."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.masters)
        prompt_embeds, pooled_prompt_embeds = self.embed(text)
        added = {"text_embeds": pooled_prompt_embeds, "time_ids": add_time_ids}
        return self.unet(model_input.to(self.dtype), timesteps, prompt_embeds, added_cond_kwargs=added).sample


def load_unet(run: Run, dtype: torch.dtype, adapted: bool = False) -> UNet2DConditionModel:
    """Load the frozen UNet on the device, packed as --base_precision says, with adapters if it is to be trained."""
    packed = run.args.base_precision != "auto"
    unet = load_part(run.base, "unet", dtype, torch.device("cpu") if packed else run.device)
    if adapted:  # before packing: peft knows plain linear layers
        add_adapters(run.args, unet)
    if packed:
        pack_unet(unet, run.args.base_precision, run.device)
    return unet.to(run.device)


def load_trainable(run: Run) -> TrainableSDXL:
    """Load what is trained, frozen in the run's dtype, and add float32 adapters."""
    args = run.args
    torch.manual_seed(position_seed(run.seed, "adapters"))  # alike on every rank
    unet, encoders = load_unet(run, run.dtype, adapted=True), []
    if run.text.is_trained:
        encoders = [load_part(run.base, part, run.dtype, run.device) for part in TEXT_ENCODERS]
        run.text.add_to(run, encoders)
    use_checkpointing(args, unet, encoders)
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    model = TrainableSDXL(unet, encoders, compile_unet(run, unet))
    if args.init_lora and not resume_candidates(args.resume_from_checkpoint, run.output):
        load_init_lora(Path(args.init_lora), model)
    for adapter in model.adapters.values() if run.accelerator.num_processes > 1 else ():
        adapter.data.copy_(broadcast(adapter.data))  # GPUs of two kinds may draw differently
    return model


def checkpointed(args: argparse.Namespace) -> int:
    """Return how many of the UNet's blocks are checkpointed."""
    return ALL_BLOCKS if args.gradient_checkpointing is True else int(args.gradient_checkpointing)


def blocks_of(unet: nn.Module) -> list[nn.Module]:
    """Return what can be checkpointed, in the order in which it is built: down, up, middle."""
    return [module for module in unet.modules() if isinstance(module, (BasicTransformerBlock, ResnetBlock2D))]


def use_checkpointing(args: argparse.Namespace, unet: nn.Module, encoders: Sequence[nn.Module]) -> None:
    """Switch gradient checkpointing on, as the flags say."""
    chosen = set(blocks_of(unet)[:checkpointed(args)])

    def call(block: nn.Module, *inputs: Any) -> Any:
        if block not in chosen:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=args.lora_dropout > 0)

    if chosen:
        unet.enable_gradient_checkpointing(call)
    for encoder in encoders if args.gradient_checkpointing is True else ():
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})




def graphs_compiled() -> str:
    """Say how many graphs were compiled in this run; "" if none were."""
    dynamo = sys.modules.get("torch._dynamo")
    count = dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0
    return f"{count} graphs" if count else ""


def compile_unet(run: Run, unet: UNet2DConditionModel) -> bool:
    """Compile the UNet in place, whole or each repeated block, if accelerate says so; return whether it does."""
    plugin = run.accelerator.state.dynamo_plugin
    if plugin.backend.value == "NO":
        return False
    # each width, batch, bucket and mode of gradients is a graph; at its usual limit of 8 dynamo goes on without them
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch._dynamo.utils.counters["stats"].clear()
    (unet.compile_repeated_blocks if plugin.use_regional_compilation else unet.compile)(**plugin.to_kwargs())
    return True


# ------------------------------------------------------------------------------------------------------------ adapters
# peft adds them; in training they run through fused kernels. A is (rank, in), B is (out, rank), both float32.


def unet_targets(args: argparse.Namespace) -> str:
    """Return a pattern of the UNet's modules that get adapters."""
    layers = LORA_LAYERS.get(args.lora_layers) or args.lora_layers.split(",")
    within = "|".join(re.escape(rule.block) for rule in block_rules(args.lora_unet_blocks))
    return (rf"(?:{within})\." if within else "") + rf".*(?:{'|'.join(layer.strip() for layer in layers)})"


def text_encoder_targets(encoder: nn.Module) -> str:
    """Return a pattern of the attention in the layers that SDXL reads: all of the second encoder, whose projection
    reads the last one, all but the last of the first (diffusers#4340).
    """
    unread = 0 if isinstance(encoder, CLIPTextModelWithProjection) else 1
    layers = "|".join(map(str, range(encoder.config.num_hidden_layers - unread)))
    return rf".*layers\.({layers})\.self_attn\.(q|k|v|out)_proj"


def add_adapters(args: argparse.Namespace, part: nn.Module) -> None:
    """Add float32 adapters to a frozen UNet or text encoder. Raises UserError if there is no such module."""
    is_unet = isinstance(part, UNet2DConditionModel)
    targets = unet_targets(args) if is_unet else text_encoder_targets(part)
    rules, adapter = (block_rules(args.lora_unet_blocks), choose_adapter(args)) if is_unet else ((), Lora(args))
    alpha = args.lora_alpha or args.rank
    ranks = {rf"{re.escape(rule.block)}\..*": rule.rank for rule in rules if rule.rank}
    alphas = {block: alpha * (rank / args.rank) ** (0.5 if args.use_rslora else 1)  # the scale of all others
              for block, rank in ranks.items()}
    config = peft.LoraConfig(
        r=args.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=args.lora_dropout, rank_pattern=ranks,
        alpha_pattern=alphas, init_lora_weights="gaussian", use_rslora=args.use_rslora, **adapter.keywords())
    try:
        peft.inject_adapter_in_model(config, part)
    except ValueError as error:
        raise UserError(f"--lora_layers or --lora_unet_blocks name nothing that the {type(part).__name__} has "
                        f"({first_line(error)[:80]}).") from error
    adapted = {name: layer for name, layer in part.named_modules() if hasattr(layer, "lora_A")}
    for rule in rules:
        refuse(not any(name.startswith(f"{rule.block}.") for name in adapted), f"--lora_unet_blocks {rule.block}: the "
               "base model has no such block with layers to adapt.")
    for parameter in part.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in half precision most updates would round to nothing
    for layer in adapted.values():
        adapter.initialize(layer)


class CastLoraWeights(NamedTuple):
    """Copies of A and B in the dtype of the computation, and their transposes, made once."""

    a: Tensor
    b: Tensor
    a_t: Tensor
    b_t: Tensor


class LowRank(torch.autograd.Function):
    """output + scale * x A^T B^T, computed with copies of A and B in x's dtype; their gradients are float32.

    Two matrix products forward and four backward; peft's forward casts x, A and B, scales and adds in kernels of their
    own, and as many again backward, 560 times a step.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, a: Tensor, b: Tensor, cast: CastLoraWeights,
                scale: float) -> Tensor:
        """Shapes: output (..., out), x (..., in), A (rank, in), B (out, rank)."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows.mm(cast.a_t)
        ctx.save_for_backward(rows, hidden)
        ctx.cast, ctx.scale, ctx.shape = cast, scale, x.shape
        flat = output.reshape(-1, output.shape[-1])
        return torch.addmm(flat, hidden, cast.b_t, alpha=scale).view(output.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of output, x, A and B."""
        rows, hidden = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        scaled = flat if ctx.scale == 1 else flat * ctx.scale
        grad_hidden = scaled.mm(ctx.cast.b)
        grad_x = grad_hidden.mm(ctx.cast.a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        grad_a, grad_b = grad_hidden.t().mm(rows), scaled.t().mm(hidden)
        return grad, grad_x, grad_a.float(), grad_b.float(), None, None


def autocast_forward(layer: nn.Module, dtype: torch.dtype, x: Tensor) -> Tensor:
    """Run peft's forward of a layer with its products in dtype."""
    if dtype == torch.float32 or x.is_meta:  # the meta device has no autocast
        return type(layer).forward(layer, x).to(dtype)
    with torch.autocast(x.device.type, dtype):
        return type(layer).forward(layer, x).to(dtype)


def convolve_lora(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a convolution with its LoRA in the dtype of x (B, in, h, w), where peft computes in float32."""
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    hidden = down._conv_forward(layer.lora_dropout["default"](x), down.weight.to(x.dtype), None)
    added = up._conv_forward(hidden, up.weight.to(x.dtype), None)
    return layer.base_layer(x) + added * layer.scaling["default"]


def fused_lora_forward(layer: nn.Module, dtype: torch.dtype,
                       compiled: bool) -> tuple[Callable | None, list[tuple[Tensor, Tensor]]]:
    """Return a forward for one of peft's layers, and (master, copy) of A and B, if it reads copies in dtype."""
    base, dropout, scale = layer.base_layer, layer.lora_dropout["default"], layer.scaling["default"]
    linear = nn.functional.linear
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if layer.lora_variant:  # DoRA: peft's own, in dtype as all else; by itself it computes in float32
        return functools.partial(autocast_forward, layer, dtype), []
    if not isinstance(layer, peft.tuners.lora.Linear):
        return functools.partial(convolve_lora, layer), []
    if compiled:
        return lambda x: base(x) + linear(linear(dropout(x), a.to(x.dtype)), b.to(x.dtype)) * scale, []
    cast_a, cast_b = a.detach().to(dtype), b.detach().to(dtype)  # the same storage if dtype is float32
    cast = CastLoraWeights(cast_a, cast_b, cast_a.t(), cast_b.t())
    copies = [] if dtype == torch.float32 else [(a.detach(), cast_a), (b.detach(), cast_b)]
    return lambda x: LowRank.apply(base(x), dropout(x), a, b, cast, scale), copies


# -------------------------------------------------------------------------------------------------------- quantization


class PackedProduct(torch.autograd.Function):
    """A linear layer on a packed weight, which the backward pass unpacks again instead of keeping it unpacked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        """Map (..., in) to (..., out)."""
        ctx.layer = layer
        return nn.functional.linear(x, layer.unpack(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        return grad @ ctx.layer.unpack(grad.dtype), None


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight is stored in 8 or 4 bits, and computed with in the dtype of its input.

    int8 has a scale for each output row; nf4 is that of QLoRA (arXiv:2305.14314), its scales in 8 bits.
    """

    def __init__(self, linear: nn.Linear, precision: str, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.to(device), requires_grad=False)
        weight, self.state = linear.weight.detach().to(device), None
        if precision == "nf4":
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # a second that only this flag costs

            self.dequantize = dequantize_4bit
            codes, self.state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            scale = None
        else:
            exact = weight.float()  # in bfloat16 a quotient of 127 rounds up to 128, which int8 reads as -128
            scale = exact.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
            codes = (exact / scale).round().to(torch.int8)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        if self.state is not None:
            return self.dequantize(self.codes, self.state).to(dtype)
        return self.codes.to(dtype).mul_(self.scale)

    def _apply(self, fn: Callable, recurse: bool = True) -> PackedLinear:
        """Move nf4's scales along with the codes; nothing here changes its dtype."""
        super()._apply(fn, recurse)
        if self.state is not None:
            self.state.to(self.codes.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return PackedProduct.apply(x, self)


def pack_unet(unet: nn.Module, precision: str, device: torch.device) -> None:
    """Pack the linear layers of the transformer blocks, one at a time: the device never holds them all unpacked.

    Convolutions and the layers that embed time and sizes, a seventh of the bytes, stay as they are.
    """
    for name, linear in list(unet.named_modules()):
        if isinstance(linear, nn.Linear) and "attentions." in name and "lora_" not in name:
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, PackedLinear(linear, precision, device))


def move_frozen(model: nn.Module, device: torch.device) -> None:
    """Move a model, but not its adapters, of which others hold the very tensors."""
    for packed in (module for module in model.modules() if isinstance(module, PackedLinear)):
        packed.to(device)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(device)


@contextmanager
def offloaded(run: Run, model: TrainableSDXL) -> Iterator[None]:
    """Keep the UNet on the host within the block, if gradient checkpointing shows that memory is short."""
    if not checkpointed(run.args):
        yield
        return
    move_frozen(model.unet, torch.device("cpu"))
    try:
        yield
    finally:
        move_frozen(model.unet, run.device)


# --------------------------------------------------------------------------------------------------------------- files
# Nothing half-written bears a final name, and nothing that this script did not write is overwritten.


@contextmanager
def atomic_write(path: Path, shared: bool = False, size: int = 0, durable: bool = False) -> Iterator[Path]:
    """Yield a file or folder to write that becomes `path` when the block ends well.

    shared: others may write it at the same time; durable: it survives a power failure, which costs an fsync a file.
    Raises TrainingError, with how many bytes are to be written if size is given, if the disk is full.
    """
    writer = f".{os.urandom(6).hex()}" * shared  # not the process's number: in another container there is the same
    unfinished, outdated = path.with_name(f".{path.name}{writer}.tmp"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(unfinished)  # of a run that was killed
        yield unfinished
        if durable:
            to_disk(unfinished)
        if path.is_dir():  # a folder cannot be replaced, as a file can
            path.replace(outdated := path.with_name(f".{path.name}{writer}.outdated.tmp"))
        unfinished.replace(path)
        remove(outdated or unfinished)
        if durable:
            to_disk(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save wraps the one in the other
        remove(unfinished)
        causes = (error, error.__context__, error.__cause__)
        if not any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
            raise
        needed = f" needs {megabytes(size)}, but" if size else ": the disk is full,"
        raise TrainingError(f"{path}{needed} {megabytes(free_bytes(path.parent))} are free; make room. What was "
                            "written before is whole.") from error
    finally:
        remove(unfinished)


def to_disk(path: Path) -> None:
    """Let a file or a folder, with what is in it, survive a power failure, as far as the file system can."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    for part in (*(path.rglob("*") if path.name.endswith(".tmp") and path.is_dir() else ()), path):
        handle = os.open(part, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(handle)
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.is_dir())).free


def megabytes(count: float) -> str:
    """Format bytes."""
    return f"{count / 1e6:,.1f} MB"


def check_space(folder: Path, needed: float, what: str) -> None:
    """Warn if a disk has less room than will be needed."""
    if needed > free_bytes(folder):
        warn("%s will need up to %s in %s, where %s are free.", what, megabytes(needed), folder,
             megabytes(free_bytes(folder)))


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Warn instead of ending the run if what it can do without fails: a full disk, a picture that was moved."""
    try:
        yield
    except (OSError, TrainingError) as error:
        warn("the %s could not be written (%s); training is not affected.", what, first_line(error))


UNFINISHED = re.compile(
    rf"\.(?:[0-9a-f]{{40}}\.safetensors|(?:checkpoint|last)-\d+|(?:dataset|unpacked)-.+|"
    rf"{'|'.join(map(re.escape, OUTPUT_FILES))})(?:\.[0-9a-f]{{12}})?(?:\.outdated)?\.tmp")
"""The names that atomic_write gives to what this script writes."""


def sweep(folder: Path, before: float) -> None:
    """Remove what killed runs left unfinished before a time, in seconds since the epoch."""
    for unfinished in folder.glob(".*.tmp"):
        with suppress(OSError):  # gone, or another user's
            if UNFINISHED.fullmatch(unfinished.name) and unfinished.stat().st_mtime < before:
                remove(unfinished)


def lock_file(path: Path) -> int:
    """Lock a file until the returned handle is closed, at the latest by the end of the process.

    Raises BlockingIOError if another process holds it, OSError if the file system has no locks or the file cannot be
    read.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's, which a local file system lets lock whoever may read it
        handle = os.open(path, os.O_RDONLY)
    try:
        if os.name == "posix":
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        os.close(handle)
        if error.errno in ((errno.EAGAIN,) if os.name == "posix" else (errno.EACCES, errno.EDEADLK)):
            raise BlockingIOError(error.errno, error.strerror) from error
        raise
    return handle


@contextmanager
def lock_output(output: Path, cache: Path) -> Iterator[None]:
    """Hold the output folder; a second run is refused, and the lock ends with its owner. Raises UserError."""
    if not is_first_rank():
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    handle = None
    try:
        handle = lock_file(output / ".lock")
    except BlockingIOError:
        raise UserError(f"--output_dir {output} is in use by another run; wait for it, or choose another.") from None
    except OSError as error:
        warn("--output_dir %s cannot be locked (%s): nothing keeps a second run out of it.", output, error.strerror)
    try:
        sweep(output, before=math.inf)
        sweep(cache, before=time.time() - 86400)  # others may be writing there
        yield
    finally:
        if handle is not None:
            os.close(handle)


def set_aside(output: Path, step: int) -> None:
    """Move what is not this run's from where it writes to a folder of its own: what another run left beyond a step,
    with that run's files, and what may be the user's.
    """
    later = sorted(path.relative_to(output).as_posix() for path, at in steps_in(output).items() if at > step)
    there = [name for name in (*OUTPUT_FILES, "validation/step-000000") if os.path.lexists(output / name)]
    was_killed = HISTORY_FILE in there and LORA_FILE not in there  # this run, before its first checkpoint
    kept = there if step or was_killed else ()
    if later:
        kept = (HISTORY_FILE, CONFIG_FILE) if step else ()
    moved = [name for name in there if name not in kept or name == "README.md"]  # which may have been edited
    if later or moved:
        place = move_aside(output, later + moved)
        print_rows([("Earlier", f"{some(later + moved)} of {output} {'is' if len(later + moved) == 1 else 'are'} now "
                     f"in {place}")])


def move_aside(output: Path, names: Iterable[str]) -> Path:
    """Move files and folders of the output folder into a new one in it, and return that. Raises UserError."""
    place = next(place for place in (output / f"earlier-{i}" for i in itertools.count(1)) if not place.exists())
    for name in names:
        try:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).replace(place / name)
        except OSError as error:
            raise UserError(f"--output_dir {output}: {name} cannot be moved to {place} ({error.strerror}); choose "
                            "another.") from error
    return place


def public_settings(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the flags from which the same run starts again: no secrets, no unset ones, the seed that was used."""
    hidden = {*SECRET_FLAGS, "config", "local_rank"}
    settings = {**vars(args), "seed": seed}
    return {key: value for key, value in settings.items() if key not in hidden and value is not None}


# -------------------------------------------------------------------------------------------------------------- caches
# Every prompt and every crop is encoded once and kept under the hash of what it was made of.


class TensorCache:
    """Tensors in a folder, by key. A broken file counts as missing; any number of runs may share the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        self.found, self.made, self.broken = 0, 0, 0

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{key}.safetensors"

    def size(self, key: str) -> int:
        """Return the bytes of a key's file."""
        return self.path(key).stat().st_size

    def has(self, key: str) -> bool:
        """Return True if there is a whole file of a key; reads its header only, which says how long it must be."""
        try:
            with safe_open(self.path(key), framework="pt"), self.lock:
                self.found += 1
                return True
        except FileNotFoundError:
            return False
        except (OSError, SafetensorError):
            with self.lock:
                self.broken += 1
            return False

    def put(self, key: str, **tensors: Tensor) -> None:
        """Write tensors. Raises TrainingError if the disk does not take them."""
        data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        try:
            with atomic_write(self.path(key), shared=True, size=len(data)) as unfinished:
                unfinished.write_bytes(data)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"the cache folder {self.folder} cannot be written ({first_line(error)}); free some "
                                "space or choose another --cache_latents_dir.") from error
        self.made += 1

    def get(self, key: str) -> dict[str, Tensor]:
        """Read the tensors of a key. Raises TrainingError if they are gone."""
        try:
            return load_file(self.path(key))
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{self.path(key)} was removed or broken while training; start again.") from error

    def report(self) -> str:
        """Say what all ranks did."""
        counts = gather_object([(self.made, self.found, self.broken)])
        made, found, broken = (sum(column) for column in zip(*counts, strict=True))
        mended = f"; {broken} broken files were replaced" if broken else ""
        return f"{made} pictures and prompts encoded, {found} found in {self.folder}{mended}"


class CachedRows:
    """Cached tensors by number, on the device: all of them if they are few.

    Many stay on the disk and are read and pinned by a thread before they are needed, so that the device never waits.
    read: from a number to a tensor, or several, on the host; size: bytes of each.
    """

    def __init__(self, read: Callable[[int], Any], count: int, size: float, device: torch.device) -> None:
        self.read, self.device, self.pending = read, device, {}
        self.is_preloaded = count * size <= PRELOAD_BYTES
        self.rows = [self.to_device(read(number_)) for number_ in range(count)] if self.is_preloaded else []
        self.thread = ThreadPoolExecutor(1)  # which begins with its first work

    def to_device(self, row: Any) -> Any:
        """Copy a row; from pinned memory a GPU copies by itself."""
        return tree_map(lambda tensor: tensor.to(self.device, non_blocking=True), row)

    def load(self, number_: int) -> Any:
        """Read a row from the disk."""
        row = self.read(number_)
        return tree_map(Tensor.pin_memory, row) if self.device.type == "cuda" else row

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Begin to read these rows, which are needed next, unless they are on the device."""
        numbers = () if self.is_preloaded else dict.fromkeys(numbers)
        self.pending = {n: self.pending.get(n) or self.thread.submit(self.load, n) for n in numbers}

    def __call__(self, number_: int) -> Any:
        """Return a row on the device."""
        if self.is_preloaded:
            return self.rows[number_]
        future = self.pending.get(number_)
        return self.to_device(future.result() if future else self.load(number_))


def weights_fingerprint(source: Source, part: str) -> str:
    """Return what stands for a part's weights in a key: a Hub commit, or local files' places, sizes and times."""
    if Path(source.name).is_dir():
        files = sorted(path.resolve() for path in Path(source.name, part if source.is_pipeline else "").iterdir())
        return content_key(source.variant, *((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))
    _, commit = AutoencoderKL.load_config(source.name, return_commit_hash=True, **source.keywords(part))
    return content_key(source.name, part, source.variant, commit)


def local_share(count: int, accelerator: Accelerator) -> range:
    """Return the numbers below count of this rank; the ranks of one machine, which share a disk, do them all."""
    return range(accelerator.local_process_index, count, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ---------------------------------------------------------------------------------------------------------------- text
# prompt_embeds (B, L, 2048): penultimate hidden states of both encoders; pooled_prompt_embeds (B, 1280): the second's.


@dataclass
class PromptEmbeddings:
    """All prompts of a run with their rows of text; ids become embeddings when the text encoders are frozen."""

    numbers: dict[str, int]  # of the prompts
    row: Callable[[int], Text]  # by number, on the device

    def at(self, numbers: Iterable[int]) -> Text:
        """Return a batch of rows by number."""
        first, second = zip(*map(self.row, numbers), strict=True)
        return torch.stack(first), torch.stack(second)

    def of(self, prompt: str) -> Text:
        """Return one prompt as a batch of one row."""
        return self.at([self.numbers[prompt]])


def prompts_of(run: Run, samples: Iterable[Sample]) -> list[str]:
    """Return all prompts that a run needs, but the empty one."""
    of_validation = (text for prompt in run.prompts for text in (prompt.text, prompt.negative_prompt))
    return [*(sample.prompt for sample in samples), *filter(None, (*of_validation, run.args.class_prompt))]


def load_tokenizer(run: Run, part: str) -> CLIPTokenizer:
    """Load a tokenizer with the run's new tokens."""
    tokenizer = load_part(run.base, part)
    tokenizer.add_tokens(run.text.new_tokens())
    return tokenizer


def tokenize_prompts(run: Run, prompts: Sequence[str]) -> Text:
    """Return both tokenizers' ids of all prompts, each (P, L)."""
    ids, replaced = [], [run.text.replace_words(prompt) for prompt in prompts]
    for part in TOKENIZERS:
        tokenizer = load_tokenizer(run, part)
        ids.append(tokenizer(replaced, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                             return_tensors="pt").input_ids)
    return ids[0], ids[1]


def warn_of_long_prompts(run: Run, prompts: Iterable[str]) -> None:
    """Warn of words that are cut off long prompts."""
    tokenizer = load_tokenizer(run, "tokenizer")
    limit = tokenizer.model_max_length
    for prompt in dict.fromkeys(prompts):
        lost = tokenizer(run.text.replace_words(prompt)).input_ids[limit - 1:-1]
        if lost:
            warn('a prompt has more than %d tokens; this end of it is cut off: "%s"', limit, tokenizer.decode(lost))


def encode_ids(encoders: Iterable[nn.Module], ids: Iterable[Tensor]) -> Text:
    """Encode token ids (B, L) as SDXL reads them: penultimate hidden states of both encoders side by side
    (B, L, 2048), and the second's projected output (B, 1280).
    """
    outputs = [encoder(rows, output_hidden_states=True) for encoder, rows in zip(encoders, ids, strict=True)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds


@torch.no_grad()
def encode_text(source: Source, ids: Text, dtype: torch.dtype, device: torch.device) -> Text:
    """Return embeddings of all prompts; each encoder is loaded, used and freed before the next."""

    def encode(part: str, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        encoder = load_part(source, part, dtype, device)
        outputs = (encoder(row[None].to(device), output_hidden_states=True) for row in rows)
        return [(output.hidden_states[-2], output.get("text_embeds")) for output in outputs]

    first, second = (encode(part, rows) for part, rows in zip(TEXT_ENCODERS, ids, strict=True))
    hidden = [torch.cat([one, two], dim=-1) for (one, _), (two, _) in zip(first, second, strict=True)]
    return torch.cat(hidden), torch.cat([pooled for _, pooled in second])


def encode_prompts(run: Run, prompts: Iterable[str], trained: bool, dtype: torch.dtype) -> PromptEmbeddings:
    """Tokenize the prompts, and the empty one, and encode what the cache lacks unless the encoders are trained."""
    distinct = list(dict.fromkeys([*prompts, ""]))
    numbers, ids = {prompt: i for i, prompt in enumerate(distinct)}, tokenize_prompts(run, distinct)
    if trained:
        return PromptEmbeddings(numbers, list(zip(*(rows.to(run.device) for rows in ids), strict=True)).__getitem__)
    made_by = [weights_fingerprint(run.base, part) for part in TEXT_ENCODERS]
    keys = [content_key(*made_by, dtype, *(rows.tolist() for rows in pair)) for pair in zip(*ids, strict=True)]
    missing = [i for i in local_share(len(keys), run.accelerator) if not run.cache.has(keys[i])]
    if missing:
        embeds, pooled = encode_text(run.base, (ids[0][missing], ids[1][missing]), dtype, run.device)
        for i, row, pooled_row in zip(missing, embeds, pooled, strict=True):
            run.cache.put(keys[i], embeds=row, pooled=pooled_row)
    run.accelerator.wait_for_everyone()

    def read(number_: int) -> Text:
        row = run.cache.get(keys[number_])
        return row["embeds"], row["pooled"]

    return PromptEmbeddings(numbers, CachedRows(read, len(keys), run.cache.size(keys[0]), run.device))


class NewTokens(nn.Module):
    """An embedding with rows of its own for the ids from `first` on, the only ones that are trained."""

    def __init__(self, known: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__()
        self.known, self.first = known, first
        self.rows = nn.Parameter(rows.float())

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids (B, L) as (B, L, width)."""
        is_new = ids >= self.first
        known = self.known(ids.masked_fill(is_new, 0))
        new = self.rows[(ids - self.first).clamp(0, len(self.rows) - 1)]
        return torch.where(is_new[..., None], new.to(known.dtype), known)


def freeze_text_encoders(model: TrainableSDXL, prompts: PromptEmbeddings, ema: EMA) -> None:
    """Train the text encoders no further: keep their embeddings of all prompts, and move them off the device.

    From now on, what is trained of them is what their files hold: the average, if there is one.
    """
    with ema.applied():
        with inference_adapters(model):
            cache_embeddings(model, prompts)
        frozen = {name: parameter.data.clone() for name, parameter in model.adapters.items()
                  if not name.startswith("unet.")}
    for name, data in frozen.items():
        model.adapters[name].data.copy_(data)


def cache_embeddings(model: TrainableSDXL, prompts: PromptEmbeddings) -> None:
    """Replace token ids by the text encoders' embeddings, and move the encoders to the host."""
    model.text_encoders.eval()
    device, rows, home = model.unet.device, [], None
    for prompt in prompts.numbers:
        with torch.no_grad():
            row = model.embed(prompts.of(prompt))
        home = home or (device if len(prompts.numbers) * row[0].nbytes <= PRELOAD_BYTES else torch.device("cpu"))
        rows.append(tuple(part[0].to(home) for part in row))
    prompts.row = lambda number_: tuple(part.to(device) for part in rows[number_])
    model.embed = lambda text: text
    for encoder in model.text_encoders:
        move_frozen(encoder, torch.device("cpu"))
    for name, parameter in model.adapters.items():
        parameter.requires_grad_(name.startswith("unet."))


# ------------------------------------------------------------------------------------------------------------- latents
# Every crop of a picture is encoded once, to mean and std of its latents (4, h, w) in float32; then the VAE is gone.


class Batch(NamedTuple):
    """The rows of one micro-batch, on the device: a class picture is a row with another weight."""

    mean: Tensor  # (B, 4, h, w), scaled
    std: Tensor
    text: Text
    add_time_ids: Tensor  # (B, 6): original height and width, crop top and left, target height and width
    weight: Tensor  # (B,)
    instance_rows: int
    names: tuple[str, ...] = ()  # of its pictures, with their prompts
    mask: Tensor | float = 1.0  # (B, 1, h, w): weight of each place in the picture, 1 on average


SampleBucket = tuple[int, Bucket]
"""A sample by number, and a bucket in which it is trained."""


class CachedView(NamedTuple):
    """A view as it is cached."""

    key: str  # of its tensor
    pixels: str  # a hash of what they are made of
    add_time_ids: tuple[int, ...]


@dataclass(frozen=True)
class LatentDataset:
    """All views, and which bucket, prompt and weight belong to which sample."""

    view: CachedRows  # by number: (9, h, w), which are mean, std (4 each, scaled) and mask
    add_time_ids: Tensor  # (views, 6)
    views: dict[SampleBucket, list[int]]  # their numbers
    buckets: list[Bucket]  # of each sample of the subject
    weight: Tensor  # (samples,)
    prompts: list[int]  # of each sample: its number in the prompt embeddings
    names: list[str]  # of each sample
    caption_dropout: float
    pictures: dict[str, list[str]]  # hash_pictures

    def moments(self, views: Iterable[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, std and mask of views of one shape, as Batch has them."""
        rows = torch.stack([self.view(number_) for number_ in views])
        mean, std = rows[:, :-1].chunk(2, dim=1)
        return mean, std, rows[:, -1:]

    def views_at(self, sampler: BatchSampler, n: int) -> list[int]:
        """Return the views of micro-batch n; all of a picture's in turn before any comes again.

        Rows of the class take the bucket of the subject's rows beside them.
        """
        rows = sampler.rows(n)
        choices = [self.views[sample, self.buckets[rows[0].sample]] for sample, _ in rows]
        return [views[row_at(range(len(views)), position_seed(sampler.seed, "view", sample), epoch).sample]
                for (sample, epoch), views in zip(rows, choices, strict=True)]

    def prompts_at(self, prompts: PromptEmbeddings, sampler: BatchSampler, n: int) -> list[int]:
        """Return the prompts of micro-batch n by number; --caption_dropout makes some empty."""
        samples = [sample for sample, _ in sampler.rows(n)]
        dropped = [i < sampler.batch_size and random.Random(position_seed(sampler.seed, "caption", n, i)).random()
                   < self.caption_dropout for i in range(len(samples))]
        return [prompts.numbers[""] if drop else self.prompts[sample]
                for sample, drop in zip(samples, dropped, strict=True)]

    def batch(self, prompts: PromptEmbeddings, sampler: BatchSampler, n: int, stride: int = 1) -> Batch:
        """Return micro-batch n, a function of n alone.

        This process computes every stride-th micro-batch: the next one's rows are read from the disk meanwhile.
        """
        samples, seen = [sample for sample, _ in sampler.rows(n)], self.views_at(sampler, n)
        text = prompts.at(self.prompts_at(prompts, sampler, n))
        mean, std, mask = self.moments(seen)
        self.view.prefetch(self.views_at(sampler, n + stride))
        if isinstance(prompts.row, CachedRows):  # else they are token ids, or embeddings of trained encoders
            prompts.row.prefetch(self.prompts_at(prompts, sampler, n + stride))
        ids, weight = (torch.stack([tensor[i] for i in numbers]) for tensor, numbers in (  # a list as index would wait
            (self.add_time_ids, seen), (self.weight, samples)))
        return Batch(mean, std, text, ids, weight, sampler.batch_size, tuple(self.names[i] for i in samples), mask)


def view_count(args: argparse.Namespace, is_class: bool, buckets: int) -> int:
    """Return how many views of a sample are encoded for a bucket: of a picture there are CACHED_CROPS in all, shared
    among its repeats or, if it is of the class, the buckets in which it is trained.
    """
    if args.center_crop and not args.random_flip:
        return 1
    return max(1, CACHED_CROPS // (buckets if is_class else args.repeats))


def latent_bytes(run: Run, buckets: Sequence[Bucket], class_pictures: int = 0) -> int:
    """Return the most that latents take on the disk, of samples of the subject in these buckets and of the class."""
    kinds = len(set(buckets))
    views = len(buckets) * view_count(run.args, False, kinds)
    views += class_pictures * kinds * view_count(run.args, True, kinds)
    return views * (run.args.resolution // run.vae_factor) ** 2 * 9 * 4  # mean, std and mask in float32


def choose_views(run: Run, sample: Sample, bucket: Bucket, count: int, vae: str) -> dict[View, CachedView]:
    """Choose up to `count` distinct views of a sample for a bucket; vae is the fingerprint of its weights.

    They follow from the picture alone, not from the run's seed, so that another run finds them encoded.
    """
    args, size, picture = run.args, picture_size(sample.path), KNOWN_PICTURES.key(sample.path)
    is_masked = args.masked_loss and not sample.is_class
    mask = (find_mask(args, sample.path) or sample.path).read_bytes() if is_masked else None  # or its own alpha
    seeds = [position_seed(picture, sample.repeat, variant) for variant in range(count)]
    views = [choose_view(resized(size, bucket), bucket, args.center_crop, args.random_flip, random.Random(seed))
             for seed in seeds]
    made_of = {view: content_key(picture, args.image_interpolation_mode, mask, bucket, tuple(view)) for view in views}
    return {view: CachedView(content_key(vae, torch.float32, key), key,
                             (size[1], size[0], view.top, view.left, bucket[1], bucket[0]))
            for view, key in made_of.items()}


def cut_view(picture: Image.Image, view: View, bucket: Bucket) -> Image.Image:
    """Mirror and crop a resized picture."""
    picture = ImageOps.mirror(picture) if view.flip else picture
    return picture.crop((view.left, view.top, view.left + bucket[0], view.top + bucket[1]))


def cut_views(run: Run, sample: Sample, picture: Image.Image, bucket: Bucket,
              views: Iterable[View]) -> dict[View, tuple[np.ndarray, np.ndarray]]:
    """Cut views of a sample's picture: pixels (height, width, 3), and a mask of a byte a latent, which is white unless
    --masked_loss is on.
    """
    args = run.args
    small = picture.resize(resized(picture.size, bucket), Image.Resampling[args.image_interpolation_mode.upper()])
    own = load_mask(args, sample.path) if args.masked_loss and not sample.is_class else None
    mask = own.resize(small.size, Image.Resampling.BILINEAR) if own else Image.new("L", small.size, 255)
    latent = bucket[0] // run.vae_factor, bucket[1] // run.vae_factor
    return {view: (np.array(cut_view(small, view, bucket)),
                   np.array(cut_view(mask, view, bucket).resize(latent, Image.Resampling.BOX))) for view in views}


def to_pixels(cut: np.ndarray) -> Tensor:
    """Return bytes (H, W, 3) as (3, H, W) in [-1, 1]."""
    return torch.from_numpy(cut).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_image(vae: AutoencoderKL, pixels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Encode one picture to the moments of its latent distribution.

    pixels: (3, H, W) in [-1, 1], H and W multiples of 8. Returns mean and std, each (4, h, w), scaled, float32.
    Raises TrainingError naming the picture if the VAE's answer is not finite.
    """
    posterior = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
    mean, std = posterior.mean[0].float(), posterior.std[0].float()
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise TrainingError(f"the VAE has no finite answer for {name}: look at the picture, or use another VAE.")
    shift = torch.tensor(getattr(vae.config, "latents_mean", None) or 0.0, device=mean.device).view(-1, 1, 1)
    spread = torch.tensor(getattr(vae.config, "latents_std", None) or 1.0, device=mean.device).view(-1, 1, 1)
    factor = vae.config.scaling_factor / spread
    return (mean - shift) * factor, std * factor


def encode_views(run: Run, samples: Sequence[Sample],
                 places: Sequence[SampleBucket]) -> dict[SampleBucket, list[CachedView]]:
    """Return the views of this rank's share of samples and buckets.

    What the cache lacks is encoded in float32, once, by a VAE that is loaded if need be; a picture of which nothing is
    missing is not decoded.
    """
    vae, views_of, made = functools.cache(lambda: load_vae(run.vae, torch.float32, run.device)), {}, set()
    fingerprint, by_path = weights_fingerprint(run.vae, "vae"), {}
    for place in places:
        by_path.setdefault(samples[place[0]].path, []).append(place)
    share = [list(by_path.values())[i] for i in local_share(len(by_path), run.accelerator)]
    buckets = len({bucket for _, bucket in places})

    def prepare(own: list[SampleBucket]) -> list[tuple[SampleBucket, dict[View, CachedView], dict]]:
        """Choose the views of a picture, and cut those that the cache lacks."""
        count = view_count(run.args, samples[own[0][0]].is_class, buckets)
        chosen = [(place, choose_views(run, samples[place[0]], place[1], count, fingerprint)) for place in own]
        missing = [[view for view, cached in views.items() if not run.cache.has(cached.key)] for _, views in chosen]
        picture = KNOWN_PICTURES.take(samples[own[0][0]].path) if any(missing) else None
        cuts = [cut_views(run, samples[place[0]], picture, place[1], lacking) if lacking else {}
                for (place, _), lacking in zip(chosen, missing, strict=True)]
        return [(place, views, {views[view].key: cut for view, cut in of_place.items()})
                for (place, views), of_place in zip(chosen, cuts, strict=True)]

    bar = progress_bar(sum(map(len, share)), "Pictures", delay=5)
    prepared = prefetch(prepare, share, run.args.dataloader_num_workers)
    for place, views, cuts in itertools.chain.from_iterable(prepared):
        views_of[place] = list(views.values())
        for key, (cut, mask) in cuts.items():
            if key not in made:  # another sample may have the same pixels
                mean, std = encode_image(vae(), to_pixels(cut), str(samples[place[0]].path))
                run.cache.put(key, view=torch.cat([mean, std, torch.from_numpy(mask)[None].to(mean) / 255]))
                made.add(key)
        bar.update()
    bar.close()
    KNOWN_PICTURES.decoded.clear()
    return views_of


def encode_latents(run: Run, samples: Sequence[Sample], buckets: Sequence[Bucket],
                   prompts: PromptEmbeddings) -> LatentDataset:
    """Encode every distinct view of every sample that the cache lacks; buckets are those of the subject's samples."""
    used = dict.fromkeys(buckets)
    places = list(enumerate(buckets)) + [(i, bucket) for i in range(len(buckets), len(samples)) for bucket in used]
    parts = gather_object([encode_views(run, samples, places)])
    if run.accelerator.is_local_main_process:
        KNOWN_PICTURES.write(run.cache.folder)
    views_of = {place: views for part in parts for place, views in part.items()}
    numbers = {view: i for i, view in enumerate(dict.fromkeys(view for place in places for view in views_of[place]))}
    keys, background = [view.key for view in numbers], run.args.background_loss_weight if run.args.masked_loss else 1.0

    def read(number_: int) -> Tensor:
        view = run.cache.get(keys[number_])["view"]
        weight = background + (1 - background) * view[-1:]
        return torch.cat([view[:-1], weight / weight.mean()])

    return LatentDataset(
        view=CachedRows(read, len(keys), run.cache.size(keys[0]), run.device),
        add_time_ids=torch.tensor([view.add_time_ids for view in numbers], device=run.device, dtype=torch.float32),
        views={place: [numbers[view] for view in views_of[place]] for place in places},
        buckets=list(buckets),
        weight=torch.tensor([run.args.prior_loss_weight if sample.is_class else 1.0 for sample in samples],
                            device=run.device),
        prompts=[prompts.numbers[sample.prompt] for sample in samples],
        names=[f'{sample.path} ("{sample.prompt}")' for sample in samples],
        caption_dropout=run.args.caption_dropout,
        pictures=hash_pictures(run, samples, {place: [view[1:] for view in views_of[place]] for place in places}))


DATA_HASH = "what the pictures and prompts hash to"


def hash_pictures(run: Run, samples: Sequence[Sample], seen: dict[SampleBucket, Any]) -> dict[str, list[str]]:
    """Return what a resume compares of each picture, by its file's name: a hash of its views, and one of its prompts;
    and, as DATA_HASH, one of all that is trained on.
    """
    views, prompts = {}, {}
    for (sample, _), hashes in seen.items():
        name = samples[sample].path.name
        views.setdefault(name, []).append(hashes)
        prompts.setdefault(name, []).append(samples[sample].prompt)
    rows = [(sample.prompt, sample.is_class and run.args.prior_loss_weight) for sample in samples]
    return {**{name: [content_key(views[name]), content_key(prompts[name])] for name in views},
            DATA_HASH: [content_key(list(seen.values()), rows)]}


def changed_pictures(before: dict[str, list[str]], now: dict[str, list[str]]) -> str:
    """Name the pictures that are gone, new, changed or captioned otherwise since a checkpoint."""
    both = [name for name in now if name in before and name != DATA_HASH]
    kinds = {
        "gone": [name for name in before if name not in now], "new": [name for name in now if name not in before],
        "changed": [name for name in both if now[name][0] != before[name][0]],
        "with another prompt": [name for name in both if now[name][1] != before[name][1]]}
    return "; ".join(f"{kind}: {some(names)}" for kind, names in kinds.items() if names)


def prefetch(work: Callable[[Any], Any], places: Sequence[Any], workers: int) -> Iterator[Any]:
    """Map work over places with that many threads, a few pictures ahead of the VAE and no more."""
    if not workers:
        yield from map(work, places)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for place in places:
            waiting.append(pool.submit(work, place))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


# ----------------------------------------------------------------------------------------------------------- optimizer


def make_optimizer(args: argparse.Namespace, model: TrainableSDXL, samples_per_step: int) -> torch.optim.Optimizer:
    """Make the optimizer over the adapters, in named groups of one learning rate and weight decay."""
    kind, rules, groups = OPTIMIZERS[args.optimizer], block_rules(args.lora_unet_blocks), {}
    scale = samples_per_step if args.scale_lr else 1
    for name, parameter in model.adapters.items():
        label, rate, decay = choose_text(args).rate()
        if name.startswith("unet."):
            own = next((rule for rule in rules if rule.rate and name.startswith(f"unet.{rule.block}.")), None)
            label, rate = (f"unet/{own.block}", own.rate) if own else ("unet", args.learning_rate)
            decay = args.adam_weight_decay
        rate = args.learning_rate if kind.finds_rate else rate * scale
        group = groups.setdefault(label, {"params": [], "lr": rate, "weight_decay": decay, "name": label})
        group["params"].append(parameter)
    make = getattr(importlib.import_module(kind.module), kind.name)
    optimizer = make(list(groups.values()), lr=args.learning_rate, **kind.keywords(args))
    if kind.averages:
        optimizer.train()
    return optimizer


@contextmanager
def swapped(parameters: Iterable[nn.Parameter], data: Iterable[Tensor]) -> Iterator[None]:
    """Put other tensors into the parameters within the block, then the very ones that were there."""
    own = [(parameter, parameter.data) for parameter in parameters]
    try:
        for (parameter, _), other in zip(own, data, strict=True):
            parameter.data = other
        yield
    finally:
        for parameter, exact in own:
            parameter.data = exact


class EMA:
    """What validation and files use: here, just what is trained."""

    mean: Sequence[Tensor] = ()  # what a resumed run needs

    def update(self, step: int) -> None:
        """Take a step into account; `step` others came before."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the adapters, within the block or the decorated function."""
        yield


class MovingAverage(EMA):
    """diffusers' exponential moving average of the adapters, whose decay after t steps is (1 + t) / (10 + t)."""

    def __init__(self, adapters: Sequence[nn.Parameter]) -> None:
        self.adapters, self.average = adapters, EMAModel(adapters, foreach=True)
        self.mean = self.average.shadow_params

    def update(self, step: int) -> None:
        """Take a step into account; `step` others came before."""
        self.average.optimization_step = step
        self.average.step(self.adapters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the mean in the place of the adapters."""
        with swapped(self.adapters, self.mean):
            yield


class ScheduleFreeAverage(EMA):
    """The weights of a schedule-free optimizer's evaluation mode."""

    def __init__(self, adapters: Sequence[nn.Parameter], optimizer: Any) -> None:
        self.adapters, self.optimizer = adapters, optimizer

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Switch to evaluation mode; there and back again in arithmetic would not be exact, so copies move."""
        with swapped(self.adapters, [adapter.data.clone() for adapter in self.adapters]):
            self.optimizer.eval()
            try:
                yield
            finally:
                self.optimizer.train()


# --------------------------------------------------------------------------------------------------------- checkpoints
# One literal dictionary, written atomically; signals that end a run after the step in progress.


@dataclass
class TrainingState:
    """The objects whose state a checkpoint holds; randomness and order need none, they are functions of the step."""

    model: TrainableSDXL
    optimizer: Any
    lr_scheduler: Any
    scaler: Any
    ema: EMA
    settings: dict[str, Any]
    pictures: dict[str, list[str]]  # hash_pictures

    @property
    def trained(self) -> list[nn.Parameter]:
        """The adapters' parameters."""
        return list(self.model.adapters.values())

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return all that a resumed run needs to equal one that never stopped."""
        return {
            "step": step,
            "settings": self.settings,
            "pictures": self.pictures,
            "adapters": {name: parameter.detach().cpu() for name, parameter in self.model.adapters.items()},
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "average": list(self.ema.mean)}

    def load(self, folder: Path) -> int:
        """Load a checkpoint and return its step. Raises UserError if it does not fit, anything if it is broken."""
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)  # runs no code
        changed = [f"{name} was {state['settings'].get(name)} and is now {now}"
                   for name, now in self.settings.items() if state["settings"].get(name) != now]
        before = state.get("pictures", {})  # none in an old checkpoint
        if before != self.pictures:
            names = changed_pictures(before, self.pictures) if before else "of an older version"
            changed.append(f"other pictures or prompts than before ({names or 'their weights'})")
        refuse(changed, f"--resume_from_checkpoint {folder}: {''.join(changed[:1])}; a run goes on as it began, so "
               "change it back, or start anew in another --output_dir.")
        for name, parameter in self.model.adapters.items():
            parameter.data.copy_(state["adapters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        for mean, saved in zip(self.ema.mean, state["average"], strict=True):
            mean.copy_(saved)
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        return state["step"]


def make_state(run: Run, model: TrainableSDXL, schedule: Schedule, pictures: dict[str, list[str]]) -> TrainingState:
    """Make optimizer, schedule and average, before their first step."""
    args, accelerator = run.args, run.accelerator
    optimizer = make_optimizer(args, model, schedule.samples_per_step)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=schedule.warmup_steps, num_training_steps=schedule.total_steps,
        num_cycles=args.lr_num_cycles, power=args.lr_power)
    optimizer = accelerator.prepare(optimizer)  # not the schedule: accelerate steps it once a process
    settings = {
        **{f"--{name}": getattr(args, name) for name in RESUME_FLAGS}, "--seed": run.seed,
        "--mixed_precision": accelerator.mixed_precision,
        "the base model": Path(args.pretrained_model_name_or_path).name,  # its folder may have moved
        "the VAE": vae_name(args),
        "--gradient_accumulation_steps times processes": args.gradient_accumulation_steps * accelerator.num_processes}
    adapters = list(model.adapters.values())
    if args.use_ema:
        ema = MovingAverage(adapters)
    else:
        ema = ScheduleFreeAverage(adapters, optimizer) if OPTIMIZERS[args.optimizer].averages else EMA()
    return TrainingState(model, optimizer, lr_scheduler, accelerator.scaler, ema, settings, pictures)


def vae_name(args: argparse.Namespace) -> str:
    """Return the VAE as it was asked for; a single file that is unpacked has another name."""
    return Path(args.pretrained_vae_model_name_or_path or args.pretrained_model_name_or_path).name


def resume_candidates(name: str | None, output: Path) -> list[Path]:
    """Return the checkpoints to resume from, the best first."""
    if name == "latest":
        return list_checkpoints(output)[::-1]
    return [find_checkpoint(name, output)] if name else []


def resume(name: str | None, output: Path, state: TrainingState) -> int:
    """Load the checkpoint that was named, or the last sound one; return its step, or 0 to begin anew.

    Raises UserError if what is there is broken or does not fit.
    """
    folders = resume_candidates(name, output)
    if name == "latest" and not folders:
        print_rows([("Resume", f"no checkpoint in {output} yet: this run begins anew")])
    for folder in folders:
        try:
            return state.load(folder)
        except UserError:
            raise
        except Exception as error:  # a foreign file fails in any way
            warn("%s is no sound checkpoint (%s).", folder, first_line(error))
    refuse(folders, f"--resume_from_checkpoint {name}: nothing sound is there to resume from; start anew in another "
           "--output_dir.")
    return 0


def restore(run: Run, state: TrainingState) -> int:
    """Resume on all ranks alike, and only then touch the output folder; return the step. Raises UserError."""
    step = resume(run.args.resume_from_checkpoint, run.output, state)
    check_alike(step, content_key(state.pictures))
    if run.accelerator.is_main_process:
        run.output.mkdir(parents=True, exist_ok=True)
        set_aside(run.output, step)
        with atomic_write(run.output / CONFIG_FILE) as unfinished:
            unfinished.write_text(yaml.safe_dump(public_settings(run.args, run.seed), allow_unicode=True),
                                  encoding="utf-8")
    return step


def check_alike(step: int, digest: str) -> None:
    """Check that all ranks begin at one step with the same data; machines may have disks of their own.

    Raises UserError.
    """
    seen = gather_object([(step, digest)])
    refuse(len({step for step, _ in seen}) > 1, "--resume_from_checkpoint: the processes would go on from steps "
           f"{[s for s, _ in seen]}; share --output_dir between the machines, or copy the checkpoint to each.")
    refuse(len({digest for _, digest in seen}) > 1, "the processes see different pictures or prompts; share the "
           "folders between the machines, --class_data_dir too, or copy them to each.")


def choose_seed(args: argparse.Namespace) -> int:
    """Return the seed that was given, or else that of the run that is resumed, or a new one."""
    if args.seed is not None:
        return args.seed
    for folder in resume_candidates(args.resume_from_checkpoint, Path(args.output_dir)):
        with suppress(Exception):  # a broken one is reported where it is loaded
            state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
            return state["settings"]["--seed"]
    return random.SystemRandom().getrandbits(31)


def save_loras(run: Run, state: TrainingState) -> None:
    """Write the LoRA files into the output folder, on the main process."""
    if run.accelerator.is_main_process:
        with state.ema.applied():
            write_loras(run, run.output, state.model)


def save_checkpoint(run: Run, state: TrainingState, step: int, total_steps: int) -> None:
    """Write a checkpoint whole or not at all, then remove the oldest beyond --checkpoints_total_limit.

    It is checkpoint-N, or last-N at the end of a run whose length is no multiple of --checkpointing_steps: scripts
    that count checkpoints find as many as they expect. The limit does not count last-N, but removes older ones.
    """
    if not run.accelerator.is_main_process:
        return
    saved, output, keep = state.state_dict(step), run.output, run.args.checkpoints_total_limit
    size = sum(leaf.nbytes for leaf in tree_leaves(saved) if isinstance(leaf, Tensor))
    is_end = step == total_steps and not due(step, run.args.checkpointing_steps)
    with atomic_write(output / f"{'last' if is_end else 'checkpoint'}-{step}", size=size, durable=True) as folder:
        folder.mkdir()
        with state.ema.applied():
            write_loras(run, folder, state.model)
        with open(folder / STATE_FILE, "wb") as file:
            torch.save(saved, file)
    regular = [path for path in list_checkpoints(output) if path.name.startswith("checkpoint-")]
    ends = [path for path in list_checkpoints(output) if path.name.startswith("last-") and step_of(path) != step]
    for old in (*ends, *regular[:-keep]) if keep else ():
        doomed = old.with_name(f".{old.name}.tmp")  # a run that is killed meanwhile leaves no half of a checkpoint
        old.replace(doomed)
        remove(doomed)


BEFORE_TRAINING = ("Stopped before training began. What was encoded and generated is kept: the same command goes on "
                   "from there.")
AFTER_TRAINING = ("Stopped after training. Checkpoint and LoRA are written: the same command with "
                  "--resume_from_checkpoint latest goes on with card and upload.")


class StopSignals:
    """STOP_SIGNALS end the run: at once while it is prepared, after the step in progress while it trains; a second
    Ctrl-C at once. The clock asks for the same.
    """

    def __init__(self, run_minutes: float | None = None) -> None:
        self.signum, self.before, self.cpu_group = 0, {}, None
        self.message: str | None = BEFORE_TRAINING  # None: there is a step to end first
        self.began, self.run_seconds = time.monotonic(), 60 * (run_minutes or math.inf)

    def __enter__(self) -> StopSignals:
        self.before = handle_stop_signals(self.handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def handle(self, signum: int, frame: object) -> None:
        """Remember the first signal, if there is a step to end. Raises Stopped otherwise."""
        if self.signum and signum != signal.SIGINT:  # launchers forward what the whole group was sent already
            return
        if self.signum:
            raise Stopped(signum, "Stopped at once, at your second request; the last checkpoint is whole.")
        self.signum = signum
        if self.message:
            raise Stopped(signum, self.message)

    def sync_stop_flags(self) -> int:
        """Return the number of the signal (or TIME_IS_UP) by which any rank is to stop, alike on all ranks; or 0."""
        stop = self.signum or TIME_IS_UP * (time.monotonic() - self.began > self.run_seconds)
        if self.cpu_group is not None:
            flag = torch.tensor(stop)  # on the host: no step waits for its device here
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self.cpu_group)
            stop = int(flag)
        return stop


@contextmanager
def translate_errors(run: Run) -> Iterator[None]:
    """Turn running out of memory and a lost process into one sentence. Raises TrainingError."""
    try:
        yield
    except RuntimeError as error:  # gloo, cuBLAS and the host's memory raise nothing more special
        if isinstance(error, torch.OutOfMemoryError) or re.search("can't allocate memory|ALLOC_FAILED", str(error)):
            raise TrainingError(f"{run.device} is out of memory ({first_line(error)[:90]}). What was written before "
                                "is whole; --gradient_checkpointing needs less, and --base_precision int8 with it."
                                ) from error
        lost = isinstance(error, torch.distributed.DistError) or re.search("gloo|peer|timed out", str(error), re.I)
        if run.accelerator.num_processes == 1 or not lost:
            raise
        raise TrainingError(f"process {run.accelerator.process_index} lost another one ({first_line(error)}). The "
                            "last checkpoint is whole: start all with --resume_from_checkpoint latest.") from error


# ---------------------------------------------------------------------------------------------------------- generation
# Pictures come from diffusers' own pipeline around parts that are loaded already, with a seed for each.


@torch.no_grad()
def generate_latents(run: Run, model: TrainableSDXL, prompts: PromptEmbeddings, prompt: ValidationPrompt,
                     seeds: Sequence[int]) -> Tensor:
    """Generate latents (B, 4, h, w), one picture a seed, as StableDiffusionXLPipeline does for a user."""
    embeds = model.embed(prompts.of(prompt.text))
    is_zero = run.zeros_for_empty_prompt and not prompt.negative_prompt
    negative = tuple(map(torch.zeros_like, embeds)) if is_zero else model.embed(prompts.of(prompt.negative_prompt))
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    text = {name: row.repeat_interleave(len(seeds), 0) for name, row in zip(names, (*embeds, *negative), strict=True)}
    pipeline = StableDiffusionXLPipeline(
        vae=None, unet=model.unet, scheduler=run.scheduler, text_encoder=None, text_encoder_2=None, tokenizer=None,
        tokenizer_2=None, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae_scale_factor = run.vae_factor
    return pipeline(
        **text, height=prompt.height, width=prompt.width, num_inference_steps=prompt.num_inference_steps,
        guidance_scale=prompt.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="latent").images


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Iterable[Tensor]) -> list[Image.Image]:
    """Decode latents (B, 4, h, w) as the pipeline does, one picture at a time; the VAE is on the device already."""
    config, pictures, place = vae.config, [], {"device": vae.device, "dtype": vae.dtype}
    for row in (row for part in latents for row in part.to(**place).split(1)):
        scaled = row / config.scaling_factor
        if config.get("latents_mean") and config.get("latents_std"):
            mean, std = (torch.tensor(config[name], **place).view(1, -1, 1, 1)
                         for name in ("latents_mean", "latents_std"))
            scaled = row * std / config.scaling_factor + mean
        pictures += VaeImageProcessor().postprocess(vae.decode(scaled).sample, output_type="pil")
    return pictures


def save_picture(image: Image.Image, path: Path, prompt: str = "") -> None:
    """Write a PNG with its prompt; two runs may generate the same pictures of a class."""
    known = PngImagePlugin.PngInfo()
    known.add_itxt("prompt", printable(prompt))
    with atomic_write(path, shared=True) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=known)


def missing_class_images(folder: Path, count: int, recursive: bool) -> list[tuple[int, Path]]:
    """Return numbers and paths of the class pictures that are to be generated, besides those that the user brought."""
    generated = [folder / f"generated-{index:05d}.png" for index in range(count)]
    brought = set(list_pictures("--class_data_dir", folder, recursive)) - set(generated)
    return [(index, path) for index, path in enumerate(generated[:max(0, count - len(brought))]) if not path.exists()]


def class_batch_size(args: argparse.Namespace) -> int:
    """Return how many class pictures are generated at once: with checkpointing, no more than a step's rows."""
    return min(args.sample_batch_size, 2 * args.train_batch_size) if checkpointed(args) else args.sample_batch_size


def class_dtype(run: Run) -> torch.dtype:
    """Return the dtype in which class pictures are generated."""
    return PRECISIONS.get(run.args.prior_generation_precision, run.dtype)


def generate_class_images(run: Run, args: argparse.Namespace) -> None:
    """Generate the missing class pictures of a subject's flags: each rank its share, seeded by number, so that a
    stopped run goes on.

    Latents of all are kept on the disk until they are decoded: UNet and VAE are loaded once each, one after the other.
    """
    accelerator, folder = run.accelerator, Path(args.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    missing = missing_class_images(folder, args.num_class_images, args.recursive)
    accelerator.wait_for_everyone()  # every rank has looked before any generates
    share = missing[accelerator.process_index::accelerator.num_processes]
    dtype, side = class_dtype(run), args.resolution
    prompt = ValidationPrompt(args.class_prompt, "", side, side, None, INFERENCE_STEPS, GUIDANCE_SCALE)
    if any(gather_object([bool(missing)])):  # all ranks encode together, also those that will generate nothing
        prompts = encode_prompts(run, [args.class_prompt], trained=False, dtype=dtype)
    if share:
        weights = [weights_fingerprint(run.base, part) for part in ("unet", *TEXT_ENCODERS)]
        made_by = (*weights, run.seed, dtype, prompt, args.base_precision, dict(run.scheduler.config))
        keys = {path: content_key("class picture", index, *made_by) for index, path in share}
        cache = TensorCache(run.cache.folder)  # with counts of its own: these are removed once they are decoded
        generate_class_latents(run, cache, prompts, prompt, [(index, keys[path]) for index, path in share])
        vae = load_vae(run.vae, dtype, run.device)
        for path, key in keys.items():
            (image,) = decode_latents(vae, [cache.get(key)["latents"]])
            save_picture(image, path)
            remove(cache.path(key))
    accelerator.wait_for_everyone()


def generate_class_latents(run: Run, cache: TensorCache, prompts: PromptEmbeddings, prompt: ValidationPrompt,
                           share: Sequence[tuple[int, str]]) -> None:
    """Generate the latents of class pictures, by number and key, and cache each (1, 4, h, w)."""
    missing = [(index, key) for index, key in share if not cache.has(key)]
    if not missing:
        return
    model, size = TrainableSDXL(load_unet(run, class_dtype(run))), class_batch_size(run.args)
    bar = progress_bar(len(missing), "Class pictures")
    for first in range(0, len(missing), size):
        part = missing[first:first + size]
        seeds = [position_seed(run.seed, "class picture", index) for index, _ in part]
        for row, (_, key) in zip(generate_latents(run, model, prompts, prompt, seeds).split(1), part, strict=True):
            cache.put(key, latents=row)
        bar.update(len(part))
    bar.close()


# ---------------------------------------------------------------------------------------------------------- validation


@contextmanager
def inference_adapters(model: TrainableSDXL) -> Iterator[None]:
    """Be as load_lora_weights makes it within the block: evaluation mode, peft's forward, the base's dtype."""
    adapters = model.adapters.values()
    model.eval()
    model.use_fused_lora(False)
    try:
        with (swapped(adapters, [parameter.data.to(model.dtype) for parameter in adapters]),
              torch.compiler.set_stance("force_eager")):  # other shapes would compile everything once more
            yield
    finally:
        model.use_fused_lora(True)
        model.train()


def make_validator(run: Run, model: TrainableSDXL, prompts: PromptEmbeddings) -> Callable[[int], None]:
    """Return a function that generates the validation pictures of a step; it does nothing without a prompt."""
    accelerator, count = run.accelerator, run.args.num_validation_images
    share = range(accelerator.process_index, len(run.prompts) * count, accelerator.num_processes)

    def latents_of(index: int) -> Tensor:
        prompt = run.prompts[index // count]
        first = run.seed if prompt.seed is None else prompt.seed
        return generate_latents(run, model, prompts, prompt, [first + index % count])

    @torch.no_grad()
    def validate(step: int) -> None:
        run.memory.begin("validation")
        with inference_adapters(model):
            latents = [latents_of(index) for index in share if not run.stop.signum]  # the memory of one at a time
        with offloaded(run, model):
            images = decode_latents(load_vae(run.vae, run.dtype, run.device), latents)
        run.memory.begin("training")
        pictures = gather_object(list(zip(share, images, strict=False)))  # fewer, if a signal came
        if accelerator.is_main_process and pictures:
            with best_effort("pictures"):
                save_validation(run, step, sorted(pictures, key=lambda numbered: numbered[0]))
        accelerator.wait_for_everyone()

    return validate if run.prompts else lambda step: None


def save_validation(run: Run, step: int, pictures: list[tuple[int, Image.Image]]) -> None:
    """Write `validation/step-N/` and progress.png, and log the pictures to the trackers."""
    count = run.args.num_validation_images
    for index, image in pictures:
        save_picture(image, validation_folder(run.output, step) / f"{index:02d}.png", run.prompts[index // count].text)
    with atomic_write(run.output / "progress.png") as unfinished:
        contact_sheet(run.output, [prompt.text for prompt in run.prompts], count).save(unfinished, format="PNG")
    for tracker in run.accelerator.trackers:
        track_pictures(tracker, [np.asarray(image) for _, image in pictures], step)


def validation_folder(output: Path, step: int) -> Path:
    """Return where the pictures of a step are kept."""
    return output / "validation" / f"step-{step:06d}"


def pictures_in(folder: Path, prompts: Sequence[str], count: int) -> dict[int, Path]:
    """Return the validation pictures of a step by number, without those of other prompts: flags may change."""
    paths = {index: folder / f"{index:02d}.png" for index in range(len(prompts) * count)}
    return {index: path for index, path in paths.items()
            if path.is_file() and Image.open(path).info.get("prompt") == printable(prompts[index // count])}


def contact_sheet(output: Path, prompts: Sequence[str], count: int, side: int = 192, gap: int = 6,
                  head: int = 20) -> Image.Image:
    """Return a picture of all validations: a column a step, the untrained model first; `count` rows a prompt."""
    folders = sorted((output / "validation").glob("step-*"))
    height = head + len(prompts) * (head + count * (side + gap))
    sheet = Image.new("RGB", (max(2, len(folders)) * (side + gap) + gap, height), "white")
    write = functools.partial(ImageDraw.Draw(sheet).text, fill="black")
    for number_, prompt in enumerate(prompts):
        write((gap, head + number_ * (head + count * (side + gap)) + gap), printable(prompt)[:sheet.width // 6])
    for column, folder in enumerate(folders):
        left = gap + column * (side + gap)
        write((left, gap), "untrained" if folder.name == "step-000000" else f"step {int(folder.name[5:])}")
        for index, path in pictures_in(folder, prompts, count).items():
            number_, row = divmod(index, count)
            top = 2 * head + number_ * (head + count * (side + gap)) + row * (side + gap)
            sheet.paste(ImageOps.contain(load_picture(path), (side, side), Image.Resampling.LANCZOS), (left, top))
    return sheet


# ------------------------------------------------------------------------------------------------------------ trackers


def chosen_trackers(args: argparse.Namespace) -> list[str]:
    """Return the names of --report_to that accelerate starts; `all` leaves out, with a warning, what has no login."""
    if not is_tracked(args):
        return []
    if args.report_to != "all":
        return [name for name in TRACKERS if name == args.report_to]
    installed = [name for name in TRACKERS if name in LoggerType.list() and importlib.util.find_spec(name)]
    chosen = [name for name in installed if is_set_up(name)]
    for name in installed:
        if name not in chosen:
            warn("--report_to all leaves %s out, which has no login here%s.", name, TRACKER_CURES[name])
    return chosen


@contextmanager
def trackers(run: Run) -> Iterator[None]:
    """Start the trackers before anything expensive, and finish them however the run ends."""
    exit_code = 0
    try:
        start_trackers(run)
        yield
    except Exception:
        exit_code = 1  # W&B marks the run as failed
        raise
    finally:
        for tracker in run.accelerator.trackers:
            try:
                finish_tracker(tracker, exit_code)
            except Exception as error:  # trackers raise whatever they like
                warn("--report_to %s did not finish (%s); training is not affected.", tracker.name, first_line(error))
        run.accelerator.trackers = []


def start_trackers(run: Run) -> None:
    """Start each tracker of --report_to, without secrets. Raises UserError; `all` leaves out what does not start."""
    args, accelerator, started = run.args, run.accelerator, []
    folder = Path(args.output_dir, args.logging_dir)
    settings = {key: str(value) if isinstance(value, list) else value  # tensorboard takes no lists
                for key, value in public_settings(args, run.seed).items()}
    if accelerator.is_main_process and accelerator.log_with:
        folder.mkdir(parents=True, exist_ok=True)
    for tracker in accelerator.log_with:
        accelerator.log_with, name = [tracker], getattr(tracker, "value", tracker)
        try:
            with hide_prints():
                accelerator.init_trackers("dreambooth-lora-sdxl", settings, {"wandb": {"dir": str(folder)}})
        except Exception as error:
            with suppress(Exception):  # it may have begun before it refused the settings, or not
                finish_tracker(accelerator.trackers[0], 1)
            accelerator.trackers = []
            message = f"{name} does not start ({first_line(error)}){TRACKER_CURES.get(name, '')}"
            refuse(args.report_to != "all", f"--report_to {message}; or leave it out.")
            warn("--report_to all: %s; it is left out.", message)
        started += accelerator.trackers
    accelerator.trackers = started


def finish_tracker(tracker: Any, exit_code: int) -> None:
    """Finish a tracker's run, which W&B shows as failed if the exit code is not 0."""
    with hide_prints():
        if tracker.name == "wandb":
            tracker.run.finish(exit_code=exit_code)
            return
        tracker.finish()
        if tracker.name == "trackio" and "trackio" in sys.modules:
            sys.modules["trackio"].finish()  # accelerate ends the run, but leaves it to be ended again at exit


def track_pictures(tracker: Any, arrays: list[np.ndarray], step: int) -> None:
    """Log pictures to a tracker, with their step, in its own way."""
    if tracker.name == "tensorboard":
        shapes = dict.fromkeys(array.shape for array in arrays)
        for height, width, channels in shapes:
            of_shape = np.stack([array for array in arrays if array.shape == (height, width, channels)])
            name = "validation" if len(shapes) == 1 else f"validation/{width}x{height}"
            tracker.log_images({name: of_shape}, step=step, dataformats="NHWC")
    elif tracker.name == "wandb":
        tracker.log_images({"validation": arrays}, step=step)
    elif tracker.name == "trackio":
        from trackio import Image as Picture

        tracker.log({f"validation/{index:02d}": Picture(array) for index, array in enumerate(arrays)}, step=step)
    else:
        for index, array in enumerate(arrays):
            tracker.tracker.log_image(array, name=f"validation/{index:02d}", step=step)


# ---------------------------------------------------------------------------------------------------------- LoRA files
# diffusers' names and metadata, and sd-scripts' names for web UIs; every file is read back before success is reported.


def lora_tensors(model: TrainableSDXL) -> dict[str, Tensor]:
    """Return the adapters under the names that every diffusers loader knows, float32 on the CPU."""
    tensors = {}
    for component, part in model.adapted().items():
        for name, tensor in peft.get_peft_model_state_dict(part, adapter_name="default").items():
            # transformers 5 dropped the first encoder's `text_model.`, which every reader outside still expects
            middle = "text_model." if component != "unet" and not name.startswith("text_model.") else ""
            tensors[f"{component}.{middle}{name}"] = tensor.detach().float().cpu().contiguous()
    return tensors


def lora_metadata(model: TrainableSDXL) -> dict[str, str]:
    """Return the header entry from which diffusers restores rank and alpha; the fields that old and new peft share."""
    fields = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora",
              "lora_bias")
    configs = {component: part.peft_config["default"].to_dict() for component, part in model.adapted().items()}
    settings = {f"{component}.{field}": config[field] for component, config in configs.items() for field in fields}
    return {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True, default=sorted)}


RESNET_NAMES = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
                "conv_shortcut": "skip_connection"}
OUTER_NAMES = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2"}


def sgm_name(path: str, layers: int) -> str:
    """Return a UNet module's path as Stability's own code names it, which web UIs read; layers is layers_per_block."""
    if path in OUTER_NAMES:
        return OUTER_NAMES[path]
    side, *rest = path.split(".")
    if side == "mid_block":
        kind, index, *inside = rest
        place = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
    else:
        block, kind, index, *inside = rest
        first = (layers + 1) * int(block)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.2.conv"
        number_ = first + int(index) + (side == "down_blocks")
        place = f"{'input' if side == 'down_blocks' else 'output'}_blocks.{number_}.{int(kind == 'attentions')}"
    return ".".join([place, RESNET_NAMES.get(inside[0], inside[0]), *inside[1:]])


def kohya_name(module: str, layers: int) -> str:
    """Return the stem of a module's tensors in a web UI's file; module begins with its component's name."""
    component, _, path = module.partition(".")
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
    return f"{prefix}_{sgm_name(path, layers) if component == 'unet' else path}".replace(".", "_")


def scale_name(module: str) -> str:
    """Name a module of the file or of the model alike: only transformers 4 has `text_model` in the first encoder."""
    return module.replace("text_encoder.text_model.", "text_encoder.", 1)


def kohya_tensors(tensors: dict[str, Tensor], scales: dict[str, float], layers: int) -> dict[str, Tensor]:
    """Return lora_tensors as web UIs read them, without DoRA's magnitudes.

    Readers scale by alpha / rank, some of them by one alpha for all of a component's modules: each component has one,
    the commonest scale times rank, and what is scaled otherwise (rsLoRA, ranks by block) is folded into up.
    """
    renamed, downs = {}, {key.removesuffix(".lora_A.weight"): key for key in tensors if key.endswith("lora_A.weight")}
    alphas = {module: scales[scale_name(module)] * len(tensors[key]) for module, key in downs.items()}
    for module, key in downs.items():
        stem, component = kohya_name(module, layers), module.partition(".")[0]
        alpha = statistics.mode(own for name, own in alphas.items() if name.startswith(f"{component}."))
        up = tensors[f"{module}.lora_B.weight"]
        renamed[f"{stem}.lora_down.weight"] = tensors[key]
        renamed[f"{stem}.lora_up.weight"] = up if alphas[module] == alpha else up * (alphas[module] / alpha)
        renamed[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return renamed


def kohya_dora(model: TrainableSDXL, layers: int) -> dict[str, Tensor]:
    """Return DoRA's magnitudes as ComfyUI and Forge apply them.

    They divide by the norm of the base weight's rows, where peft, and the paper, divide by that of the changed
    weight's, so the quotient of the two is folded in.
    """
    magnitudes = {}
    for name, layer in model.unet.named_modules():
        if hasattr(layer, "lora_A") and layer.lora_variant:
            weight, magnitude = layer.base_layer.weight.float(), layer.lora_magnitude_vector["default"].weight
            changed = weight + layer.get_delta_weight("default").float().view_as(weight)
            before, after = (part.flatten(1).norm(dim=1) for part in (weight, changed))
            scaled = magnitude.detach().flatten().float() * before / after
            magnitudes[f"{kohya_name(f'unet.{name}', layers)}.dora_scale"] = \
                scaled.view(-1, *[1] * (weight.ndim - 1)).cpu().contiguous()
    return magnitudes


def kohya_metadata(run: Run, tensors: dict[str, Tensor], title: str) -> dict[str, str]:
    """Return what web UIs show and sort by: sd-scripts' ss_ fields, and ModelSpec 1.0.1."""
    args, picture = run.args, max(run.output.glob("validation/step-*/00.png"), default=None)
    content = save(tensors)
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little"):]).hexdigest()
    trigger = run.text.replace_words("; ".join(own.instance_prompt or "" for own in subjects_of(args)))
    settings = {
        "output_name": title, "base_model_version": "sdxl_base_v1-0", "v2": False, "network_module": "networks.lora",
        "network_dim": next(len(tensor) for key, tensor in tensors.items() if key.endswith("lora_down.weight")),
        "network_alpha": next(float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")),
        "network_args": "{}",
        "sd_model_name": Path(args.pretrained_model_name_or_path).name, "vae_name": vae_name(args), "seed": run.seed,
        "learning_rate": args.learning_rate, "unet_lr": args.learning_rate, "lr_scheduler": args.lr_scheduler,
        "text_encoder_lr": args.text_encoder_lr if args.train_text_encoder else None,
        "optimizer": args.optimizer,
        "max_train_steps": args.max_train_steps, "mixed_precision": run.accelerator.mixed_precision,
        "batch_size_per_device": args.train_batch_size, "min_snr_gamma": args.snr_gamma,
        "gradient_accumulation_steps": args.gradient_accumulation_steps, "num_train_images": run.pictures,
        "resolution": f"({args.resolution}, {args.resolution})",
        "tag_frequency": json.dumps({title: {trigger: run.pictures}})}
    spec = {
        "sai_model_spec": "1.0.1", "architecture": "stable-diffusion-xl-v1-base/lora", "title": title,
        "implementation": "https://github.com/Stability-AI/generative-models", "trigger_phrase": trigger,
        "resolution": f"{args.resolution}x{args.resolution}", "hash_sha256": f"0x{digest}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "prediction_type": "v" if run.scheduler.config.prediction_type == "v_prediction" else "epsilon",
        "thumbnail": thumbnail(picture) if picture else None}
    return {"sshs_model_hash": digest, **{f"ss_{key}": str(value) for key, value in settings.items()},
            **{f"modelspec.{key}": value for key, value in spec.items() if value}}


def thumbnail(path: Path) -> str:
    """Return a picture as a data URL of at most 256 pixels."""
    image, buffer = load_picture(path), io.BytesIO()
    image.thumbnail((256, 256))
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_loras(run: Run, folder: Path, model: TrainableSDXL) -> None:
    """Write the LoRA files that are asked for into the output folder, or a checkpoint's. Raises TrainingError."""
    dtype, tensors = PRECISIONS[run.args.lora_dtype], lora_tensors(model)
    is_last, title = folder == run.output, run.output.resolve().name
    # kohya's trainers write -step00000500; the folder has a name of its own until it is whole
    title += "" if is_last else f"-step{int(re.search(r'-([0-9]+)', folder.name)[1]):08d}"
    write = functools.partial(write_lora, durable=is_last)  # a checkpoint is made durable as a whole
    diffusers_form = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    write(folder / LORA_FILE, diffusers_form, lora_metadata(model))
    embeddings = {key: rows.to(dtype) for key, rows in run.text.embeddings(model.text_encoders).items()}
    if embeddings:
        write(folder / EMBEDDINGS_FILE, embeddings, {"format": "pt"})
    if run.args.output_kohya_format:
        scales, layers = model.scales(), model.unet.config.layers_per_block
        kohya_form = {**kohya_tensors(diffusers_form, scales, layers), **kohya_dora(model, layers)}
        write(folder / KOHYA_FILE, kohya_form, kohya_metadata(run, kohya_form, title))


def write_lora(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], durable: bool = False) -> None:
    """Write a LoRA file, once what was written reads back as what was to be written. Raises TrainingError."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise TrainingError(f"the adapters are not finite; {path} was not written. A lower --learning_rate helps.")
    data = save(tensors, metadata)  # save_file makes files that only their owner can read
    with atomic_write(path, size=len(data), durable=durable) as unfinished:
        unfinished.write_bytes(data)
        with safe_open(unfinished, framework="pt") as file:
            same = set(file.keys()) == set(tensors) and file.metadata() == metadata
            if not same or not all(torch.equal(file.get_tensor(key), tensors[key]) for key in tensors):
                raise TrainingError(f"{path} did not read back as it was written: is the disk failing?")




def load_init_lora(path: Path, model: TrainableSDXL) -> None:
    """Set the adapters to a LoRA file's weights, at this run's scale; those that it lacks begin as usual.

    Raises UserError if the file is damaged, or has what this run does not adapt.
    """
    try:
        tensors, scales = read_lora(path, model)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError,
            re.error) as error:
        raise UserError(f"--init_lora {path} is damaged ({type(error).__name__}: {first_line(error)}).") from error
    expected, own = lora_tensors(model), model.scales()
    refuse(not scales, f"--init_lora {path} has no layer that this run trains, under the names of diffusers "
           "(unet.*.lora_A.weight) or of web UIs (lora_unet_*.lora_down.weight).")
    unknown = [name for name in tensors if name not in expected]
    refuse(unknown, f"--init_lora {path} has {''.join(unknown[:1])}, which this run does not train; set the flags of "
           "the run that made it: --train_text_encoder, --use_dora, --lora_layers, --lora_unet_blocks.")
    lacking = [name for name in expected if name.split(".lora_")[0] in scales and name not in tensors]
    refuse(lacking, f"--init_lora {path} is damaged, or a plain LoRA that needs no --use_dora: it lacks "
           f"{''.join(lacking[:1])}.")
    for name, tensor in tensors.items():
        ranks = f"--rank {len(tensor)}" if name.endswith("lora_A.weight") else "its rank"
        refuse(tensor.shape != expected[name].shape, f"--init_lora {path}: {name} is {tuple(tensor.shape)}, and in "
               f"this run {tuple(expected[name].shape)}; use {ranks}, or another base model.")
    for module, scale in scales.items():
        tensors[f"{module}.lora_B.weight"] *= scale / own[scale_name(module)]
    for component, part in model.adapted().items():
        middle = "" if component == "unet" or hasattr(part, "text_model") else "text_model."
        peft.set_peft_model_state_dict(part, {
            name.removeprefix(f"{component}.{middle}"): tensor for name, tensor in tensors.items()
            if name.startswith(f"{component}.")}, adapter_name="default")


def read_lora(path: Path, model: TrainableSDXL) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return a LoRA file's tensors under the names of lora_tensors, unknown ones under their own, and the scale of
    each module's B A. The file may be diffusers' or a web UI's. Raises ValueError if a number is not finite.
    """
    found = {name: tensor.float() for name, tensor in load_file(path).items()}  # float8 knows no isfinite
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise ValueError("its weights are not finite")
    with safe_open(path, framework="pt") as file:
        settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    tensors, scales, layers = {}, {}, model.unet.config.layers_per_block
    for module in (key.removesuffix(".lora_A.weight") for key in lora_tensors(model) if key.endswith("lora_A.weight")):
        stem, component = kohya_name(module, layers), module.partition(".")[0]
        if f"{stem}.lora_down.weight" in found:
            down, up = (found.pop(f"{stem}.lora_{name}.weight") for name in ("down", "up"))
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = down, up
            scales[module] = float(found.pop(f"{stem}.alpha", len(down))) / len(down)
        elif f"{module}.lora_A.weight" in found:
            rank, alphas = len(found[f"{module}.lora_A.weight"]), settings.get(f"{component}.alpha_pattern") or {}
            own = (alpha for pattern, alpha in alphas.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
            alpha = next(own, settings.get(f"{component}.lora_alpha", rank))
            scales[module] = alpha / (rank**0.5 if settings.get(f"{component}.use_rslora") else rank)
    return {**tensors, **found}, scales


# ------------------------------------------------------------------------------------------------- plan, card, and Hub


def describe_adapters(run: Run) -> str:
    """Say what will be trained: kind, rank, layers, parameters, megabytes; no weights are read. Raises UserError."""
    args = run.args
    parts = {part: meta_model(run.base, part) for part in ("unet", *(TEXT_ENCODERS if run.text.is_trained else ()))}
    unet, *encoders = parts.values()
    add_adapters(args, unet)
    run.text.add_to(run, encoders)
    layers = {part: [layer for layer in model.modules() if hasattr(layer, "lora_A")] for part, model in parts.items()}
    trained = [f"rank {', '.join(map(str, sorted({layer.r['default'] for layer in own})))} on {len(own)} layers of "
               f"the {part.replace('unet', 'UNet')}" for part, own in layers.items() if own]
    trained += filter(None, [run.text.summary()])
    count = sum(p.numel() for model in parts.values() for p in model.parameters() if p.requires_grad)
    kind = choose_adapter(args).name or "rank-stabilised, " * args.use_rslora
    kind += f"alpha {args.lora_alpha:g}, " if args.lora_alpha else ""
    return f"{kind}{'; '.join(trained)}: {count / 1e6:.2f} M parameters, {4 * count / 1e6:.1f} MB"


def plan_facts(run: Run, schedule: Schedule, subject: Sequence[Sample], buckets: Sequence[Bucket]) -> dict[str, str]:
    """Return what plan and card say of a run, by the name of the row; of paths only the base model's."""
    args, prompts, config = run.args, list(dict.fromkeys(sample.prompt for sample in subject)), run.scheduler.config
    more = f" and {len(prompts) - 1} other prompt{'s' * (len(prompts) > 2)}" if len(prompts) > 1 else ""
    sizes = zip(*(picture_size(path) for path in {sample.path for sample in subject}), strict=True)
    wide, high = (" to ".join(map(str, dict.fromkeys((min(sides), max(sides))))) for sides in sizes)
    shapes = ", ".join(f"{width}x{height}: {buckets.count((width, height))}" for width, height in sorted(set(buckets)))
    packed = "" if args.base_precision == "auto" else f", its linear layers in {args.base_precision},"
    zero_snr = ", zero terminal SNR" * bool(config.get("rescale_betas_zero_snr"))
    predicts = f"; predicts velocity{zero_snr}" if config.prediction_type == "v_prediction" else ""
    batch, passes = schedule.samples_per_step, schedule.total_steps / schedule.steps_per_epoch
    scale = batch if args.scale_lr and not OPTIMIZERS[args.optimizer].finds_rate else 1
    facts = {
        "Subject": f'{run.pictures} picture{"s" * (run.pictures > 1)}, {wide} pixels wide and {high} high: '
                   f'"{prompts[0]}"{more}',
        "Buckets": shapes if args.aspect_ratio_buckets else "",
        "Class": run.prior.summary(),
        "Base": f"{args.pretrained_model_name_or_path} in {run.accelerator.mixed_precision.replace('no', 'fp32')}"
                f"{packed} on {run.device}{predicts}",
        "VAE": args.pretrained_vae_model_name_or_path or "",
        "LoRA": describe_adapters(run) + (f"; begins as {Path(args.init_lora).name}" if args.init_lora else ""),
        "Optimizer": f"{args.optimizer}, rate {args.learning_rate * scale:g}, {args.lr_scheduler}"
                     + f", {schedule.warmup_steps} steps of warm-up" * bool(schedule.warmup_steps),
        "Steps": f"{schedule.total_steps} of {batch} pictures at {args.resolution} px, which is {passes:.0f} passes; "
                 f"seed {run.seed}"}
    return {name: text for name, text in facts.items() if text}


def print_plan(run: Run, facts: dict[str, str], subject: Sequence[Sample], buckets: Sequence[Bucket],
               schedule: Schedule) -> None:
    """Print the plan, and warn of what is odd about prompts, files and length."""
    args = run.args
    size = megabytes(latent_bytes(run, buckets))
    print_rows([*facts.items(), ("From", args.dataset_name or args.subjects or args.instance_data_dir),
                ("Output", f"{args.output_dir}; latents of the subject take up to {size} in {run.cache.folder}")])
    is_auto = args.steps_per_image == "auto"
    if args.lr_scheduler != "constant" and schedule.warmup_steps < args.lr_warmup_steps and not is_auto:
        warn("--lr_warmup_steps %d is the whole run of %d steps; a tenth of it is taken.", args.lr_warmup_steps,
             schedule.total_steps)
    if not args.max_train_steps and not args.steps_per_image and args.num_train_epochs == 1:
        warn("one pass over the pictures is far too little to learn a subject; --steps_per_image auto is a beginning.")
    if args.instance_prompt and not any(args.instance_prompt in sample.prompt for sample in subject):
        warn("all pictures have captions, and --instance_prompt is in none of them; {instance_prompt} in a caption "
             "stands for it.")
    for own in subjects_of(args) if is_first_rank() else ():
        for problem in unused_files(own):
            warn("%s", problem)
    warn_of_long_prompts(run, prompts_of(run, subject))


def print_summary(run: Run, step: int, loss: float, minutes: float, address: str) -> None:
    """Print what the run came to and where everything is."""
    path = run.output / LORA_FILE
    print_rows([
        ("Done", f"{step} steps, {minutes:.1f} minutes in all, "
                 + (f"loss {loss:.4f}" if math.isfinite(loss) else "none of them taken now")),
        ("Memory", ", ".join(f"{phase} {peak:.2f} GB" for phase, peak in run.memory.measure().items() if peak > 5e-3)),
        ("Compiled", graphs_compiled()),
        ("LoRA", f"{path} ({path.stat().st_size / 1e6:.1f} MB)"),
        ("", f"{run.output / KOHYA_FILE} (for ComfyUI, A1111, Forge)" if run.args.output_kohya_format else ""),
        ("Pictures", f"{run.output / 'progress.png'}" if run.prompts else ""),
        ("Card", f"{run.output / 'README.md'}" if (run.output / "README.md").exists() else ""),
        ("Hub", address)])


def quoted(path: Path) -> str:
    """Return a path for a command line in this folder."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def command_of(args: argparse.Namespace, seed: int) -> str:
    """Return the command that makes this run, with the flags that differ from their defaults."""
    parser, words = make_parser(), ["accelerate launch train_dreambooth_lora_sdxl.py"]
    for key, value in public_settings(args, seed).items():
        if isinstance(value, list):
            words += [f"--{key} {shlex.quote(entry)}" for entry in value]
        elif isinstance(value, bool) and value != parser.get_default(key):
            words.append(f"--{'' if value else 'no-'}{key}")
        elif value != parser.get_default(key):
            is_private = os.path.isabs(str(value)) and not key.endswith("_prompt")  # a path of this machine
            words.append(f"--{key} {shlex.quote(Path(value).name if is_private else str(value))}")
    return " \\\n    ".join(words)


def usage(run: Run, place: str, prompt: str) -> str:
    """Return Python that generates a picture with the LoRA of a place, a folder or a repository, as it was trained."""
    args, base, vae = run.args, run.args.pretrained_model_name_or_path, run.args.pretrained_vae_model_name_or_path
    config, config_of = run.scheduler.config, repr(args.single_file_config or base)
    lines = ["import torch", f"from diffusers import {'AutoencoderKL, ' * bool(vae)}StableDiffusionXLPipeline", ""]
    if vae and Path(vae).is_file():
        lines += [f"vae = AutoencoderKL.from_single_file({vae!r}, config={config_of}, subfolder=\"vae\","
                  " torch_dtype=torch.float16)"]
    elif vae:
        lines += [f"vae = AutoencoderKL.from_pretrained({vae!r}, torch_dtype=torch.float16)"]
    is_file = Path(base).is_file()
    more = {"config": args.single_file_config} if is_file else {"revision": args.revision, "variant": args.variant}
    words = [repr(base), *["vae=vae"] * bool(vae), *(f"{name}={value!r}" for name, value in more.items() if value),
             "torch_dtype=torch.float16"]  # before diffusers 0.40 `dtype` is ignored
    lines += [f"pipeline = StableDiffusionXLPipeline.from_{'single_file' if is_file else 'pretrained'}("
              f"{', '.join(words)})"]
    if config.prediction_type == "v_prediction":
        is_zero = bool(config.get("rescale_betas_zero_snr"))
        zero = ', rescale_betas_zero_snr=True, timestep_spacing="trailing"' * is_zero
        lines += ["pipeline.scheduler = type(pipeline.scheduler).from_config(",
                  f'    pipeline.scheduler.config, prediction_type="v_prediction"{zero})']
    lines += [f'pipeline.to("cuda").load_lora_weights({place!r}, weight_name="{LORA_FILE}")',
              *run.text.usage(place, is_pushed=args.push_to_hub and place != str(run.output))]
    return "\n".join([*lines, f"image = pipeline({prompt!r}, num_inference_steps=25).images[0]"])


def base_license(name: str) -> str | None:
    """Return the license that the base model's card states, if it has a card that can be read."""
    if Path(name).is_file():  # which would be read whole, as a card
        return None
    try:
        return ModelCard.load(Path(name, "README.md") if Path(name).is_dir() else name).data.license
    except Exception:  # no card, no network, no front matter: this card says nothing of a license then
        return None


CARD = """
# {title}

<Gallery />

LoRA weights for {base}, trained with DreamBooth on {pictures} pictures by `train_dreambooth_lora_sdxl.py`.

## Trigger words

Use {trigger} in your prompt.

## Use it

With diffusers 0.34 or newer: older ones may generate at another strength, as they ignore alpha.

```python
{usage}
```

In ComfyUI, A1111 or Forge: {webui}

## How it was made

| | |
|---|---|
{facts}

{fence}bash
{command}
{fence}
"""
TAGS = ["text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora", "stable-diffusion-xl",
        "stable-diffusion-xl-diffusers"]


def write_card(run: Run, repo: str, step: int, subject: Sequence[Sample], facts: dict[str, str]) -> list[Path]:
    """Write README.md with gallery, trigger words and the command; return the pictures that it shows."""
    args, base, replace_words = run.args, run.args.pretrained_model_name_or_path, run.text.replace_words
    own = [of.instance_prompt for of in subjects_of(args)
           if any((of.instance_prompt or "\0") in sample.prompt for sample in subject)]
    triggers, prompts = list(map(replace_words, own or [subject[0].prompt])), [prompt.text for prompt in run.prompts]
    gallery = pictures_in(validation_folder(run.output, step), prompts, args.num_validation_images)
    data = ModelCardData(
        license=base_license(base), library_name="diffusers", tags=[*TAGS, *choose_adapter(args).tags],
        instance_prompt=triggers[0],
        base_model=None if Path(base).exists() else base,  # the Hub refuses what is not an id
        widget=[{"text": replace_words(prompts[i // args.num_validation_images]) or " ",
                 "output": {"url": path.relative_to(run.output).as_posix()}} for i, path in gallery.items()] or None)
    command = command_of(args, run.seed)
    cells = {name: html.escape(" ".join(text.split())).replace("|", "&#124;")  # prompts cannot break the table
             for name, text in {**facts, "Trained": f"{step} steps"}.items()}
    body = CARD.format(
        title=re.sub(r"[^\w .-]", " ", run.output.resolve().name), base=base, pictures=run.pictures,
        # a blank line would end the code, and begin markup
        trigger=" or ".join(f"`{' '.join(trigger.replace('`', chr(39)).split())}`" for trigger in triggers),
        usage=usage(run, repo, replace_words(prompts[0]) if prompts else triggers[0]),
        webui=f"download `{KOHYA_FILE}` into the folder for LoRAs." if args.output_kohya_format else
        "this repository holds no file for them; `--output_kohya_format` writes one.",
        facts="\n".join(f"| {name} | {text} |" for name, text in cells.items()), command=command,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0)))
    if os.path.lexists(run.output / "README.md"):  # came while the run lasted
        warn("a README.md that this script did not write is now in %s.", move_aside(run.output, ["README.md"]))
    with atomic_write(run.output / "README.md") as unfinished:
        unfinished.write_text(f"---\n{data.to_yaml()}\n---\n{body}", encoding="utf-8")
    return list(gallery.values())


HUB_WAITS, HUB_TIMEOUT = (1, 3, 9), 60.0  # seconds before the Hub is asked again; of silence until it counts as down


def retry(ask: Callable[[], Any]) -> Any:
    """Ask the Hub again if it is busy or out of reach; what it refuses stays refused."""
    for wait in HUB_WAITS:
        get_session().timeout = HUB_TIMEOUT  # the client itself would wait for ever
        try:
            return ask()
        except Exception as error:  # its client's networking library has errors of its own, by another name each year
            if is_refusal(error):
                raise
            time.sleep(wait)
    return ask()


def is_refusal(error: Exception) -> bool:
    """Return True if the Hub would answer the same again, or was not even asked."""
    return isinstance(error, ValueError) or status_of(error) in range(400, 500) and status_of(error) not in (408, 429)


def status_of(error: Exception) -> int:
    """Return the status that the Hub answered, or 0."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def create_repository(args: argparse.Namespace) -> str:
    """Create the Hub repository, or find it there and writable, before training begins; return its id.

    Raises UserError if the Hub refuses, HubError if it does not answer.
    """
    name, api = args.hub_model_id or Path(args.output_dir).resolve().name, HfApi(token=args.hub_token)
    private = args.hub_private_repo or None
    try:
        repo = retry(lambda: api.create_repo(name, private=private, exist_ok=True).repo_id)
        retry(lambda: api.auth_check(repo, write=True))  # one that exists is found by whoever may read it
        return repo
    except Exception as error:
        if is_refusal(error):
            cure = "is the token's right to write there missing?" if status_of(error) else "choose a --hub_model_id."
            raise UserError(f"--push_to_hub cannot create {name}: {first_line(error)}; {cure}") from None  # its token
        raise HubError(f"--push_to_hub: the Hub does not answer ({first_line(error)}). Nothing was begun; try later, "
                       "or train without --push_to_hub and push then.") from None


def push(args: argparse.Namespace, repo: str, gallery: Sequence[Path]) -> str:
    """Upload LoRA, card and gallery, and nothing else, in one commit; return its address. Raises HubError."""
    output, api = Path(args.output_dir), HfApi(token=args.hub_token)
    files = [output / LORA_FILE, output / "README.md", *gallery, *[output / KOHYA_FILE] * args.output_kohya_format,
             *(output / name for name in choose_text(args).files)]

    def upload() -> str:
        operations = [CommitOperationAdd(path.relative_to(output).as_posix(), path) for path in files]
        return api.create_commit(repo, operations, commit_message="LoRA, card and pictures").commit_url

    try:
        return retry(upload)
    except Exception as error:  # whatever happened to the upload, the training is safe
        wanted = " ".join(f"--include {shlex.quote(path.relative_to(output).as_posix())}" for path in files)
        raise HubError(f"the upload to {repo} failed ({first_line(error)}); LoRA, card and pictures are safe in "
                       f"{output}. Push them with\n    hf upload {repo} {shlex.quote(str(output))} {wanted}") from None


if __name__ == "__main__":
    with one_sentence():
        main(ARGS)

"""Inspect pictures before training: which are broken, small, blurry, alike, not used or badly captioned.

    python tools/inspect_pictures.py dog
    python tools/inspect_pictures.py dog --resolution 768 --aspect_ratio_buckets auto --recursive

Prints a sentence for each problem, with what to do. The exit code is 0 if there is none, else 1.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from PIL import Image, ImageFilter, ImageStat

import train_dreambooth_lora_sdxl as trainer

MAX_COMPARED = 300  # pictures: all pairs of them are compared
SMALL, BLURRY, ALIKE = 1.5, 1.5, 3  # times enlarged; grey levels between neighbours; bits of 64


class Features(NamedTuple):
    """What is compared of a picture."""

    bits: int  # 64: whether each pixel of 9 x 8 is brighter than its right neighbour
    sharpness: float  # standard deviation of the Laplacian at 256 x 256, in grey levels


def compute_features(picture: Image.Image) -> Features:
    """Compute the features of a picture in RGB."""
    grey = picture.convert("L")
    small = grey.resize((9, 8), Image.Resampling.BOX).tobytes()
    bits = sum((small[i] > small[i + 1]) << n for n, i in enumerate(i for i in range(72) if i % 9 < 8))
    edges = grey.resize((256, 256)).filter(ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), 1, 128))
    return Features(bits, ImageStat.Stat(edges).stddev[0])


def find_picture_problems(paths: Sequence[Path], buckets: Sequence[trainer.Bucket]) -> list[str]:
    """Return a sentence for each problem of pictures that can be read and are trained on in these buckets."""
    features = {path: compute_features(trainer.load_picture(path)) for path in paths[:MAX_COMPARED]}
    problems = []
    for (path, found), (width, height) in zip(features.items(), buckets, strict=False):
        size = trainer.picture_size(path)
        growth = max(width / size[0], height / size[1])
        if growth > SMALL:
            problems.append(f"{path.name} is small and is enlarged {growth:.1f} times; use a larger one.")
        elif found.sharpness < BLURRY:
            problems.append(f"{path.name} looks blurry, and so will the subject; use a sharper one.")
    alike = [f"{one.name} and {other.name}" for one, other in itertools.combinations(features, 2)
             if (features[one].bits ^ features[other].bits).bit_count() <= ALIKE]
    if alike:
        problems.append(f"{trainer.some(alike)} look alike; different poses and places teach more.")
    return problems


def find_caption_problems(folder: Path, paths: Sequence[Path]) -> list[str]:
    """Return a sentence for each problem of the captions."""
    captions = trainer.read_captions(folder, paths)
    texts = {path: captions.get(path, "") for path in paths}
    bare = [path.name for path, text in texts.items() if not text]
    problems = []
    if bare and len(bare) < len(paths):
        problems.append(f"{trainer.some(bare)}: no caption, though other pictures have one; the instance prompt is "
                        "used.")
    common = [text for text, count in Counter(filter(None, texts.values())).items() if count > 1]
    if common and len(set(texts.values())) > 1:
        same = [path.name for path, text in texts.items() if text == common[0]]
        problems.append(f'{trainer.some(same)} have the same caption, "{common[0][:60]}"; say what differs.')
    return problems


def inspect(args: argparse.Namespace) -> list[str]:
    """Return all problems of a folder. Raises UserError for what ends a training run before it begins."""
    folder = Path(args.instance_data_dir)
    paths = trainer.list_pictures("--instance_data_dir", folder, args.recursive)
    if not paths:
        trainer.check_subject(args)  # raises, and says why there is none
    trainer.check_pictures("--instance_data_dir", paths)
    buckets = trainer.bucket_of_each(args, [trainer.Sample(path, "", is_class=False) for path in paths])
    return (find_picture_problems(paths, buckets) + find_caption_problems(folder, paths)
            + trainer.unused_files(args))


def main() -> int:
    """Print the problems; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the pictures of the subject")
    parser.add_argument("--resolution", type=trainer.square_side, default=1024, help="of the training run")
    parser.add_argument("--aspect_ratio_buckets", metavar="auto|LIST", help="of the training run")
    parser.add_argument("--recursive", action="store_true", help="look into sub-folders, too")
    own = parser.parse_args()
    words = [f"--instance_data_dir={own.folder}", f"--resolution={own.resolution}", "--instance_prompt="]
    words += [f"--aspect_ratio_buckets={own.aspect_ratio_buckets}"] * bool(own.aspect_ratio_buckets)
    with trainer.one_sentence():
        args = trainer.make_parser().parse_args([*words, *["--recursive"] * own.recursive])
        problems = inspect(args)
    print("\n".join(problems) or f"{own.folder}: no problem found.")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

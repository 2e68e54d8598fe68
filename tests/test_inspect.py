"""tools/inspect_pictures.py: problems of pictures and captions, each with a cure."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageFilter


def inspect(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools/inspect_pictures.py", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def noise_picture(size: tuple[int, int], spread: int) -> Image.Image:
    levels = np.random.default_rng(spread).normal(128, spread, size[::-1]).clip(0, 255)
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def test_problems_of_pictures(tmp_path):
    noise = noise_picture((300, 300), 80)
    noise.resize((60, 60)).resize((300, 300)).save(tmp_path / "fine.png")
    Image.open(tmp_path / "fine.png").resize((290, 290)).save(tmp_path / "again.jpg", quality=80)
    noise.rotate(90).resize((7, 7)).save(tmp_path / "small.png")
    noise.rotate(180).filter(ImageFilter.GaussianBlur(40)).save(tmp_path / "blurry.png")
    (tmp_path / "phone.heic").write_bytes(b"x")
    done = inspect(tmp_path, "--resolution=16")
    assert done.returncode == 1 and not done.stderr
    assert "small.png is small and is enlarged 2.3 times" in done.stdout
    assert done.stdout.count("looks blurry") == 1 and "blurry.png looks blurry" in done.stdout
    assert "again.jpg and fine.png look alike" in done.stdout
    assert "phone.heic passed over" in done.stdout


def test_problems_of_captions(tmp_path):
    for i in range(4):
        noise_picture((64, 64), 50 + i).save(tmp_path / f"{i}.png")
    for i, text in enumerate(("a dog", "a dog", "a red dog")):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "other.txt").write_text("of no picture")
    done = inspect(tmp_path, "--resolution=64")
    assert "3.png: no caption, though other pictures have one" in done.stdout
    assert '0.png, 1.png have the same caption, "a dog"' in done.stdout
    assert "other.txt: captions of no picture" in done.stdout


def test_what_cannot_be_read_is_a_mistake(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"x")
    for folder, message in ((tmp_path, "cut.png"), (tmp_path / "nowhere", "no such folder")):
        done = inspect(folder)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("subject", ["sks_dog", "sks_mug"])
def test_good_pictures_have_no_problem(subject):
    done = inspect(ROOT / "examples/toy_world/subjects" / subject, "--resolution=64", "--aspect_ratio_buckets=auto")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("no problem found.\n")

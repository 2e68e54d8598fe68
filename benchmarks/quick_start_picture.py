"""Compose README's picture from a finished quick start: what went in above, what was drawn below.

python benchmarks/quick_start_picture.py lora-sks-dog examples/toy_world/quick_start.png
"""

import sys
from pathlib import Path

import yaml
from PIL import Image, ImageDraw


def compose(run: Path, side: int = 112, gap: int = 8, head: int = 22) -> Image.Image:
    """The pictures that were trained on, and the run's own contact sheet."""
    settings = yaml.safe_load((run / "training_config.yaml").read_text(encoding="utf-8"))
    given = [Image.open(path) for path in sorted(Path(settings["instance_data_dir"]).glob("*.png"))]
    sheet = Image.open(run / "progress.png")
    page = Image.new(
        "RGB", (max(sheet.width, len(given) * (side + gap) + gap), head + side + gap + head + sheet.height), "white"
    )
    pen = ImageDraw.Draw(page)
    pen.text((gap, 5), f'the five pictures: "{settings["instance_prompt"]}"', fill="black")
    for index, picture in enumerate(given):
        page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (gap + index * (side + gap), head))
    pen.text((gap, head + side + gap + 4), f'drawn: "{settings["validation_prompt"][0]}"', fill="black")
    page.paste(sheet, (0, head + side + gap + head))
    return page


if __name__ == "__main__":
    compose(Path(sys.argv[1])).save(sys.argv[2])

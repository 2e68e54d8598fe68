"""Write report.html for a training run: pictures, curves, data and settings in one page that needs no network.

    python tools/report.py lora-sks-dog

It reads the output folder alone: training_config.yaml, history.jsonl, validation/, progress.png, README.md and, if
tools/evaluate.py wrote it, evaluation/.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import io
import logging
import math
import os
import re
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import train_dreambooth_lora_sdxl as trainer

MAX_PICTURES = 100
REPORT = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8886; --curve: light-dark(#0b57d0, #8ab4f8) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem }
.small { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)) }
figure { margin: 0 } figcaption { font-size: .85rem; overflow-wrap: anywhere }
.sheet { overflow-x: auto } .sheet img { max-width: none }
svg { width: 100%; border: 1px solid var(--line) } polyline { fill: none; stroke: var(--curve); stroke-width: 1.5 }
text { font: 11px system-ui; fill: currentColor }
table { border-collapse: collapse } td, th { border: 1px solid var(--line); padding: .2rem .6rem; text-align: left;
overflow-wrap: anywhere } pre { overflow-x: auto; border: 1px solid var(--line); padding: .6rem }
</style>
</head>
<body>
<header><h1>$title</h1><p>$summary</p></header>
<main>
<section aria-labelledby="pictures"><h2 id="pictures">Pictures</h2>$sheet</section>
<section aria-labelledby="curves"><h2 id="curves">Curves</h2><div class="grid">$curves</div></section>
$evaluation
<section aria-labelledby="data"><h2 id="data">Training pictures</h2><div class="grid small">$data</div></section>
<section aria-labelledby="use"><h2 id="use">Use it</h2><pre tabindex="0">$use</pre></section>
<section aria-labelledby="settings"><h2 id="settings">Settings</h2>
<details><summary>All flags of this run</summary><table><tr><th>flag</th><th>value</th></tr>$settings</table></details>
</section>
</main>
</body>
</html>
""")


def curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    """Return an HTML figure with one curve over steps."""
    steps, values = zip(*points, strict=True)
    low, high, first, last = min(values), max(values), steps[0], steps[-1]
    place = [(40 + 350 * (x - first) / ((last - first) or 1), 150 - 130 * (y - low) / ((high - low) or 1))
             for x, y in points]
    told = f"{name} from {values[0]:.4g} at step {first} to {values[-1]:.4g} at step {last}"
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    marks = ((2, 24, f"{high:.3g}"), (2, 150, f"{low:.3g}"), (40, 168, f"step {first}"), (340, 168, f"step {last}"))
    texts = "".join(f'<text x="{x}" y="{y}">{mark}</text>' for x, y, mark in marks)
    return (f'<figure><svg viewBox="0 0 400 175" role="img" aria-label="{told}"><polyline points="{line}"/>{texts}'
            f"</svg><figcaption>{name}</figcaption></figure>")


def read_settings(output: Path) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return a run's flags, all of them and those in its training_config.yaml. Raises UserError."""
    parser, path = trainer.make_parser(), output / trainer.CONFIG_FILE
    if not path.is_file():
        raise trainer.UserError(f"{output} is no output folder of a training run: it has no {trainer.CONFIG_FILE}.")
    args = parser.parse_args(trainer.config_as_words(parser, str(path)))
    return args, trainer.yaml.safe_load(path.read_text(encoding="utf-8"))


def curves_html(output: Path) -> tuple[str, int]:
    """Return figures of all that was logged, and the last step."""
    history = trainer.read_history(output)
    names = sorted({name for entry in history for name in entry} - {"step"})
    points = {name: [(entry["step"], entry[name]) for entry in history if math.isfinite(entry.get(name, math.nan))]
              for name in names}  # a GradScaler lets norms overflow at times
    figures = "".join(curve(html.escape(name), found) for name, found in points.items() if found)
    return figures or "<p>Nothing yet.</p>", history[-1]["step"] if history else 0


def sheet_html(output: Path, prompts: Sequence[str]) -> str:
    """Return the figure of progress.png."""
    sheet = output / "progress.png"
    if not sheet.exists():
        return "<p>No --validation_prompt was given.</p>"
    return image_html(sheet, html.escape(f"A column a step, the untrained model first; rows: {'; '.join(prompts)}"))


def pictures_html(args: argparse.Namespace) -> tuple[str, int]:
    """Return figures of the pictures that were trained on, if they are still there, and their number."""
    try:
        samples = list({sample.path: sample for sample in trainer.instance_samples(args)}.values())
    except trainer.UserError as error:
        return f"<p>{html.escape(str(error))}</p>", 0
    buckets = trainer.bucket_of_each(args, samples)
    figures = []
    for sample, (width, height) in list(zip(samples, buckets, strict=True))[:MAX_PICTURES]:
        name, prompt = html.escape(sample.path.name), html.escape(sample.prompt)
        figures.append(f'<figure><img src="{trainer.thumbnail(sample.path)}" alt="{name}" width="128">'
                       f"<figcaption>{name}, {width}x{height}: {prompt}</figcaption></figure>")
    more = f"<p>and {len(samples) - MAX_PICTURES} more</p>" if len(samples) > MAX_PICTURES else ""
    return "".join(figures) + more, len(samples)


def evaluation_html(output: Path) -> str:
    """Return the section of evaluation/, or "" if the run was not evaluated."""
    folder = output / "evaluation"
    if not (folder / "evaluation.csv").is_file():
        return ""
    rows = list(csv.reader(io.StringIO((folder / "evaluation.csv").read_text(encoding="utf-8"))))
    lines = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
             for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False)]
    advice = folder / "advice.txt"
    told = html.escape(advice.read_text(encoding="utf-8")) if advice.is_file() else ""
    grids = "".join(image_html(path, "Checkpoints down, strengths across")
                    for path in sorted(folder.glob("grid*.png")))
    return ('<section aria-labelledby="evaluation"><h2 id="evaluation">Evaluation</h2>'
            f'<div class="sheet" tabindex="0"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'
            f'<pre tabindex="0">{told}</pre>{grids}</section>\n')


def image_html(path: Path, caption: str) -> str:
    """Return a figure of a picture that is part of the page."""
    encoded = base64.b64encode(path.read_bytes()).decode()
    return (f'<figure><div class="sheet" tabindex="0"><img src="data:image/png;base64,{encoded}" alt="{caption}">'
            f"</div><figcaption>{caption}</figcaption></figure>")


def usage_html(output: Path) -> str:
    """Return the code of the model card that generates a picture, if the card is written already."""
    card = output / "README.md"
    found = re.search("```python\n(.*?)\n```", card.read_text(encoding="utf-8"), re.S) if card.is_file() else None
    return html.escape(found[1] if found else "The model card README.md says how, when training has ended.")


def make_report(output: Path) -> str:
    """Return the page. Raises UserError if the folder is not a run's."""
    args, settings = read_settings(output)
    curves, step = curves_html(output)
    pictures, count = pictures_html(args)
    return REPORT.substitute(
        title=html.escape(output.resolve().name), curves=curves,
        evaluation=evaluation_html(output), data=pictures, use=usage_html(output),
        summary=html.escape(f"{count} pictures, rank {args.rank}, {step} steps so far"),
        sheet=sheet_html(output, [prompt.text for prompt in trainer.validation_prompts(args)]),
        settings="".join(f"<tr><td>{key}</td><td>{html.escape(str(value))}</td></tr>"
                         for key, value in settings.items()))


def main() -> None:
    """Write the page into the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the --output_dir of the run")
    output = parser.parse_args().folder
    with trainer.one_sentence():
        page = make_report(output)
        with trainer.atomic_write(output / "report.html") as unfinished:
            unfinished.write_text(page, encoding="utf-8", errors="backslashreplace")
    print(output / "report.html")


if __name__ == "__main__":
    main()

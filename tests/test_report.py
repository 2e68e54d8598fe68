"""tools/report.py: one page that opens from disk, in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report
from conftest import ROOT

import train_dreambooth_lora_sdxl as trainer


@pytest.fixture
def output(train) -> Path:
    """A finished run whose prompts would like to break a page."""
    output = train(
        max_train_steps=30,
        instance_prompt='a photo of sks dog </title><script>throw "injected"</script> & "quotes"',
        validation_prompt="<img src=x onerror=alert(1)>",
        num_validation_images=1,
        validation_steps=15,
        aspect_ratio_buckets="auto",
        resolution=32,
    )
    subprocess.run([sys.executable, ROOT / "tools/report.py", output], check=True, capture_output=True)
    return output


def test_the_page_needs_nothing_else_and_nothing_breaks_it(output):
    page = (output / "report.html").read_text()
    assert "<script" not in page and "onerror=alert(1)>" not in page
    sources = re.findall(r'(?:src|href)="([^"]*)', page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert page.count("<svg") == 9 and 'aria-label="loss from' in page  # loss, its quarters, norm, rate, memory, speed
    assert page.count('width="128"') == 5 and page.count(" alt=") == page.count("<img")
    levels = re.findall(r"<(h\d)", page)
    assert levels[0] == "h1" and set(levels[1:]) == {"h2"}
    HTMLParser().feed(page)


def test_the_history_is_cut_where_a_run_goes_on(train):
    output = train(max_train_steps=30, checkpointing_steps=20)
    assert [entry["step"] for entry in trainer.read_history(output)] == [10, 20, 30]
    with open(output / trainer.HISTORY_FILE, "a") as file:
        file.write('{"step": 4')  # a kill
    train(max_train_steps=40, resume_from_checkpoint="checkpoint-20")
    assert [entry["step"] for entry in trainer.read_history(output)] == [10, 20, 30, 40]
    train(max_train_steps=10)
    assert [entry["step"] for entry in trainer.read_history(output)] == [10]


def test_curves_leave_out_what_is_not_finite(train):
    output = train(max_train_steps=30)
    with open(output / trainer.HISTORY_FILE, "a") as file:
        file.write('{"step": 31, "grad_norm": Infinity, "peak_memory_gb": NaN}\n{"step": 4')
    page = report.make_report(output)
    assert 'aria-label="grad_norm from' in page and not re.search(r"[ ,](inf|nan)", page)


def test_the_code_loads_what_was_trained_on(train, tmp_path):
    """The revision and variant of the base, and new tokens from the folder though they were pushed elsewhere."""
    run = trainer.start(train.args(train_text_encoder_ti=True, instance_prompt="a photo of TOK dog"))
    args = {**vars(run.args), "revision": "abc", "variant": "fp16", "push_to_hub": True}
    run = trainer.replace(run, args=trainer.argparse.Namespace(**args))
    here, there = (trainer.usage(run, place, "a dog") for place in (str(run.output), "me/dog"))
    assert "revision='abc', variant='fp16', torch_dtype=torch.float16)" in here
    assert f"load_file('{run.output}/embeddings.safetensors')" in here and "hf_hub_download" not in here
    assert "hf_hub_download('me/dog', 'embeddings.safetensors')" in there


def test_a_run_that_has_just_begun_and_a_folder_that_is_none(train, pictures, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    output = train(instance_data_dir=moved, max_train_steps=1)
    (output / trainer.HISTORY_FILE).unlink()
    (output / "README.md").unlink()
    shutil.rmtree(moved)
    page = report.make_report(output)
    assert "Nothing yet." in page and "no such folder" in page and "No --validation_prompt" in page
    with pytest.raises(trainer.UserError, match="is no output folder of a training run"):
        report.make_report(tmp_path)


PROBE = """
<script>
addEventListener("load", () => {
  const images = [...document.images];
  const told = {images: images.length, shown: images.filter(i => i.complete && i.naturalWidth > 0).length,
                wide: document.documentElement.scrollWidth <= innerWidth};
  document.title = JSON.stringify(told);
});
</script></body>"""


@pytest.mark.parametrize("size", ["400,900", "1400,1000"])
def test_it_opens_in_a_browser(output, tmp_path, size):
    """Debian's chromium, headless: every picture is shown, nothing hangs over, the console is silent."""
    browser = shutil.which("chromium") or pytest.skip("no browser here: apt-get install chromium, as .ci/run does")
    page = output / "report.html"
    probed = page.read_text().replace("</body>", PROBE)
    (tmp_path / "probed.html").write_text(probed)
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    common = [browser, "--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"]
    common += [f"--disable-{part}" for part in quiet]
    common += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}"]
    address = f"file://{tmp_path / 'probed.html'}"
    told = subprocess.run([*common, "--dump-dom", address], capture_output=True, text=True)
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", told.stdout)[1])
    assert found["images"] == found["shown"] == 6 and found["wide"], found
    assert "CONSOLE" not in told.stderr
    shot = tmp_path / "shot.png"
    subprocess.run([*common, f"--screenshot={shot}", f"file://{page}"], capture_output=True, check=True)
    from PIL import Image

    assert len(Image.open(shot).convert("RGB").resize((100, 100)).getcolors(10_000)) > 20

"""Every command of README.md and docs/: what needs no GPU is run, what does is parsed, inference code is executed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
from conftest import ROOT
from hub import Hub
from judge import Judge
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": "README.zh-CN.md", **{f"docs/{name}.md": f"docs/zh/{name}.md" for name in (
    "training", "memory", "methods", "other-trainers", "troubleshooting")}}  # with their Chinese pages
FENCED = re.compile(r"```(\w+)\n(.*?)```", flags=re.S)
BLOCKS = [block for page in PAGES for block in FENCED.findall((ROOT / page).read_text(encoding="utf-8"))]
COMMANDS = [
    shlex.split(line)
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
]
TRAINING = [words for words in COMMANDS if "train_dreambooth_lora_sdxl.py" in words]
QUICK_START = TRAINING[0]


def environment() -> dict[str, str]:
    """A shell in which this Python's `accelerate` is the one that is found."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def run_in(folder: Path, words: list[str], **variables: str) -> subprocess.CompletedProcess:
    """Run a command as it stands; it must end well."""
    told = subprocess.run(
        words, cwd=folder, env={**environment(), **variables}, capture_output=True, text=True, timeout=900
    )
    assert told.returncode == 0, told.stderr
    return told


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory) -> Path:
    """The first command of the README, as it stands, in a copy of the repository's folder."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("examples", "tools", "train_dreambooth_lora_sdxl.py"):
        (folder / name).symlink_to(ROOT / name)
    told = run_in(folder, QUICK_START[QUICK_START.index("accelerate") :])
    assert told.stdout.startswith("Subject") and "Done" in told.stdout and "warn" not in told.stderr.lower()
    return folder


def test_the_quick_start_leaves_what_the_readme_lists(quick_start):
    output = quick_start / "lora-sks-dog"
    table = README.split("| in `lora-sks-dog/` |")[1].split("\n\n")[0]
    listed = re.findall(r"^\| (`.*?`) \|", table, flags=re.M)
    assert len(listed) == 5
    for name in re.findall(r"`([^`]+)`", " ".join(listed)):
        assert (output / name).exists(), name


def test_the_quick_start_shows_the_subject_where_it_was_never_shown(quick_start):
    last = sorted((quick_start / "lora-sks-dog" / "validation").iterdir())[-1]
    verdicts = Judge()([Image.open(path) for path in sorted(last.iterdir())])
    assert sum(verdict.subjects["sks_dog"] > 0.5 for verdict in verdicts) >= 3
    assert sum(verdict.place == "in a bucket" for verdict in verdicts) >= 3
    first = Judge()([Image.open(path) for path in sorted((last.parent / "step-000000").iterdir())])
    assert sum(verdict.subjects["sks_dog"] > 0.5 for verdict in first) == 0


def test_going_on_ends_with_the_same_bits(quick_start):
    """The resume command as it stands, after the run's last hundred steps were lost."""
    output = quick_start / "lora-sks-dog"
    before = load_file(output / trainer.LORA_FILE)
    shutil.rmtree(output / "checkpoint-400")
    (output / trainer.LORA_FILE).unlink()
    run_in(quick_start, next(words for words in TRAINING if words[-1] == "latest" and "--multi_gpu" not in words))
    after = load_file(output / trainer.LORA_FILE)  # the header's entries have no order of their own
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_dry_run_tells_the_plan(quick_start):
    told = run_in(quick_start, next(words for words in TRAINING if words[-1] == "--dry_run"))
    assert told.stdout.startswith("Subject") and "Steps" in told.stdout


TOOLS = [words for words in COMMANDS if words[:1] == ["python"] and words[1].startswith("tools/")]


def test_the_tools(quick_start):
    """Those of README run as they stand; two need something from the Hub, and are parsed."""
    estimate, inspect = (next(words for words in TOOLS if name in words[1]) for name in ("estimate", "inspect"))
    assert "It fits in 8 GB with these flags" in run_in(quick_start, [sys.executable, *estimate[1:]]).stdout
    assert "no problem found" in run_in(quick_start, [sys.executable, *inspect[1:]]).stdout
    run_in(quick_start, [sys.executable, "tools/report.py", "lora-sks-dog"])
    assert "sks dog" in (quick_start / "lora-sks-dog" / "report.html").read_text()
    evaluation = next(words for words in TOOLS if "evaluate" in words[1])
    assert (quick_start / evaluate.make_parser().parse_args(evaluation[2:]).folder / "checkpoint-400").is_dir()
    other = next(words for words in TOOLS if words != estimate and "estimate" in words[1])
    flags = trainer.make_parser().parse_args(other[other.index("8") + 1 :])
    assert other[2] == "--budget" and flags.instance_prompt


def test_pushing_what_is_finished(quick_start):
    """The push command as it stands, to a Hub in this process."""
    hub = Hub("hf_x")
    run_in(
        quick_start,
        next(words for words in TRAINING if "--push_to_hub" in words),
        HF_ENDPOINT=hub.endpoint,
        HF_HUB_OFFLINE="0",
        HF_TOKEN="hf_x",
        HF_HOME=str(quick_start / "home"),
    )
    pictures = {f"validation/step-000400/0{index}.png" for index in range(4)}
    assert set(hub.files["you/sks-dog"]) == {trainer.LORA_FILE, "README.md", *pictures}


@pytest.mark.parametrize("words", TRAINING, ids=lambda words: " ".join(words)[-40:])
def test_every_training_command_is_understood(words, pictures, tmp_path, monkeypatch):
    """Parsed and checked as written, with the pictures that it names standing ready."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(pictures, tmp_path / "dog")
    (tmp_path / "lora-sks-dog").mkdir()
    shutil.copy(ROOT / "examples/toy_world/sks_dog.yaml", tmp_path / "lora-sks-dog" / "training_config.yaml")
    args = trainer.parse_args(words[words.index("train_dreambooth_lora_sdxl.py") + 1 :])
    assert args.instance_prompt


def test_the_other_commands_are_the_ones_that_ci_and_the_requirements_know():
    others = [words for words in COMMANDS if "train_dreambooth_lora_sdxl.py" not in words]
    programs = {words[0] for words in others if words}
    assert programs <= {"pip", "hf", "python"}
    assert QUICK_START[:4] == ["pip", "install", "-r", "requirements_sdxl.txt"]
    assert ["pip", "install", "-r", "tests/requirements.txt", "&&", "pytest"] in others
    for words in others:
        assert words[:1] != ["python"] or (ROOT / words[1]).exists(), words


@pytest.mark.parametrize("number", [0, 1, 2])
def test_inference_snippets(number, train, tiny, tmp_path, monkeypatch):
    """The code as it stands, on the tiniest model: names and devices replaced, nothing else."""
    train(output_dir=tmp_path / "lora-trained-xl")
    train(output_dir=tmp_path / "lora-sks-mug", seed=2)
    monkeypatch.chdir(tmp_path)
    code = [text for language, text in BLOCKS if language == "python"][number]
    for name in ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-refiner-1.0"):
        code = code.replace(name, str(tiny)).replace('variant="fp16", ', "")
    exec(code.replace("cuda", "cpu").replace("torch.float16", "torch.float32"), {})
    assert Image.open(tmp_path / "dog.png").size == (16, 16)


def test_the_first_page_is_one_page():
    assert len(README.splitlines()) <= 220


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for name in (page, PAGES[page]):
        links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
        for link in (link for link in links if "://" not in link):
            assert ((ROOT / name).parent / link).exists(), (name, link)


def test_flags_that_the_pages_name_exist():
    known = {option for parser in (trainer.make_parser(), evaluate.make_parser()) for action in parser._actions
             for option in action.option_strings}  # fmt: skip
    others = {"--quiet", "--methods", "--measure", "--kills", "--budget", "--collect", "--machine_rank"}
    others |= {"--dynamo_mode", "--dynamo_use_regional_compilation"}  # of accelerate launch
    for page in PAGES:
        named = set(re.findall(r"`(?:python [^`]*)?(--[a-z_0-9]+)", (ROOT / page).read_text(encoding="utf-8")))
        assert named <= known | others, (page, named - known)


@pytest.mark.parametrize("page", PAGES)
def test_the_chinese_page_has_the_same_headings_tables_and_commands(page):
    english, other = ((ROOT / name).read_text(encoding="utf-8") for name in (page, PAGES[page]))
    assert FENCED.findall(other) == FENCED.findall(english)
    text, theirs = (re.sub(r"```.*?```", "", page, flags=re.S) for page in (english, other))
    for pattern in (r"^(#+) ", r"^(\|)", r"(-?\d[\d,.]* ?(?:%|GB|MB))"):
        assert re.findall(pattern, theirs, flags=re.M) == re.findall(pattern, text, flags=re.M), pattern
    flags = [set(re.findall(r"`(--\w+)", page)) for page in (text, theirs)]
    assert flags[0] == flags[1]


def test_the_list_of_subjects_is_read(train, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dog", "mug"):
        shutil.copytree(pictures, tmp_path / name)
    (text,) = [text for language, text in BLOCKS if language == "yaml" and "folder:" in text]
    (tmp_path / "subjects.yaml").write_text(text)
    flags = {"instance_data_dir": None, "instance_prompt": None, "with_prior_preservation": True}
    samples = trainer.instance_samples(train.args(subjects="subjects.yaml", **flags))
    assert len(samples) == 5 + 2 * 5 and samples[-1].prompt == "a photo of ohwx mug"

"""examples/recipes: every value has its source, every pair of subject and card is understood."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, build_tiny

import train_dreambooth_lora_sdxl as trainer

RECIPES = {path.stem: path for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml"))}
CARDS = [name for name in RECIPES if name.endswith("gb")]
SUBJECTS = [name for name in RECIPES if name not in CARDS]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """With two attentions in its upper block, which B-LoRA needs."""
    return build_tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_there_is_one_for_each_subject_and_card():
    assert SUBJECTS == ["face", "pet", "product", "style"] and CARDS == ["12gb", "16gb", "24gb", "8gb"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_has_its_source(name):
    text = RECIPES[name].read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    known = {action.dest for action in trainer.make_parser()._actions}
    assert settings and set(settings) <= known
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == len(settings)
    for line in lines:
        assert re.search(r"# \w|^train_batch_size: 1$", line), line
    for place in re.findall(r"(?:benchmarks|docs)/[\w.-]+\.md", text):
        assert (ROOT / place).exists()


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_pair_makes_a_plan(train, tmp_path, capsys, subject, card):
    """With what its first lines say to add; a CPU trains in no half precision, so the command line wins here."""
    words = ["--config", str(RECIPES[subject]), str(RECIPES[card]), "--mixed_precision=no", "--dry_run"]
    words += [f"--{name}={train.flags[name]}" for name in ("pretrained_model_name_or_path", "instance_data_dir")]
    command = RECIPES[subject].read_text(encoding="utf-8")
    prompts = dict(re.findall(r'--(\w+_prompt) "([^"]+)"', command))
    words += [f"--{name}={value}" for name, value in prompts.items()]
    args = trainer.parse_args([*words, f"--output_dir={tmp_path / 'out'}", "--report_to=none"])
    for name, value in {**yaml.safe_load(RECIPES[subject].read_text()), **yaml.safe_load(RECIPES[card].read_text()),
                        "mixed_precision": "no"}.items():  # fmt: skip
        assert getattr(args, name) == value or name == "mixed_precision"
    trainer.main(args)
    told = capsys.readouterr().out
    assert told.startswith("Subject") and "warning" not in told, told


def test_later_files_win_and_the_command_line_over_all(train, tmp_path):
    files = [{"rank": 2, "repeats": 5, "validation_prompt": ["a", "b"]}, {"rank": 3, "random_flip": True}, {"rank": 6}]
    paths = []
    for number, settings in enumerate(files):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(yaml.safe_dump(settings))
    words = [*train.words(), "--config", *map(str, paths)]
    args = trainer.parse_args(words)
    assert (args.rank, args.repeats, args.random_flip, args.validation_prompt) == (6, 5, True, ["a", "b"])
    assert trainer.parse_args([*words, "--rank", "7", "--no-random_flip"]).rank == 7
    paths[2].write_text(yaml.safe_dump({"validation_prompt": "c"}))
    args = trainer.parse_args(words)
    assert (args.rank, args.validation_prompt) == (3, ["c"])
    assert trainer.parse_args([*words, "--validation_prompt", "d"]).validation_prompt == ["d"]
    args = trainer.parse_args([*words, "--instance_prompt=a photo of sks dog"])  # a word with spaces is no file
    assert args.instance_prompt == "a photo of sks dog" and args.rank == 3
    for stray in ("--instance_promt=a b", "--clip_skip=a b"):
        with pytest.raises(trainer.UserError, match="did you mean --instance_prompt|--clip_skip was removed"):
            trainer.parse_args([*words, stray])
    with pytest.raises(trainer.UserError, match="--config .*nowhere.yaml cannot be read"):
        trainer.parse_args([*words, "nowhere.yaml"])

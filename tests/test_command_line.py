"""Mistakes are told at the door: one sentence, exit code 2, nothing left behind, nothing heavy imported."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import SCRIPT
from PIL import Image

import train_dreambooth_lora_sdxl as trainer
from train_dreambooth_lora_sdxl import UserError, make_parser, parse_args, public_settings

REQUIRED = "pretrained_model_name_or_path"
KEPT_FLAGS = {  # of the command lines that people have, with the values that they rely on where they name none
    "pretrained_vae_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "cache_dir": None,
    "instance_data_dir": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "image_column": "image",
    "caption_column": None,
    "repeats": 1,
    "instance_prompt": None,
    "class_data_dir": None,
    "class_prompt": None,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "sample_batch_size": 4,
    "prior_generation_precision": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "output_dir": "lora-dreambooth-model",
    "output_kohya_format": False,
    "seed": None,
    "resolution": 1024,
    "center_crop": False,
    "random_flip": False,
    "image_interpolation_mode": "lanczos",
    "train_text_encoder": False,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "text_encoder_lr": 5e-6,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "snr_gamma": None,
    "do_edm_style_training": False,
    "dataloader_num_workers": 0,
    "optimizer": "adamw",  # in any case
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "adam_weight_decay": 1e-4,
    "adam_weight_decay_text_encoder": 1e-3,
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_token": None,
    "logging_dir": "logs",
    "report_to": "tensorboard",
    "allow_tf32": False,
    "mixed_precision": None,
    "local_rank": -1,
    "enable_xformers_memory_efficient_attention": False,
    "rank": 4,
    "lora_dropout": 0.0,
    "use_dora": False,
}


def test_the_flags_of_old_commands_are_there_with_their_defaults():
    parser = make_parser()
    with pytest.raises(UserError, match=f"--{REQUIRED} is missing"):
        parse_args([])
    with pytest.raises(UserError, match=f"--pretrained_model_name_or_pth.*did you mean --{REQUIRED}"):
        parse_args(["--pretrained_model_name_or_pth=x"])
    left = vars(parser.parse_args([f"--{REQUIRED}=x"]))
    assert len(KEPT_FLAGS) + 1 == 72
    assert {flag: left.get(flag, "no such flag") for flag in KEPT_FLAGS} == KEPT_FLAGS
    assert all(f"--{flag}" in parser._option_string_actions for flag in KEPT_FLAGS)


def mistake(train, **flags) -> str:
    """The sentence that a command line is refused with; nothing is left behind."""
    before = sorted(train.folder.rglob("*"))
    with pytest.raises(UserError) as refusal:
        train.args(**flags)
    assert sorted(train.folder.rglob("*")) == before
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    "flags, told",
    [
        ({"instance_data_dir": "/no/such"}, "--instance_data_dir /no/such: no such folder"),
        ({"resolution": 20}, "--resolution 20 is not a multiple of 8; 24 is"),
        ({"rank": 0}, "--rank"),
        ({"rank": "four"}, "--rank"),
        ({"learning_rate": "nan"}, "--learning_rate"),
        ({"adam_beta1": 1}, "--adam_beta1"),
        ({"lora_dropout": -1}, "--lora_dropout"),
        ({"seed": -1}, "--seed"),
        ({"with_prior_preservation": True}, "--class_prompt"),
        ({"with_prior_preservation": True, "class_data_dir": "x"}, "--class_prompt"),
        ({"pretrained_model_name_or_path": "./no/such/model"}, "no such folder"),
        ({"pretrained_model_name_or_path": str(SCRIPT)}, "no safetensors file"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "names no checkpoint"),
        ({"output_dir": "/proc/none"}, "--output_dir /proc/none cannot be written"),
        ({"output_dir": str(SCRIPT)}, "cannot be written"),
        ({"report_to": "papyrus"}, "--report_to"),
        ({"lr_scheduler": "magic"}, "--lr_scheduler"),
        ({"learning_rat": 1}, "did you mean --learning_rate?"),
        ({"config": "/no/such.yaml"}, "--config /no/such.yaml"),
        ({"push_to_hub": True}, "hf auth login"),
        ({"enable_xformers_memory_efficient_attention": True}, "PyTorch's own attention is already memory-efficient"),
    ],
)
def test_a_mistake_is_one_sentence(train, flags, told, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    assert told in mistake(train, **flags)


@pytest.mark.parametrize(
    "package, flags",
    [
        ("bitsandbytes", {"use_8bit_adam": True}),
        ("wandb", {"report_to": "wandb"}),
        ("tensorboard", {"report_to": "tensorboard"}),
    ],
)
def test_an_optional_package_that_is_absent_is_named(train, package, flags, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest)
    )
    assert f"pip install {package}" in mistake(train, **flags)


def test_a_base_model_that_is_not_sdxl_is_refused(train, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "is a StableDiffusionPipeline, not SDXL" in mistake(train, pretrained_model_name_or_path=tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    assert "without a whole model_index.json" in mistake(train, pretrained_model_name_or_path=tmp_path)


ELSEWHERE = {"budget", "n", "s", "l", "w", "dynamo_backend", "dynamo_mode", "dynamo_use_regional_compilation"}


@pytest.mark.parametrize("flag", " ".join(trainer.DROPPED_FLAGS.values()).split())
def test_a_dropped_flag_says_what_to_do_instead(train, tmp_path, flag, capsys):
    told = mistake(train, **{flag: "1"})
    assert told.startswith(f"--{flag} was removed: ") and len(told) < 250
    known = {action.dest for action in trainer.make_parser()._actions}
    assert flag not in known and set(re.findall(r"--(\w+)", told.partition(": ")[2])) <= known | ELSEWHERE
    trainer.quiet_libraries("warning")
    config = write(tmp_path / "old.yaml", {flag: 1, "rank": 2})
    args = train.args(config=config, log_level="warning")
    assert not hasattr(args, flag) and args.rank == 2
    assert f"flags of an earlier version are ignored: {flag}." in capsys.readouterr().out


@pytest.mark.parametrize(("words", "value"), [
    ([], False), (["--gradient_checkpointing"], True), (["--gradient_checkpointing", "12"], 12),
    (["--gradient_checkpointing=True"], True), (["--no-gradient_checkpointing"], False),
])  # fmt: skip
def test_gradient_checkpointing_takes_a_number_of_blocks(train, tmp_path, words, value):
    assert trainer.parse_args([*train.words(), *words]).gradient_checkpointing == value
    config = write(tmp_path / "config.yaml", {"gradient_checkpointing": value})
    read = train.args(config=config).gradient_checkpointing
    assert read == value and type(read) is type(value)


def test_class_folder_without_prior_preservation_is_a_warning(train, capsys):
    train.args(class_data_dir="classes", log_level="info")
    assert "--class_data_dir does nothing without --with_prior_preservation" in capsys.readouterr().out


def write(path: Path, values) -> Path:
    path.write_text(yaml.safe_dump(values) if isinstance(values, dict) else values)
    return path


def test_config_file_and_the_command_line_wins(train, tmp_path):
    config = write(
        tmp_path / "c.yaml", {"rank": 7, "lora_alpha": 2.5, "random_flip": True, "train_batch_size": 3, "seed": None}
    )
    args = train.args(config=config)
    assert (args.rank, args.lora_alpha, args.random_flip) == (7, 2.5, True)
    assert args.train_batch_size == 2  # given on the command line too
    assert not train.args(config=config, random_flip=False).random_flip


@pytest.mark.parametrize(
    "values, told",
    [
        ({"rnak": 3}, "did you mean --rank?"),
        ({"rank": "x"}, "--rank"),
        ({"random_flip": "yes"}, "random_flip takes true or false"),
        ({"rank": True}, "rank takes one value"),
        ({"rank": [1]}, "rank takes one value"),
        ("just words", "lines of 'flag: value'"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_mistake_in_the_config_file(train, tmp_path, values, told):
    assert told in mistake(train, config=write(tmp_path / "c.yaml", values))


def test_settings_lead_back_to_the_same_arguments_without_the_token(train, tmp_path):
    args = train.args(hub_token="hf_secret", random_flip=True, validation_prompt="ein Hund: 'größer'", lora_alpha=3)
    config = write(tmp_path / "c.yaml", public_settings(args, 1))
    assert "hf_secret" not in config.read_text()
    from train_dreambooth_lora_sdxl import parse_args

    again = parse_args([f"--config={config}"])
    assert {**vars(again), "config": None, "hub_token": "hf_secret"} == vars(args)


def test_help_and_mistakes_answer_before_the_heavy_imports():
    for words, code in ((["--help"], 0), (["--rank", "x"], 2)):
        started = time.perf_counter()
        told = subprocess.run(
            [sys.executable, "-X", "importtime", str(SCRIPT), *words], capture_output=True, text=True
        )
        assert told.returncode == code
        assert time.perf_counter() - started < 3  # 0.3 s on an idle machine
        assert "torch" not in {
            line.split("|")[-1].strip().split(".")[0] for line in told.stderr.splitlines() if "|" in line
        }


def test_a_prompt_in_any_script_goes_into_any_pipe(train):
    """Windows writes into pipes in an alphabet of its own."""
    env = {"PYTHONIOENCODING": "ascii"}
    told = train.shell(instance_prompt="一张 sks 狗", dry_run=True, log_level="info", env=env)
    assert told.returncode == 0, told.stderr
    assert '"\\u4e00\\u5f20 sks \\u72d7"' in told.stdout


def test_exit_code_and_output_of_a_mistake():
    told = subprocess.run([sys.executable, str(SCRIPT), "--rank", "x"], capture_output=True, text=True)
    assert told.returncode == 2
    assert told.stdout == ""
    assert told.stderr.startswith("error: ") and told.stderr.count("\n") == 1


def test_a_weight_of_the_background_needs_masks(train, tmp_path, capsys):
    trainer.quiet_libraries("warning")
    train.args(background_loss_weight=0.5, log_level="warning")
    assert "--background_loss_weight does nothing without --masked_loss" in capsys.readouterr().out
    (tmp_path / "masks").mkdir()
    for path in Path(train.flags["instance_data_dir"]).iterdir():
        Image.open(path).convert("L").save(tmp_path / "masks" / path.name)
    train.args(background_loss_weight=0.5, masked_loss=tmp_path / "masks", log_level="warning")
    assert "background_loss_weight" not in capsys.readouterr().out

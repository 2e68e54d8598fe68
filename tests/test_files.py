"""The files that a run leaves: the LoRA, the card, the settings, the tracker's records."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer


def test_the_lora_file_restores_rank_and_alpha_by_itself(train, tiny):
    output = train(rank=6, lora_alpha=3, train_text_encoder=True)
    with safe_open(output / trainer.LORA_FILE, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118 (safetensors has no iterator)
    assert settings["unet.r"] == 6 and settings["text_encoder_2.lora_alpha"] == 3
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    pipeline.load_lora_weights(output, weight_name=trainer.LORA_FILE)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        config = part.peft_config["default_0"]
        assert (config.r, config.lora_alpha) == (6, 3)


def test_every_adapter_arrives_in_the_users_pipeline(train, tiny):
    output = train(train_text_encoder=True, max_train_steps=3, text_encoder_lr=1e-2)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    pipeline.load_lora_weights(output, weight_name=trainer.LORA_FILE)
    loaded = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for name, parameter in getattr(pipeline, component).named_parameters():
            if "lora_" in name:
                loaded[component + "." + name.replace(".default_0", "").removeprefix("text_model.")] = parameter
    with safe_open(output / trainer.LORA_FILE, framework="pt") as file:
        saved = {key.replace(".text_model.", "."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert set(saved) == set(loaded)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_trap_17_a_file_that_does_not_read_back_is_not_reported(train, monkeypatch):
    real = trainer.save
    monkeypatch.setattr(trainer, "save", lambda tensors, *rest: real({k: v + 1 for k, v in tensors.items()}, *rest))
    with pytest.raises(trainer.TrainingError, match="did not read back"):
        train()
    assert not list(Path(train.flags["output_dir"]).rglob(trainer.LORA_FILE))


def test_files_have_the_users_permissions(train):
    before = os.umask(0o027)
    try:
        output = train(checkpointing_steps=2)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in output.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


def test_a_prompt_cannot_put_markup_into_the_card(train):
    prompt = "sks dog\n\n<h1>owned</h1>\n\n[free money](http://x.example) ```"
    card = (train(instance_prompt=prompt) / "README.md").read_text()
    body = re.sub(r"^(`{3,}).*?^\1$", "", card.partition("\n---\n")[2], flags=re.M | re.S)  # code is shown as it is
    assert not re.search(r"^\s*(<h1>|\[free)", body, flags=re.M)


def test_the_card_is_valid_and_nothing_in_a_prompt_breaks_it(train, tmp_path):
    prompt = 'a photo of sks: "dog" `rm` --- \n--- # {pictures} 犬'
    output = train(instance_prompt=prompt, validation_prompt=prompt, num_validation_images=2)
    card = ModelCard.load(output / "README.md")
    assert card.data.instance_prompt == prompt
    assert [entry["text"] for entry in card.data.widget] == [prompt] * 2
    assert all((output / entry["output"]["url"]).exists() for entry in card.data.widget)
    assert "text-to-image" in card.data.tags and card.data.library_name == "diffusers"
    assert "--train_batch_size" in card.text and "<Gallery />" in card.text


def test_only_pictures_of_this_runs_prompts_are_shown(train, pictures):
    """Prompts may change on the way, and a Mac writes files of its own beside all others."""
    flags = {"num_validation_images": 1, "validation_steps": 1, "max_train_steps": 2, "checkpointing_steps": 1}
    output = train(**flags, validation_prompt="a dog")
    for name in ("._00.png", "00 copy.png"):
        (output / "validation" / "step-000001" / name).write_bytes(b"x")
    train(**{**flags, "max_train_steps": 3}, validation_prompt="a cat", resume_from_checkpoint="latest")
    card = (output / "README.md").read_text()
    assert "a cat" in card and "step-000003/00.png" in card and "a dog\n" not in card.partition("---\n\n")[0]
    folders = sorted((output / "validation").glob("step-*"))
    assert [len(trainer.pictures_in(folder, ["a cat"], 1)) for folder in folders] == [0, 0, 0, 1]
    train(**{**flags, "max_train_steps": 3}, resume_from_checkpoint="latest")
    assert "step-000003" not in (output / "README.md").read_text()


def test_the_cards_command_has_no_path_of_this_machine_and_whole_prompts(train, pictures):
    command = trainer.command_of(train.args(instance_prompt="/ sks dog"), 1)
    assert f"--instance_data_dir {pictures.name} " in command and "--instance_prompt '/ sks dog'" in command


def test_the_license_of_the_base_is_the_cards(train, tiny, tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n")
    assert ModelCard.load(train(pretrained_model_name_or_path=base) / "README.md").data.license == "openrail++"


def test_the_run_starts_again_from_its_settings(train, tmp_path):
    output = train(seed=None, random_flip=True)
    settings = yaml.safe_load((output / trainer.CONFIG_FILE).read_text())
    assert isinstance(settings["seed"], int) and settings["random_flip"] is True
    args = trainer.parse_args(["--config", str(output / trainer.CONFIG_FILE), f"--output_dir={tmp_path / 'again'}"])
    trainer.main(args)
    first, second = (load_file(folder / trainer.LORA_FILE) for folder in (output, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_trap_28_tensorboard_gets_scalars_and_pictures_with_their_step(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = train(
        report_to="tensorboard",
        max_train_steps=20,
        validation_prompt="a dog",
        validation_steps=10,
        num_validation_images=2,
        train_text_encoder=True,
    )
    events = next(path for path in (output / "logs").rglob("events.*") if path.parent.name == "dreambooth-lora-sdxl")
    records = EventAccumulator(str(events))
    records.Reload()
    tags = records.Tags()
    assert {"loss", "grad_norm", "lr/unet", "lr/text_encoder", "samples_per_second", "peak_memory_gb"} <= set(
        tags["scalars"]
    )
    assert [event.step for event in records.Scalars("loss")] == [10, 20]
    assert sorted({event.step for tag in tags["images"] for event in records.Images(tag)}) == [0, 10, 20]


def wandb_history(path: Path) -> list:
    """What wandb's client stored: protobuf records in LevelDB's log format, 32 KiB blocks after a header of 7."""
    from wandb.proto import wandb_internal_pb2

    data, items, record, position = path.read_bytes(), [], b"", 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a header: the rest of the block is padding
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            items.extend(parsed.history.item)
            record = b""
    return items


def test_trap_28_wandb_gets_them_too(train):
    told = train.shell(
        report_to="wandb",
        max_train_steps=10,
        validation_prompt="a dog",
        num_validation_images=1,
        hub_token="hf_marked",
        env={"WANDB_MODE": "offline"},
    )
    assert told.returncode == 0, told.stderr
    output = Path(train.flags["output_dir"])
    logged = {}
    for item in wandb_history(next(output.rglob("*.wandb"))):
        logged.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    assert logged["loss"] and logged["_step"] == [0, 10]
    assert len(list(output.rglob("media/images/*.png"))) == 2
    assert not any(b"hf_marked" in path.read_bytes() for path in output.rglob("*") if path.is_file())
    assert not (train.folder / "wandb").exists()


def test_trap_28_trackio_gets_them_on_this_machine(train, tmp_path):
    """Its own reader finds scalars, settings without secrets, and pictures; its chatter is not ours."""
    env = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    flags = {"max_train_steps": 10, "validation_prompt": "a dog", "num_validation_images": 1, "log_level": "info"}
    told = train.shell(report_to="trackio", hub_token="hf_marked", env=env, **flags)
    assert told.returncode == 0, told.stderr
    assert "Trackio" not in told.stdout + told.stderr and "dashboard" not in told.stdout
    read = "import json; from trackio.sqlite_storage import SQLiteStorage as S; p = 'dreambooth-lora-sdxl'; "
    read += "print(json.dumps(S.get_logs(p, S.get_runs(p)[0])))"
    environment = {**os.environ, **env}
    told = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True, check=True)
    logs = [entry for entry in json.loads(told.stdout.splitlines()[-1]) if "loss" in entry]
    assert {"loss", "grad_norm", "lr/unet", "samples_per_second", "peak_memory_gb"} <= set(logs[0])
    assert [entry["step"] for entry in logs] == [10]
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 2
    assert not any(b"hf_marked" in path.read_bytes() for path in (tmp_path / "trackio").rglob("*") if path.is_file())


def test_trap_28_comet_gets_them_offline(train, tmp_path):
    """Its own archive of an offline run is read back."""
    import zipfile

    env = {"COMET_START_ONLINE": "0", "COMET_OFFLINE_DIRECTORY": str(tmp_path / "comet")}
    told = train.shell(
        report_to="comet_ml", max_train_steps=10, validation_prompt="a dog", num_validation_images=1, env=env
    )
    assert told.returncode == 0, told.stderr
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        messages = [json.loads(line) for line in file.read("messages.json").splitlines()]
        pictures = set(file.namelist()) - {"messages.json", "experiment.json"}
    metrics = {entry["payload"]["metric"]["metricName"] for entry in messages if "metric" in entry["payload"]}
    assert {"loss", "grad_norm", "lr/unet", "samples_per_second", "peak_memory_gb"} <= metrics
    assert len(pictures) >= 2, archive

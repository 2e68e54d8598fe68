"""Pushing with the real huggingface_hub client to a local server that speaks the Hub's protocol."""

import contextlib
import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from conftest import ROOT
from hub import BREAK, STALL, Hub

import train_dreambooth_lora_sdxl as trainer

TOKEN = "hf_MARKEDTOKENnobodymayeverseethis"


@pytest.fixture
def hub():
    return Hub(TOKEN)


def push(train, hub, env=None, **flags):
    """Train and push in a process of its own, against the local Hub."""
    flags = {
        "push_to_hub": True,
        "report_to": "tensorboard",
        "validation_prompt": "a photo of sks dog",
        "num_validation_images": 1,
        "log_level": "info",
        "checkpointing_steps": 1,
        **flags,
    }
    env = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(train.folder / "home"),
        **(env or {}),
    }
    return train.shell(env=env, **flags)


def assert_nowhere(token: str, folder: Path, *told: str) -> None:
    """The token is in no file below a folder and in no text."""
    for path in folder.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path
    assert all(token not in text for text in told)


def test_traps_35_36_only_lora_card_and_pictures_are_uploaded_and_the_token_is_nowhere(train, hub):
    told = push(train, hub, hub_token=TOKEN, hub_model_id="me/dog", hub_private_repo=True)
    assert told.returncode == 0, told.stderr
    assert set(hub.files["me/dog"]) == {trainer.LORA_FILE, "README.md", "validation/step-000002/00.png"}
    assert hub.private["me/dog"]
    assert_nowhere(TOKEN, train.folder, told.stdout, told.stderr)
    assert f"{hub.endpoint}/me/dog" in told.stdout


def test_the_token_leaves_the_process_title(train, hub, tmp_path):
    """The script replaces itself by a process without the flag before anything else happens."""
    words = train.words(hub_token=TOKEN, rank="x")
    probe = (
        "import os, sys, runpy\nreal = os.execv\n"
        "def execv(path, words):\n    print(words, os.environ['HF_TOKEN'], flush=True)\n"
        "    real(path, [path, '-c', 'print(1)'])\n"
        f"os.execv = execv\nsys.argv = ['x.py', *{words!r}]\n"
        f"runpy.run_path({str(trainer.__file__)!r}, run_name='__main__')"
    )
    told = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    words, token = told.stdout.splitlines()[0].rsplit(" ", 1)
    assert token == TOKEN and "hub_token" not in words and TOKEN not in words


def test_what_was_pushed_reads_back_as_the_readme_says(train, hub, tiny, tmp_path):
    told = push(train, hub, hub_model_id="me/dog", env={"HF_TOKEN": TOKEN})
    assert told.returncode == 0, told.stderr
    reader = f"""
import torch
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import RepoCard
card = RepoCard.load("me/dog")
card.validate()
print(card.data.instance_prompt, card.data.tags, card.data.widget[0]["output"]["url"])
pipeline = StableDiffusionXLPipeline.from_pretrained({str(tiny)!r})
pipeline.load_lora_weights("me/dog", weight_name="pytorch_lora_weights.safetensors")
print(pipeline.get_active_adapters(), pipeline.unet.peft_config["default_0"].r)
"""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "reader"),
        "HF_TOKEN": TOKEN,
    }
    told = subprocess.run([sys.executable, "-c", reader], capture_output=True, text=True, env=env, cwd=ROOT)
    assert told.returncode == 0, told.stderr
    assert (
        "a photo of sks dog" in told.stdout and "template:sd-lora" in told.stdout and "['default_0'] 4" in told.stdout
    )


@pytest.fixture
def push_here(train, hub, monkeypatch):
    """Train and push in this process, without seconds between two tries; returns the output folder."""
    monkeypatch.setattr(trainer, "HUB_WAITS", (0, 0))
    monkeypatch.setattr(trainer, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=hub.endpoint))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()
    flags = {"validation_prompt": "a photo of sks dog", "num_validation_images": 1, "checkpointing_steps": 1}
    yield functools.partial(train, **flags, push_to_hub=True, hub_token=TOKEN, hub_model_id="me/dog")
    huggingface_hub.close_session()


@pytest.mark.parametrize("status", [401, 403, 429, 500, 0])
def test_a_failed_upload_loses_nothing_and_says_how_to_try_again(train, hub, push_here, capfd, status):
    """A line that breaks is 0."""
    hub.refuse["/commit/"] = status
    with pytest.raises(trainer.HubError, match="are safe in") as failure:
        push_here()
    output = Path(train.flags["output_dir"])
    assert (output / trainer.LORA_FILE).exists() and (output / "checkpoint-2" / "state.pt").exists()
    assert_nowhere(TOKEN, train.folder, str(failure.value), *capfd.readouterr())
    assert failure.value.__suppress_context__  # the cause holds the token
    tries = [path for _, path in hub.requests if "/commit/" in path]
    assert len(tries) == (1 if status in (401, 403) else 3)
    if status != 500:
        return
    hub.refuse.clear()  # the command that is printed pushes later
    command = str(failure.value).splitlines()[-1].split()
    assert command[:3] == ["hf", "upload", "me/dog"]
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    later = subprocess.run([Path(sys.executable).parent / "hf", *command[1:]], env=env, capture_output=True, text=True)
    assert later.returncode == 0, later.stderr
    assert set(hub.files["me/dog"]) == {trainer.LORA_FILE, "README.md", "validation/step-000002/00.png"}


@pytest.mark.parametrize("place", ["/storage/", "/commit/"])
def test_an_upload_that_stalls_is_given_up_and_loses_nothing(train, hub, push_here, monkeypatch, place):
    """The server takes what is sent and is silent; the client's own waits between its tries are skipped."""
    hub.refuse[place] = STALL
    monkeypatch.setattr(trainer, "HUB_TIMEOUT", 0.2)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", Mock(wraps=time, sleep=lambda seconds: None))
    began = time.monotonic()
    with pytest.raises(trainer.HubError, match="are safe in"):
        push_here()
    assert time.monotonic() - began < 60  # a stalled server says nothing for half a minute, each time
    assert len([path for _, path in hub.requests if place in path]) >= 3
    assert (Path(train.flags["output_dir"]) / trainer.LORA_FILE).exists() and not hub.files["me/dog"]


@pytest.mark.parametrize("place", ["/storage/", "/preupload/", "/info/lfs/"])
def test_an_upload_that_is_refused_midway_loses_nothing(train, hub, push_here, place):
    hub.refuse[place] = 403
    with pytest.raises(trainer.HubError, match="are safe in"):
        push_here()
    assert (Path(train.flags["output_dir"]) / trainer.LORA_FILE).exists()
    assert not hub.files["me/dog"]


def test_a_busy_hub_is_asked_again(hub, push_here):
    hub.refuse = {"/api/repos/create": [503, 0], "/commit/": [500, 429]}
    push_here()
    assert trainer.LORA_FILE in hub.files["me/dog"]


@pytest.mark.parametrize("status", [500, 0])
def test_a_hub_that_does_not_answer_is_noticed_before_training(train, hub, push_here, status):
    hub.refuse["/api/repos/create"] = status
    with pytest.raises(trainer.HubError, match="the Hub does not answer"):
        push_here()
    assert not Path(train.flags["output_dir"]).exists()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_repository_costs_seconds_not_hours(train, hub, push_here, capfd, status):
    hub.refuse["/api/repos/create"] = status
    with pytest.raises(trainer.UserError, match="--push_to_hub cannot create me/dog") as failure:
        push_here()
    assert not Path(train.flags["output_dir"]).exists()
    assert_nowhere(TOKEN, train.folder, str(failure.value), *capfd.readouterr())


@pytest.fixture
def titles():
    """Every command line on this machine that holds the token, looked for until the test ends."""
    found, over = set(), threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    found.update([path.read_bytes()] if TOKEN.encode() in path.read_bytes() else [])

    watch = threading.Thread(target=look)
    watch.start()
    yield found
    over.set()
    watch.join()


def test_exit_code_3_for_a_hub_that_fails_and_the_token_is_nowhere(train, hub, titles):
    """It breaks the line and has errors of its own, in turn, as often as it is asked."""
    hub.refuse["/commit/"] = [500, BREAK, 500, BREAK, 500, BREAK]
    told = push(train, hub, hub_model_id="me/dog", env={"HF_TOKEN": TOKEN})
    output = Path(train.flags["output_dir"])
    assert told.returncode == 3, told.stderr
    assert "error: the upload to me/dog failed" in told.stderr and "Traceback" not in told.stderr
    assert (output / trainer.LORA_FILE).exists() and (output / "checkpoint-2" / "state.pt").exists()
    assert list((output / "logs").rglob("events.out.tfevents.*")) and not hub.files["me/dog"]
    assert_nowhere(TOKEN, train.folder, told.stdout, told.stderr)
    assert not titles


@pytest.mark.parametrize("status", [401, 403])
def test_exit_code_2_for_a_repository_that_others_own_and_the_token_is_nowhere(train, hub, titles, status):
    """It exists, and may be read; with 401 nothing may."""
    hub.files["them/dog"], hub.private["them/dog"] = {"README.md": b"theirs"}, False
    hub.read_only.add("them/dog")
    hub.refuse = {"/auth-check": 401, "/repos/create": 401} if status == 401 else {}
    told = push(train, hub, hub_model_id="them/dog", env={"HF_TOKEN": TOKEN})
    assert told.returncode == 2, told.stderr
    assert told.stderr.startswith("error: --push_to_hub cannot create them/dog") and told.stderr.count("\n") == 1
    assert not Path(train.flags["output_dir"]).exists() and hub.files["them/dog"] == {"README.md": b"theirs"}
    assert_nowhere(TOKEN, train.folder, told.stdout, told.stderr)
    assert not titles


def test_the_token_is_in_no_process_title_while_training(train, hub):
    output = Path(train.flags["output_dir"])
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(train.folder / "home")}
    words = train.words(push_to_hub=True, hub_token=TOKEN, hub_model_id="me/dog", max_train_steps=100_000)
    process = subprocess.Popen(
        [sys.executable, str(trainer.__file__), *words], env={**os.environ, **env}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 120
    while not (output / trainer.CONFIG_FILE).exists() and time.time() < deadline:
        time.sleep(0.2)
    titles = {path: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.exists()}
    process.terminate()
    told = process.communicate(timeout=60)[1]
    assert str(trainer.__file__).encode() in titles[Path(f"/proc/{process.pid}/cmdline")]
    assert not any(TOKEN.encode() in title for title in titles.values())
    assert "others on this machine can see --hub_token" in told and TOKEN not in told
    assert_nowhere(TOKEN, train.folder)


def test_a_base_model_of_the_hub(train, hub, tiny):
    """Downloaded once, pinned by its commit; a second run is offline and encodes nothing."""
    hub.files["me/tiny"] = {
        path.relative_to(tiny).as_posix(): path.read_bytes() for path in tiny.rglob("*") if path.is_file()
    }
    hub.private["me/tiny"] = False
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(train.folder / "home")}
    flags = {"pretrained_model_name_or_path": "me/tiny", "log_level": "info", "center_crop": True}
    told = train.shell(env={**env, "HF_HUB_OFFLINE": "0"}, **flags)
    assert told.returncode == 0, told.stderr
    assert "7 pictures and prompts encoded" in told.stdout
    told = train.shell(env={**env, "HF_HUB_OFFLINE": "1"}, **flags)
    assert told.returncode == 0, told.stderr
    assert "0 pictures and prompts encoded, 7 found" in told.stdout
    told = train.shell(env={**env, "HF_HUB_OFFLINE": "0"}, **{**flags, "pretrained_model_name_or_path": "me/absent"})
    assert told.returncode == 2 and "me/absent" in told.stderr and "Traceback" not in told.stderr


def test_what_cannot_be_a_name_is_not_asked_for_again(hub, push_here, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.time, "sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(trainer.UserError, match="cannot create my lora: .*; choose a --hub_model_id"):
        push_here(hub_model_id=None, output_dir=tmp_path / "my lora")


def test_the_card_has_no_pictures_of_the_data(train, pictures, tmp_path):
    own = tmp_path / "a" / "samples" / "mine.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"x")
    card = (train(output_dir=tmp_path / "a") / "README.md").read_text()
    assert own.exists() and str(tmp_path) not in card.partition("```bash")[2]
    assert "5 pictures, 24 to 40 pixels wide and 32 high" in card and "samples/" not in card
    assert "| Optimizer | adamw, rate 0.01, constant |" in card and "| Class |" not in card
    assert "--output_kohya_format` writes one" in card
    card = (train(output_dir=tmp_path / "b", output_kohya_format=True) / "README.md").read_text()
    assert f"download `{trainer.KOHYA_FILE}`" in card

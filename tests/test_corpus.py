"""Every input of the corpus comes to what its table says: a result, or one sentence and nothing left behind."""

import re
from pathlib import Path

import pytest
import report
import torch
from corpus import CASES, FINE, Stock
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer


@pytest.fixture(scope="module")
def stock(tiny, pictures, tmp_path_factory):
    import conftest

    conftest.reset_accelerate()
    train = conftest.Trainer(tiny, pictures, tmp_path_factory.mktemp("stock"))
    return Stock(tiny, train(checkpointing_steps=1) / "checkpoint-1")


def outcome(train, flags: dict, runs: bool) -> str:
    """What is said of a command line, or "" if nothing."""
    try:
        args = train.args(**flags)
        if runs:
            trainer.main(args)
    except trainer.UserError as error:
        return str(error)
    return FINE


def test_the_corpus_is_large():
    assert len(CASES) >= 80


@pytest.mark.parametrize("name", CASES)
def test_corpus(train, stock, tmp_path, name):
    case = CASES[name]
    (tmp_path / "made").mkdir()
    flags = case.make(tmp_path / "made", stock)
    told = outcome(train, flags, case.runs)
    assert not list(tmp_path.rglob("canary"))
    if case.outcome == FINE:
        assert told == FINE
        if "instance_data_dir" in flags:
            loaded = [trainer.load_picture(path) for path in trainer.list_pictures("", flags["instance_data_dir"])]
            assert loaded and all(image.mode == "RGB" for image in loaded)
        return
    assert re.search(case.outcome, told), told
    assert "\n" not in told and "\x1b" not in trainer.printable(told) and len(told) < 800
    output = Path(train.flags["output_dir"])
    assert not output.exists() or not (output / trainer.LORA_FILE).exists()
    assert case.runs or not output.exists()


def test_all_that_is_fine_trains_at_once(train, stock, tmp_path):
    """Pictures of every kind and name, each in its shape, and counted in card and report."""
    together = tmp_path / "together"
    fine = [name for name, case in CASES.items() if case.outcome == FINE and name.startswith(("picture", "name"))]
    for number, name in enumerate(fine):
        folder = together / f"{number:02d}"
        folder.mkdir(parents=True)
        CASES[name].make(folder, stock)
    count = len(trainer.list_pictures("", together, recursive=True))
    assert count >= len(fine) > 30
    flags = {"aspect_ratio_buckets": "auto", "resolution": 32, "center_crop": True, "max_train_steps": 3}
    output = train(instance_data_dir=together, recursive=True, **flags)
    assert all(tensor.isfinite().all() for tensor in load_file(output / trainer.LORA_FILE).values())
    assert f"on {count} pictures" in (output / "README.md").read_text()
    assert f"{count} pictures, rank 4" in report.make_report(output)


def test_a_state_that_would_run_code_is_armed(train, stock, tmp_path):
    flags = CASES["checkpoint: a state with a pickle that would run code"].make(tmp_path, stock)
    torch.load(flags["resume_from_checkpoint"] / "state.pt", weights_only=False)
    assert list(tmp_path.rglob("canary"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_trap_29_each_orientation_is_turned_upright(train, tmp_path, stock, orientation):
    """Where the red half comes to lie, by the EXIF standard."""
    case = CASES[f"picture: EXIF orientation {orientation}"]
    image = trainer.load_picture(next(iter(case.make(tmp_path, stock).values())) / "a.jpg")
    red = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}[orientation]
    width, height = image.size
    spot = {
        "left": (2, height // 2),
        "right": (width - 3, height // 2),
        "top": (width // 2, 2),
        "bottom": (width // 2, height - 3),
    }[red]
    r, _, b = image.getpixel(spot)
    assert r > 150 > b


def numeric_flags() -> dict[str, object]:
    """Every flag that takes a number."""
    words = (trainer.patterns, trainer.block_rules, str.lower)
    actions = [a for a in trainer.make_parser()._actions if callable(a.type) and a.type not in words]
    return {action.dest: action for action in actions if action.dest != "local_rank"}


ZERO_IS_FINE = {
    "dataloader_num_workers",
    "lr_warmup_steps",
    "prior_loss_weight",
    "lora_dropout",
    "caption_dropout",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_weight_decay_text_encoder",
    "seed",
    "noise_offset",
    "min_timestep",
    "max_timestep",
    "prodigy_beta3",
}


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e30", "1" + "0" * 30, "", "x"])
@pytest.mark.parametrize("flag", numeric_flags())
def test_every_number_has_its_bounds(train, flag, value):
    told = outcome(train, {flag: value}, runs=False)
    if value == "0" and flag in ZERO_IS_FINE:
        assert told == FINE
    else:
        assert f"--{flag}" in told and "Traceback" not in told, told

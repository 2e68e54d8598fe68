"""Base models and VAEs that are one `.safetensors` file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from diffusers import StableDiffusionXLPipeline
from original_format import write_single_file, write_vae_file
from safetensors.torch import load_file, save_file

import train_dreambooth_lora_sdxl as trainer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Its encoders are told apart by their widths, as SDXL's are."""
    return build_tiny(tmp_path_factory.mktemp("tiny") / "model", widths=(64, 96))


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory) -> Path:
    return write_single_file(tiny, tmp_path_factory.mktemp("civitai") / "my model.safetensors")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Where single files are unpacked, for all runs."""
    monkeypatch.setattr(trainer, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def unpacked(home: Path) -> Path:
    (folder,) = home.glob("*/unpacked-*")
    return folder


def test_a_single_file_trains_as_its_folder_does(train, tiny, single, tmp_path, home):
    flags = {"validation_prompt": "a dog", "num_validation_images": 1, "max_train_steps": 3}
    of_folder = train(**flags, output_dir=tmp_path / "folder")
    of_file = train(
        **flags, output_dir=tmp_path / "file", pretrained_model_name_or_path=single, single_file_config=tiny
    )
    first, second = (load_file(output / trainer.LORA_FILE) for output in (of_folder, of_file))
    assert all(torch.equal(first[name], second[name]) for name in first)
    theirs, ours = (
        StableDiffusionXLPipeline.from_pretrained(folder).components for folder in (tiny, unpacked(home))
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        tensors = theirs[part].state_dict()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in ours[part].state_dict().items())
    assert ours["scheduler"].config.prediction_type == "epsilon"
    made = unpacked(home).stat().st_mtime_ns
    train(**flags, output_dir=tmp_path / "new", pretrained_model_name_or_path=single, single_file_config=tiny)
    assert unpacked(home).stat().st_mtime_ns == made  # once for all output folders
    flags |= {"cache_dir": tmp_path / "downloads"}
    train(**flags, output_dir=tmp_path / "new", pretrained_model_name_or_path=single, single_file_config=tiny)
    assert unpacked(tmp_path / "downloads")


def test_a_run_goes_on_though_its_file_has_moved(train, tiny, single, tmp_path):
    flags = {"single_file_config": tiny, "max_train_steps": 3}
    train(**{**flags, "max_train_steps": 2}, pretrained_model_name_or_path=single)
    moved = tmp_path / "scratch" / single.name
    moved.parent.mkdir()
    shutil.copy(single, moved)
    output = train(**flags, pretrained_model_name_or_path=moved, resume_from_checkpoint="latest")
    assert (output / "last-3").exists()


@pytest.mark.parametrize(("markers", "spacing"), [(("v_pred",), "leading"), (("v_pred", "ztsnr"), "trailing")])
def test_the_markers_of_v_prediction_are_read_and_told(train, tiny, tmp_path, capsys, home, markers, spacing):
    path = write_single_file(tiny, tmp_path / "noob.safetensors", *markers)
    train(pretrained_model_name_or_path=path, single_file_config=tiny, log_level="info")
    assert "predicts velocity" + ", zero terminal SNR" * (len(markers) > 1) in capsys.readouterr().out
    config = json.loads((unpacked(home) / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction" and config["timestep_spacing"] == spacing
    assert config["rescale_betas_zero_snr"] == (len(markers) > 1)


def test_a_vae_of_one_file_is_that_vae_with_the_bases_configuration(train, tiny, tmp_path):
    path = write_vae_file(tiny, tmp_path / "vae.safetensors")
    flags = {"pretrained_vae_model_name_or_path": path}
    first = load_file(train(output_dir=tmp_path / "own") / trainer.LORA_FILE)
    second = load_file(train(**flags, output_dir=tmp_path / "other") / trainer.LORA_FILE)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_half_precision_files_stay_so_on_the_disk(train, tiny, tmp_path, home):
    path = write_single_file(tiny, tmp_path / "half.safetensors", dtype=torch.float16)
    train(pretrained_model_name_or_path=path, single_file_config=tiny)
    weights = load_file(next((unpacked(home) / "unet").glob("*.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_what_is_no_whole_model_is_refused_at_the_door(train, tiny, single, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(single.read_bytes()[:-100])
    with pytest.raises(trainer.UserError, match="cut off"):
        train.args(pretrained_model_name_or_path=cut)
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, lora)
    with pytest.raises(trainer.UserError, match="is not a complete SDXL model, as it lacks model.diffusion_model"):
        train.args(pretrained_model_name_or_path=lora)
    cosxl = write_single_file(tiny, tmp_path / "cosxl.safetensors", "edm_vpred.sigma_max")
    with pytest.raises(trainer.UserError, match="CosXL"):
        train.args(pretrained_model_name_or_path=cosxl)
    with pytest.raises(trainer.UserError, match=r"--pretrained_vae_model_name_or_path: .* lacks encoder"):
        train.args(pretrained_vae_model_name_or_path=lora)


def test_a_file_that_lacks_weights_is_no_traceback(train, tiny, single, tmp_path):
    tensors = load_file(single)
    del tensors["model.diffusion_model.out.2.weight"]
    save_file(tensors, tmp_path / "holes.safetensors")
    with pytest.raises(trainer.UserError, match="cannot be unpacked"):
        train(pretrained_model_name_or_path=tmp_path / "holes.safetensors", single_file_config=tiny)
    assert not list(Path(train.flags["output_dir"]).rglob("*.safetensors"))


def test_offline_without_a_configuration_the_flag_is_named(train, single):
    with pytest.raises(trainer.UserError, match=r"--single_file_config, by default SDXL base 1.0 from the Hub"):
        train(pretrained_model_name_or_path=single)
    with pytest.raises(trainer.UserError, match="--single_file_config, /nowhere"):
        train(pretrained_model_name_or_path=single, single_file_config="/nowhere")
    assert not list(Path(train.flags["output_dir"]).rglob("*.safetensors"))

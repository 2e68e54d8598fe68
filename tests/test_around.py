"""Where people are: the notebook, accelerate's configurations, one copied file with its requirements inside."""

import os
import re
import subprocess
import sys

import nbformat
import pytest
import tomllib
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, SCRIPT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "examples" / "SDXL_DreamBooth_LoRA.ipynb"


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """With the toy world in its one cell of parameters; what is installed already stays."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    toy = ROOT / "examples" / "toy_world"
    changes = {
        "pretrained_model_name_or_path": str(toy / "model"),
        "variant": None,
        "pretrained_vae_model_name_or_path": None,
        "instance_data_dir": str(toy / "subjects" / "sks_dog"),
        "resolution": 64,
        "max_train_steps": 3,
        "validation_steps": 100,
        "mixed_precision": "no",
        "num_validation_images": 1,
    }
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += f"\nSETTINGS |= {changes!r}\n"
    install = next(cell for cell in notebook.cells if "%pip" in cell.source)
    install.source = install.source.replace("%pip", "# %pip")
    for name in ("train_dreambooth_lora_sdxl.py", "requirements_sdxl.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "drawn.png").exists() and (tmp_path / "lora-sks-dog" / "progress.png").exists()
    told = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert told.count("Steps") >= 2 and "Done" in told


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerates_own_reader_takes_every_configuration(path):
    config = load_config_from_file(str(path))
    assert set(yaml.safe_load(path.read_text())) <= {*vars(config), "dynamo_config"}
    assert (config.num_processes > 1) == ("several" in path.stem) and config.use_cpu == (path.stem == "cpu")


def test_a_configuration_trains(train):
    config = ROOT / "examples" / "accelerate" / "cpu.yaml"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config))
    told = train.shell(*launcher, log_level="info")
    assert told.returncode == 0 and told.stdout.startswith("Subject"), told.stderr


def test_one_copied_file_brings_its_requirements():
    """PEP 723: what `uv run train_dreambooth_lora_sdxl.py` installs is requirements_sdxl.txt."""
    block = re.search(r"(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$", SCRIPT.read_text())[1]
    inline = tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in block.splitlines(True)))
    lines = (ROOT / "requirements_sdxl.txt").read_text().splitlines()
    assert inline["dependencies"] == [line for line in lines if line and not line.startswith("#")]
    assert inline["requires-python"] == ">=3.10"


def test_spawned_processes_can_import_the_script(train, tmp_path):
    """What Windows and macOS do: nothing in the module needs a fork."""
    program = (
        "import multiprocessing, sys\n"
        "import train_dreambooth_lora_sdxl as trainer\n"
        "def work(words):\n    trainer.main(trainer.parse_args(words))\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=work, args=(sys.argv[1:],))\n"
        "    process.start()\n    process.join()\n    sys.exit(process.exitcode)\n"
    )
    (tmp_path / "program.py").write_text(program)
    told = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), *train.words(dataloader_num_workers=2)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert told.returncode == 0, told.stderr

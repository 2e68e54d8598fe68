"""Machines as people have them: terminals that close, readers that go away, folders with files, locks and logins of
others, paths as a shell writes them, runs that are moved.
"""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT
from safetensors.torch import load_file, save_file

import train_dreambooth_lora_sdxl as trainer


def same(first: Path, second: Path) -> bool:
    ours, theirs = (load_file(folder / trainer.LORA_FILE) for folder in (first, second))
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.1)


def begun(output: Path) -> bool:
    """Whether a run has written its first numbers, or has a checkpoint."""
    history = output / trainer.HISTORY_FILE
    return (history.exists() and history.stat().st_size > 0) or bool(trainer.list_checkpoints(output))


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR2", "SIGXCPU"])
def test_what_ends_a_program_by_default_stops_a_run_well(train, name):
    output, signum = Path(train.flags["output_dir"]), getattr(signal, name)
    run = subprocess.Popen(
        [sys.executable, str(SCRIPT), *train.words(max_train_steps=100_000)], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: begun(output))
    run.send_signal(signum)
    _, told = run.communicate(timeout=60)
    assert run.returncode == 128 + signum
    assert "checkpoint and LoRA are written. Go on with" in told and "Traceback" not in told
    assert trainer.list_checkpoints(output) and (output / trainer.LORA_FILE).exists()


def test_under_nohup_a_hang_up_changes_nothing(train):
    output = Path(train.flags["output_dir"])
    words = ["nohup", sys.executable, str(SCRIPT), *train.words(max_train_steps=100_000)]
    run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=train.folder)
    try:
        wait_for(lambda: begun(output))
        run.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert run.poll() is None
    finally:
        run.terminate()
    assert run.wait(60) == 128 + signal.SIGTERM


@pytest.mark.parametrize("launched", [False, True])
def test_a_terminal_that_closes_costs_nothing(train, launched):
    """The signal comes, and whatever is written from then on has nowhere to go."""
    output, (ours, theirs) = Path(train.flags["output_dir"]), os.openpty()
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1"] if launched else []
    words = [sys.executable, *launcher, str(SCRIPT), *train.words(max_train_steps=100_000, log_level="info")]

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "preexec_fn": own_terminal}
    run = subprocess.Popen(words, **terminal, cwd=train.folder)
    os.close(theirs)
    os.set_blocking(ours, False)

    def read_until_begun() -> bool:
        try:
            while os.read(ours, 65536):
                pass
        except BlockingIOError:
            pass
        return begun(output)

    wait_for(read_until_begun)
    os.close(ours)
    wait_for(lambda: trainer.list_checkpoints(output) and (output / trainer.LORA_FILE).exists(), 60)
    run.wait(60)
    assert trainer.list_checkpoints(output)


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")])
def test_a_reader_that_goes_away_ends_nothing(train, tmp_path, streams):
    whole = train(output_dir=tmp_path / "whole")
    words = [sys.executable, str(SCRIPT), *train.words(log_level="info")]
    pipes = dict.fromkeys(streams, subprocess.PIPE)
    run = subprocess.Popen(words, **{"stderr": subprocess.PIPE, **pipes}, text=True)
    for name in streams:
        getattr(run, name).close()
    told = run.stderr.read() if "stderr" not in streams else ""
    assert run.wait(120) == 0 and "Error" not in told and "Traceback" not in told
    assert same(whole, Path(train.flags["output_dir"]))


def test_help_is_cut_by_head_without_a_word():
    told = subprocess.run(f"{sys.executable} {SCRIPT} --help | head -1", shell=True, capture_output=True, text=True)
    assert told.stdout.startswith("usage") and not told.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_from_the_start(train, tmp_path, closed):
    """The first file that is opened must not take their numbers, and be written into."""
    whole = train(output_dir=tmp_path / "whole")
    words = [sys.executable, str(SCRIPT), *train.words(log_level="info")]
    assert subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *words], capture_output=True).returncode == 0
    assert same(whole, Path(train.flags["output_dir"]))


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_all(tmp_path):
    """As node.js makes its pipes, and whatever hands its own on."""
    code = "import os, sys; sys.path.insert(0, sys.argv[1]); os.set_blocking(1, False)\n"
    code += "import train_dreambooth_lora_sdxl as t; t.keep_writing()\nfor i in range(40000): print(i)"
    run = subprocess.Popen([sys.executable, "-c", code, str(SCRIPT.parent)], stdout=subprocess.PIPE)
    time.sleep(15)
    assert run.stdout.read().split() == [str(i).encode() for i in range(40000)] and run.wait() == 0


def test_the_script_runs_where_stdout_is_no_file(train):
    """In a notebook's %run, or under runpy."""
    code = "import contextlib, io, runpy, sys; sys.argv = sys.argv[1:]; told = io.StringIO()\n"
    code += "with contextlib.redirect_stdout(told): runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "assert 'LoRA' in told.getvalue()"
    words = [sys.executable, "-c", code, str(SCRIPT), *train.words(log_level="info")]
    assert subprocess.run(words, capture_output=True).returncode == 0


def test_a_background_job_heeds_ctrl_c(train):
    """A shell that runs a script starts background jobs with SIGINT ignored; who sends it means it."""
    output = Path(train.flags["output_dir"])
    command = [sys.executable, str(SCRIPT), *train.words(max_train_steps=100_000)]
    words = ["sh", "-c", '"$@" & echo $!; wait', "sh", *command]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=train.folder)
    child = int(run.stdout.readline())
    wait_for(lambda: begun(output))
    os.kill(child, signal.SIGINT)
    run.wait(60)
    assert (output / trainer.LORA_FILE).exists()


def test_a_log_on_a_full_disk_ends_nothing(train):
    with open("/dev/full", "w") as full:
        words = [sys.executable, str(SCRIPT), *train.words(log_level="info")]
        run = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0 and "Errno" not in run.stderr


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """A home in which nobody is logged in to anything."""
    for name in ("WANDB_API_KEY", "COMET_API_KEY", "WANDB_MODE", "COMET_START_ONLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_CONFIG_HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.chdir(tmp_path)
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it keeps its settings for the life of the process


PRIOR = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2, "validation_prompt": "a dog"}


@pytest.mark.parametrize(("tracker", "cure"), [("wandb", "WANDB_MODE=offline"), ("comet_ml", "COMET_START_ONLINE=0")])
def test_a_tracker_without_a_login_is_refused_at_the_door(train, tmp_path, no_login, tracker, cure):
    flags = {"report_to": tracker, **PRIOR, "class_data_dir": tmp_path / "class"}
    told = train.shell(**flags)
    assert told.returncode == 2 and "Traceback" not in told.stderr, told.stderr
    assert f"--report_to {tracker} has no login here; run `" in told.stderr and cure in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "class").exists() and not Path(train.flags["output_dir"]).exists()
    variable, value = cure.split("=")
    assert trainer.is_set_up(tracker) is False
    train(dry_run=True, report_to=tracker)  # which starts none
    os.environ["RANK"] = "1"
    try:
        train.args(report_to=tracker)  # the first rank alone logs
    finally:
        del os.environ["RANK"]
    os.environ["WANDB_MODE"] = ""  # as a compose file writes what is not set
    assert trainer.is_set_up(tracker) is False
    os.environ[variable] = value
    try:
        assert trainer.is_set_up(tracker)
    finally:
        del os.environ[variable]


def test_all_trackers_are_those_that_are_set_up(train, no_login, capsys):
    assert trainer.chosen_trackers(train.args(report_to="all")) == ["tensorboard", "trackio"]
    told = capsys.readouterr().out
    assert "--report_to all leaves wandb out, which has no login here; run `wandb login`" in told
    assert "--report_to all leaves comet_ml out" in told


def test_trackers_that_accelerate_does_not_know_are_left_out(train, no_login, monkeypatch):
    monkeypatch.setattr(trainer.LoggerType, "list", lambda: ["tensorboard", "wandb"])
    assert trainer.chosen_trackers(train.args(report_to="all")) == ["tensorboard"]


@pytest.mark.parametrize("error", [RuntimeError, trainer.TrainingError, None])
def test_a_tracker_knows_how_the_run_ended(train, monkeypatch, capsys, error):
    """W&B shows failed runs as failed; a finish() that fails hides no error and ends no run."""
    from accelerate.tracking import WandBTracker

    codes, real = [], WandBTracker.start

    def start(self):
        real(self)
        finish = self.run.finish

        def noted(exit_code=None):
            codes.append(exit_code)
            finish(exit_code=exit_code)
            raise OSError("no network")

        self.run.finish = noted

    def loss(*_):
        raise error("power")

    monkeypatch.setattr(WandBTracker, "start", start)
    if error is None:
        assert (train(report_to="wandb", max_train_steps=1) / trainer.LORA_FILE).exists()
    else:
        monkeypatch.setattr(trainer, "diffusion_loss", loss)
        with pytest.raises(error, match="power"):
            train(report_to="wandb")
    assert codes == [int(error is not None)]
    assert "--report_to wandb did not finish (no network); training is not affected" in capsys.readouterr().out


def test_a_tracker_that_refuses_the_settings_is_finished(train, monkeypatch):
    from accelerate.tracking import WandBTracker

    runs = []

    def store(self, values):
        runs.append(self.run)
        raise RuntimeError("too long")

    monkeypatch.setattr(WandBTracker, "store_init_configuration", store)
    with pytest.raises(trainer.UserError, match="--report_to wandb does not start"):
        train(report_to="wandb")
    assert runs[0]._is_finished


@pytest.mark.parametrize("report_to", ["wandb", "all"])
def test_a_tracker_that_does_not_start_is_known_before_anything_expensive(
    train, tmp_path, monkeypatch, capsys, report_to
):
    """Its server refuses the key, say."""
    from accelerate.tracking import WandBTracker

    def start(self):
        raise RuntimeError("401\nand more")

    monkeypatch.setenv("COMET_START_ONLINE", "1")
    monkeypatch.setattr(WandBTracker, "start", start)
    flags = {"report_to": report_to, **PRIOR, "class_data_dir": tmp_path / "class", "max_train_steps": 1}
    if report_to == "all":
        output = train(**flags)
        assert "--report_to all: wandb does not start (401); run `wandb login`" in capsys.readouterr().out
        assert list((output / "logs").rglob("events.out.*"))
        return
    with pytest.raises(trainer.UserError, match=r"--report_to wandb does not start \(401\); run `wandb login`"):
        train(**flags)
    assert not list((tmp_path / "class").glob("*.png"))


OWN_FILES = [*trainer.OUTPUT_FILES, "progress.PNG"]


def test_what_this_script_did_not_write_is_moved_not_overwritten(train, tmp_path, capsys):
    """A project's folder as the output folder, with files and folders of every name that is written there."""
    output = Path(train.flags["output_dir"])
    names = [*OWN_FILES, "checkpoint-2/weights.bin", "checkpoint-1/state.pt", "validation/step-000000/00.png"]
    names += ["validation/step-000002/00.png", ".lock", ".project.tmp", "cache/x", "logs/x"]
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(f"mine: {name}")
    flags = {"validation_prompt": "a dog", "num_validation_images": 1, "log_level": "info"}
    train(**flags, output_kohya_format=True, checkpointing_steps=1)
    kept = [path.read_text() for path in output.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"mine"]
    assert sorted(kept) == sorted(f"mine: {name}" for name in names)
    assert f"are now in {output / 'earlier-1'}" in capsys.readouterr().out
    train(**flags, max_train_steps=3, resume_from_checkpoint="latest")
    assert [path.name for path in (output / "earlier-2").iterdir()] == ["README.md"]  # which may have been edited


def test_a_readme_alone_is_moved_and_said(train, capsys):
    output = Path(train.flags["output_dir"])
    output.mkdir()
    (output / "README.md").write_text("my project")
    train(log_level="info")
    assert f"README.md of {output} is now in {output / 'earlier-1'}" in capsys.readouterr().out
    assert (output / "earlier-1" / "README.md").read_text() == "my project"


def test_a_file_that_comes_while_it_trains_is_moved_too(train, monkeypatch, capsys):
    output, real = Path(train.flags["output_dir"]), trainer.diffusion_loss

    def loss(*arguments):
        (output / "README.md").write_text("mine")
        return real(*arguments)

    monkeypatch.setattr(trainer, "diffusion_loss", loss)
    train()
    assert (output / "earlier-1" / "README.md").read_text() == "mine" and "LoRA" in (output / "README.md").read_text()
    assert f"a README.md that this script did not write is now in {output / 'earlier-1'}" in capsys.readouterr().out


def test_a_link_to_nowhere_is_moved(train):
    output = Path(train.flags["output_dir"])
    output.mkdir()
    (output / "README.md").symlink_to(output / "notes" / "gone.md")
    train()
    assert (output / "earlier-1" / "README.md").is_symlink() and not (output / "README.md").is_symlink()


@pytest.mark.parametrize("name", ["cache", "validation"])
def test_a_file_where_a_folder_must_be_is_refused(train, name):
    output = Path(train.flags["output_dir"])
    output.mkdir()
    (output / name).write_text("mine")
    with pytest.raises(trainer.UserError, match=f"--output_dir .*/{name} cannot be written .Not a directory.; choose"):
        train.args(validation_prompt="a dog")


def test_what_cannot_be_moved_is_told_in_one_sentence(train, monkeypatch):
    output = Path(train.flags["output_dir"])
    output.mkdir()
    (output / "README.md").write_text("mine")

    def replace(self, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(trainer.UserError, match="README.md cannot be moved to .*1 .Operation not permitted"):
            trainer.set_aside(output, 0)
    assert (output / "README.md").read_text() == "mine"


def test_a_logging_folder_that_is_a_file_is_refused(train, tmp_path):
    (tmp_path / "logs").write_text("x")
    with pytest.raises(trainer.UserError, match="--logging_dir .* cannot be written"):
        train.args(report_to="tensorboard", logging_dir=tmp_path / "logs")


def test_an_edited_card_is_kept_when_a_run_goes_on(train):
    output = train(checkpointing_steps=1)
    with (output / "README.md").open("a") as file:
        file.write("# edited")
    history = trainer.read_history(output)
    train(max_train_steps=3, resume_from_checkpoint="latest")
    assert (output / "earlier-1" / "README.md").read_text().endswith("# edited")
    assert trainer.read_history(output)[: len(history)] == history


def test_a_run_that_began_again_before_its_first_checkpoint_leaves_no_folders(train, monkeypatch):
    """As a restart loop does, where the machine goes away early."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "diffusion_loss", lambda *_: (_ for _ in ()).throw(RuntimeError("power")))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="power"):
                train(resume_from_checkpoint="latest", validation_prompt="a dog", num_validation_images=1)
    assert not list(train(resume_from_checkpoint="latest").glob("earlier-*"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO, errno.EACCES])
def test_a_file_system_without_locks_is_said_and_trained_on(train, monkeypatch, capsys, number):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(trainer.fcntl, "flock", flock)
    assert (train() / trainer.LORA_FILE).exists()
    assert f"cannot be locked ({os.strerror(number)}): nothing keeps a second run out" in capsys.readouterr().out


@pytest.mark.parametrize("readable", [True, False])
def test_another_users_lock_that_nobody_holds_is_none(train, monkeypatch, capsys, readable):
    """Which can be read, or not even that; one that is held is heeded as far as it can be read."""
    real, output = os.open, Path(train.flags["output_dir"])

    def opened(path, flags, *rest, **more):
        if str(path).endswith(".lock") and (flags & os.O_RDWR or not readable):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *rest, **more)

    output.mkdir()
    lock = output / ".lock"
    lock.write_text("theirs")
    monkeypatch.setattr(os, "open", opened)
    assert (train() / trainer.LORA_FILE).exists() and lock.read_text() == "theirs"
    assert ("nothing keeps a second run out" in capsys.readouterr().out) == (not readable)
    if readable:
        holder = real(lock, os.O_RDONLY)
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(trainer.UserError, match="in use by another run"):
            train()
        os.close(holder)


def test_a_run_folder_can_be_moved(train, tmp_path, monkeypatch):
    """Its settings name the folder where it was: the command says which one is meant."""
    monkeypatch.chdir(tmp_path)
    train(output_dir="run", max_train_steps=2, checkpointing_steps=2)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    words = ["--config", "moved/" + trainer.CONFIG_FILE, "--resume_from_checkpoint", "latest", "--max_train_steps=3"]
    with pytest.raises(trainer.UserError, match="--output_dir run: was its folder moved. Add --output_dir"):
        trainer.parse_args(words)
    trainer.main(trainer.parse_args([*words, "--output_dir", "moved"]))
    assert (tmp_path / "moved" / "last-3").exists() and not (tmp_path / "run").exists()
    shutil.copy("moved/" + trainer.CONFIG_FILE, "settings.yaml")
    assert trainer.parse_args(["--config", "settings.yaml", "--output_dir=next"]).output_dir == "next"


def test_paths_are_expanded_as_a_shell_does(train, tmp_path, pictures, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DOGS", str(pictures))
    monkeypatch.chdir(tmp_path)
    args = train.args(output_dir="~/lora", instance_data_dir="${DOGS}", cache_latents_dir="$HOME/cache")
    assert args.output_dir == str(tmp_path / "lora") and args.instance_data_dir == str(pictures)
    assert args.cache_latents_dir == str(tmp_path / "cache")
    (tmp_path / "run.yaml").write_text("output_dir: ~/lora\nlogging_dir: $HOME/logs\n")
    args = train.args(config="~/run.yaml", output_dir=None)
    assert (args.output_dir, args.logging_dir) == (str(tmp_path / "lora"), str(tmp_path / "logs"))
    with pytest.raises(trainer.UserError, match=r"--output_dir \$NOWHERE/x: the variable \$NOWHERE is not set"):
        train.args(output_dir="$NOWHERE/x")
    for path, told in (("~nobodyx/lora", "user ~nobodyx"), ("${UNSET:-foo}/x", r"variable \$\{UNSET:-foo\}")):
        with pytest.raises(trainer.UserError, match=f"--output_dir .*: the {told} is not set"):
            train.args(output_dir=path)
    with pytest.raises(trainer.UserError, match="--output_dir is empty: is a variable of the shell not set"):
        train.args(output_dir="")
    (tmp_path / "$odd").mkdir()
    assert train.args(output_dir="$odd").output_dir == "$odd"  # it is there as it is


def test_every_flag_that_names_a_place_is_expanded():
    """By what its help calls its value, and by its name."""
    places = {
        action.dest
        for action in trainer.make_parser()._actions
        if re_place(action.dest) or any(word in str(action.metavar) for word in ("DIR", "FILE"))
    }
    assert places - {"validation_prompt", "config"} == set(trainer.PATH_FLAGS)  # which are expanded when read


def re_place(dest: str) -> bool:
    return dest.endswith(("_dir", "_path"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny, pictures):
    """A run with both kinds of file, text encoders and two checkpoints."""
    import conftest

    conftest.reset_accelerate()
    train = conftest.Trainer(tiny, pictures, tmp_path_factory.mktemp("finished"))
    flags = {"train_text_encoder": True, "text_encoder_lr": 1e-2, "rank": 2, "lora_alpha": 3.0}
    return train(**flags, output_kohya_format=True, checkpointing_steps=2, max_train_steps=3)


def test_a_runs_folder_or_its_state_is_resumed_from(train, finished, tmp_path):
    assert trainer.find_checkpoint(str(finished), tmp_path) == finished / "last-3"
    assert trainer.find_checkpoint(str(finished / "checkpoint-2" / "state.pt"), tmp_path) == finished / "checkpoint-2"
    with pytest.raises(trainer.UserError, match="holds no state .*--init_lora .* starts a new run from its weights"):
        train.args(resume_from_checkpoint=finished / trainer.LORA_FILE)
    with pytest.raises(trainer.UserError, match="names no checkpoint"):
        train.args(resume_from_checkpoint=finished / "README.md")
    assert train.args(resume_from_checkpoint="Last").resume_from_checkpoint == "latest"


@pytest.mark.parametrize("name", [trainer.LORA_FILE, trainer.KOHYA_FILE])
def test_a_new_run_begins_with_a_loras_weights(train, finished, tmp_path, name):
    """Of either form, at another alpha, with other data."""
    flags = {"rank": 2, "train_text_encoder": True, "lora_alpha": 5.0, "init_lora": finished / name}
    run = trainer.start(train.args(**flags))
    model = trainer.load_trainable(run)
    ours, theirs = trainer.lora_tensors(model), load_file(finished / trainer.LORA_FILE)
    assert set(ours) == set(theirs)
    for key in ours:
        scale = 5 / 3 if "lora_B" in key else 1
        torch.testing.assert_close(ours[key] * scale, theirs[key])
    train(**flags, instance_prompt="another prompt", max_train_steps=1, output_dir=tmp_path / "new")
    train(**{**flags, "init_lora": tmp_path / "nowhere"}, instance_prompt="another prompt", max_train_steps=2,
          output_dir=tmp_path / "new", resume_from_checkpoint="latest")  # fmt: skip


def test_rates_of_blocks_rslora_and_dora_begin_with_their_own_files(train, tmp_path):
    for number, flags in enumerate(
        [{"use_rslora": True, "lora_alpha": 7.0}, {"use_dora": True}, {"lora_unet_blocks": "mid_block=2,up_blocks.0"}]
    ):
        output = train(**flags, output_dir=tmp_path / str(number))
        model = trainer.load_trainable(trainer.start(train.args(**flags, init_lora=output / trainer.LORA_FILE)))
        theirs = load_file(output / trainer.LORA_FILE)
        for key, tensor in trainer.lora_tensors(model).items():
            torch.testing.assert_close(tensor, theirs[key])


def test_a_lora_that_does_not_fit_is_refused(train, finished, tmp_path):
    file = finished / trainer.LORA_FILE
    cases = [
        ({"rank": 2}, "which this run does not train; set the flags of the run that made it"),
        ({"train_text_encoder": True}, r"lora_A.weight is \(2, 64\), and in this run \(4, 64\); use --rank 2,"),
        ({"rank": 2, "train_text_encoder": True, "lora_unet_blocks": "mid_block"}, "--lora_layers, "),
        ({"rank": 2, "train_text_encoder": True, "use_dora": True}, "a plain LoRA that needs no --use_dora"),
        ({"train_text_encoder_ti": True, "instance_prompt": "a TOK"}, "reads no new tokens"),
        ({"output_dir": finished}, "is in --output_dir, where this run's own LoRA goes"),
    ]
    for flags, told in cases:
        with pytest.raises(trainer.UserError, match=f"--init_lora .*{told}"):
            train(init_lora=file, **flags)
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(trainer.UserError, match="--init_lora .* has no layer that this run trains"):
        train(init_lora=tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-1])
    for name in ("cut.safetensors", "nowhere"):
        with pytest.raises(trainer.UserError, match="is not a complete safetensors file; name a LoRA's"):
            train.args(init_lora=tmp_path / name)
    tensors = load_file(file)
    first = next(key for key in tensors if "unet" in key and "lora_B" in key)
    broken = {
        "half": {key: tensor for key, tensor in tensors.items() if key != first},
        "nan": {**tensors, first: tensors[first] * float("nan")},
        "empty": {key: tensor[:0] if "lora_A" in key else tensor[:, :0] for key, tensor in tensors.items()},
    }
    for name, content in broken.items():
        save_file(content, tmp_path / f"{name}.safetensors")
    save_file(tensors, tmp_path / "list.safetensors", {"lora_adapter_metadata": "[]"})
    save_file(tensors, tmp_path / "word.safetensors", {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'})
    pattern = {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 1}}'}
    save_file(tensors, tmp_path / "pattern.safetensors", pattern)
    for name in (*broken, "list", "word", "pattern"):
        with pytest.raises(trainer.UserError, match=f"{name}.safetensors (is damaged|has no layer)"):
            train(init_lora=tmp_path / f"{name}.safetensors", rank=2, train_text_encoder=True)
    named = {key.replace("layers.0", "layers.2"): key for key in tensors if "text_encoder." in key}
    last = {name: tensors[key].clone() for name, key in named.items()}
    save_file({**tensors, **last}, tmp_path / "last.safetensors")
    with pytest.raises(trainer.UserError, match="layers.2.* which this run does not train"):
        train(init_lora=tmp_path / "last.safetensors", rank=2, train_text_encoder=True)
    eighth = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}
    save_file(eighth, tmp_path / "fp8.safetensors")
    flags = {"rank": 2, "train_text_encoder": True, "max_train_steps": 1}
    train(init_lora=tmp_path / "fp8.safetensors", **flags, output_dir=tmp_path / "fp8")
    dora = train(use_dora=True, output_kohya_format=True, output_dir=tmp_path / "dora")
    with pytest.raises(trainer.UserError, match="lora_magnitude_vector, which this run does not train; .* --use_dora"):
        train(init_lora=dora / trainer.LORA_FILE, output_dir=tmp_path / "b")
    with pytest.raises(trainer.UserError, match="dora_scale, which this run does not train"):
        train(init_lora=dora / trainer.KOHYA_FILE, output_dir=tmp_path / "b")


def test_a_resume_names_the_pictures_that_changed(train, pictures, tmp_path):
    from PIL import Image

    made = tmp_path / "made"
    shutil.copytree(pictures, made)
    output = train(instance_data_dir=made)
    Image.new("RGB", (20, 20)).save(made / "0.png")
    (made / "1.png").unlink()
    Image.new("RGB", (20, 20), "red").save(made / "new.png")
    (made / "2.txt").write_text("another caption")
    told = "gone: 1.png; new: new.png; changed: 0.png; with another prompt: 2.png"
    with pytest.raises(trainer.UserError, match=rf"--resume_from_checkpoint .*\({told}\)"):
        train(instance_data_dir=made, max_train_steps=3, resume_from_checkpoint="latest")
    state = torch.load(output / "last-2" / trainer.STATE_FILE)
    del state["pictures"]  # as older versions have it
    torch.save(state, output / "last-2" / trainer.STATE_FILE)
    with pytest.raises(trainer.UserError, match="other pictures or prompts than before"):
        train(instance_data_dir=made, max_train_steps=3, resume_from_checkpoint="latest")


def test_web_uis_tell_the_checkpoints_of_a_run_apart(finished):
    """By the name that they list and the title that they show."""
    from safetensors import safe_open

    names = []
    for folder in (finished / "checkpoint-2", finished / "last-3", finished):
        with safe_open(folder / trainer.KOHYA_FILE, "pt") as file:
            metadata = file.metadata()
        assert metadata["ss_output_name"] == metadata["modelspec.title"]
        names.append(metadata["ss_output_name"])
    assert names == [f"{finished.name}-step00000002", f"{finished.name}-step00000003", finished.name]


def test_the_end_of_a_run_is_no_checkpoint_by_name(train):
    """Scripts that count them find as many as --checkpointing_steps and the limit make."""
    output = train(max_train_steps=7, checkpointing_steps=2, checkpoints_total_limit=2)
    assert {path.name for path in output.iterdir() if "checkpoint" in path.name} == {"checkpoint-4", "checkpoint-6"}
    assert (output / "last-7").is_dir()
    train(max_train_steps=9, checkpointing_steps=2, checkpoints_total_limit=2, resume_from_checkpoint="latest")
    names = {path.name for path in output.iterdir() if trainer.step_of(path) is not None}
    assert names == {"checkpoint-6", "checkpoint-8", "last-9"}
    assert trainer.find_checkpoint("latest", output) == output / "last-9" == trainer.find_checkpoint("last-9", output)
    output = train(max_train_steps=1, output_dir=output.parent / "all")
    train(max_train_steps=2, output_dir=output, resume_from_checkpoint="latest")
    assert (output / "last-1").exists() and (output / "last-2").exists()  # without a limit nothing goes


@pytest.mark.parametrize(
    ("steps", "expected"),
    [("0.1", 10), (".25", 25), ("2e-1", 20), ("7", 7), ("0", 0), ("500", 10), ("0.0", 0), ("1.0", 1), ("20.0", 20)],
)
def test_a_warm_up_may_be_a_share_of_the_steps(train, steps, expected):
    args = train.args(lr_warmup_steps=steps, lr_scheduler="cosine", max_train_steps=100)
    assert trainer.plan_steps(args, 5, 1).warmup_steps == expected


def test_sizes_and_seeds_as_other_trainers_write_them(train):
    for text in ("64x64", "64X64", "64,64", "64, 64", "(64, 64)", "64"):
        assert train.args(resolution=text).resolution == 64
    with pytest.raises(trainer.UserError, match="--resolution: '64x32' is no square.*--aspect_ratio_buckets 64x32"):
        train.args(resolution="64x32")
    with pytest.raises(trainer.UserError, match="--seed: '-1' is not .*; leave it out to have one drawn at random"):
        train.args(seed=-1)
    with pytest.raises(trainer.UserError, match="--lr_warmup_steps: '1.5' is not .* nor a share of the steps such as"):
        train.args(lr_warmup_steps="1.5")


def test_the_card_says_which_diffusers_draws_it_right(train):
    """0.30.3 draws at half strength, 0.34 is right."""
    card = (train(lora_alpha=2.0) / "README.md").read_text()
    assert "diffusers 0.34" in card

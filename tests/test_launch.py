"""`accelerate launch` in the ways in which people use it: quiet, with a configuration file, on two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SCRIPT
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")
TWO = (*LAUNCH, "--quiet", "--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no")  # on CPUs, with what follows
ON_CPUS = {"ACCELERATE_USE_CPU": "true"}
ALONE = (*LAUNCH, "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")


def test_accelerate_launch(train):
    told = train.shell(*ALONE, log_level="info")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("Subject") and "warn" not in told.stderr.lower()


def test_trap_5_accelerates_own_configuration_is_respected(train, tmp_path):
    """The file that write_basic_config() writes, with bf16 in it."""
    from accelerate.utils import write_basic_config

    config = tmp_path / "default_config.yaml"
    write_basic_config(mixed_precision="bf16", save_location=str(config))
    assert yaml.safe_load(config.read_text())["mixed_precision"] == "bf16"
    told = train.shell(*LAUNCH, "--config_file", str(config), log_level="info")
    assert told.returncode == 0, told.stderr
    assert "in bf16 on cpu" in told.stdout
    assert {t.dtype for t in load_file(Path(train.flags["output_dir"]) / trainer.LORA_FILE).values()} == {
        torch.float32
    }


@pytest.fixture(scope="module")
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_traps_7_31_34_37_two_processes_equal_one_with_twice_the_accumulation(train, tmp_path, free_port):
    flags = {
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "with_prior_preservation": True,
        "class_prompt": "a photo of a dog",
        "num_class_images": 3,
        "validation_prompt": "a dog",
        "num_validation_images": 3,
        "train_text_encoder": True,
        "random_flip": True,
        "learning_rate": 1e-3,
    }
    alone = train(
        **flags, output_dir=tmp_path / "alone", class_data_dir=tmp_path / "c1", gradient_accumulation_steps=4
    )
    # accelerate launch starts several processes for GPUs and MPI alone; torchrun, which it calls there, does it here
    two = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}")
    told = train.shell(
        *two,
        **flags,
        output_dir=tmp_path / "two",
        class_data_dir=tmp_path / "c2",
        gradient_accumulation_steps=2,
        log_level="info",
        env={"ACCELERATE_USE_CPU": "true"},
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("Subject") == 1 and "which is 6 passes" in told.stdout
    for index in range(3):
        first, second = (
            Image.open(tmp_path / folder / f"generated-{index:05d}.png").tobytes() for folder in ("c1", "c2")
        )
        assert max(abs(x - y) for x, y in zip(first, second, strict=True)) <= 2
    first, second = (load_file(folder / trainer.LORA_FILE) for folder in (alone, tmp_path / "two"))
    worst = max((first[name] - second[name]).abs().max().item() for name in first)
    assert worst < 1e-4, worst  # class pictures of another batch may differ by a grey level
    assert len(list((tmp_path / "two" / "validation").rglob("*.png"))) == 6
    assert (tmp_path / "two" / "checkpoint-4" / "state.pt").exists()


def test_gradients_are_shared_in_one_flat_tensor_of_four_bytes_a_parameter(train):
    """Once a step, whatever the accumulation; the frozen base is neither wrapped nor sent."""
    model = trainer.load_trainable(trainer.start(train.args(mixed_precision="bf16")))
    adapters = list(model.adapters.values())
    for number, adapter in enumerate(adapters):
        adapter.grad = torch.full_like(adapter, number)
    sent = []

    class TwoRanks:
        num_processes = 2

        def reduce(self, tensor, reduction):
            sent.append(tensor.nbytes)
            assert reduction == "mean" and tensor.dtype == torch.float32
            return tensor / 2

    trainer.share_gradients(TwoRanks(), adapters)
    assert sent == [4 * sum(adapter.numel() for adapter in adapters)]
    assert all((adapter.grad == number / 2).all() for number, adapter in enumerate(adapters))


LISTENING = """
import json, os, sys
sys.path.insert(0, os.path.dirname({script!r}))
import torch
import train_dreambooth_lora_sdxl as trainer
from torch.utils._python_dispatch import TorchDispatchMode

heard = []

class Ear(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in trainer.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            heard.append(func._opname + f" {{sum(t.nbytes for t in tensors)}}" * ("allreduce" in func._opname))
        return func(*args, **(kwargs or {{}}))

def loss(*arguments, real=trainer.diffusion_loss):
    heard.append("micro-batch begins")
    return real(*arguments)

def backward(*arguments, real=trainer.Accelerator.backward):
    real(*arguments)
    heard.append("micro-batch ends")

def train(run, model, *rest, real=trainer.train):
    heard.append(sum(adapter.numel() for adapter in model.adapters.values()))
    with Ear():
        return real(run, model, *rest)

trainer.diffusion_loss, trainer.Accelerator.backward, trainer.train = loss, backward, train
trainer.main(trainer.parse_args())
with open("heard-" + os.environ["RANK"] + ".json", "w") as file:
    json.dump(heard, file)
"""


def run_twice(program: str, words: list[str], folder: Path, port: int) -> None:
    """Run a program around the trainer in two processes; both must end well."""
    (folder / "program.py").write_text(program.format(script=str(trainer.__file__)))
    two = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")
    told = subprocess.run(
        [sys.executable, *two, "program.py", *words],
        env={**os.environ, **ON_CPUS},
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr


def test_processes_talk_once_a_step_and_never_while_they_accumulate(train, tmp_path, free_port):
    """What goes through torch.distributed, in order: one all-reduce a step, of 4 bytes a trained parameter, and the
    question whether a signal came, which the hosts ask each other; the last step is looked at, too.
    """
    words = train.words(gradient_accumulation_steps=3, max_train_steps=3, mixed_precision="bf16")
    run_twice(LISTENING, words, tmp_path, free_port)
    for rank in range(2):
        parameters, *heard = json.loads((tmp_path / f"heard-{rank}.json").read_text())
        step = [*["micro-batch begins", "micro-batch ends"] * 3, f"allreduce_ {4 * parameters}", "allreduce_ 8"]
        look = ["allreduce_ 4", "allreduce_ 32"]  # at the loss, and at those of the quarters of the timesteps
        assert parameters > 10_000 and heard[heard.index("micro-batch begins") :] == step * 3 + look


SLOW_DISK = """
import os, sys, time
sys.path.insert(0, os.path.dirname({script!r}))
import train_dreambooth_lora_sdxl as trainer

def find_sources(*arguments, real=trainer.find_sources):
    time.sleep(12 * (os.environ["RANK"] == "0"))
    return real(*arguments)

trainer.find_sources = find_sources
trainer.main(trainer.parse_args())
"""


def test_what_one_rank_prepares_may_take_longer_than_a_step(train, tmp_path, free_port):
    """A single file of 7 GB, a large data set: the others wait without a limit such as --ddp_timeout."""
    run_twice(SLOW_DISK, train.words(ddp_timeout=8), tmp_path, free_port)
    assert (Path(train.flags["output_dir"]) / trainer.LORA_FILE).exists()


def worst_difference(first: Path, second: Path) -> float:
    ours, theirs = (load_file(folder / trainer.LORA_FILE) for folder in (first, second))
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def children(process: subprocess.Popen) -> list[int]:
    """The processes that a launcher started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(path: Path, process: subprocess.Popen | None = None) -> None:
    deadline = time.time() + 120
    while not path.exists() and time.time() < deadline and (process is None or process.poll() is None):
        time.sleep(0.1)
    assert path.exists()


LONG = {
    "max_train_steps": 60,
    "checkpointing_steps": 10,
    "learning_rate": 1e-3,
    "resume_from_checkpoint": "latest",
    "log_level": "info",
}


def test_a_killed_worker_comes_back_and_another_number_of_ranks_goes_on(train, tmp_path, free_port):
    """`accelerate launch --max_restarts`; then one process takes the checkpoint of two."""
    alone = train(**LONG, output_dir=tmp_path / "alone", gradient_accumulation_steps=2)
    output = tmp_path / "two"
    launcher = (*TWO, "--num_processes=2", "--num_machines=1", "--max_restarts=3", f"--main_process_port={free_port}")
    process = subprocess.Popen(
        [*launcher, str(trainer.__file__), *train.words(**LONG, output_dir=output, ddp_timeout=15)],
        env={**os.environ, **ON_CPUS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for checkpoint in ("checkpoint-10", "checkpoint-20", "checkpoint-30"):
        wait_for(output / checkpoint / "state.pt", process)
        os.kill(children(process)[-1], signal.SIGKILL)
    told = process.communicate(timeout=300)
    assert process.returncode == 0, told[1]
    assert told[0].count("Done") == 1 and told[0].count("Subject") == 4, told[0]  # thrice started again
    assert worst_difference(alone, output) < 1e-6
    reset = {**LONG, "output_dir": tmp_path / "handed over", "gradient_accumulation_steps": 2}
    one = train(**{**reset, "resume_from_checkpoint": output / "checkpoint-10"})
    assert worst_difference(alone, one) < 1e-6


def test_a_launcher_that_accelerate_does_not_follow_is_noticed(train, free_port):
    told = train.shell(*TWO, "--num_processes=2", "--num_machines=1", f"--main_process_port={free_port}")
    assert told.returncode == 1 and "error: the launcher started 2 processes" in told.stderr  # 1 is the launcher's own


def test_machines_that_do_not_see_the_same_are_noticed(monkeypatch):
    monkeypatch.setattr(trainer, "gather_object", lambda mine: [*mine, (10, "a")])
    trainer.check_alike(10, "a")
    with pytest.raises(trainer.UserError, match=r"from steps \[0, 10\]; share --output_dir"):
        trainer.check_alike(0, "a")
    with pytest.raises(trainer.UserError, match="see different pictures"):
        trainer.check_alike(10, "b")


COUNTED = """
import os, sys
sys.path.insert(0, os.environ["TRAINER"])
import train_dreambooth_lora_sdxl as trainer
real = trainer.generate_latents
def draw(run, model, table, prompt, seeds, *others, **keywords):
    with open(f"{os.environ['DRAWN']}/{os.environ['RANK']}", "a") as file:
        print(prompt.text, *seeds, sep="|", file=file)
    return real(run, model, table, prompt, seeds, *others, **keywords)
trainer.generate_latents = draw
with trainer.one_sentence():
    trainer.main(trainer.parse_args())
"""


def test_two_ranks_share_out_what_is_drawn(train, tmp_path, free_port):
    """Of five class pictures, and of three validation pictures before and after training, each rank draws its own."""
    (tmp_path / "counted.py").write_text(COUNTED)
    (tmp_path / "drawn").mkdir()
    flags = {
        "max_train_steps": 1,
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "class",
        "class_prompt": "a dog",
        "num_class_images": 5,
        "sample_batch_size": 1,
        "validation_prompt": "a mug --s 1",
        "num_validation_images": 3,
        "validation_epochs": 1000,
    }
    launcher = (*TWO, "--num_processes=2", "--num_machines=1", f"--main_process_port={free_port}")

    def run() -> None:
        told = subprocess.run(
            [*launcher, str(tmp_path / "counted.py"), *train.words(**flags)],
            env={**os.environ, **ON_CPUS, "TRAINER": str(SCRIPT.parent), "DRAWN": str(tmp_path / "drawn")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert told.returncode == 0, told.stderr

    run()
    seeds = [trainer.position_seed(1, "class picture", index) for index in range(5)]
    for rank in (0, 1):
        drawn = [f"a dog|{seed}" for seed in seeds[rank::2]] + [f"a mug|{seed}" for seed in (1, 2, 3)[rank::2]] * 2
        assert (tmp_path / "drawn" / str(rank)).read_text().splitlines() == drawn
    assert len(list((tmp_path / "class").iterdir())) == 5
    assert len(list(Path(train.flags["output_dir"]).glob("validation/*/*.png"))) == 6
    (tmp_path / "class" / "generated-00003.png").unlink()
    shutil.rmtree(Path(train.flags["output_dir"]) / "cache")
    run()  # one rank has nothing to draw, and a prompt to encode
    assert (tmp_path / "drawn" / "0").read_text().count("a dog") == 4
    assert len(list((tmp_path / "class").iterdir())) == 5


SIGNALLED = {**LONG, "max_train_steps": 100_000, "checkpointing_steps": 100_000}


def begin(command: list[str], output: Path) -> subprocess.Popen:
    """Start a run that no checkpoint interrupts, and wait until it trains."""
    process = subprocess.Popen(
        command, env={**os.environ, **ON_CPUS}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(output / trainer.HISTORY_FILE, process)
    time.sleep(1)
    return process


def only_checkpoint(output: Path) -> Path:
    """The checkpoint that the signal asked for; it loads."""
    (checkpoint,) = trainer.list_checkpoints(output)
    assert torch.load(checkpoint / "state.pt")["step"] == trainer.step_of(checkpoint) > 0
    return checkpoint


def test_a_launcher_that_is_terminated_leaves_a_checkpoint(train):
    """`accelerate launch` with one process hands no signal on: the run hears of its launcher's death."""
    output = Path(train.flags["output_dir"])
    process = begin([*ALONE, str(SCRIPT), *train.words(**SIGNALLED)], output)
    (run,) = children(process)
    process.terminate()
    told = process.communicate(timeout=120)  # until the run, too, has closed its output
    deadline = time.time() + 60
    while Path(f"/proc/{run}").exists() and time.time() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{run}").exists() and process.returncode == -signal.SIGTERM
    assert "checkpoint and LoRA are written. Go on with" in told[1] and "Traceback" not in told[1]
    assert (output / trainer.LORA_FILE).exists() and only_checkpoint(output)


def test_two_ranks_and_their_launcher_that_are_terminated_leave_a_checkpoint(train, free_port):
    """As a cluster does it: all at once; the launcher hands it on once more."""
    output = Path(train.flags["output_dir"])
    launcher = (*TWO, "--num_processes=2", "--num_machines=1", f"--main_process_port={free_port}")
    process = begin([*launcher, str(SCRIPT), *train.words(**SIGNALLED)], output)
    ranks = children(process)
    assert len(ranks) == 2
    for number in (*ranks, process.pid):
        os.kill(number, signal.SIGTERM)
    told = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and "lost another one" not in told
    assert told.count("checkpoint and LoRA are written. Go on with") == 1
    step = trainer.step_of(only_checkpoint(output))
    again = {**SIGNALLED, "max_train_steps": step + 1, "gradient_accumulation_steps": 2}
    assert (train(**again) / f"checkpoint-{step}").exists()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_what_shards_is_refused(train, monkeypatch, kind):
    from accelerate.utils import DistributedType

    monkeypatch.setattr(trainer.Accelerator, "distributed_type", DistributedType[kind])
    with pytest.raises(trainer.UserError, match=f"configured for {kind}, .*choose plain multi-GPU"):
        train()
    assert not Path(train.flags["output_dir"]).exists()


HOSTS = """
set -e
mount -t tmpfs tmpfs /run
for host in 1 2; do
    ip netns add h$host
    ip -n h$host link set lo up
done
ip link add v1 netns h1 type veth peer name v2 netns h2
for host in 1 2; do
    ip -n h$host addr add 10.77.0.$host/24 dev v$host
    ip -n h$host link set v$host up
done
for host in 1 2; do
    GLOO_SOCKET_IFNAME=v$host ip netns exec h$host "$@" >$OUT/told$host 2>&1 &
    eval "host$host=$!"
    export MACHINE_RANK=1
done
CUT
wait $host1 || echo $? >$OUT/code1
wait $host2 || echo $? >$OUT/code2
"""
ON_HOST = """
import os, sys
words = ["launch", "--quiet", "--multi_gpu", "--num_machines=2", "--num_processes=2", "--mixed_precision=no",
         "--dynamo_backend=no", "--main_process_ip=10.77.0.1", "--main_process_port=29577",
         "--machine_rank=" + os.environ.get("MACHINE_RANK", "0"), *sys.argv[1:]]
os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.launch", *words[1:]])
"""


def on_two_hosts(train, folder: Path, cut: str = "", **flags) -> dict[str, str]:
    """Train on two hosts: network namespaces with a cable between them; returns what each host told."""
    folder.mkdir()
    script = HOSTS.replace("CUT", cut)
    command = [sys.executable, "-c", ON_HOST, str(trainer.__file__), *train.words(**flags)]
    environment = {**os.environ, **ON_CPUS, "OUT": str(folder)}
    told = subprocess.run(
        ["unshare", "-rmn", "bash", "-c", script, "bash", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_two_hosts_equal_one_process(train, tmp_path):
    flags = {**LONG, "max_train_steps": 12}
    alone = train(**flags, output_dir=tmp_path / "alone", gradient_accumulation_steps=2)
    told = on_two_hosts(train, tmp_path / "told", output_dir=tmp_path / "two", **flags)
    assert set(told) == {"told1", "told2"}, told
    assert worst_difference(alone, tmp_path / "two") < 1e-6


def test_a_host_that_is_cut_off_ends_the_other_in_time_and_the_run_goes_on(train, tmp_path):
    output = tmp_path / "two"
    cut = f"while [ ! -e {output}/checkpoint-10/state.pt ]; do sleep 0.1; done; ip -n h2 link set v2 down"
    flags = {**LONG, "max_train_steps": 100_000, "ddp_timeout": 5}
    told = on_two_hosts(train, tmp_path / "told", cut, output_dir=output, **flags)
    assert {"code1", "code2"} <= set(told), told
    for host in ("told1", "told2"):  # what follows the sentence is the launcher's
        told_first, sentence = told[host].split("error: ", 1)
        assert "Traceback" not in told_first
        assert "lost another one" in sentence and "--resume_from_checkpoint latest" in sentence.splitlines()[0]
    last = trainer.list_checkpoints(output)[-1]
    assert torch.load(last / "state.pt")["step"] >= 10

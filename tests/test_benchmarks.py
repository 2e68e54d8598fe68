"""Every benchmark runs, in a short form; its figures are README's in the long one."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from judge import Eye

TOY = ROOT / "examples" / "toy_world" / "model"
SHORT = {
    "learning.py": "--methods untrained plain --subjects sks_dog --max_train_steps 2 --pictures 1 --out {}",
    "crafts.py": "--methods EMA --subjects sks_dog --seeds 1 --steps 50 --pictures 1 --out {}",
    "advice.py": "--methods plain --subjects sks_dog --seeds 1 --steps 50 --pictures 1 --out {}",
    "half.py": "--methods plain --subjects sks_cat --seeds 1 --steps 50 --pictures 1 --out {}",
    "two_subjects.py": "--seeds 1 --steps 1 --class_pictures 1 --pictures 1 --out {}",
    "step_overhead.py": "--pairs 2",
    "memory.py": "--recipes half --resolution 512",
    "launches.py": "",
    "startup.py": "--turns 1",
    "torture.py": "--kills 4",
    "speed.py": f"--base {TOY} --resolution 64 --turns 1 --steps 1 --flags=--gradient_checkpointing",
}


def test_every_benchmark_is_here():
    written = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    others = {"full_size.py", "quick_start_picture.py", "half_precision.py"}  # used by others; README's picture
    assert written == {*SHORT, *others, "gpu.py"}


def test_every_part_of_the_gpus_benchmark_runs_on_a_cpu(tmp_path):
    """So that no mistake in typing costs time on a card."""
    words = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--tiny", "--seconds", "500", "--out", tmp_path / "gpu"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stderr
    found = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert found["machine"]["card"] == "CPU" and list(found["parts"]) == [
        "toy", "exact", "computed", "ceilings", "step", "graph", "kernels", "estimate", "smaller", "compile"
    ]  # fmt: skip
    for part, rows in found["parts"].items():
        assert rows[-1].get("done") and len(rows) > 1 and not [row for row in rows if "error" in row], (part, rows)
    assert all(row["same_bits"] for row in found["parts"]["exact"][:-1])
    assert all(row.get("worst_difference", 0) == 0 for row in found["parts"]["graph"])


@pytest.mark.parametrize("name", SHORT)
def test_a_benchmark_runs(name, tmp_path):
    words = SHORT[name].format(tmp_path).split()
    if name == "advice.py":  # which would train it for a minute
        torch.save(Eye().state_dict(), tmp_path / "eye.pt")
    told = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert told.returncode == 0, told.stderr
    assert re.search(r"\d %|\d GB|\d s a step|no trace|\| +\d", told.stdout)
    if name == "launches.py":  # what the adapters add is cut by at least half
        assert int(re.search(r"\((\d+) %\)", told.stdout)[1]) <= 50


@pytest.mark.parametrize("autocast", ["0", "1"])
def test_the_trainer_in_fp16_on_a_cpu(train, autocast):
    script, words = ROOT / "benchmarks" / "half_precision.py", train.words(mixed_precision="fp16", max_train_steps=1)
    told = subprocess.run([sys.executable, script, *words], capture_output=True, text=True,
                          env={**os.environ, "AUTOCAST": autocast})  # fmt: skip
    assert told.returncode == 0, told.stderr


def test_the_tables_of_methods_are_what_was_found(tmp_path):
    """Printed again from crafts.jsonl, which crafts.py wrote; README has some of the rows."""
    script = ROOT / "benchmarks" / "crafts.py"
    told = subprocess.run(
        [sys.executable, script, "--measured", "--out", tmp_path], capture_output=True, text=True, timeout=300
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout == (ROOT / "benchmarks" / "crafts.md").read_text(encoding="utf-8")
    measured = set(told.stdout.splitlines())
    for name in ("advice.py", "half.py", "two_subjects.py"):
        words = [sys.executable, ROOT / "benchmarks" / name, "--measured"]
        more = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
        measured |= set(more.stdout.splitlines())
    for name in ("docs/methods.md", "docs/zh/methods.md"):
        written = (ROOT / name).read_text(encoding="utf-8").splitlines()
        rows = [line for line in written if line.startswith("|") and " ± " in line]
        assert len(rows) > 9 and set(rows) <= measured

"""Seconds of a training step on this machine, for one set of flags after another, in turns.

    python benchmarks/speed.py                                           # SDXL's size, random weights, 1024 px
    python benchmarks/speed.py --base DIR --resolution 64 --flags= --flags=--base_precision=int8

Every set of flags runs its steps in a process of its own, which loads once (all must fit beside each other; on a card
give one or two --flags at a time). The sets take turns, so that a busy machine is busy for all of them. Please send
back what it says on your card: the first line tells which card that is.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SETS = [
    "",
    "--gradient_checkpointing=50",
    "--gradient_checkpointing",
    "--base_precision=int8",
    "--base_precision=nf4",
    "--train_batch_size=4",
]


def serve(base: Path | None, resolution: int, flags: list[str]) -> None:
    """In a process of its own: load, warm up with two steps, then time as many steps as each line of stdin says."""
    import torch
    from full_size import start_run, training_step, write_configuration

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = start_run(base or write_configuration(folder / "sdxl"), folder, flags, resolution)
        step = training_step(run)
        step()
        step()
        device = torch.cuda.get_device_name() if run.device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
        print(f"{device}, torch {torch.__version__}", flush=True)
        for line in sys.stdin:
            began = time.perf_counter()
            for _ in range(int(line)):
                step()
            print((time.perf_counter() - began) / int(line), flush=True)


def main() -> None:
    """Print a row a set of flags: the median of its turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a diffusers folder, of which the configuration counts")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--flags", action="append", help="a set of flags, in one word; give it again for the next")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in a turn")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.flags = SETS if args.flags is None else args.flags
    if args.serve is not None:
        serve(args.base, args.resolution, args.serve.split())
        return
    common = [sys.executable, __file__, f"--resolution={args.resolution}"]
    common += [f"--base={args.base}"] if args.base else []
    seconds: dict[str, list[float]] = {flags: [] for flags in args.flags}
    servers = {}
    for flags in args.flags:
        servers[flags] = subprocess.Popen(
            [*common, f"--serve={flags}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        told = servers[flags].stdout.readline().strip()
        if flags == args.flags[0]:
            print(told)
    for _ in range(args.turns):
        for flags, server in servers.items():
            server.stdin.write(f"{args.steps}\n")
            server.stdin.flush()
            seconds[flags].append(float(server.stdout.readline()))
    for flags, server in servers.items():
        server.stdin.close()
        server.wait()
        ratio = statistics.median(a / b for a, b in zip(seconds[flags], seconds[args.flags[0]], strict=True))
        print(f"{flags or 'as it comes':34}{statistics.median(seconds[flags]):8.3f} s a step, {ratio:.2f} x the first")


if __name__ == "__main__":
    main()

"""What a micro-step of the training loop costs beyond a bare step as peft computes it: forward, backward, AdamW.

    python benchmarks/step_overhead.py             # about 5 minutes on two CPU cores

Both run in one process, in turn, on the toy model, once more with all switched on that adds work to a step, and on a
UNet of over 100 M parameters. The figure is the median over pairs of (loop / bare - 1).
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1")
ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy_world"
sys.path.insert(0, str(ROOT))

import torch
from diffusers import UNet2DConditionModel

import train_dreambooth_lora_sdxl as trainer


def widened(folder: Path, channels: tuple[int, int, int]) -> Path:
    """The toy pipeline with a wider UNet of random weights, in a folder of its own."""
    for part in TOY.joinpath("model").iterdir():
        if part.name != "unet":
            (folder / part.name).symlink_to(part)
    config = UNet2DConditionModel.load_config(TOY / "model" / "unet")
    heads = [channel // 32 for channel in channels]
    unet = UNet2DConditionModel.from_config({**config, "block_out_channels": channels, "attention_head_dim": heads})
    print(f"a UNet of {sum(p.numel() for p in unet.parameters()) / 1e6:.0f} M parameters:", flush=True)
    unet.save_pretrained(folder / "unet")
    return folder


EVERYTHING = [
    "--report_to=tensorboard",
    "--snr_gamma=5",
    "--loss_type=huber",
    "--noise_offset=0.05",
    "--random_flip",
    "--caption_dropout=0.1",
    f"--masked_loss={TOY / 'subjects' / 'sks_mug'}",  # any grey pictures of the same names
    "--use_ema",
]


def time_steps(base: Path, out: Path, pairs: int, flags: list[str]) -> list[tuple[float, float]]:
    """Seconds of (loop, bare) steps: the loop's are read off train() itself, the bare ones run between them."""
    args = trainer.parse_args(
        [
            f"--pretrained_model_name_or_path={base}",
            f"--instance_data_dir={TOY / 'subjects' / 'sks_dog'}",
            "--report_to=none",
            "--instance_prompt=a photo of a sks dog",
            f"--output_dir={out}",
            "--resolution=64",
            "--train_batch_size=4",
            "--seed=0",
            f"--max_train_steps={pairs + 2}",
            "--log_level=warning",
            "--checkpointing_steps=100000",
            *flags,
        ]
    )
    stamps: dict[str, list[float]] = {"loop": [], "bare": []}
    original = trainer.train

    def paired(run: trainer.Run, model: trainer.TrainableSDXL, batch_at: Callable, *rest: Any) -> tuple:
        bare = make_bare_step(model, batch_at(0))
        optimizer_step = [time.perf_counter()]

        def batch_and_clock(n: int) -> trainer.Batch:
            """Close the loop's last step, run a bare one, open the next: batch_at is the first thing in a step."""
            stamps["loop"].append(time.perf_counter() - optimizer_step[0])
            for _ in range(random.choice((1, 2))):
                started = time.perf_counter()
                bare()
                last = time.perf_counter() - started
            stamps["bare"].append(last)
            optimizer_step[0] = time.perf_counter()
            return batch_at(n)

        return original(run, model, batch_and_clock, *rest)

    trainer.train = paired
    trainer.main(args)
    trainer.train = original
    return list(zip(stamps["loop"][2:], stamps["bare"][1:-1], strict=True))


def make_bare_step(model: trainer.TrainableSDXL, batch: trainer.Batch) -> Callable[[], None]:
    """Forward with peft's own LoRA layers under autocast, mean squared error, backward, fused AdamW: nothing else."""
    adapters = list(model.adapters.values())
    optimizer = torch.optim.AdamW(adapters, lr=0.0, fused=True)
    noise, timesteps = torch.randn_like(batch.mean), torch.full((len(batch.mean),), 500)
    added = {"text_embeds": batch.text[1], "time_ids": batch.add_time_ids}

    def step() -> None:
        model.use_fused_lora(False)
        with torch.autocast("cpu", model.dtype, enabled=model.dtype != torch.float32):
            prediction = model.unet(batch.mean, timesteps, batch.text[0], added_cond_kwargs=added).sample
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.use_fused_lora(True)

    return step


def main() -> None:
    """Print the overhead of both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder, "wide")
        wide.mkdir()
        for name, base, count, flags in (
            ("toy", TOY / "model", pairs, []),
            ("toy, everything on", TOY / "model", pairs, EVERYTHING),
            ("wide", widened(wide, (256, 512, 512)), max(10, pairs // 3), []),
        ):
            times = time_steps(base, Path(folder, name), count, flags)
            overhead = statistics.median(loop / bare - 1 for loop, bare in times)
            bare = statistics.median(bare for _, bare in times)
            print(
                f"{name}: bare step {1000 * bare:.0f} ms, the loop's {100 * overhead:+.1f} % ({len(times)} pairs)",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""How many operators one optimizer step dispatches: at batch 1 a fast GPU waits for Python to launch them.

    python benchmarks/launches.py             # about 2 minutes on a CPU

SDXL's own UNet at 1024 px on fake tensors, no checkpointing: alone (frozen, forward and backward to its input), in the
usual loop (peft's forward, autocast, clipping, foreach AdamW), and in ours. Views and transposes count.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from full_size import write_configuration
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import train_dreambooth_lora_sdxl as trainer

DTYPE = torch.bfloat16


def fake_unet(base: Path, adapted: bool) -> nn.Module:
    """The full-size UNet, ready to be given storage in fake mode."""
    unet = trainer.sketch(trainer.Source(str(base)), "unet")
    if adapted:
        flags = trainer.make_parser().parse_args(["--pretrained_model_name_or_path", str(base)])
        trainer.add_adapters(flags, unet)
    return unet


def predict(unet: nn.Module, latents: Tensor) -> Tensor:
    """One forward pass."""
    added = {"text_embeds": torch.empty(1, 1280, dtype=DTYPE), "time_ids": torch.empty(1, 6)}
    return unet(latents, torch.tensor([1]), torch.empty(1, 77, 2048, dtype=DTYPE), added_cond_kwargs=added).sample


def alone(unet: nn.Module, meter: trainer.MemoryMeter) -> dict[str, int]:
    """The frozen UNet, forward and backward to its input."""
    latents = torch.empty(1, 4, 128, 128, dtype=DTYPE, requires_grad=True)
    meter.operators = 0
    loss = predict(unet, latents).float().square().mean()
    forward = meter.operators
    loss.backward()
    return {"forward": forward, "backward": meter.operators - forward}


def usual(unet: nn.Module, meter: trainer.MemoryMeter) -> dict[str, int]:
    """The loop with peft's own forward under autocast, clip_grad_norm_, foreach AdamW."""
    adapters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = with_moments(torch.optim.AdamW(adapters, foreach=True))
    meter.operators = 0
    with torch.autocast("cpu", DTYPE):
        loss = predict(unet, torch.empty(1, 4, 128, 128, dtype=DTYPE)).float().square().mean()
    return rest_of_step(loss, adapters, optimizer, meter)


def ours(unet: nn.Module, meter: trainer.MemoryMeter) -> dict[str, int]:
    """Lean adapters, no autocast, fused AdamW."""
    model = trainer.TrainableSDXL(unet).train()
    adapters = list(model.adapters.values())
    optimizer = with_moments(torch.optim.AdamW(adapters, fused=True))
    text = (torch.empty(1, 77, 2048, dtype=DTYPE), torch.empty(1, 1280, dtype=DTYPE))
    latents = torch.empty(1, 4, 128, 128)
    meter.operators = 0
    loss = model(latents, torch.tensor([1]), text, torch.empty(1, 6)).float().square().mean()
    return rest_of_step(loss, adapters, optimizer, meter)


def with_moments(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer after its first step, which makes its moments."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def rest_of_step(
    loss: Tensor, adapters: list[nn.Parameter], optimizer: torch.optim.Optimizer, meter: trainer.MemoryMeter
) -> dict[str, int]:
    """Backward, clipping and the optimizer's step, counted one by one."""
    counts = {"forward": meter.operators}
    for name, work in (
        ("backward", loss.backward),
        ("clip", lambda: clip(adapters)),
        ("optimizer", optimizer.step),
    ):
        before = meter.operators
        work()
        counts[name] = meter.operators - before
    return counts


def clip(adapters: list[nn.Parameter]) -> None:
    """What clip_grad_norm_ does on a GPU, without the branch that fake tensors cannot take."""
    norm = torch.nn.utils.get_total_norm([adapter.grad for adapter in adapters], foreach=True)
    torch.nn.utils.clip_grads_with_norm_(adapters, 1.0, norm, foreach=True)


def count(base: Path, step: Callable, adapted: bool) -> dict[str, int]:
    """Run one step in fake mode."""
    unet = fake_unet(base, adapted)
    with FakeTensorMode(allow_non_fake_inputs=True), trainer.MemoryMeter() as meter:
        return step(trainer.give_storage(unet, DTYPE), meter)


def main() -> None:
    """Print the table and what is added to the frozen UNet."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = write_configuration(Path(folder, "sdxl"))
        totals = {}
        for name, step, adapted in (("alone", alone, False), ("usual", usual, True), ("ours", ours, True)):
            counts = count(base, step, adapted)
            totals[name] = sum(counts.values())
            told = "  ".join(f"{part} {number}" for part, number in counts.items())
            print(f"{name:6} {totals[name]:6} operators: {told}", flush=True)
    added = {name: totals[name] - totals["alone"] for name in ("usual", "ours")}
    share = 100 * added["ours"] / added["usual"]
    print(f"added to the frozen UNet: {added['usual']} by the usual loop, {added['ours']} by ours ({share:.0f} %)")


if __name__ == "__main__":
    main()

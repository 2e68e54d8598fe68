"""How many operators one optimizer step dispatches: at batch 1 a fast GPU waits for Python to launch them.

    python benchmarks/launches.py             # 2 to 4 minutes on a CPU

SDXL's own UNet at 1024 px on fake tensors, no checkpointing: alone (frozen, forward and backward to its input), in the
usual loop (peft's forward, autocast, clipping, foreach AdamW), and in ours. Views and transposes count. A second table
says by cause what either adds.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

import estimate_memory
import torch
from full_size import write_configuration
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import train_dreambooth_lora_sdxl as trainer

DTYPE = torch.bfloat16
CAUSES = {  # by the beginning of an operator's name; views are told by themselves
    "casts": ("_to_copy",),
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"),
    "views": ("_unsafe_view",),
    "clipping and optimizer": ("_foreach", "_fused", "linalg_vector_norm", "stack", "_local_scalar_dense"),
    "sums of gradients, zeros, copies": ("add.", "add_.", "copy_", "clone", "zeros", "empty", "new_", "fill_"),
    "scales and dropout": ("mul", "native_dropout"),
}


class ByCause(estimate_memory.MemoryMeter):
    """Counts operators by cause, too."""

    def __init__(self) -> None:
        super().__init__()
        self.causes = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, result = self.operators, super().__torch_dispatch__(func, types, args, kwargs)
        name = func.name().partition("::")[2] + "."
        known = (cause for cause, names in CAUSES.items() if name.startswith(names))
        self.causes["views" if func.is_view else next(known, "others")] += self.operators - before
        return result

    def restart(self) -> None:
        """Count from here."""
        self.operators, self.causes = 0, Counter()


def fake_unet(base: Path, adapted: bool) -> nn.Module:
    """The full-size UNet, ready to be given storage in fake mode."""
    unet = trainer.meta_model(trainer.Source(str(base)), "unet")
    if adapted:
        flags = trainer.make_parser().parse_args(["--pretrained_model_name_or_path", str(base)])
        trainer.add_adapters(flags, unet)
    return unet


def predict(unet: nn.Module, latents: Tensor) -> Tensor:
    """One forward pass."""
    added = {"text_embeds": torch.empty(1, 1280, dtype=DTYPE), "time_ids": torch.empty(1, 6)}
    return unet(latents, torch.tensor([1]), torch.empty(1, 77, 2048, dtype=DTYPE), added_cond_kwargs=added).sample


def alone(unet: nn.Module, meter: ByCause) -> dict[str, int]:
    """The frozen UNet, forward and backward to its input."""
    latents = torch.empty(1, 4, 128, 128, dtype=DTYPE, requires_grad=True)
    meter.restart()
    loss = predict(unet, latents).float().square().mean()
    forward = meter.operators
    loss.backward()
    return {"forward": forward, "backward": meter.operators - forward}


def usual(unet: nn.Module, meter: ByCause) -> dict[str, int]:
    """The loop with peft's own forward under autocast, clip_grad_norm_, foreach AdamW."""
    adapters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = with_moments(torch.optim.AdamW(adapters, foreach=True))
    meter.restart()
    with torch.autocast("cpu", DTYPE):
        loss = predict(unet, torch.empty(1, 4, 128, 128, dtype=DTYPE)).float().square().mean()
    return rest_of_step(loss, adapters, optimizer, meter)


def ours(unet: nn.Module, meter: ByCause) -> dict[str, int]:
    """Lean adapters, no autocast, fused AdamW."""
    model = trainer.TrainableSDXL(unet).train()
    adapters = list(model.adapters.values())
    optimizer = with_moments(torch.optim.AdamW(adapters, fused=True))
    text = (torch.empty(1, 77, 2048, dtype=DTYPE), torch.empty(1, 1280, dtype=DTYPE))
    latents = torch.empty(1, 4, 128, 128)
    meter.restart()
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
    loss: Tensor, adapters: list[nn.Parameter], optimizer: torch.optim.Optimizer, meter: ByCause
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


def count(base: Path, step: Callable, adapted: bool) -> tuple[dict[str, int], Counter]:
    """Run one step in fake mode; returns its operators by part and by cause."""
    unet = fake_unet(base, adapted)
    with FakeTensorMode(allow_non_fake_inputs=True), ByCause() as meter:
        return step(estimate_memory.give_storage(unet, DTYPE), meter), meter.causes


def main() -> None:
    """Print the table and what is added to the frozen UNet."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = write_configuration(Path(folder, "sdxl"))
        totals, causes = {}, {}
        for name, step, adapted in (("alone", alone, False), ("usual", usual, True), ("ours", ours, True)):
            counts, causes[name] = count(base, step, adapted)
            totals[name] = sum(counts.values())
            told = "  ".join(f"{part} {number}" for part, number in counts.items())
            print(f"{name:6} {totals[name]:6} operators: {told}", flush=True)
    added = {name: totals[name] - totals["alone"] for name in ("usual", "ours")}
    share = 100 * added["ours"] / added["usual"]
    print(f"added to the frozen UNet: {added['usual']} by the usual loop, {added['ours']} by ours ({share:.0f} %)")
    print(f"{'of these':36} {'usual':>6} {'ours':>6}")
    for cause in sorted(causes["usual"] | causes["ours"], key=lambda cause: -causes["usual"][cause]):
        usual_, ours_ = (causes[name][cause] - causes["alone"][cause] for name in ("usual", "ours"))
        print(f"{cause:36} {usual_:6} {ours_:6}")


if __name__ == "__main__":
    main()

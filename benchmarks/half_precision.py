"""The trainer in half precision on a CPU, as it computes on a GPU: also in fp16, and also as the usual loop does.

    python benchmarks/half_precision.py --mixed_precision=fp16 FLAGS             # adapters computed in half precision
    AUTOCAST=1 python benchmarks/half_precision.py --mixed_precision=bf16 FLAGS  # peft's forward under torch.autocast

accelerate refuses fp16 on a CPU, although PyTorch has the kernels and the scaler. crafts.py trains its half precision
methods with this file; what it finds is in crafts.md.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate import Accelerator

import train_dreambooth_lora_sdxl as trainer


class UsualSDXL(trainer.TrainableSDXL):
    """The model with peft's own forward under autocast; the frozen weights are in half precision, too."""

    def use_fused_lora(self, lean: bool) -> None:
        """Keep peft's forward."""
        super().use_fused_lora(False)

    def forward(self, *inputs: Any) -> torch.Tensor:
        """Predict under autocast."""
        with torch.autocast(self.unet.device.type, self.dtype):
            return super().forward(*inputs)


def allow_fp16() -> None:
    """Let the trainer run in fp16 on a CPU, with the scaler that accelerate has on a GPU."""
    make_usual = trainer.make_accelerator

    def make_accelerator(args: argparse.Namespace) -> Accelerator:
        if args.mixed_precision != "fp16":
            return make_usual(args)
        accelerator = make_usual(argparse.Namespace(**{**vars(args), "mixed_precision": "no"}))
        accelerator.state._mixed_precision = args.mixed_precision
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
        return accelerator

    trainer.make_accelerator = make_accelerator


if __name__ == "__main__":
    torch.set_num_threads(1)
    allow_fp16()
    if os.environ.get("AUTOCAST"):
        trainer.TrainableSDXL = UsualSDXL
    with trainer.one_sentence():
        trainer.main(trainer.parse_args())

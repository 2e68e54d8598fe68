"""The real SDXL without its weights: configuration files to compute on, random weights to measure on."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

import train_dreambooth_lora_sdxl as trainer

TOY = Path(__file__).parent.parent / "examples" / "toy_world" / "model"
CHANGES = {
    "unet": {
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "norm_num_groups": 32,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    },
    "text_encoder": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "intermediate_size": 5120,
        "projection_dim": 1280,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    },
}


def write_configuration(base: Path) -> Path:
    """Write a diffusers folder that has SDXL's configurations, the toy world's tokenizers, and no weights."""
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(TOY / part, base / part)
    shutil.copy(TOY / "model_index.json", base)
    for part, change in CHANGES.items():
        (base / part).mkdir()
        config = json.loads((TOY / part / "config.json").read_text())
        (base / part / "config.json").write_text(json.dumps({**config, **change}))
    return base


def start_run(base: Path, folder: Path, flags: list[str], resolution: int) -> trainer.Run:
    """A run of batch 1, rank 4, in bf16, with validation; flags may say otherwise."""
    common = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": TOY.parent / "subjects" / "sks_dog",
        "instance_prompt": "a photo of sks dog",
        "validation_prompt": "a photo of sks dog in a bucket",
        "output_dir": folder / "out",
        "resolution": resolution,
        "train_batch_size": 1,
        "mixed_precision": "bf16",
        "report_to": "none",
    }
    words = [f"--{key}={value}" for key, value in common.items()]
    return trainer.start(trainer.parse_args([*words, *flags], with_weights=False))


def random_weights(
    source: trainer.Source, part: str, dtype: torch.dtype, device: torch.device | None = None
) -> nn.Module:
    """A part with random weights, in place of load_part."""
    model = trainer.meta_model(source, part).to(dtype).to_empty(device=device or "cpu")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.fill_(1.0) if "norm" in name and name.endswith("weight") else tensor.normal_(0, 0.01)
        for name, tensor in model.named_buffers():
            if name.endswith("position_ids"):
                tensor.copy_(torch.arange(tensor.shape[-1])[None])
    return model.eval()


def random_batch(run: trainer.Run, model: trainer.TrainableSDXL, rows: int) -> trainer.Batch:
    """A micro-batch of random latents and embeddings, on the device."""
    side, device = run.args.resolution // run.vae_factor, run.device
    width = model.unet.config.cross_attention_dim
    pooled = model.unet.config.projection_class_embeddings_input_dim - 6 * model.unet.config.addition_time_embed_dim
    text = torch.randn(rows, 77, width, device=device, dtype=run.dtype), torch.randn(rows, pooled, device=device)
    sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * rows, device=device)
    moments = torch.rand(2, rows, 4, side, side, device=device)
    return trainer.Batch(*moments, (text[0], text[1].to(run.dtype)), sizes, torch.ones(rows, device=device), rows)


def training_step(run: trainer.Run) -> Callable[[], None]:
    """One whole optimizer step of the trainer's own parts on random pictures and prompts, weights random too."""
    trainer.load_part = random_weights
    model, device = trainer.load_trainable(run).train(), run.device
    batch = random_batch(run, model, run.args.train_batch_size)
    objective = trainer.make_objective(run.args, run.scheduler, device)
    optimizer, adapters = trainer.make_optimizer(run.args, model, 1), list(model.adapters.values())

    def step() -> None:
        trainer.diffusion_loss(model, objective, batch).total.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step

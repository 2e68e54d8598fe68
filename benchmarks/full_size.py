"""The real SDXL's configuration files, without weights: what the computed figures are computed on."""

import json
import shutil
from pathlib import Path

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

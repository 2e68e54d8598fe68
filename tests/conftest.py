"""A tiniest SDXL with random weights, a folder of pictures, and a way to run the trainer in this process."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_XET="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
    TRANSFORMERS_VERBOSITY="error",
    DIFFUSERS_VERBOSITY="error",
)

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
import train_dreambooth_lora_sdxl as trainer  # noqa: E402 (it brings bitsandbytes, which would talk)

torch.set_num_threads(1)  # two threads on two busy cores are 8 to 30 times slower
ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train_dreambooth_lora_sdxl.py"


def build_tiny(folder: Path, widths: tuple[int, int] = (64, 64), **unet_config) -> Path:
    """Write an SDXL pipeline of 0.2 M parameters with random weights; 16 px pictures have 8 x 8 latents."""
    import build
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tokenizers = [build.make_tokenizer("<|endoftext|>"), build.make_tokenizer("!")]
    encoders = []
    for width, tokenizer in zip(widths, tokenizers, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "WIDTH", width)
            encoders.append(build.make_text_encoder(tokenizer, bool(encoders)))
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
        force_upcast=False,
    )
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "transformer_layers_per_block": [1, 1],
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": [2, 4],
            "norm_num_groups": 4,
            "cross_attention_dim": sum(widths),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 48 + widths[1],
            **unet_config,
        }
    )
    pipeline = StableDiffusionXLPipeline(
        vae,
        *encoders,
        *tokenizers,
        unet,
        build.make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Five pictures of different shape and colour."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(5):
        blots = np.random.default_rng(index).integers(0, 256, (7, 7, 3), dtype=np.uint8)
        Image.fromarray(blots).resize((24 + 4 * index, 32), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


class Trainer:
    """Runs the trainer on the tiniest model, in this process or in one of its own."""

    def __init__(self, tiny: Path, pictures: Path, folder: Path) -> None:
        self.folder = folder
        self.flags = {
            "pretrained_model_name_or_path": tiny,
            "instance_data_dir": pictures,
            "instance_prompt": "a photo of sks dog",
            "resolution": 16,
            "output_dir": folder / "out",
            "max_train_steps": 2,
            "train_batch_size": 2,
            "seed": 1,
            "report_to": "none",
            "learning_rate": 1e-2,
            "log_level": "warning",
        }

    def words(self, **flags) -> list[str]:
        """Flags as a command line; a boolean is a switch, None leaves a flag out."""
        words = []
        for key, value in {**self.flags, **flags}.items():
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{key}")
            elif value is not None:
                words.append(f"--{key}={value}")
        return words

    def args(self, **flags):
        return trainer.parse_args(self.words(**flags))

    def __call__(self, **flags) -> Path:
        """Train in this process; returns the output folder."""
        args = self.args(**flags)
        trainer.main(args)
        return Path(args.output_dir)

    def shell(self, *launcher: str, env=None, **flags) -> subprocess.CompletedProcess:
        """Run as a user does, in a process of its own."""
        command = [*(launcher or (sys.executable,)), str(SCRIPT), *self.words(**flags)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, env={**os.environ, **(env or {})}, timeout=300
        )


@pytest.fixture
def train(tiny, pictures, tmp_path) -> Trainer:
    reset_accelerate()
    yield Trainer(tiny, pictures, tmp_path)
    reset_accelerate()


def reset_accelerate() -> None:
    """Accelerate keeps its precision and world for the life of a process; a test wants its own."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


SLOW = ("test_readme", "test_toy_world", "test_benchmarks", "test_launch", "test_memory")


def pytest_collection_modifyitems(items) -> None:
    """On two cores: the longest modules first."""
    items.sort(key=lambda item: SLOW.index(item.module.__name__) if item.module.__name__ in SLOW else len(SLOW))

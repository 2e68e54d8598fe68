"""Build `examples/toy_world/model`: a small SDXL, trained from nothing on the scenes of scene.py, on two CPU cores.

    python examples/toy_world/build.py --work /tmp/toy_world      # about an hour; stages already done are kept

Three stages: draw the scenes, train the VAE on them, train the UNet together with both text encoders. Every stage is
seeded and leaves a file in --work, so that a stopped build goes on where it was.
"""

import argparse
import json
import math
import os
import time
from multiprocessing import Pool
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file
from scene import CLASSES, COLOURS, PLACES, Scene, caption, draw, random_scene, sheet, write_subjects
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

HERE = Path(__file__).parent
RARE_WORDS = ("sks", "zwx", "ohwx", "tok", "bnha")
OTHER_WORDS = (
    "photo",
    "picture",
    "drawing",
    "style",
    "the",
    "of",
    "with",
    "and",
    "my",
    "small",
    "big",
    "old",
    "new",
    "toy",
)
MAX_LENGTH = 24  # tokens a prompt, BOS and EOS included: a third of CLIP's, and a third of the time
WIDTH = 64  # of either text encoder
COLOURFUL, PALETTE = 8_000, 20_000  # scenes in colours that no caption names, and in those of the palette


# ------------------------------------------------------------------------------------------------------------- scenes


def scene_at(index: int) -> Scene:
    """The index-th scene of the training set; the first COLOURFUL ones may have any colour."""
    return random_scene(np.random.default_rng((1, index)), any_colour=float(index < COLOURFUL))


def scene_pixels(index: int) -> np.ndarray:
    """Draw the index-th scene: (64, 64, 3) uint8."""
    return np.asarray(draw(scene_at(index)))


def draw_scenes(work: Path, workers: int) -> torch.Tensor:
    """All scenes as uint8 (N, 3, 64, 64), drawn once and kept in work/scenes.npy."""
    path = work / "scenes.npy"
    if not path.exists():
        with Pool(workers) as pool:
            np.save(path, np.stack(pool.map(scene_pixels, range(COLOURFUL + PALETTE), chunksize=200)))
    return torch.from_numpy(np.load(path)).permute(0, 3, 1, 2).contiguous()


def pixels_at(scenes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Scenes as float pixels in [-1, 1]."""
    return scenes[rows].float() / 127.5 - 1


# --------------------------------------------------------------------------------------------------------- tokenizers


def words_as_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary in which every word that matters is one token; "!" is 0, as tokenizer_2 pads with it."""
    words = {*CLASSES, *COLOURS, *" ".join(PLACES).split(), *OTHER_WORDS, *RARE_WORDS}
    alphabet = sorted(ByteLevel.alphabet())
    tokens, merges = [*alphabet, *(letter + "</w>" for letter in alphabet)], []
    for word in sorted(words - {"a"}, key=lambda word: (-len(word), word)):  # longest first, or "at" would split "cat"
        symbols = [*word[:-1], word[-1] + "</w>"]
        head = symbols[0]
        for symbol in symbols[1:]:
            merges.append((head, symbol))
            head += symbol
            tokens.append(head)
    tokens = list(dict.fromkeys(tokens))
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, list(
        dict.fromkeys(merges)
    )


def write_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt, the two files that every version of transformers reads."""
    vocabulary, merges = words_as_bpe()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_tokenizer(pad_token: str) -> CLIPTokenizer:
    """A CLIP tokenizer over words_as_bpe."""
    with TemporaryDirectory() as folder:
        write_vocabulary(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder, pad_token=pad_token, model_max_length=MAX_LENGTH)
    for word in (*CLASSES, *COLOURS, *RARE_WORDS, *" ".join(PLACES).split(), "photo"):
        if len(tokenizer(word).input_ids) != 3:
            raise ValueError(f"'{word}' is not one token: {tokenizer.tokenize(word)}; another word's merges break it")
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------- VAE


def make_vae() -> AutoencoderKL:
    """Factor 4, 4 latent channels, 1.7 M parameters, made to learn from the first step.

    The default initialisation shrinks the signal at every layer: after 80 steps the reconstruction is half as good.
    """
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        force_upcast=False,
    )
    blocks = [module for module in vae.modules() if isinstance(module, ResnetBlock2D)]
    inside = [conv for block in blocks for conv in (block.conv1, block.conv2)]
    for conv in (module for module in vae.modules() if isinstance(module, torch.nn.Conv2d) and module not in inside):
        torch.nn.init.normal_(conv.weight, 0, (conv.in_channels * conv.kernel_size[0] ** 2) ** -0.5)
        torch.nn.init.zeros_(conv.bias)
    for block in blocks:
        torch.nn.init.zeros_(block.conv2.weight)  # each residual block begins as the identity
    with torch.no_grad():
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6  # log-variance: hardly any noise at first
    return vae


def vae_loss(vae: AutoencoderKL, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Colours and edges of the reconstruction, with a whisper of KL."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    error = decoded.float() - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 2 * error.square().mean() + edges + 1e-4 * kl


def confetti(pixels: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Strew discs of any colour over a share of the pictures: a subject may have spots that no scene has."""
    strewn, grid = pixels.clone(), torch.arange(64)
    for row in range(int(share * len(pixels))):
        for _ in range(4):
            y, x = torch.randint(64, (2,), generator=generator)
            radius = torch.randint(2, 12, (), generator=generator)
            disc = (grid[:, None] - y).square() + (grid[None] - x).square() <= radius.square()
            strewn[row] = torch.where(disc, torch.rand(3, 1, 1, generator=generator) * 2 - 1, strewn[row])
    return strewn


def train_vae(work: Path, scenes: torch.Tensor, steps: int, batch_size: int = 8) -> AutoencoderKL:
    """Train on whole scenes, half of them in colours outside the palette, strewn with confetti.

    On crops, GroupNorm hides the colour of anything flat, and nothing is learnt.
    """
    vae, path = make_vae(), work / "vae.pt"
    if path.exists():
        vae.load_state_dict(torch.load(path, weights_only=True))
        return vae.eval()
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.2e-3, total_steps=steps, pct_start=0.05, final_div_factor=1e3
    )
    meter = Meter("vae", steps)
    for step in range(steps):
        rows = torch.randint(len(scenes), (batch_size,), generator=generator)
        rows[: batch_size // 2] %= COLOURFUL
        loss = vae_loss(vae, confetti(pixels_at(scenes, rows), 0.5, generator), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        meter(step, loss)
    torch.save(vae.state_dict(), path)
    return vae.eval()


@torch.no_grad()
def encode_scenes(work: Path, vae: AutoencoderKL, scenes: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Latent means of all scenes, scaled to unit variance, and the scaling factor."""
    path = work / "latents.pt"
    if not path.exists():
        rows = torch.arange(len(scenes)).split(200)
        torch.save(torch.cat([vae.encode(pixels_at(scenes, part)).latent_dist.mean for part in rows]), path)
    latents = torch.load(path, weights_only=True)
    factor = round(1 / latents.std().item(), 5)
    return latents * factor, factor


# ------------------------------------------------------------------------------------------- UNet and text encoders


def make_text_encoder(tokenizer: CLIPTokenizer, with_projection: bool) -> torch.nn.Module:
    """Three CLIP layers; the first encoder has quick_gelu, the second gelu and a projection, as SDXL's have."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=WIDTH,
        hidden_act="gelu" if with_projection else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def make_unet() -> UNet2DConditionModel:
    """SDXL's block pattern in small, on 16 x 16 latents: 8.2 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 2],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[2, 4, 4],
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + WIDTH,
    )


def make_scheduler() -> EulerDiscreteScheduler:
    """SDXL's own schedule."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )


OPENINGS = {"a photo of a": 0.68, "a picture of a": 0.08, "a": 0.1, "a photo of": 0.09, "a photo of the": 0.05}


def spoken_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption with colour or place sometimes left out, and other openings.

    Where the scene's colour has no name, a rare word stands in its place: so the model learns that a rare word is
    something unusual to look at. Strewn in without a meaning, rare words are learnt to be noise, and DreamBooth has to
    unlearn that.
    """
    words = str(rng.choice(list(OPENINGS), p=list(OPENINGS.values())))
    if not isinstance(scene.colour, str):
        words += f" {rng.choice(RARE_WORDS)}"
    return caption(scene, colour=rng.random() < 0.8, place=rng.random() < 0.87, prefix=words)


class ToySDXL(torch.nn.Module):
    """UNet and both text encoders: what the third stage trains."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizers = [make_tokenizer("<|endoftext|>"), make_tokenizer("!")]
        self.encoders = torch.nn.ModuleList(make_text_encoder(t, bool(i)) for i, t in enumerate(self.tokenizers))
        self.unet = make_unet()

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (B, 24, 128) and pooled embeddings (B, 64), the way SDXL takes them."""
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
            ).input_ids
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return torch.cat(hidden, dim=-1), output.text_embeds

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: list[str],
        keep: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the noise; rows that are not kept see zeros, as the pipeline's missing negative prompt does."""
        embeds, pooled = self.encode(prompts)
        added = {"text_embeds": pooled * keep[:, None], "time_ids": time_ids}
        return self.unet(latents, timesteps, embeds * keep[:, None, None], added_cond_kwargs=added).sample


def random_time_ids(count: int, generator: torch.Generator) -> torch.Tensor:
    """Sizes and crops that say nothing about the picture, so that any size that a user brings is familiar: (B, 6)."""
    original = torch.randint(64, 1025, (count, 1), generator=generator).expand(-1, 2)
    original = torch.where(torch.rand(count, 1, generator=generator) < 0.5, original, 64)
    crop = torch.randint(0, 65, (count, 2), generator=generator) * (torch.rand(count, 1, generator=generator) < 0.2)
    return torch.cat([original, crop, torch.full((count, 2), 64)], dim=1).float()


def train_unet(work: Path, latents: torch.Tensor, steps: int, batch_size: int = 48) -> ToySDXL:
    """Train UNet and text encoders on epsilon with min-SNR weight 5; returns the moving average (EMA 0.999)."""
    torch.manual_seed(3)
    model, path, first = ToySDXL(), work / "unet.pt", 0
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    alphas = make_scheduler().alphas_cumprod
    weights = (alphas / (1 - alphas)).clamp(max=5) / (alphas / (1 - alphas))
    meter = Meter("unet", steps, first)
    for step in range(first, steps):
        generator, rng = torch.Generator().manual_seed(10_000 + step), np.random.default_rng((4, step))
        rows = torch.randint(COLOURFUL, len(latents), (batch_size,), generator=generator)
        rows[: batch_size // 8] %= COLOURFUL
        prompts = [spoken_caption(scene_at(int(row)), rng) for row in rows]
        timesteps = torch.randint(1000, (batch_size,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        a = alphas[timesteps][:, None, None, None]
        keep = (torch.rand(batch_size, generator=generator) >= 0.1).float()
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(
                a.sqrt() * latents[rows] + (1 - a).sqrt() * noise,
                timesteps,
                prompts,
                keep,
                random_time_ids(batch_size, generator),
            )
        loss = (weights[timesteps] * (predicted.float() - noise).square().mean(dim=(1, 2, 3))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min(1, (step + 1) / 150) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.999, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - decay) if value.is_floating_point() else average[name].copy_(value)
        meter(step, loss)
        if (step + 1) % 250 == 0:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "step": step + 1,
                },
                path,
            )
    model.load_state_dict(average)
    return model.eval()


class Meter:
    """Prints a line of progress every 50 steps."""

    def __init__(self, name: str, steps: int, first: int = 0) -> None:
        self.name, self.steps, self.first, self.total, self.start = name, steps, first, 0.0, time.time()

    def __call__(self, step: int, loss: torch.Tensor) -> None:
        """Note a step's loss."""
        self.total += loss.item()
        if (step + 1) % 50 == 0:
            left = (time.time() - self.start) / (step + 1 - self.first) * (self.steps - step - 1) / 60
            print(f"{self.name} {step + 1}/{self.steps}  loss {self.total / 50:.4f}  {left:.0f} min left", flush=True)
            self.total = 0.0


# ----------------------------------------------------------------------------------------------------------- pipeline


def assemble(vae: AutoencoderKL, factor: float, model: ToySDXL) -> StableDiffusionXLPipeline:
    """Put the parts into the pipeline that diffusers knows."""
    vae.register_to_config(scaling_factor=factor)
    return StableDiffusionXLPipeline(
        vae,
        *model.encoders,
        *model.tokenizers,
        model.unet,
        make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


CARD = """---
license: apache-2.0
tags: [text-to-image, stable-diffusion-xl]
---

A small SDXL that knows a small world: five classes, seven colours, six places, 64 x 64 pixels. It was trained from
nothing on drawn scenes by `examples/toy_world/build.py`.
"""


def save_in_half(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Write the pipeline as fp16 safetensors."""
    pipeline.set_progress_bar_config(disable=True)
    for part in ("vae", "text_encoder", "text_encoder_2", "unet"):
        getattr(pipeline, part).half()
    pipeline.save_pretrained(folder)
    for part in ("tokenizer", "tokenizer_2"):
        write_vocabulary(folder / part)  # beside tokenizer.json, which transformers 5 writes alone
    encoder = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(encoder)  # transformers 5 drops the prefix that its older versions expect, and reads both
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    save_file(named, encoder, {"format": "pt"})
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({k: v for k, v in index.items() if k != "_name_or_path"}, indent=2) + "\n"
    )
    (folder / "README.md").write_text(CARD)


def main() -> None:
    """Build, save, and draw a sheet of what was built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/toy_world"), help="where unfinished stages are kept")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--vae_steps", type=int, default=3600)
    parser.add_argument("--unet_steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    scenes = draw_scenes(args.work, args.threads)
    vae = train_vae(args.work, scenes, args.vae_steps)
    latents, factor = encode_scenes(args.work, vae, scenes)
    model = train_unet(args.work, latents, args.unet_steps)
    pipeline = assemble(vae, factor, model)
    prompts = [f"a photo of a {list(COLOURS)[i % 7]} {CLASSES[i // 6]} {PLACES[i % 6]}" for i in range(30)]
    images = pipeline(prompts, num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images
    sheet(images, 6).save(args.work / "sheet.png")
    save_in_half(pipeline, args.out)
    write_subjects(HERE / "subjects")


if __name__ == "__main__":
    main()

"""A diffusers folder as one file with the names of Stability's own code, as Civitai has them."""

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import train_dreambooth_lora_sdxl as trainer

NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
VAE_NAMES = (
    (r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1.\2.\3.block.\4"),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    ("attn_1.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)
OPEN_CLIP_NAMES = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("layer_norm", "ln_"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def unet_tensors(folder: Path) -> dict[str, torch.Tensor]:
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    renamed = {}
    for name, tensor in unet.state_dict().items():
        module, kind = name.rsplit(".", 1)
        *path, last = module.split(".")
        if last in NORMS and "resnets" in path:
            stem = trainer.sgm_name(".".join([*path, "conv1"]), unet.config.layers_per_block)
            stem = stem.replace("in_layers.2", NORMS[last])
        else:
            stem = "out.0" if module == "conv_norm_out" else trainer.sgm_name(module, unet.config.layers_per_block)
        renamed[f"model.diffusion_model.{stem}.{kind}"] = tensor
    return renamed


def vae_tensors(folder: Path) -> dict[str, torch.Tensor]:
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    last, renamed = len(vae.config.block_out_channels) - 1, {}
    for name, tensor in vae.state_dict().items():
        for ours, theirs in VAE_NAMES:
            name = re.sub(ours, theirs, name)
        name = re.sub(r"decoder\.up\.(\d+)", lambda found: f"decoder.up.{last - int(found[1])}", name)
        is_matrix = "attn_1" in name and tensor.ndim == 2
        renamed[name] = tensor[:, :, None, None].clone() if is_matrix else tensor
    return renamed


def text_tensors(folder: Path) -> dict[str, torch.Tensor]:
    first = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").state_dict()
    second = CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2").state_dict()
    prefix = "conditioner.embedders.0.transformer.text_model."
    renamed = {prefix + name.removeprefix("text_model."): tensor for name, tensor in first.items()}
    for name, tensor in second.items():
        if name == "text_projection.weight":
            renamed["conditioner.embedders.1.model.text_projection"] = tensor.T.contiguous()
            continue
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            tensor = torch.cat([second[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            name = re.sub(r"self_attn\.q_proj\.", "attn.in_proj_", name)
        for ours, theirs in OPEN_CLIP_NAMES:
            name = name.replace(ours, theirs)
        renamed[f"conditioner.embedders.1.model.{name}"] = tensor
    return renamed


def write_single_file(folder: Path, path: Path, *markers: str, dtype: torch.dtype = torch.float32) -> Path:
    """All of an SDXL pipeline in one file, with empty tensors as markers."""
    vae = {f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(folder).items()}
    tensors = {**unet_tensors(folder), **vae, **text_tensors(folder)}
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        | {marker: torch.zeros(0) for marker in markers},
        path,
    )
    return path


def write_vae_file(folder: Path, path: Path) -> Path:
    """The VAE alone, without a prefix, as such files are passed around."""
    save_file(vae_tensors(folder), path)
    return path

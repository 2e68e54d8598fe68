"""The file that web UIs read: names against the full-size SDXL's modules, values against diffusers' own loading."""

import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from full_size import write_configuration
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import train_dreambooth_lora_sdxl as trainer

DEEP = "transformer_blocks.9.attn2.to_out.0"
VECTORS = {  # EXPORT_FORMATS.md, section 2
    f"down_blocks.2.attentions.1.{DEEP}": "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
    "up_blocks.1.attentions.2.proj_out": "output_blocks_5_1_proj_out",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "up_blocks.2.resnets.0.conv_shortcut": "output_blocks_6_0_skip_connection",
    "add_embedding.linear_2": "label_emb_0_2",
}


@pytest.mark.parametrize("path", VECTORS)
def test_names_of_known_modules(path):
    assert trainer.kohya_name(f"unet.{path}", 2) == f"lora_unet_{VECTORS[path]}"


def test_every_module_of_sdxl_has_a_name_of_its_own(tmp_path):
    source = trainer.Source(str(write_configuration(tmp_path / "sdxl")))
    unet = trainer.meta_model(source, "unet")
    modules = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    names = {trainer.kohya_name(f"unet.{name}", 2) for name in modules}
    assert len(modules) == len(names) == 794
    assert len([name for name in modules if name.endswith(("to_k", "to_q", "to_v", "to_out.0"))]) == 560
    encoder = "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj"
    assert trainer.kohya_name(encoder, 2) == "lora_te2_text_model_encoder_layers_31_self_attn_q_proj"


def weights_of(pipeline: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    """Of all that can be adapted; transformers 5 dropped the first encoder's `text_model.`, files have it in both."""
    weights = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, tensor in getattr(pipeline, part).state_dict().items():
            is_bare = part == "text_encoder" and not name.startswith("text_model.")
            weights[f"{part}.{'text_model.' * is_bare}{name}"] = tensor
    return weights


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_traps_15_16_the_kohya_file_is_the_same_lora(train, tiny, dtype):
    """With text encoders and an alpha of its own, through diffusers' loader of such files."""
    output = train(
        output_kohya_format=True,
        train_text_encoder=True,
        text_encoder_lr=1e-2,
        lora_alpha=2,
        max_train_steps=3,
        checkpointing_steps=3,
        validation_prompt="a dog",
        num_validation_images=1,
        lora_dtype=dtype,
    )
    assert (output / "checkpoint-3" / trainer.KOHYA_FILE).exists()
    tensors = load_file(output / trainer.KOHYA_FILE)
    assert all(key.startswith(("lora_unet_", "lora_te1_text_model_", "lora_te2_text_model_")) for key in tensors)
    stems = {key.split(".")[0] for key in tensors}
    assert all(tensors[f"{stem}.alpha"].item() == 2 and tensors[f"{stem}.alpha"].shape == () for stem in stems)
    assert 3 * len(stems) == len(tensors)
    with safe_open(output / trainer.KOHYA_FILE, framework="pt") as file:
        metadata = file.metadata()
    assert "lora_adapter_metadata" not in metadata
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_network_dim"] == "4"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert json.loads(metadata["ss_tag_frequency"]) == {"out": {"a photo of sks dog": 5}}
    header = (output / trainer.KOHYA_FILE).read_bytes()[8:10]
    assert header == b'{"'
    deltas = []
    for name in (trainer.LORA_FILE, trainer.KOHYA_FILE):
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
        before = {key: value.clone() for key, value in weights_of(pipeline).items()}
        pipeline.load_lora_weights(output, weight_name=name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        deltas.append({key: value - before[key] for key, value in weights_of(pipeline).items()})
    moved = [key for key in deltas[0] if deltas[0][key].abs().max() > 0]
    assert len(moved) == len(stems)
    for part, prefix in (("text_encoder.", "lora_te1_"), ("text_encoder_2.", "lora_te2_")):
        paths = {key.removeprefix(part).removesuffix(".weight") for key in moved if key.startswith(part)}
        assert {prefix + path.replace(".", "_") for path in paths} == {stem for stem in stems if prefix in stem}
    for key in moved:
        torch.testing.assert_close(deltas[0][key], deltas[1][key], rtol=1e-4, atol=1e-7)

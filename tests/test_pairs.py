"""Every pair of features at least once: trained, saved, loaded by a user, resumed."""

import functools
from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionXLPipeline
from pairs import assert_covers, flags_of, pairs_of, rows_of
from PIL import Image
from safetensors.torch import load_file
from test_objective import with_scheduler
from test_text import load_tokens

import train_dreambooth_lora_sdxl as trainer

CRAFTS = {
    "objective": {
        "epsilon": {},
        "v": {"prediction_type": "v_prediction"},
        "v, zero SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        "v, EDM style": {"prediction_type": "v_prediction", "do_edm_style_training": True},
        "EDM": {},
    },
    "weighting": {
        "none": {},
        "min-SNR": {"snr_gamma": 5},
        "debiased": {"loss_weighting": "debiased"},
    },
    "distance": {"l2": {}, "huber": {"loss_type": "huber"}},
    "timesteps": {
        "all": {},
        "offset": {"noise_offset": 0.1},
        "some": {"min_timestep": 200, "max_timestep": 700},
    },
    "prior": {
        "none": {},
        "pictures": {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2,
                     "class_data_dir": "CLASS"},
        "base model": {"with_prior_preservation": True, "class_prompt": "a dog"},
    },
    "adapter": {
        "LoRA": {},
        "rsLoRA, dropout": {"use_rslora": True, "lora_dropout": 0.2},
        "DoRA": {"use_dora": True},
    },
    "layers": {
        "attention": {},
        "attention+ff": {"lora_layers": "attention+ff"},
        "full": {"lora_layers": "full"},
        "a block": {"lora_unet_blocks": "up_blocks.0.attentions.1"},
        "patterns": {"lora_layers": r"attn1\.to_(k|v),proj_out"},
        "blocks, rates": {"lora_unet_blocks": "up_blocks.0=8:2e-2,mid_block"},
    },
    "text": {
        "frozen": {},
        "LoRA": {"train_text_encoder": True},
        "LoRA for half": {"train_text_encoder": True, "train_text_encoder_frac": 0.5},
        "new tokens": {"train_text_encoder_ti": True, "instance_prompt": "a photo of TOK dog"},
    },
    "precision": {
        "fp32": {},
        "bf16": {"mixed_precision": "bf16"},
        "int8": {"base_precision": "int8"},
        "nf4": {"base_precision": "nf4"},
    },
    "optimizer": {
        "adamw": {"gradient_accumulation_steps": 2},
        "adamw8bit": {"use_8bit_adam": True},
        "prodigy": {"optimizer": "prodigy", "learning_rate": 100, "text_encoder_lr": 100, "token_lr": 100},
        "adafactor": {"optimizer": "adafactor"},
        "schedule-free": {"optimizer": "schedule_free", "lr_warmup_steps": 0},
        "EMA": {"use_ema": True},
    },
    "data": {
        "squares": {},
        "buckets": {"aspect_ratio_buckets": "auto", "random_flip": True},
        "checkpointed": {"gradient_checkpointing": True, "caption_dropout": 0.3},
        "masks": {"masked_loss": True, "background_loss_weight": 0.2},
    },
}
REFUSED = [
    *(
        {("objective", form), ("weighting", other)}
        for form in ("EDM", "v, EDM style")
        for other in ("min-SNR", "debiased")
    ),
    *({("adapter", "DoRA"), ("precision", packed)} for packed in ("int8", "nf4")),
    {("layers", "blocks, rates"), ("optimizer", "prodigy")},
    {("text", "LoRA for half"), ("optimizer", "schedule-free")},
    {("text", "new tokens"), ("optimizer", "schedule-free")},
    {("text", "LoRA for half"), ("prior", "base model")},
]
ROWS = rows_of(CRAFTS, REFUSED)


@pytest.fixture(scope="module")
def playground(tiny, tmp_path_factory) -> Path:
    return with_scheduler(tiny, tmp_path_factory.mktemp("edm") / "base", EDMEulerScheduler())


def test_every_allowed_pair_is_there_and_the_refused_are_refused(train, playground):
    assert len(pairs_of(CRAFTS, REFUSED)) > 500
    assert_covers(CRAFTS, REFUSED, ROWS)
    for refused in REFUSED:
        flags = functools.reduce(dict.__or__, (CRAFTS[axis][choice] for axis, choice in refused))
        base = {"pretrained_model_name_or_path": playground} if ("objective", "EDM") in refused else {}
        with pytest.raises(trainer.UserError):
            args = train.args(**flags, **base)
            trainer.make_objective(args, trainer.start(args).scheduler)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """What one row has encoded, another need not."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def masks(pictures, tmp_path_factory) -> Path:
    """Of all pictures, white in the middle."""
    folder = tmp_path_factory.mktemp("masks")
    for path in pictures.iterdir():
        width, height = Image.open(path).size
        mask = Image.new("L", (width, height))
        mask.paste(255, (width // 4, height // 4, width - width // 4, height - height // 4))
        mask.save(folder / path.name)
    return folder


def furthest(first: Image.Image, second: Image.Image) -> int:
    """How many grey levels two pictures differ by at most."""
    return (torch.tensor(list(first.tobytes())) - torch.tensor(list(second.tobytes()))).abs().max().item()


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers: a packed weight's codes are in no state_dict."""
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.mark.parametrize("row", ROWS, ids=[" | ".join(row) for row in ROWS])
def test_it_moves_draws_and_resumes(train, tiny, playground, cache, masks, tmp_path, monkeypatch, row):
    base = playground if row[0] == "EDM" else tiny
    flags = {"learning_rate": 1e-2, "text_encoder_lr": 1e-2, "token_lr": 1e-2, **flags_of(CRAFTS, row)}
    flags |= {"pretrained_model_name_or_path": base, "max_train_steps": 4, "checkpointing_steps": 2}
    flags |= {"class_data_dir": tmp_path / "class"} if "class_data_dir" in flags else {}
    flags |= {"masked_loss": masks} if "masked_loss" in flags else {}
    prompt = "a TOK dog" if "train_text_encoder_ti" in flags else "a dog"
    drawing = {"validation_prompt": f"{prompt} --s 2", "num_validation_images": 1}
    models, real = [], trainer.load_trainable

    def noted(run):
        model = real(run)
        models.append((model, {name: tensor.clone() for name, tensor in everything(model).items()}))
        return model

    monkeypatch.setattr(trainer, "load_trainable", noted)
    output = train(**flags, **drawing, output_dir=tmp_path / "a", cache_latents_dir=cache)
    model, before = models[0]
    after, trained = everything(model), set(model.adapters)
    assert trained and ("base_precision" in flags) == any(name.endswith(".codes") for name in before)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in trained), name
    resume = {"output_dir": tmp_path / "b", "cache_latents_dir": cache}
    resumed = train(**flags, **resume, resume_from_checkpoint=output / "checkpoint-2")
    for name in {trainer.LORA_FILE, trainer.EMBEDDINGS_FILE} & {path.name for path in output.iterdir()}:
        first, second = load_file(output / name), load_file(resumed / name)
        assert first and all(torch.equal(first[key], second[key]) for key in first), name
    untrained, ours = (Image.open(output / f"validation/step-{step:06d}/00.png") for step in (0, 4))
    assert furthest(ours, drawn_by_a_user(base, output, flags, prompt)) <= 2 < furthest(ours, untrained)


def drawn_by_a_user(base: Path, output: Path, flags: dict, prompt: str) -> Image.Image:
    """What the file draws in diffusers' own pipeline, around a base that is packed as the trained one was."""
    dtype = torch.bfloat16 if flags.get("mixed_precision") == "bf16" else torch.float32
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if flags.get("prediction_type"):
        zero_snr = "rescale_betas_zero_snr" in flags
        pipeline.scheduler = trainer.with_prediction(pipeline.scheduler, "v_prediction", zero_snr)
    if "train_text_encoder_ti" in flags:
        load_tokens(pipeline, output, ["<s0>", "<s1>"])
    pipeline.load_lora_weights(output, weight_name=trainer.LORA_FILE)
    if "base_precision" in flags:
        trainer.pack_unet(pipeline.unet, flags["base_precision"], torch.device("cpu"))
    seeded = torch.Generator().manual_seed(1)
    return pipeline(
        prompt.replace("TOK", "<s0><s1>"), num_inference_steps=2, generator=seeded, height=16, width=16
    ).images[0]

"""Every pair of features at least once: trained, saved, loaded by a user, resumed."""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from allpairspy import AllPairs
from diffusers import EDMEulerScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from test_objective import with_scheduler
from test_text import load_tokens

import train_dreambooth_lora_sdxl as trainer

CRAFTS = {
    "objective": {
        "epsilon": {},
        "v, zero SNR, min-SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_gamma": 5},
        "EDM": {},
        "debiased, huber": {"loss_weighting": "debiased", "loss_type": "huber"},
        "offset, perturbed, later": {"noise_offset": 0.1, "input_perturbation": 0.1, "timestep_bias": "later"},
    },
    "prior": {
        "none": {},
        "pictures": {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2},
        "base model": {"prior_preservation": "base_model", "class_prompt": "a dog"},
        "dco": {"prior_preservation": "dco"},
    },
    "adapter": {
        "LoRA": {},
        "rsLoRA, dropout": {"use_rslora": True, "lora_dropout": 0.2},
        "DoRA": {"use_dora": True},
        "PiSSA": {"lora_init": "pissa", "rank": 2},
        "convolutions": {"lora_preset": "full"},
        "blocks, LoRA+": {"lora_unet_blocks": "up_blocks.0=8,mid_block", "loraplus_lr_ratio": 4},
    },
    "text": {
        "frozen": {},
        "LoRA": {"train_text_encoder": True},
        "LoRA for half": {"train_text_encoder": True, "train_text_encoder_frac": 0.5},
        "new tokens": {"train_text_encoder_ti": True, "instance_prompt": "a photo of TOK dog"},
    },
    "precision": {"fp32": {}, "bf16": {"mixed_precision": "bf16"}, "int8": {"base_precision": "int8"}},
    "optimizer": {
        "adamw": {"gradient_accumulation_steps": 2},
        "adamw8bit": {"use_8bit_adam": True},
        "lion8bit": {"optimizer": "lion8bit"},
        "prodigy": {"optimizer": "prodigy", "learning_rate": 30, "text_encoder_lr": 30, "token_lr": 30},
        "adafactor": {"optimizer": "adafactor"},
        "schedule-free": {"optimizer": "schedule_free", "lr_warmup_steps": 0},
        "EMA": {"use_ema": True, "ema_half_life": 2},
    },
    "data": {
        "squares": {},
        "buckets": {"aspect_ratio_buckets": "auto", "random_flip": True, "clip_skip": 1},
        "checkpointed": {"gradient_checkpointing": True, "caption_dropout": 0.3},
    },
}
REFUSED = [
    {("adapter", "DoRA"), ("precision", "int8")},
    {("adapter", "blocks, LoRA+"), ("optimizer", "prodigy")},
    {("text", "LoRA for half"), ("optimizer", "schedule-free")},
    {("text", "new tokens"), ("optimizer", "schedule-free")},
    {("text", "LoRA for half"), ("prior", "base model")},
    {("text", "LoRA for half"), ("prior", "dco")},
]


def is_allowed(chosen: list[str]) -> bool:
    pairs = set(zip(CRAFTS, chosen, strict=False))
    return not any(refused <= pairs for refused in REFUSED)


def all_pairs() -> list[set[tuple[str, str]]]:
    names = list(CRAFTS)
    return [
        {(first, one), (second, other)}
        for first, second in itertools.combinations(names, 2)
        for one in CRAFTS[first]
        for other in CRAFTS[second]
        if {(first, one), (second, other)} not in REFUSED
    ]


def make_rows() -> list[tuple[str, ...]]:
    """The library's rows, and plain ones for the pairs that its filter lets fall through."""
    rows = [tuple(row) for row in AllPairs([list(options) for options in CRAFTS.values()], filter_func=is_allowed)]
    for pair in all_pairs():
        if not any(pair <= set(zip(CRAFTS, row, strict=True)) for row in rows):
            rows.append(tuple(dict(pair).get(name, next(iter(options))) for name, options in CRAFTS.items()))
    return rows


ROWS = make_rows()


def test_every_allowed_pair_is_there_and_the_refused_are_refused(train, tmp_path):
    assert len(all_pairs()) > 400 and all(is_allowed(list(row)) for row in ROWS)
    for pair in all_pairs():
        assert any(pair <= set(zip(CRAFTS, row, strict=True)) for row in ROWS), pair
    for refused in REFUSED:
        flags = functools.reduce(dict.__or__, (CRAFTS[name][choice] for name, choice in refused))
        with pytest.raises(trainer.UserError):
            train.args(**flags)


@pytest.fixture(scope="module")
def playground(tiny, tmp_path_factory) -> Path:
    return with_scheduler(tiny, tmp_path_factory.mktemp("edm") / "base", EDMEulerScheduler())


@pytest.mark.parametrize("row", ROWS, ids=[" | ".join(row) for row in ROWS])
def test_it_moves_draws_and_resumes(train, tiny, playground, tmp_path, monkeypatch, row):
    flags = functools.reduce(dict.__or__, (CRAFTS[name][choice] for name, choice in zip(CRAFTS, row, strict=True)))
    base = playground if row[0] == "EDM" else tiny
    flags = {"learning_rate": 1e-2, "text_encoder_lr": 1e-2, "token_lr": 1e-2, **flags}
    flags |= {"pretrained_model_name_or_path": base, "max_train_steps": 4, "checkpointing_steps": 2}
    flags |= {"class_data_dir": tmp_path / "class"} if "with_prior_preservation" in flags else {}
    prompt = "a TOK dog" if "train_text_encoder_ti" in flags else "a dog"
    drawing = {"validation_prompt": prompt, "num_validation_images": 1, "validation_num_inference_steps": 4}
    models, real = [], trainer.load_trainable

    def noted(run):
        model = real(run)
        models.append((model, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return model

    monkeypatch.setattr(trainer, "load_trainable", noted)
    output = train(**flags, **drawing, output_dir=tmp_path / "a")
    model, before = models[0]
    after, trained = model.state_dict(), set(model.adapters)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in trained), name
    resumed = train(**flags, output_dir=tmp_path / "b", resume_from_checkpoint=output / "checkpoint-2")
    for name in {trainer.LORA_FILE, trainer.EMBEDDINGS_FILE} & {path.name for path in output.iterdir()}:
        first, second = load_file(output / name), load_file(resumed / name)
        assert first and all(torch.equal(first[key], second[key]) for key in first), name
    if row[4] != "int8":  # which a user unpacks again
        drawn = drawn_by_a_user(base, output, flags, prompt)
        ours = Image.open(output / "validation/step-000004/00.png")
        difference = torch.tensor(list(ours.tobytes())) - torch.tensor(list(drawn.tobytes()))
        assert difference.abs().max() <= 2


def drawn_by_a_user(base: Path, output: Path, flags: dict, prompt: str) -> Image.Image:
    dtype = torch.bfloat16 if flags.get("mixed_precision") == "bf16" else torch.float32
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if flags.get("prediction_type"):
        pipeline.scheduler = trainer.with_prediction(pipeline.scheduler, "v_prediction", True)
    if "train_text_encoder_ti" in flags:
        load_tokens(pipeline, output, ["<s0>", "<s1>"])
    pipeline.load_lora_weights(output, weight_name=trainer.LORA_FILE)
    seeded = torch.Generator().manual_seed(1)
    clip_skip = {"clip_skip": flags["clip_skip"]} if flags.get("clip_skip") else {}
    return pipeline(
        prompt.replace("TOK", "<s0><s1>"), num_inference_steps=4, generator=seeded, height=16, width=16, **clip_skip
    ).images[0]

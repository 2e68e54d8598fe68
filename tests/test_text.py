"""What the text encoders learn: a share of the steps, new tokens, layers left out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer

TI = {"train_text_encoder_ti": True, "instance_prompt": "a photo of TOK dog", "token_lr": 1e-2}


def picture(output: Path, step: int) -> bytes:
    return Image.open(output / f"validation/step-{step:06d}/00.png").tobytes()


def drawn_by_a_user(pipeline, prompt, **extra) -> bytes:
    pipeline.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(1)
    drawn = pipeline(prompt, num_inference_steps=25, generator=seeded, height=16, width=16, **extra)
    return drawn.images[0].tobytes()


def load_tokens(pipeline, folder, tokens) -> None:
    """As the card says."""
    embeddings = load_file(folder / "embeddings.safetensors")
    assert set(embeddings) == {"clip_l", "clip_g"}
    for name, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(embeddings[name], token=tokens, text_encoder=encoder, tokenizer=tokenizer)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("average", [{}, {"use_ema": True}])
def test_pivotal_tuning_draws_what_a_user_draws(train, tiny, tmp_path, share, average):
    flags = {**TI, **average, "train_text_encoder_frac": share, "validation_prompt": "TOK dog on grass"}
    flags |= {"num_validation_images": 1, "max_train_steps": 6, "checkpointing_steps": 3, "output_kohya_format": True}
    output = train(**flags, output_dir=tmp_path / "a")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    load_tokens(pipeline, output, ["<s0>", "<s1>"])
    pipeline.load_lora_weights(output, weight_name=trainer.LORA_FILE)
    assert picture(output, 6) == drawn_by_a_user(pipeline, "<s0><s1> dog on grass")
    assert picture(output, 0) != picture(output, 6)
    tokens = load_file(output / "embeddings.safetensors")
    halfway = load_file(output / "checkpoint-3" / "embeddings.safetensors")
    assert torch.equal(tokens["clip_l"], halfway["clip_l"]) == (share == 0.5)
    with pytest.raises(trainer.Stopped):
        train(**flags, output_dir=tmp_path / "b", max_train_minutes=1e-9)
    resumed = train(**flags, output_dir=tmp_path / "b", resume_from_checkpoint="latest")
    for name in (trainer.LORA_FILE, "embeddings.safetensors"):
        first, second = load_file(output / name), load_file(resumed / name)
        assert all(torch.equal(first[key], second[key]) for key in first), name
    card = (output / "README.md").read_text()
    assert "a photo of <s0><s1> dog" in card and "load_textual_inversion" in card


def test_only_the_new_rows_change(train):
    """Bit for bit: every other tensor of the encoders is what it was."""
    run = trainer.start(train.args(**TI))
    model = trainer.load_trainable(run)
    before = {name: tensor.clone() for name, tensor in model.text_encoders.state_dict().items()}
    table = trainer.encode_prompts(run, ["a photo of TOK dog"], True, torch.float32)
    optimizer = trainer.make_optimizer(run.args, model, 1)
    for _ in range(3):
        embeds, pooled = model.embed(table.of("a photo of TOK dog"))
        (embeds.square().mean() + pooled.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.text_encoders.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 2 and all(name.endswith(".rows") for name in changed)
    assert {group["name"] for group in optimizer.param_groups} == {"unet", "tokens"}


def test_tokens_begin_as_a_concept_or_at_random(train):
    run = trainer.start(train.args(**TI, initializer_concept="red dog"))
    tokenizer = trainer.load_part(run.base, "tokenizer")
    ids = tokenizer("red dog", add_special_tokens=False).input_ids
    for encoder in trainer.load_trainable(run).text_encoders:
        embedding = encoder.get_input_embeddings()
        known = embedding.known.weight
        assert torch.equal(embedding.rows, known[ids])
    for encoder in trainer.load_trainable(trainer.start(train.args(**TI))).text_encoders:
        embedding = encoder.get_input_embeddings()
        assert embedding.rows.std().item() == pytest.approx(float(embedding.known.weight.std()), rel=0.5)


def test_prompts_are_tokenised_as_at_inference(train, tiny):
    """With several abstractions: both words are replaced, and the ids are those of a user's pipeline."""
    flags = {"token_abstraction": "TOK,STYLE", "instance_prompt": "a TOK dog in STYLE"}
    run = trainer.start(train.args(**{**TI, **flags}))
    tokens = ["<s0>", "<s1>", "<s2>", "<s3>"]
    assert trainer.choose_text(run.args).replace_words("TOK dog in STYLE") == "<s0><s1> dog in <s2><s3>"
    table = trainer.encode_prompts(run, ["a TOK dog in STYLE"], True, torch.float32)
    model = trainer.load_trainable(run)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    for part, encoder, tokenizer in zip(
        model.text_encoders,
        (pipeline.text_encoder, pipeline.text_encoder_2),
        (pipeline.tokenizer, pipeline.tokenizer_2),
        strict=True,
    ):
        rows = part.get_input_embeddings().rows.detach()
        pipeline.load_textual_inversion(rows, token=tokens, text_encoder=encoder, tokenizer=tokenizer)
    theirs = pipeline.encode_prompt("a <s0><s1> dog in <s2><s3>", do_classifier_free_guidance=False)
    with torch.no_grad():
        embeds, pooled = model.embed(table.of("a TOK dog in STYLE"))
    torch.testing.assert_close(embeds, theirs[0])
    torch.testing.assert_close(pooled, theirs[2])


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_encoders_stop_for_real(train, tiny, tmp_path, share):
    """Their adapters stay as they were from that step on, the UNet's go on; resumed before and after, it is exact."""
    flags = {"train_text_encoder": True, "text_encoder_lr": 1e-2, "train_text_encoder_frac": share}
    flags |= {"max_train_steps": 6, "checkpointing_steps": 1, "lora_dropout": 0.3, "use_8bit_adam": False}
    output = train(**flags, output_dir=tmp_path / "a", validation_prompt="a dog", num_validation_images=1)
    stopped, last = max(1, round(6 * share)), load_file(output / trainer.LORA_FILE)
    for step in (stopped, 5):
        then = load_file(output / f"checkpoint-{step}" / trainer.LORA_FILE)
        same = {key: torch.equal(then[key], last[key]) for key in last}
        assert all(same[key] for key in last if key.startswith("text_encoder"))
        assert not all(same[key] for key in last if key.startswith("unet"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    pipeline.load_lora_weights(output, weight_name=trainer.LORA_FILE)
    assert picture(output, 6) == drawn_by_a_user(pipeline, "a dog")
    for step in (1, 4):
        again = train(**flags, output_dir=tmp_path / f"b{step}", resume_from_checkpoint=output / f"checkpoint-{step}")
        resumed = load_file(again / trainer.LORA_FILE)
        assert all(torch.equal(resumed[key], last[key]) for key in last)


def test_frozen_encoders_leave_the_device(train):
    run = trainer.start(train.args(train_text_encoder=True, train_text_encoder_frac=0.5))
    model = trainer.load_trainable(run)
    table = trainer.encode_prompts(run, ["a dog"], True, torch.float32)
    before = [part.clone() for part in model.embed(table.of("a dog"))]
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "move_frozen", lambda part, device: moved.append((part, str(device))))
        assert table.row(0)[0].dtype == torch.int64
        trainer.freeze_text_encoders(model, table, trainer.EMA())
    assert [device for _, device in moved] == ["cpu", "cpu"]
    assert all(torch.allclose(x, y) for x, y in zip(model.embed(table.of("a dog")), before, strict=True))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("unet.") for name in trained)


def test_the_prompt_is_pooled_at_its_end_as_in_web_uis(train, tiny, tmp_path):
    """SDXL's configuration has eos_token_id 2, with which transformers pools at the highest id: a new token."""
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    config = base / "text_encoder_2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 2}))
    flags = {**TI, "pretrained_model_name_or_path": base, "validation_prompt": "TOK dog on grass"}
    output = train(**flags, num_validation_images=1, max_train_steps=4)
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    load_tokens(pipeline, output, ["<s0>", "<s1>"])
    pipeline.load_lora_weights(output, weight_name=trainer.LORA_FILE)
    elsewhere = drawn_by_a_user(pipeline, "<s0><s1> dog on grass")
    line = next(line for line in (output / "README.md").read_text().splitlines() if "eos_token_id" in line)
    exec(line, {"pipeline": pipeline})
    assert picture(output, 4) == drawn_by_a_user(pipeline, "<s0><s1> dog on grass") != elsewhere


def test_only_whole_words_are_new_tokens(train):
    args = train.args(**TI)
    assert trainer.choose_text(args).replace_words("TOK dog in TOKYO, TOK.") == "<s0><s1> dog in TOKYO, <s0><s1>."


def test_flags_that_will_do_nothing_are_told(train, capsys):
    train.args(
        train_text_encoder_frac=0.5, token_lr=0.1, optimizer="prodigy", learning_rate=1, scale_lr=True
    )
    told = capsys.readouterr().out
    for flag in ("train_text_encoder_frac", "token_lr", "scale_lr"):
        assert f"--{flag} does nothing with" in told
    train.args()
    assert capsys.readouterr().out == ""

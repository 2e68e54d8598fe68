"""Kinds of LoRA, where they sit, and what moves them: as users load them, as other readers do, and resumed."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from full_size import write_configuration
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import train_dreambooth_lora_sdxl as trainer

KINDS = {
    "rsLoRA": {"use_rslora": True, "rank": 8, "lora_alpha": 2},
    "DoRA": {"use_dora": True},
    "DoRA on all layers": {"use_dora": True, "lora_layers": "full"},
    "rank-stabilised": {"rank": 2, "use_rslora": True, "lora_alpha": 3},
    "feed-forward": {"lora_layers": "attention+ff"},
    "convolutions": {"lora_layers": "full"},
    "a block": {"lora_unet_blocks": "up_blocks.0.attentions.1"},
    "patterns": {"lora_layers": "attn2.to_k,attn2.to_v,conv1"},
    "blocks": {"lora_unet_blocks": "up_blocks.0=8:2e-2,mid_block"},
}
COMFYS = ("rsLoRA", "DoRA", "DoRA on all layers", "rank-stabilised", "convolutions", "blocks")


def modules_of(output: Path) -> set[str]:
    return {key.split(".lora_")[0].removeprefix("unet.") for key in load_file(output / trainer.LORA_FILE)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """With two attentions in its upper block, which B-LoRA needs."""
    from conftest import build_tiny

    return build_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_what_a_user_draws_and_a_resumed_run_is_the_same(train, tiny, tmp_path, kind):
    flags = {**KINDS[kind], "validation_prompt": "a dog", "num_validation_images": 1, "max_train_steps": 4}
    flags |= {"checkpointing_steps": 2, "output_kohya_format": True}
    output = train(**flags, output_dir=tmp_path / "a")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(output, weight_name=trainer.LORA_FILE)
    drawn = pipeline("a dog", num_inference_steps=25, generator=torch.Generator().manual_seed(1), height=16, width=16)
    ours = Image.open(output / "validation/step-000004/00.png")
    difference = torch.tensor(list(ours.tobytes())) - torch.tensor(list(drawn.images[0].tobytes()))
    assert difference.abs().max() <= 1, kind
    moved = Image.open(output / "validation/step-000000/00.png")
    assert moved.tobytes() != ours.tobytes()
    train(**{**flags, "max_train_steps": 2}, output_dir=tmp_path / "b")
    again = train(**flags, output_dir=tmp_path / "b", resume_from_checkpoint="latest")
    for name in (trainer.LORA_FILE, trainer.KOHYA_FILE):
        first, second = load_file(output / name), load_file(again / name)
        assert all(torch.equal(first[key], second[key]) for key in first)


def as_comfy_applies(weight: torch.Tensor, tensors: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    """ComfyUI's formula for one module (EXPORT_FORMATS.md, section 2, as of August 2026)."""
    down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
    delta = (up.flatten(1) @ down.flatten(1)).view_as(weight) * (tensors[f"{stem}.alpha"] / len(down))
    changed, scale = weight + delta, tensors.get(f"{stem}.dora_scale")
    if scale is None:
        return changed
    assert scale.shape == (len(weight), *[1] * (weight.ndim - 1))
    return changed * (scale / weight.flatten(1).norm(dim=1).view_as(scale))


@pytest.mark.parametrize("kind", COMFYS)
def test_web_uis_make_the_same_weights(train, tiny, kind):
    """Against peft's own merge, with diffusers' loader in between; one alpha in all modules."""
    output = train(**KINDS[kind], output_kohya_format=True, max_train_steps=3)
    tensors = load_file(output / trainer.KOHYA_FILE)
    assert len({tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}) == 1
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    base = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(output, weight_name=trainer.LORA_FILE)
    for name, layer in pipeline.unet.named_modules():
        if hasattr(layer, "lora_A"):
            layer.merge()
            stem = trainer.kohya_name(f"unet.{name}", pipeline.unet.config.layers_per_block)
            theirs = as_comfy_applies(base[f"{name}.weight"], tensors, stem)
            torch.testing.assert_close(theirs, layer.base_layer.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_change_that_is_smaller_than_its_rounding_is_no_fault(train, dtype):
    """One step at a low rate, with scales that are folded into the file."""
    flags = {"lora_unet_blocks": "up_blocks.0=8,mid_block", "use_rslora": True, "lora_dtype": dtype}
    flags |= {"output_kohya_format": True, "learning_rate": 1e-6}
    output = train(**flags, max_train_steps=1, checkpointing_steps=1)
    assert (output / trainer.KOHYA_FILE).exists()


def test_dora_begins_at_the_base_model_in_half_precision(train):
    run = trainer.start(train.args(use_dora=True, mixed_precision="bf16", lora_layers="full"))
    for layer in trainer.load_trainable(run).layers:
        magnitude = layer.lora_magnitude_vector["default"].weight
        exact = layer.base_layer.weight.float().flatten(1).norm(dim=1)
        torch.testing.assert_close(magnitude.flatten(), exact, rtol=1e-6, atol=0)


def sdxl_modules(tmp_path, **flags) -> set[str]:
    """What the full-size UNet would have adapted."""
    unet = trainer.meta_model(trainer.Source(str(write_configuration(tmp_path / "sdxl"))), "unet")
    args = trainer.make_parser().parse_args(["--pretrained_model_name_or_path", "x"])
    vars(args).update(flags)
    trainer.add_adapters(args, unet)
    return {name for name, layer in unet.named_modules() if hasattr(layer, "lora_A")}


@pytest.mark.parametrize(
    ("preset", "count"),
    [("attention", 560), ("attention+ff", 722), ("full", 794)],
)
def test_presets_on_the_full_size(tmp_path, preset, count):
    """EXPORT_FORMATS.md's counts."""
    assert len(sdxl_modules(tmp_path, lora_layers=preset)) == count


@pytest.mark.parametrize("block", ["up_blocks.0.attentions.0", "up_blocks.0.attentions.1"])
def test_a_block_on_the_full_size(tmp_path, block):
    """B-LoRA's blocks (arXiv:2403.14572) have ten transformer blocks of eight layers."""
    names = sdxl_modules(tmp_path, lora_unet_blocks=block)
    assert len(names) == 80 and all(name.startswith(f"{block}.") for name in names)


def test_every_linear_layer_and_convolution_is_one_of_the_full_preset(tmp_path):
    unet = trainer.meta_model(trainer.Source(str(write_configuration(tmp_path / "sdxl"))), "unet")
    whole = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert sdxl_modules(tmp_path / "b", lora_layers="full") == whole


def test_blocks_have_ranks_and_rates_of_their_own(train):
    run = trainer.start(train.args(lora_unet_blocks="up_blocks.0=8:2e-2,mid_block", lora_alpha=2))
    model = trainer.load_trainable(run)
    for name, layer in model.unet.named_modules():
        if hasattr(layer, "lora_A"):
            assert layer.r["default"] == (8 if name.startswith("up_blocks.0.") else 4)
            assert layer.scaling["default"] == 0.5
            assert name.startswith(("up_blocks.0.", "mid_block."))
    groups = {group["name"]: group["lr"] for group in trainer.make_optimizer(run.args, model, 1).param_groups}
    assert groups == {"unet": 1e-2, "unet/up_blocks.0": 2e-2}


def test_an_unknown_block_or_layer_is_one_sentence(train):
    for flags, told in (
        ({"lora_unet_blocks": "up_blocks.7"}, r"--lora_layers or --lora_unet_blocks name nothing"),
        ({"lora_unet_blocks": "up_blocks.0,up_blocks.7"}, r"--lora_unet_blocks up_blocks.7: .* no such block"),
        ({"lora_layers": "nothing"}, r"--lora_layers or --lora_unet_blocks name nothing"),
    ):
        with pytest.raises(trainer.UserError, match=told):
            train(**flags)


# ----------------------------------------------------------------------------------------------- optimizers

OPTIMIZERS = {
    "adamw": {},
    "adamw8bit": {},
    "prodigy": {"learning_rate": 1, "prodigy_safeguard_warmup": "True", "prodigy_decouple": "True"},
    "adafactor": {},
    "schedule_free": {"lr_warmup_steps": 2},
}


def test_the_table_is_tested(train):
    assert set(OPTIMIZERS) == set(trainer.OPTIMIZERS)
    with pytest.raises(trainer.UserError, match="--optimizer: invalid choice: 'paged_adamw8bit'"):
        train.args(optimizer="paged_adamw8bit")  # bitsandbytes pages no tensor as small as an adapter's


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_learns_and_a_resumed_run_is_the_same(train, tmp_path, name):
    """Validation in between disturbs nothing; text encoders beside."""
    flags = {"optimizer": name, **OPTIMIZERS[name], "train_text_encoder": True, "max_train_steps": 6}
    flags |= {"text_encoder_lr": flags.get("learning_rate", 1e-2), "checkpointing_steps": 3}
    whole = train(**flags, output_dir=tmp_path / "a")
    train(**{**flags, "max_train_steps": 3}, output_dir=tmp_path / "b", validation_prompt="a dog", validation_steps=2)
    resumed = train(**flags, output_dir=tmp_path / "b", resume_from_checkpoint="latest")
    first, second = load_file(whole / trainer.LORA_FILE), load_file(resumed / trainer.LORA_FILE)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(first[key].abs().max() > 0 for key in first if "lora_B" in key)
    entries = trainer.read_history(whole)
    assert {name for name in entries[0] if name.startswith("lr/")} == {"lr/unet", "lr/text_encoder"}


def quadratic(name: str, **flags):
    """An optimizer of the table over one adapter-like parameter, with the library's own beside it."""

    class Model:
        def __init__(self):
            self.weight = nn.Parameter(torch.full((64, 64), 2.0))
            self.adapters = {"unet.x.lora_A": self.weight}

    args = trainer.make_parser().parse_args(["--pretrained_model_name_or_path", "x", "--optimizer", name])
    vars(args).update(flags)
    model = Model()
    return trainer.make_optimizer(args, model, 1), model.weight


def test_schedule_free_warms_up_where_it_is_told_to():
    constant, _ = quadratic("schedule_free")
    assert constant.param_groups[0]["warmup_steps"] == 0


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "prodigy", "schedule_free"])
def test_adams_epsilon_reaches_it(name):
    """The first step is lr * gradient / (|gradient| + epsilon), here a third of what it is without."""
    rates = {"learning_rate": 1e-2, "adam_weight_decay": 0}
    moved = []
    for epsilon in (1e-8, 8.0):
        optimizer, weight = quadratic(name, **rates, adam_epsilon=epsilon)
        assert {group["eps"] for group in optimizer.param_groups} == {epsilon}
        weight.square().sum().backward()  # its gradient is 4
        optimizer.step()
        moved.append(2 - weight.mean().item())
    assert moved[1] == pytest.approx(moved[0] / 3, rel=1e-3), moved


def test_the_text_encoders_have_a_weight_decay_of_their_own(train):
    """Where there is no gradient, AdamW leaves 1 - lr * decay of a weight."""
    flags = {"train_text_encoder": True, "text_encoder_lr": 1e-2, "adam_weight_decay_text_encoder": 0.5}
    run = trainer.start(train.args(**flags, adam_weight_decay=0.25))
    model = trainer.load_trainable(run)
    before = {name: adapter.detach().clone() for name, adapter in model.adapters.items()}
    optimizer = trainer.make_optimizer(run.args, model, 1)
    for adapter in model.adapters.values():
        adapter.grad = torch.zeros_like(adapter)
    optimizer.step()
    for name, adapter in model.adapters.items():
        decay = 0.5 if name.startswith("text_encoders.") else 0.25
        torch.testing.assert_close(adapter, before[name] * (1 - 1e-2 * decay), rtol=1e-6, atol=0)


def test_prodigys_flags_reach_it():
    flags = {"learning_rate": 1.0, "prodigy_beta3": 0.5, "prodigy_decouple": False, "prodigy_safeguard_warmup": False}
    optimizer, _ = quadratic("Prodigy", **flags, prodigy_use_bias_correction=False)
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__ == "Prodigy" and group["beta3"] == 0.5 and group["decouple"] is False
    assert group["safeguard_warmup"] is False and group["use_bias_correction"] is False and group["lr"] == 1.0
    words = ["--pretrained_model_name_or_path", "x", "--prodigy_decouple", "False", "--no-prodigy_safeguard_warmup"]
    args = trainer.make_parser().parse_args([*words, "--prodigy_use_bias_correction=True"])
    assert not args.prodigy_decouple and not args.prodigy_safeguard_warmup and args.prodigy_use_bias_correction
    with pytest.raises(trainer.UserError, match="neither True nor False"):
        trainer.make_parser().parse_args(["--prodigy_decouple", "perhaps"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_goes_down_a_bowl(name):
    optimizer, weight = quadratic(name, learning_rate=1.0 if name == "prodigy" else 0.05, lr_warmup_steps=0)
    for _ in range(600 if name == "prodigy" else 60):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    assert weight.abs().max() < 1.7


def test_the_moving_average_is_the_formula(train, tmp_path):
    """Half-life in steps: written out over what each step left; drawn, saved, and resumed exactly."""
    weight = nn.Parameter(torch.zeros(3))
    average, expected = trainer.MovingAverage([weight]), weight
    for step in range(7):
        weight.data += step
        average.update(step)
        decay = (1 + step) / (10 + step) if step else 0.0
        expected = decay * expected + (1 - decay) * weight.data if decay else weight.data.clone()
    with average.applied():
        torch.testing.assert_close(weight.data, expected)
    assert weight.data[0] == 21
    flags = {"use_ema": True, "max_train_steps": 4, "checkpointing_steps": 2}
    flags |= {"validation_prompt": "a dog", "num_validation_images": 1}
    whole = train(**flags, output_dir=tmp_path / "a")
    train(**{**flags, "max_train_steps": 2}, output_dir=tmp_path / "b")
    resumed = train(**flags, output_dir=tmp_path / "b", resume_from_checkpoint="latest")
    plain = train(**{**flags, "use_ema": False}, output_dir=tmp_path / "c")
    first, second, third = (load_file(output / trainer.LORA_FILE) for output in (whole, resumed, plain))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)
    pictures = [output / "validation/step-000004/00.png" for output in (whole, resumed, plain)]
    drawn = [Image.open(path).tobytes() for path in pictures]
    assert drawn[0] == drawn[1] != drawn[2]
    state = torch.load(whole / "checkpoint-4" / "state.pt")
    trained = load_file(plain / trainer.LORA_FILE)
    assert torch.equal(
        next(iter(state["adapters"].values())),
        next(
            iter(
                tensor
                for key, tensor in trained.items()
                if key.startswith("unet.")
                and "lora_A" in key
                and key == "unet." + next(iter(state["adapters"])).removeprefix("unet.").replace(".default", "")
            )
        ),
    )


def test_what_looks_like_a_contradiction_and_is_none(train):
    train.args(use_rslora=True, lora_alpha=7)
    train.args(optimizer="Prodigy", train_text_encoder=True, learning_rate=1, text_encoder_lr=1)


def test_prodigys_rate_is_warned_about(train, capsys):
    train.args(optimizer="prodigy", learning_rate=1e-4)
    assert "use --learning_rate 1, not 0.0001" in capsys.readouterr().out

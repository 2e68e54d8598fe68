"""What is trained, in which dtype, and that prompts and latents are what diffusers' pipeline makes of them."""

import gc
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

import train_dreambooth_lora_sdxl as trainer
from train_dreambooth_lora_sdxl import (
    PART_CLASSES,
    Source,
    TrainingError,
    UserError,
    encode_image,
    encode_prompts,
    load_part,
    load_trainable,
    load_vae,
    lora_tensors,
    start,
    text_encoder_targets,
)


@pytest.fixture
def run(train):
    return lambda **flags: start(train.args(**flags))


def test_prompts_are_encoded_as_the_pipeline_does(run, tiny):
    prompts = ["a photo of sks dog on grass", "a red car"]
    table = encode_prompts(run(), prompts, trained=False, dtype=torch.float32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    for prompt in prompts:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=True)
        assert torch.equal(table.of(prompt)[0], embeds) and torch.equal(table.of(prompt)[1], pooled)


def test_trained_encoders_start_from_the_same_embeddings(run):
    started = run(train_text_encoder=True)
    model = load_trainable(started)
    frozen, trained = (encode_prompts(started, ["a photo of sks dog"], kind, torch.float32) for kind in (False, True))
    for ours, theirs in zip(model.embed(trained.at([0, 1])), frozen.at([0, 1]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_trap_12_a_cut_prompt_is_quoted_before_anything_heavy(capsys, train):
    """Once, and in a dry run, too."""
    prompt = "a photo of a " + "red " * 18 + "duck on grass"
    flags = {"class_prompt": prompt, "with_prior_preservation": True, "instance_prompt": prompt}
    train(**flags, log_level="info", dry_run=True)
    told = capsys.readouterr().out
    assert told.count("more than 24 tokens") == 1 and '"duck on grass"' in told
    train(log_level="info", dry_run=True)
    assert "tokens" not in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trap_4_adapters_are_float32_and_the_rest_is_frozen_in_the_base_precision(run, precision):
    started = run(train_text_encoder=True, mixed_precision=precision, gradient_checkpointing=True)
    model = load_trainable(started)
    adapters = model.adapters
    assert adapters and all("lora_" in name and p.dtype == torch.float32 for name, p in adapters.items())
    rest = {p.dtype for name, p in model.named_parameters() if name not in adapters}
    assert rest == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_trap_5_precision_comes_from_accelerate_when_the_flag_is_absent(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    started = run()
    assert started.dtype == torch.bfloat16
    model = load_trainable(started)
    assert model.adapters and {adapter.dtype for adapter in model.adapters.values()} == {torch.float32}
    rest = {parameter.dtype for name, parameter in model.named_parameters() if name not in model.adapters}
    assert rest == {torch.bfloat16}


def test_trap_11_no_adapter_on_a_layer_that_sdxl_never_reads(run):
    model = load_trainable(run(train_text_encoder=True))
    first, second = (
        {name.split("layers.")[1][0] for name, p in encoder.named_parameters() if p.requires_grad}
        for encoder in model.text_encoders
    )
    assert first == {"0", "1"} and second == {"0", "1", "2"}


def test_trap_15_names_of_text_encoders_carry_text_model(run):
    names = set(lora_tensors(load_trainable(run(train_text_encoder=True))))
    for component in ("text_encoder", "text_encoder_2"):
        own = {name for name in names if name.startswith(component + ".")}
        assert own and all(name.startswith(f"{component}.text_model.encoder.layers.") for name in own)
    assert {name.rsplit(".", 2)[1] for name in names} == {"lora_A", "lora_B"}


def test_full_size_counts(run):
    """560 attention modules, 5.8 M parameters at rank 4: the figures of the real SDXL, on the meta device."""
    args = run().args
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=[320, 640, 1280],
            layers_per_block=2,
            transformer_layers_per_block=[1, 2, 10],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            sample_size=128,
        )
        unet.requires_grad_(False)
        trainer.add_adapters(args, unet)
        text = PART_CLASSES["text_encoder"].config_class(num_hidden_layers=12)
        encoder = PART_CLASSES["text_encoder"](text)
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert len(trained) == 2 * 560 and round(sum(p.numel() for p in trained) / 1e6, 1) == 5.8
    targets = re.compile(text_encoder_targets(encoder))
    hit = [name for name, _ in encoder.named_modules() if targets.fullmatch(name)]
    assert len(hit) == 11 * 4 and not any("layers.11." in name for name in hit)


PLAYGROUND = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}


@pytest.mark.parametrize("config", [{}, PLAYGROUND], ids=["SDXL", "Playground"])
def test_moments_are_the_vaes_own(tiny, config):
    vae = load_part(Source(str(tiny)), "vae", torch.float32, torch.device("cpu"))
    vae.register_to_config(**config)
    pixels = torch.rand(3, 16, 16) * 2 - 1
    mean, std = encode_image(vae, pixels, "x")
    posterior = vae.encode(pixels[None]).latent_dist
    latents_mean = torch.tensor(config.get("latents_mean", [0.0] * 4)).view(4, 1, 1)
    latents_std = torch.tensor(config.get("latents_std", [1.0] * 4)).view(4, 1, 1)
    torch.testing.assert_close(mean, (posterior.mean[0] - latents_mean) * vae.config.scaling_factor / latents_std)
    torch.testing.assert_close(std, posterior.std[0] * vae.config.scaling_factor / latents_std)


class OverflowingVAE(torch.nn.Module):
    """Finite only from a given precision on, as SDXL's own VAE is."""

    def __init__(self, vae, finite_in):
        super().__init__()
        self.vae, self.finite_in, self.config = vae, finite_in, vae.config

    def to(self, *args, **keywords):
        self.vae.to(*args, **keywords)
        return self

    @property
    def dtype(self):
        return self.vae.dtype

    device = torch.device("cpu")

    def encode(self, pixels):
        answer = self.vae.encode(pixels)
        if pixels.dtype not in self.finite_in:
            answer.latent_dist.mean = answer.latent_dist.mean * float("nan")
        return answer


def test_trap_26_a_vae_that_overflows_is_used_in_float32_or_the_picture_is_named(train, tiny, monkeypatch):
    """Whatever the run computes in: what is encoded stays."""
    pixels = torch.rand(3, 16, 16) * 2 - 1
    vae = load_part(Source(str(tiny)), "vae", torch.float32, torch.device("cpu"))
    mean, _ = encode_image(OverflowingVAE(vae, {torch.float32}), pixels, "dog.png")
    assert mean.isfinite().all() and mean.dtype == torch.float32
    seen, real = [], trainer.encode_image
    monkeypatch.setattr(trainer, "encode_image", lambda vae, *rest: seen.append(vae.dtype) or real(vae, *rest))
    train(mixed_precision="bf16", max_train_steps=1)
    assert set(seen) == {torch.float32}
    with pytest.raises(TrainingError, match="dog.png"):
        encode_image(OverflowingVAE(vae, set()), pixels, "dog.png")


def test_trap_26_force_upcast_is_obeyed(tiny, tmp_path):
    vae = load_part(Source(str(tiny)), "vae", torch.float32, torch.device("cpu"))
    vae.register_to_config(force_upcast=True)
    vae.save_pretrained(tmp_path)
    source = Source(str(tmp_path), is_pipeline=False)
    assert load_vae(source, torch.float16, torch.device("cpu")).dtype == torch.float32
    assert load_vae(Source(str(tiny)), torch.float16, torch.device("cpu")).dtype == torch.float16


def test_trap_26_force_upcast_is_obeyed_where_pictures_are_drawn(tiny, tmp_path):
    """A decoder that overflows in float16, as SDXL's own does, and the pipeline's picture of the same latents."""
    vae = AutoencoderKL.from_pretrained(tiny, subfolder="vae")
    vae.decoder.conv_in.weight.data *= 3e5
    vae.register_to_config(force_upcast=True)
    vae.half().save_pretrained(tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny, vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    size = {"num_inference_steps": 2, "height": 16, "width": 16}
    latents, expected = (
        pipeline("a dog", **size, generator=torch.Generator().manual_seed(1), output_type=kind).images
        for kind in ("latent", "pil")
    )
    assert vae.dtype == torch.float16
    assert not vae.decode(latents.half() / vae.config.scaling_factor).sample.isfinite().all()
    ours = load_vae(Source(str(tmp_path), is_pipeline=False), torch.float16, torch.device("cpu"))
    (drawn,) = trainer.decode_latents(ours, [latents])
    assert ours.dtype == torch.float32 and drawn.tobytes() == expected[0].tobytes()


def test_an_own_vae_ignores_revision_and_variant_of_the_base(run, tiny, tmp_path):
    base, other = tmp_path / "base", str(tiny / "vae")
    shutil.copytree(tiny, base)
    for path in [*base.glob("*/model.safetensors"), *base.glob("*/diffusion_pytorch_model.safetensors")]:
        path.rename(path.with_suffix(".fp16.safetensors"))
    flags = {"pretrained_model_name_or_path": base, "revision": "refs/pr/1", "variant": "fp16"}
    started = run(**flags, pretrained_vae_model_name_or_path=other)
    assert (started.base.revision, started.base.variant) == ("refs/pr/1", "fp16")
    assert started.vae == Source(other, None, None, None, False)


def test_a_part_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(UserError, match="the vae of .*nowhere"):
        load_part(Source(str(tmp_path / "nowhere")), "vae", torch.float32)


def test_trap_6_time_ids_are_each_pictures_own(train, tmp_path):
    from train_dreambooth_lora_sdxl import encode_latents, instance_samples

    classes = tmp_path / "classes"
    classes.mkdir()
    Image.new("RGB", (40, 20)).save(classes / "0.png")
    started = start(
        train.args(with_prior_preservation=True, class_data_dir=classes, class_prompt="a dog", center_crop=True)
    )
    samples = instance_samples(started.args)
    samples = samples + started.prior.samples(samples)
    table = encode_prompts(started, ["a photo of sks dog", "a dog"], False, torch.float32)
    cache = encode_latents(started, samples, [(16, 16)] * 5, table)
    ids = [cache.add_time_ids[views[0]].tolist() for views in cache.views.values()]
    assert ids[0] == [32, 24, (round(32 * 16 / 24) - 16) // 2, 0, 16, 16]
    assert ids[-1] == [20, 40, 0, 8, 16, 16]
    assert cache.weight.tolist() == [1.0] * 5 + [1.0] and len(cache.views) == 6


def test_trap_8_crops_and_flips_are_drawn_anew_for_every_look(train):
    from train_dreambooth_lora_sdxl import BatchSampler, encode_latents, instance_samples

    started = start(train.args(random_flip=True, repeats=2))
    samples = instance_samples(started.args)
    table = encode_prompts(started, ["a photo of sks dog"], False, torch.float32)
    cache = encode_latents(started, samples, [(16, 16)] * len(samples), table)
    order = BatchSampler([range(len(samples))], (), 2, seed=0)
    seen = {}
    for n in range(200):
        batch = cache.batch(table, order, n)
        for (row, _), mean in zip(order.rows(n), batch.mean, strict=True):
            seen.setdefault(row, []).append(mean.numpy().tobytes())
    for (row, _), views in cache.views.items():
        assert len(views) >= (2 if row % 5 == 2 else 3)  # number 2 is square: only flips
        first, second = seen[row][: len(views)], seen[row][len(views) : 2 * len(views)]
        assert len(set(first)) == len(views) and set(first) == set(second)  # all in turn before any comes again
    assert len(samples) == 10 and set(seen[0]) != set(seen[5])  # a repeat has views of its own


def test_trap_1_rows_of_the_class_keep_their_prompts_weights_and_pictures(train, tmp_path):
    """Two rows of the subject beside two of its class: all of a batch is of the samples that the order names."""
    from train_dreambooth_lora_sdxl import BatchSampler, encode_latents, instance_samples

    for folder, count in (("subject", 5), ("class", 3)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            noise = np.random.default_rng([count, i]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / folder / f"{i}.png")
            (tmp_path / folder / f"{i}.txt").write_text(f"a photo of {i}")
    flags = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a dog"}
    flags |= {"instance_data_dir": tmp_path / "subject", "prior_loss_weight": 0.7, "caption_dropout": 0.5}
    started = start(train.args(**flags))
    subject = instance_samples(started.args)
    samples = subject + started.prior.samples(subject)
    table = encode_prompts(started, [sample.prompt for sample in samples], False, torch.float32)
    cache = encode_latents(started, samples, [(16, 16)] * 5, table)
    vae = load_part(started.vae, "vae", torch.float32, torch.device("cpu"))
    means = [encode_image(vae, trainer.to_pixels(np.array(Image.open(sample.path))), "x")[0] for sample in samples]
    prompts = [f"a photo of {i}" for i in range(5)] + ["a dog"] * 3
    order, emptied, seen = BatchSampler([range(5)], range(5, 8), 2, seed=0), 0, set()
    for n in range(100):
        rows, batch = [row for row, _ in order.rows(n)], cache.batch(table, order, n)
        assert batch.instance_rows == 2 and max(rows[:2]) < 5 <= min(rows[2:])
        torch.testing.assert_close(batch.weight, torch.tensor([1.0, 1.0, 0.7, 0.7]))
        assert batch.names == tuple(f'{samples[row].path} ("{prompts[row]}")' for row in rows)
        torch.testing.assert_close(batch.mean, torch.stack([means[row] for row in rows]))
        for i, row in enumerate(rows):
            is_empty = torch.equal(batch.text[0][i], table.of("")[0][0])
            embeds, pooled = table.of("" if is_empty and i < 2 else prompts[row])
            assert torch.equal(batch.text[0][i], embeds[0]) and torch.equal(batch.text[1][i], pooled[0])
            emptied += is_empty
        seen.update(rows)
    assert 80 < emptied < 120 and seen == set(range(8))


def alive(kind) -> int:
    gc.collect()
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


def test_traps_18_20_21_what_a_phase_loaded_is_gone_after_it(train, monkeypatch):
    """No text encoder and no VAE lives in the training loop; validation loads a VAE, and the end loads nothing."""
    kinds = (PART_CLASSES["text_encoder"], PART_CLASSES["text_encoder_2"], PART_CLASSES["vae"])
    before = [alive(kind) for kind in kinds]
    loaded, in_the_loop = [], []
    real_load, real_loss = trainer.load_part, trainer.diffusion_loss
    monkeypatch.setattr(
        trainer, "load_part", lambda source, part, *rest: loaded.append(part) or real_load(source, part, *rest)
    )
    monkeypatch.setattr(
        trainer,
        "diffusion_loss",
        lambda *rest: in_the_loop.append([alive(kind) for kind in kinds]) or real_loss(*rest),
    )
    train(validation_prompt="a dog", num_validation_images=1)
    assert in_the_loop and all(counts == before for counts in in_the_loop)
    texts = ["tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"]
    # lengths of prompts, prompts, latents, the loop, a validation before and one after
    assert loaded == ["tokenizer", *texts, "vae", "unet", "vae", "vae"]


@pytest.mark.parametrize("mode", [None, "nearest", "bicubic"])
def test_trap_14_every_picture_keeps_its_own_latents_and_prompt(train, mode):
    from train_dreambooth_lora_sdxl import encode_latents, instance_samples, load_picture, resized

    started = start(train.args(center_crop=True, dataloader_num_workers=2, image_interpolation_mode=mode))
    samples = instance_samples(started.args)
    table = encode_prompts(started, ["a photo of sks dog"], False, torch.float32)
    cache = encode_latents(started, samples, [(16, 16)] * 5, table)
    vae = load_part(started.vae, "vae", torch.float32, torch.device("cpu"))
    for sample, views in zip(samples, cache.views.values(), strict=True):
        picture = load_picture(sample.path)
        width, height = resized(picture.size, (16, 16))
        left, top = (width - 16) // 2, (height - 16) // 2
        filtered = picture.resize((width, height), Image.Resampling[(mode or "lanczos").upper()])
        cut = filtered.crop((left, top, left + 16, top + 16))
        pixels = torch.tensor(list(cut.get_flattened_data())).view(16, 16, 3).permute(2, 0, 1) / 127.5 - 1
        assert len(views) == 1
        torch.testing.assert_close(cache.moments(views)[0][0], encode_image(vae, pixels, "x")[0], rtol=1e-4, atol=1e-4)


def test_trap_25_embeddings_need_no_gradients(run):
    table = encode_prompts(run(), ["a dog"], trained=False, dtype=torch.float32)
    assert not any(rows.requires_grad for rows in table.of("a dog"))


KINDS = {"LoRA": {}, "text encoders": {"train_text_encoder": True}, "DoRA": {"use_dora": True, "lora_dropout": 0.5}}


@pytest.mark.parametrize("kind", KINDS)
def test_without_adapters_it_is_the_base_model(run, tiny, kind):
    """Bit for bit what diffusers' own parts predict, whatever the adapters have learnt."""
    prompt, started = "a photo of sks dog", run(**KINDS[kind])
    model = load_trainable(started)
    table = encode_prompts(started, [prompt], "train_text_encoder" in KINDS[kind], torch.float32)
    with torch.no_grad():
        for name, adapter in model.adapters.items():
            adapter.add_(torch.randn_like(adapter) if "lora_B" in name else 0)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    noisy, timesteps, ids = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.tensor([[32.0, 24, 0, 3, 16, 16]])
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": ids}
        plain = pipeline.unet(noisy, timesteps, embeds, added_cond_kwargs=added).sample
        with model.without_adapters():
            assert torch.equal(model(noisy, timesteps, table.of(prompt), ids), plain)
        assert (model(noisy, timesteps, table.of(prompt), ids) - plain).abs().max() > 0.1


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_trap_22_a_part_is_loaded_in_its_final_dtype(tiny, part, monkeypatch):
    """The loaders are told the dtype, so that no float32 copy is ever made: nothing is cast afterwards."""
    casts = []
    to = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *rest, **words: casts.append(rest) or to(self, *rest, **words)
    )
    model = load_part(Source(str(tiny)), part, torch.bfloat16, torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(isinstance(value, torch.dtype) for rest in casts for value in rest)


def test_trap_38_xformers_whose_kernels_cannot_run_is_refused_before_anything_loads(train, monkeypatch):
    """Installed, but built for another torch: there is no kernel, and no page of warnings."""
    import importlib.util
    import sys
    import types

    broken = types.ModuleType("xformers.ops")
    broken.memory_efficient_attention = lambda *rest: (_ for _ in ()).throw(NotImplementedError("No operator found"))
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", broken)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "xformers" or real(name, *rest))
    monkeypatch.setattr(trainer, "load_part", lambda *rest: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="no kernel of xformers runs on cpu here"):
        train(enable_xformers_memory_efficient_attention=True)


LOADING = """
import resource, sys, torch
sys.path.insert(0, {root!r})
import train_dreambooth_lora_sdxl as trainer

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def load(folder):
    return trainer.load_part(trainer.Source(folder), "unet", torch.bfloat16, torch.device("cpu"))

load({small!r})  # imports, and whatever else only the first time costs
before = peak()
unet = load({large!r})
print(peak() - before, sum(parameter.nbytes for parameter in unet.parameters()))
"""


def test_loading_a_part_takes_little_more_memory_than_the_part(tiny, tmp_path):
    """A UNet of 0.3 billion parameters in float16, loaded in bfloat16 by a process of its own."""
    config = UNet2DConditionModel.load_config(tiny, subfolder="unet")
    shape = {"block_out_channels": (320, 960), "attention_head_dim": [5, 15], "transformer_layers_per_block": [1, 4]}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**config, **shape, "norm_num_groups": 32}).to(torch.float16)
    unet = unet.to_empty(device="cpu")
    for parameter in unet.parameters():
        parameter.data.fill_(0.01)
    unet.save_pretrained(tmp_path / "unet")
    del unet
    code = LOADING.format(root=str(ROOT), small=str(tiny), large=str(tmp_path))
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    shutil.rmtree(tmp_path / "unet")  # half a gigabyte
    assert told.returncode == 0, told.stderr
    grown, size = map(int, told.stdout.split())
    assert size > 5e8 and grown < size + 1e9

"""Folders as people have them: captions, metadata, sub-folders, shapes."""

import functools
import json
import math
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_dreambooth_lora_sdxl as trainer


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures, the last in a sub-folder."""
    made = tmp_path / "data"
    (made / "more").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("b.jpg", "green"), ("more/c.png", "blue")):
        Image.new("RGB", (30, 20), colour).save(made / name)
    return made


def noise_picture(size: tuple[int, int], spread: int) -> Image.Image:
    """Grey noise, the same each time: Pillow's own has no seed."""
    levels = np.random.default_rng(spread).normal(128, spread, size[::-1]).clip(0, 255)
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def prompts(train, folder, **flags) -> dict[str, str]:
    samples = trainer.instance_samples(train.args(instance_data_dir=folder, **flags))
    return {sample.path.name: sample.prompt for sample in samples}


def test_pictures_alone_have_the_instance_prompt(train, folder):
    assert prompts(train, folder) == dict.fromkeys(("a.png", "b.jpg"), "a photo of sks dog")
    assert set(prompts(train, folder, recursive=True)) == {"a.png", "b.jpg", "c.png"}


def test_a_text_beside_a_picture_is_its_caption(train, folder):
    (folder / "a.txt").write_text("\ufeff{instance_prompt} on grass, 犬\n", encoding="utf-8")
    (folder / "b.txt").write_text("")  # an empty one is none
    (folder / "more" / "c.txt").write_text("no placeholder")
    assert prompts(train, folder, recursive=True) == {
        "a.png": "a photo of sks dog on grass, 犬",
        "b.jpg": "a photo of sks dog",
        "c.png": "no placeholder",
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_gives_captions(train, folder, kind):
    rows = [("a.png", 'red, "dear" dog'), ("more/c.png", "blue")]
    if kind == "csv":
        text = 'file_name,text\na.png,"red, ""dear"" dog"\nmore/c.png,blue\n'
    else:
        text = "\n\n".join(json.dumps({"file_name": name, "text": caption, "extra": 1}) for name, caption in rows)
    (folder / f"metadata.{kind}").write_text(text)
    (folder / "a.txt").write_text("metadata wins")
    assert prompts(train, folder, recursive=True) == {
        "a.png": 'red, "dear" dog',
        "b.jpg": "a photo of sks dog",
        "c.png": "blue",
    }


def test_no_instance_prompt_is_needed_where_all_have_captions(train, folder):
    (folder / "a.txt").write_text("a red thing")
    with pytest.raises(trainer.UserError, match=r"--instance_prompt is needed, as 1 of 2 pictures .*: b\.jpg"):
        train.args(instance_data_dir=folder, instance_prompt=None)
    (folder / "b.txt").write_text("a green thing")
    output = train(instance_data_dir=folder, instance_prompt=None, log_level="info")
    assert "a red thing" in (output / "README.md").read_text()


def test_captions_reach_the_batches_and_dropout_empties_them(train, folder):
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"a photo of {name}")
    run = trainer.start(train.args(instance_data_dir=folder, caption_dropout=0.25))
    samples = trainer.instance_samples(run.args)
    table = trainer.encode_prompts(run, [sample.prompt for sample in samples], False, torch.float32)
    cache = trainer.encode_latents(run, samples, [(16, 16)] * 2, table)
    order, seen = trainer.BatchSampler([range(2)], (), 2, 0), Counter()
    for n in range(400):
        for (row, _), embeds in zip(order.rows(n), cache.batch(table, order, n).text[0], strict=True):
            found = [prompt for prompt in table.numbers if torch.equal(table.of(prompt)[0][0], embeds)]
            assert found in ([samples[row].prompt], [""])
            seen[found[0]] += 1
    assert 0.2 < seen[""] / 800 < 0.3
    assert cache.batch(table, order, 7).text[0].equal(cache.batch(table, order, 7).text[0])


SHAPES = {"wide.png": (90, 40), "wider.png": (120, 50), "tall.png": (40, 90), "tiny.png": (9, 6)}
SHAPES["square.png"] = 64, 64


@pytest.fixture
def shapes(tmp_path) -> Path:
    made = tmp_path / "shapes"
    made.mkdir()
    for i, (name, size) in enumerate(SHAPES.items()):
        noise_picture(size, 50 + i).save(made / name)
    return made


def test_sdxls_own_buckets():
    """The 40 pairs of its paper's appendix I (EXPORT_FORMATS.md, section 6), and the one that it does not mirror."""
    pairs = {
        512: (2048, 1984, 1920, 1856),
        576: (1792, 1728, 1664),
        640: (1600, 1536),
        704: (1472, 1408, 1344),
        768: (1344, 1280),
        832: (1216, 1152),
        896: (1152, 1088),
        960: (1088, 1024),
        1024: (1024, 960),
    }
    short = {(side, other) for side, others in pairs.items() for other in others}
    assert set(trainer.make_buckets("auto", 1024)) == short | {(other, side) for side, other in short}


@pytest.mark.parametrize("spec", ["auto", "64x64,96x40,40x96"])
def test_every_picture_keeps_its_shape_and_none_is_dropped(train, shapes, spec):
    args = train.args(instance_data_dir=shapes, resolution=64, aspect_ratio_buckets=spec)
    samples = trainer.instance_samples(args)
    buckets = trainer.bucket_of_each(args, samples)
    for sample, (width, height) in zip(samples, buckets, strict=True):
        size = SHAPES[sample.path.name]
        assert abs(math.log(width / height) - math.log(size[0] / size[1])) < 0.45
    assert len(set(buckets)) >= 3


def test_a_small_picture_gets_a_small_bucket():
    buckets = trainer.make_buckets("auto", 1024)
    assert trainer.choose_bucket((2000, 1000), buckets, 1.0) == (1408, 704)
    width, height = trainer.choose_bucket((500, 250), buckets, 1.5)
    assert (width, height) == (704, 320) and max(width / 500, height / 250) <= 1.5
    assert trainer.choose_bucket((10, 10), [(64, 64)], 1.0) == (64, 64)  # without buckets there is no other


def test_rows_of_a_batch_share_a_bucket_and_have_their_own_time_ids(train, shapes, tmp_path):
    classes = tmp_path / "classes"
    classes.mkdir()
    Image.new("RGB", (70, 50)).save(classes / "0.png")
    run = trainer.start(
        train.args(
            instance_data_dir=shapes,
            aspect_ratio_buckets="auto",
            resolution=32,
            with_prior_preservation=True,
            class_data_dir=classes,
            class_prompt="a dog",
        )
    )
    subject = trainer.instance_samples(run.args)
    samples, buckets = subject + run.prior.samples(subject), trainer.bucket_of_each(run.args, subject)
    table = trainer.encode_prompts(run, {sample.prompt for sample in samples}, False, torch.float32)
    cache = trainer.encode_latents(run, samples, buckets, table)
    rows = [[i for i, own in enumerate(buckets) if own == bucket] for bucket in dict.fromkeys(buckets)]
    order, seen = trainer.BatchSampler(rows, range(5, 6), 2, 0), set()
    for n in range(40):
        batch, numbers = cache.batch(table, order, n), [row.sample for row in order.rows(n)]
        width, height = buckets[numbers[0]]
        assert batch.mean.shape == (4, 4, height // run.vae_factor, width // run.vae_factor)
        assert batch.add_time_ids[:, 4:].tolist() == [[height, width]] * 4
        for row, ids in zip(numbers, batch.add_time_ids.tolist(), strict=True):
            own = SHAPES.get(samples[row].path.name, (70, 50))
            assert ids[:2] == [own[1], own[0]]
        seen.update(numbers)
    assert seen == set(range(6))


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_a_data_set_is_read_through_datasets(train, folder, tmp_path, kind, capsys):
    """A local one: parquet with the pictures inside, or a folder with metadata.csv."""
    import datasets

    source = tmp_path / "source"
    if kind == "parquet":
        source.mkdir()
        rows = {"photo": [str(folder / name) for name in ("a.png", "b.jpg")], "words": ["red", "green"]}
        table = datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image())
        table.to_parquet(source / "train.parquet")
        flags = {"image_column": "photo", "caption_column": "words"}
    else:
        source = folder
        (folder / "metadata.csv").write_text("file_name,text\na.png,red\nb.jpg,green\nmore/c.png,green\n")
        flags = {"caption_column": "text"}
    flags |= {"instance_data_dir": None, "dataset_name": source, "log_level": "info", "max_train_steps": 1}
    output = train(**flags)
    told = capsys.readouterr().out
    samples = trainer.instance_samples(train.args(**flags))
    assert str(source) in told and {"red", "green"} == {sample.prompt for sample in samples}
    kept = trainer.pictures_folder(train.args(**flags))
    assert kept.is_relative_to(output / "cache") and {path.suffix for path in kept.iterdir()} >= {".png", ".jpeg"}
    first = next(sample.path for sample in samples if sample.prompt == "red")
    assert first.read_bytes() == (folder / "a.png").read_bytes()
    settings = trainer.yaml.safe_load((output / trainer.CONFIG_FILE).read_text())
    assert settings["dataset_name"] == str(source) and "instance_data_dir" not in settings
    with pytest.raises(trainer.UserError, match="has no column nothing; --caption_column is one of"):
        train(**{**flags, "caption_column": "nothing"})
    with pytest.raises(trainer.UserError, match="--dataset_name .*nowhere cannot be read"):
        train(**{**flags, "dataset_name": tmp_path / "nowhere"})


def test_a_data_set_of_files_in_an_archive_and_what_phones_write(train, folder, tmp_path):
    """Rows that hold an address instead of bytes, as the Hub's folders of pictures do; a JPEG of two pictures, which
    Pillow calls MPO, is a JPEG.
    """
    red, more = Image.new("RGB", (30, 20), "red"), [Image.new("L", (9, 9))]
    red.save(folder / "m.jpg", "MPO", save_all=True, append_images=more)
    source = tmp_path / "source"
    source.mkdir()
    with zipfile.ZipFile(source / "train.zip", "w") as archive:
        for name in ("a.png", "m.jpg"):
            archive.write(folder / name, name)
    flags = {"instance_data_dir": None, "dataset_name": source, "max_train_steps": 1}
    train(**flags)
    samples = trainer.instance_samples(train.args(**flags))
    assert [sample.path.name for sample in samples] == ["000000.png", "000001.jpg"]
    assert samples[0].path.read_bytes() == (folder / "a.png").read_bytes()


def test_a_data_set_that_changed_is_read_again(train, folder, monkeypatch):
    """Here by its files; on the Hub by its commit, and out of reach of the Hub the newest copy is taken."""
    (folder / "metadata.csv").write_text("file_name,text\na.png,red\nb.jpg,green\n")
    flags = {"instance_data_dir": None, "dataset_name": folder, "caption_column": "text", "max_train_steps": 1}
    train(**flags)
    (folder / "metadata.csv").write_text("file_name,text\na.png,crimson\nb.jpg,green\n")
    train(**flags)
    read = {sample.prompt for sample in trainer.instance_samples(train.args(**flags))}
    assert read == {"crimson", "green"}
    newest = trainer.pictures_folder(train.args(**flags))
    monkeypatch.setattr(trainer, "dataset_version", functools.cache(lambda name: ""))
    assert trainer.pictures_folder(train.args(**flags)) == newest


def test_metadata_is_found_however_the_folder_is_written(train, folder, tmp_path):
    """With .. in the path, and where pictures are links to elsewhere, as in the Hub's cache."""
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}')
    (tmp_path / "other").mkdir()
    assert prompts(train, tmp_path / "other" / ".." / "data")["a.png"] == "red"
    (tmp_path / "blob").write_bytes((folder / "a.png").read_bytes())
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(tmp_path / "blob")
    assert prompts(train, folder)["a.png"] == "red"


def test_pictures_come_from_one_place(train, folder):
    with pytest.raises(trainer.UserError, match="give one of them"):
        train.args(dataset_name="x/y")
    with pytest.raises(trainer.UserError, match="give one of them"):
        train.args(instance_data_dir=None)


def test_a_dry_run_names_what_is_not_used_and_prints_the_plan(train, folder, capsys):
    (folder / "phone.heic").write_bytes(b"x")
    train(instance_data_dir=folder, dry_run=True, log_level="info")
    printed = capsys.readouterr().out
    assert "phone.heic passed over" in printed
    assert "Steps" in printed and "latents of the subject take up to" in printed
    assert not Path(train.flags["output_dir"]).exists()


@pytest.fixture
def masked(tmp_path) -> Path:
    """A picture whose left half is opaque, one without alpha, and a folder of masks for both."""
    made, masks = tmp_path / "masked", tmp_path / "masks"
    made.mkdir()
    masks.mkdir()
    noise = noise_picture((32, 32), 90)
    half = Image.new("L", (32, 32), 0)
    half.paste(255, (0, 0, 16, 32))
    cut = noise.copy()
    cut.putalpha(half)
    cut.save(made / "cut.png")
    noise.rotate(90).save(made / "whole.png")
    half.rotate(90).resize((64, 64)).save(masks / "whole.png")
    return made


def batch_of(train, **flags):
    run = trainer.start(train.args(center_crop=True, **flags))
    samples = trainer.instance_samples(run.args)
    table = trainer.encode_prompts(run, [sample.prompt for sample in samples], False, torch.float32)
    cache = trainer.encode_latents(run, samples, [(16, 16)] * len(samples), table)
    order = trainer.BatchSampler([range(len(samples))], (), len(samples), 0)
    batch = cache.batch(table, order, 0)
    return run, batch, {name.split("/")[-1].split(" ")[0]: i for i, name in enumerate(batch.names)}


def test_masks_count_the_subject_and_little_else(train, masked, tmp_path):
    flags = {"instance_data_dir": masked, "masked_loss": True, "background_loss_weight": 0.25}
    _, batch, at = batch_of(train, **flags)
    assert batch.mask.shape == (2, 1, 8, 8)
    torch.testing.assert_close(batch.mask.mean(dim=(1, 2, 3)), torch.ones(2))
    rows = batch.mask[at["cut.png"], 0]
    torch.testing.assert_close(rows[:, :3] / rows[:, 5:], torch.full((8, 3), 4.0))  # 1 against a quarter
    assert (batch.mask[at["whole.png"]] == 1).all()  # no mask: all of it is the subject
    _, batch, at = batch_of(train, **{**flags, "masked_loss": tmp_path / "masks"}, output_dir=tmp_path / "b")
    rows = batch.mask[at["whole.png"], 0]
    torch.testing.assert_close(rows[5:] / rows[:3], torch.full((3, 8), 4.0))  # the left half was turned to the bottom


def test_the_masked_loss_is_the_weighted_mean(train, masked):
    """Against the sum over places written out, with min-SNR and a class row beside."""
    run, batch, _ = batch_of(train, instance_data_dir=masked, masked_loss=True, snr_gamma=5.0)
    objective = trainer.make_objective(run.args, run.scheduler)
    batch = batch._replace(weight=torch.tensor([1.0, 0.3]), instance_rows=1)
    answer = torch.randn(2, 4, 8, 8)
    seen = {}

    def model(model_input, timesteps, text, ids):
        seen["t"] = timesteps
        return answer

    torch.manual_seed(3)
    loss = trainer.diffusion_loss(model, objective, batch).total
    torch.manual_seed(3)
    torch.randn_like(batch.mean)
    noise = torch.randn_like(batch.mean)
    error = ((answer - noise) ** 2).mean(dim=1)
    means = [(error[i] * batch.mask[i, 0]).sum() / batch.mask[i, 0].sum() for i in range(2)]
    expected = means[0] * objective.table.weight[seen["t"][0]] + 0.3 * means[1] * objective.table.weight[seen["t"][1]]
    torch.testing.assert_close(loss, expected)


def test_masks_with_buckets_flips_and_prior_resume_exactly(train, masked, tmp_path):
    from safetensors.torch import load_file

    flags = {
        "instance_data_dir": masked,
        "masked_loss": True,
        "random_flip": True,
        "aspect_ratio_buckets": "auto",
        "resolution": 32,
        "with_prior_preservation": True,
        "class_prompt": "a dog",
        "class_data_dir": tmp_path / "classes",
        "num_class_images": 2,
    }
    whole = train(**flags, max_train_steps=4, checkpointing_steps=2, output_dir=tmp_path / "whole")
    again = train(**flags, max_train_steps=4, output_dir=tmp_path / "b", resume_from_checkpoint=whole / "checkpoint-2")
    plain = train(**{**flags, "masked_loss": False}, max_train_steps=4, output_dir=tmp_path / "plain")
    first, second, third = (load_file(folder / trainer.LORA_FILE) for folder in (whole, again, plain))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], third[key]) for key in first)


def test_masks_that_are_not_there_or_do_not_fit_are_refused(train, folder, masked, tmp_path):
    with pytest.raises(trainer.UserError, match="--masked_loss finds no mask: .*transparent"):
        train.args(instance_data_dir=folder, masked_loss=True)
    with pytest.raises(trainer.UserError, match="--masked_loss .*no such folder"):
        train.args(instance_data_dir=folder, masked_loss=tmp_path / "x")
    Image.new("L", (10, 99)).save(tmp_path / "masks" / "whole.png")
    with pytest.raises(trainer.UserError, match="whole.png is 10x99, which is another shape"):
        train.args(instance_data_dir=masked, masked_loss=tmp_path / "masks")


def test_masks_are_looked_at_before_anything_else(train, masked, tmp_path, capsys):
    """All of them: a mask of another shape behind a good one is found, a picture without a mask is named, an alpha
    that hides nothing is none; and what is mended is seen in the same process.
    """
    flags = {"instance_data_dir": masked, "masked_loss": True}
    train.args(**flags, log_level="warning")
    assert "1 of 2 pictures have no mask, and all of them counts as subject: whole.png" in capsys.readouterr().out
    Image.open(masked / "whole.png").convert("RGBA").save(masked / "cut.png")
    with pytest.raises(trainer.UserError, match="--masked_loss finds no mask"):
        train.args(**flags)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(trainer.UserError, match="--masked_loss finds no mask"):
        train.args(**{**flags, "masked_loss": empty})
    for path in masked.iterdir():
        Image.new("L", (32, 32)).save(empty / path.name)
    train.args(**{**flags, "masked_loss": empty})
    (empty / "whole.png").write_bytes(b"x")
    with pytest.raises(trainer.UserError, match="--masked_loss: 1 of 2 pictures cannot be read"):
        train.args(**{**flags, "masked_loss": empty})


def test_masks_of_sub_folders_lie_in_sub_folders(train, tmp_path):
    for place in ("pictures/a", "pictures/b", "masks/a", "masks/b"):
        (tmp_path / place).mkdir(parents=True)
    for name, grey in (("a", 10), ("b", 250)):
        noise_picture((32, 32), grey).save(tmp_path / "pictures" / name / "0.png")
        Image.new("L", (32, 32), grey).save(tmp_path / "masks" / name / "0.png")
    args = train.args(instance_data_dir=tmp_path / "pictures", recursive=True, masked_loss=tmp_path / "masks")
    masks = [trainer.load_mask(args, sample.path).getextrema() for sample in trainer.instance_samples(args)]
    assert masks == [(10, 10), (250, 250)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_picture_has_the_size_that_is_seen(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{kind.lower()}"
    noise_picture((30, 20), 1).save(path, kind, exif=exif)
    assert trainer.picture_size(path) == trainer.load_picture(path).size == (20, 30)


def test_repeats_and_buckets_share_the_views_of_a_picture(train, shapes, tmp_path):
    """However often a picture counts, and however many buckets a picture of the class is seen in."""
    classes = tmp_path / "classes"
    classes.mkdir()
    noise_picture((70, 50), 3).save(classes / "a.png")
    flags = {"instance_data_dir": shapes, "aspect_ratio_buckets": "auto", "resolution": 32, "repeats": 4}
    flags |= {"with_prior_preservation": True, "class_data_dir": classes, "class_prompt": "a dog"}
    run = trainer.start(train.args(**flags))
    subject = trainer.instance_samples(run.args)
    samples, buckets = subject + run.prior.samples(subject), trainer.bucket_of_each(run.args, subject)
    table = trainer.encode_prompts(run, {sample.prompt for sample in samples}, False, torch.float32)
    cache = trainer.encode_latents(run, samples, buckets, table)
    views = Counter()
    for (row, _), seen in cache.views.items():
        views[samples[row].path.name] += len(seen)
    assert max(views.values()) <= trainer.CACHED_CROPS and min(views.values()) >= 1
    size = sum(path.stat().st_size for path in run.cache.folder.iterdir())
    assert size < 1.5 * trainer.latent_bytes(run, buckets, 1) + 10**5
    args = train.args(**{**flags, "class_data_dir": None})
    assert len(trainer.choose_prior(args).samples(subject)) == len(SHAPES)


def test_a_table_that_names_files_is_a_data_set_and_a_row_may_lack_its_caption(train, folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.csv").write_text(f"image,words\n{folder / 'a.png'},red\n{folder / 'b.jpg'},\n")
    flags = {"instance_data_dir": None, "dataset_name": source, "caption_column": "words", "max_train_steps": 1}
    train(**flags)
    prompts_read = [sample.prompt for sample in trainer.instance_samples(train.args(**flags))]
    assert prompts_read == ["red", "a photo of sks dog"]


def test_a_data_set_of_several_configurations(train, folder, tmp_path):
    import datasets

    source = tmp_path / "source"
    source.mkdir()
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("cats", "dogs"))
    (source / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, picture in (("cats", "a.png"), ("dogs", "b.jpg")):
        rows = datasets.Dataset.from_dict({"image": [str(folder / picture)]})
        rows.cast_column("image", datasets.Image()).to_parquet(source / f"{name}.parquet")
    flags = {"instance_data_dir": None, "dataset_name": source, "dataset_config_name": "dogs", "max_train_steps": 1}
    train(**flags)
    (sample,) = trainer.instance_samples(train.args(**flags))
    assert sample.path.read_bytes() == (folder / "b.jpg").read_bytes()

"""Files as people have them: colours, bit depths, captions, masks, sub-folders, names, data sets, prompts, models."""

import io
import json
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import icc
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file

import train_dreambooth_lora_sdxl as trainer

GREEN = (40, 200, 60)


def loaded(path: Path, image: Image.Image, **options) -> tuple[int, int, int]:
    """The first pixel of a picture that is written and read."""
    image.save(path, **options)
    return trainer.load_picture(path).getpixel((0, 0))


def near(one, other, within: int = 2) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= within


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize(("profile", "pixel"), [(icc.DISPLAY_P3, (97, 197, 81)), (icc.ADOBE_RGB, (117, 199, 75))])
def test_a_colour_profile_is_honoured(tmp_path, suffix, profile, pixel):
    """The same green as Display P3 and Adobe RGB write it."""
    options = {"icc_profile": profile, **({"quality": 100} if suffix in ("jpg", "webp") else {})}
    assert near(loaded(tmp_path / f"a.{suffix}", Image.new("RGB", (16, 16), pixel), **options), GREEN, 6)


def test_profiles_of_other_modes(tmp_path):
    """Transparent, in a palette, grey under profiles of greys and of colours, inks, Lab; sRGB's changes nothing."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    clear = Image.new("RGBA", (2, 2), (97, 197, 81, 255))
    assert near(loaded(tmp_path / "a.png", clear, icc_profile=icc.DISPLAY_P3), GREEN)
    clear = Image.new("RGBA", (2, 2), (97, 197, 81, 0))
    assert loaded(tmp_path / "b.png", clear, icc_profile=icc.DISPLAY_P3) == (255, 255, 255)
    palette = Image.new("RGB", (2, 2), (97, 197, 81)).quantize(2)
    assert near(loaded(tmp_path / "c.png", palette, icc_profile=icc.DISPLAY_P3), GREEN)
    grey = Image.new("L", (2, 2), 100)
    assert near(loaded(tmp_path / "d.png", grey, icc_profile=icc.grey(1.0)), (168,) * 3)  # of linear light
    clear = Image.new("LA", (2, 2), (100, 255))
    assert near(loaded(tmp_path / "e.png", clear, icc_profile=icc.grey(1.0)), (168,) * 3)
    assert near(loaded(tmp_path / "f.png", grey, icc_profile=icc.DISPLAY_P3), (100,) * 3)
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    found = loaded(tmp_path / "g.jpg", inks, icc_profile=icc.cmyk((140, 200, 190)), quality=100)
    assert found[0] > 180 > 120 > found[2]  # the red that the profile says, where plain cyan would be (0, 255, 255)
    spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.new("RGB", (2, 2), GREEN), *spaces, outputMode="LAB")
    assert near(loaded(tmp_path / "h.tif", lab), GREEN, 8)  # 8 bits of Lab are coarse
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    noise.save(tmp_path / "i.png", icc_profile=srgb)
    assert np.array_equal(trainer.load_picture(tmp_path / "i.png"), noise)


def test_a_profile_that_cannot_be_used_is_refused(train, tmp_path):
    """It is broken, or for inks in a picture of light."""
    for name, profile in (("broken", b"no profile"), ("inks", icc.cmyk((140, 200, 190)))):
        Image.new("RGB", (64, 64), GREEN).save(tmp_path / f"{name}.png", icc_profile=profile)
    with pytest.raises(trainer.UserError, match="broken.png' .its colour profile cannot be used .*inks.png' .its"):
        train.args(instance_data_dir=tmp_path)


def test_bit_depth_is_a_matter_of_the_file_not_of_its_brightest_pixel(tmp_path):
    for suffix in ("png", "tif"):
        for level, expected in ((200, 0), (32768, 128), (65535, 255)):
            grey = Image.fromarray(np.full((4, 4), level, np.uint16))
            assert loaded(tmp_path / f"{level}.{suffix}", grey) == (expected,) * 3
    grey = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    assert loaded(tmp_path / "inverted.tif", grey, tiffinfo={262: 0}) == (0, 0, 0)  # WhiteIsZero


def write_with_chunk(path: Path, name: bytes, data: bytes) -> None:
    """A green PNG with a chunk behind its header, whatever Pillow would write."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), GREEN).save(buffer, "PNG")
    png = buffer.getvalue()
    made = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(png[:33] + made + png[33:])


def points(*values: float) -> bytes:
    return b"".join(round(value * 100_000).to_bytes(4, "big") for value in values)


def adobe_exif(path: Path) -> None:
    exif = Image.Exif()
    exif._ifds[0x8769] = {0xA001: 2}
    Image.new("RGB", (16, 16), GREEN).save(path, exif=exif)


REFUSED = {
    "float.tif": ("not 8- or 16-bit integers", lambda path: Image.new("F", (4, 4), 0.5).save(path)),
    "signed.tif": ("not 8- or 16-bit integers", lambda path: Image.new("I", (4, 4), 70_000).save(path)),
    "linear.png": ("a gamma of 1,", lambda path: write_with_chunk(path, b"gAMA", points(1.0))),
    "hdr.png": (
        "the primaries 9 and transfer function 16",
        lambda path: write_with_chunk(path, b"cICP", bytes((9, 16, 0, 1))),
    ),
    "p3.png": ("the primaries 12", lambda path: write_with_chunk(path, b"cICP", bytes((12, 13, 0, 1)))),
    "adobe.jpg": ("Adobe RGB", adobe_exif),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(train, tmp_path, name):
    told, write = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(trainer.UserError, match=rf"{name}' \(.*{told}.*convert it to .*sRGB"):
        train.args(instance_data_dir=tmp_path)


def test_chunks_that_say_srgb_are_fine(tmp_path):
    for number, (name, data) in enumerate(
        [
            (b"gAMA", points(0.45455)),
            (b"cICP", bytes((1, 13, 0, 1))),
            (b"cHRM", points(0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)),
        ]
    ):
        write_with_chunk(tmp_path / f"{number}.png", name, data)
        assert trainer.load_picture(tmp_path / f"{number}.png").getpixel((0, 0)) == GREEN


def test_an_avif_of_wide_colours_is_refused(tmp_path):
    path = tmp_path / "a.avif"
    Image.new("RGB", (16, 16), GREEN).save(path, quality=100)
    assert near(trainer.load_picture(path).getpixel((0, 0)), GREEN)
    path.write_bytes(path.read_bytes().replace(b"colrnclx\0\x01\0\x0d", b"colrnclx\0\x09\0\x10"))
    with pytest.raises(ValueError, match="primaries 9 and transfer function 16"):
        trainer.load_picture(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures."""
    made = tmp_path / "data"
    made.mkdir()
    for name, colour in (("0.png", "red"), ("1.JPG", "green"), ("2.png", "blue")):
        Image.new("RGB", (30, 20), colour).save(made / name)
    return made


def prompts(train, folder, **flags) -> dict[str, str]:
    samples = trainer.instance_samples(train.args(instance_data_dir=folder, **flags))
    return {sample.path.name: sample.prompt for sample in samples}


def test_captions_in_capitals_and_kohyas(train, folder, capsys):
    (folder / "0.TXT").write_text("zero")
    (folder / "1.caption").write_text("one")
    (folder / "2.Caption").write_text("kohya's")
    (folder / "2.png.txt").write_text("two")
    (folder / "dog.txt").write_text("of no picture")
    assert prompts(train, folder) == {"0.png": "zero", "1.JPG": "one", "2.png": "two"}
    train(instance_data_dir=folder, dry_run=True)
    told = capsys.readouterr().out
    assert "dog.txt: captions of no picture" in told and "passed over" not in told


@pytest.mark.parametrize("name", ["METADATA.JSONL", "Metadata.csv"])
def test_metadata_in_capitals(train, folder, name):
    text = '{"file_name": "0.png", "text": "zero"}' if name.endswith("L") else "file_name,text\n0.png,zero\n"
    (folder / name).write_text(text)
    assert prompts(train, folder)["0.png"] == "zero"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_composed_and_decomposed_unicode(train, tmp_path, form):
    """A Mac's names beside what was written elsewhere: captions, metadata, masks."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    stem = "Hündchen é"
    made, masks = tmp_path / "made", tmp_path / "masks"
    made.mkdir()
    masks.mkdir()
    Image.new("RGB", (30, 20), "red").save(made / f"{unicodedata.normalize(form, stem)}.png")
    Image.new("L", (30, 20), 7).save(masks / f"{unicodedata.normalize(other, stem)}.png")
    caption = made / f"{unicodedata.normalize(other, stem)}.txt"
    caption.write_text("beside")
    assert set(prompts(train, made).values()) == {"beside"}
    args = train.args(instance_data_dir=made, masked_loss=masks)
    assert trainer.load_mask(args, trainer.instance_samples(args)[0].path).getextrema() == (7, 7)
    line = {"file_name": unicodedata.normalize(other, f"{stem}.png"), "text": "in the table"}
    (made / "metadata.jsonl").write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    assert set(prompts(train, made).values()) == {"in the table"}


def test_a_path_that_leads_out_and_back_in_names_its_picture(train, folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "../data/0.png", "text": "zero"}')
    assert prompts(train, folder)["0.png"] == "zero"


MASKS = ["0-masklabel.png", "1_mask.png", "2-MASK.PNG", "0-condlabel.png"]


@pytest.fixture
def masked(folder) -> Path:
    """OneTrainer's and others' masks beside the pictures: white at the left."""
    half = Image.new("L", (30, 20), 0)
    half.paste(255, (0, 0, 15, 20))
    for name in MASKS:
        half.save(folder / name)
    return folder


def test_masks_beside_the_pictures_are_no_pictures(train, masked, tmp_path, capsys):
    assert set(prompts(train, masked)) == {"0.png", "1.JPG", "2.png"}
    flags = {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": masked, "num_class_images": 3}
    Image.new("RGB", (30, 20)).save(tmp_path / "dog_mask.png")  # of a carnival: there is no dog.png
    assert set(prompts(train, tmp_path)) == {"dog_mask.png"}
    args = train.args(instance_data_dir=tmp_path, **flags)
    assert len(trainer.choose_prior(args).samples(())) == 3
    train(instance_data_dir=masked, dry_run=True)
    assert "left out, as masks by their names; --masked_loss uses them" in capsys.readouterr().out


def test_masks_beside_the_pictures_are_used(train, masked, tmp_path, capsys):
    args = train.args(instance_data_dir=masked, masked_loss=True)
    for sample in trainer.instance_samples(args):
        mask = trainer.load_mask(args, sample.path)
        assert mask.getpixel((3, 5)) == 255 and mask.getpixel((25, 5)) == 0
    train(instance_data_dir=masked, masked_loss=True, dry_run=True)
    assert "no mask" not in capsys.readouterr().out
    elsewhere = tmp_path / "masks"
    elsewhere.mkdir()
    for name in MASKS[:3]:
        (masked / name).rename(elsewhere / name)
    args = train.args(instance_data_dir=masked, masked_loss=elsewhere)
    assert all(trainer.load_mask(args, sample.path) for sample in trainer.instance_samples(args))
    (masked / "0-condlabel.png").unlink()
    Image.new("L", (10, 99)).save(masked / "0_mask.png")
    with pytest.raises(trainer.UserError, match="--masked_loss: 0_mask.png is 10x99, which is another shape"):
        train.args(instance_data_dir=masked, masked_loss=True)


@pytest.mark.parametrize(
    "name", ["mask_0.png", "0.png.mask.png", "0.mask.jpg", "0_masks.png", "masks/0.png"]
)
def test_other_names_of_masks(train, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    Image.new("L", (30, 20), 9).save(folder / name, quality=100)
    args = train.args(instance_data_dir=folder, masked_loss=True, recursive=True)
    samples = trainer.instance_samples(args)
    assert [sample.path.name for sample in samples] == ["0.png", "1.JPG", "2.png"]
    assert trainer.load_mask(args, samples[0].path).getextrema() == (9, 9)


def test_masks_of_other_programs(train, folder, tmp_path):
    """White or black where alpha says so, and 0 and 1 instead of 0 and 255."""
    masks = tmp_path / "masks"
    masks.mkdir()
    half = Image.new("L", (30, 20), 0)
    half.paste(255, (0, 0, 15, 20))
    for name, colour in (("0.png", "white"), ("1.png", "black")):
        clear = Image.new("RGB", (30, 20), colour)
        clear.putalpha(half)
        clear.save(masks / name)
    half.point(lambda value: value // 255).save(masks / "2.png")
    args = train.args(instance_data_dir=folder, masked_loss=masks)
    for sample in trainer.instance_samples(args):
        mask = trainer.load_mask(args, sample.path)
        assert mask.getpixel((3, 5)) == 255 and mask.getpixel((25, 5)) == 0


def test_a_mask_is_no_colour(train, folder, tmp_path):
    """A gamma of 1 changes nothing."""
    masks = tmp_path / "masks"
    masks.mkdir()
    write_with_chunk(masks / "0.png", b"gAMA", points(1.0))
    for name in ("1.png", "2.png"):
        Image.new("L", (30, 20), 9).save(masks / name)
    (folder / "0.png").unlink()
    Image.new("RGB", (20, 20), "red").save(folder / "0.png")
    train.args(instance_data_dir=folder, masked_loss=masks)
    Image.new("F", (20, 20), 0.5).save(masks / "0.tif")
    with pytest.raises(trainer.UserError, match="0.tif' .its pixels are not 8- or 16-bit integers"):
        train.args(instance_data_dir=folder, masked_loss=masks)


def test_a_transparent_grey_keeps_its_profile(tmp_path):
    grey = Image.new("L", (4, 4), 100)
    assert near(loaded(tmp_path / "a.png", grey, icc_profile=icc.grey(1.0), transparency=7), (168,) * 3)


def test_a_white_point_that_is_cut_short_is_an_error_of_nobody(tmp_path):
    Image.new("RGB", (4, 4), GREEN).save(tmp_path / "a.tif", tiffinfo={318: (0.3127,)})
    assert trainer.load_picture(tmp_path / "a.tif").getpixel((0, 0)) == GREEN


def test_a_year_in_a_folders_name_is_no_count(tmp_path):
    assert trainer.kohya_repeats(["holiday2019_paris"]) == ""
    assert "the 10 of '10_dog'" in trainer.kohya_repeats(["a/10_dog"])


def test_pictures_in_sub_folders(train, folder, tmp_path, capsys):
    """As kohya's trainers want them, with a number in front."""
    kohya = tmp_path / "above" / "kohya"
    (kohya / "10_sks dog").mkdir(parents=True)
    (folder / "0.png").rename(kohya / "10_sks dog" / "0.png")
    told = r"holds no picture, but its sub-folders do \(10_sks dog\): add --recursive, .* --repeats 10 here"
    with pytest.raises(trainer.UserError, match=f"--instance_data_dir .* {told}"):
        train.args(instance_data_dir=kohya)
    with pytest.raises(trainer.UserError, match=r"\(kohya/10_sks dog.*--repeats 10 here"):
        train.args(instance_data_dir=tmp_path / "above")
    flags = {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": kohya}
    with pytest.raises(trainer.UserError, match=f"--class_data_dir .* {told}"):
        train.args(instance_data_dir=folder, **flags)
    args = train.args(instance_data_dir=folder, recursive=True, **flags)
    assert [sample.path.name for sample in trainer.choose_prior(args).samples(())] == ["0.png"]
    assert len(trainer.missing_class_images(kohya, 3, recursive=True)) == 2
    train(instance_data_dir=kohya, recursive=True, dry_run=True)
    assert "the 10 of '10_sks dog' is --repeats 10 here" in capsys.readouterr().out
    (folder / "more").mkdir()
    (folder / "2.png").rename(folder / "more" / "2.png")
    train(instance_data_dir=folder, dry_run=True)
    assert "sub-folders have pictures, too (more), which are left out; --recursive" in capsys.readouterr().out
    with pytest.raises(trainer.UserError, match="--instance_data_dir .* is in --class_data_dir"):
        train.args(instance_data_dir=folder, recursive=True, **{**flags, "class_data_dir": tmp_path})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("一张TOK狗的照片", "一张<s0><s1>狗的照片"),
        ("TOKの写真", "<s0><s1>の写真"),
        ("TOK의 사진", "<s0><s1>의 사진"),
        ("ภาพTOKบนโต๊ะ", "ภาพ<s0><s1>บนโต๊ะ"),
        ("a TOK, TOK's", "a <s0><s1>, <s0><s1>'s"),
        ("TOKEN, STOK, TOK1, ÉTOKé", "TOKEN, STOK, TOK1, ÉTOKé"),
        ("собакаTOK", "собакаTOK"),
    ],
)
def test_a_new_token_between_letters_of_a_script_without_spaces(train, prompt, expected):
    args = train.args(train_text_encoder_ti=True, instance_prompt="a photo of TOK")
    assert trainer.choose_text(args).replace_words(prompt) == expected


def test_kohyas_prompts_file(train, tmp_path):
    """Comments are no prompts, and options no words: the pictures have the sizes that they ask for."""
    path = tmp_path / "prompts.txt"
    options = "--n blurry, bad --w 24 --h 32 --d 5 --s 3 --l 6"
    path.write_text(f"# my prompts\n\na cat {options}\n  a dog  \n#a --x\na cat --w=24\n")
    def args(**flags):
        flags = {"num_validation_images": 1, "max_train_steps": 1, **flags}
        prompts = ["--validation_prompt=a mug --s 2", f"--validation_prompt={path}"]
        return trainer.parse_args([*train.words(**flags), *prompts])

    def run(**flags):
        trainer.main(args(**flags))
        return Path(flags.get("output_dir", train.flags["output_dir"]))

    assert trainer.validation_prompts(args()) == [
        trainer.ValidationPrompt("a mug", "", 16, 16, None, 2, 5.0),
        trainer.ValidationPrompt("a cat", "blurry, bad", 24, 32, 5, 3, 6.0),
        trainer.ValidationPrompt("a dog", "", 16, 16, None, 25, 5.0),
        trainer.ValidationPrompt("a cat", "", 24, 16, None, 25, 5.0),
    ]
    output = run(report_to="tensorboard")
    last = output / "validation" / "step-000001"
    assert [Image.open(path).size for path in sorted(last.iterdir())] == [(16, 16), (24, 32), (16, 16), (24, 16)]
    assert Image.open(last / "01.png").info["prompt"] == "a cat"
    seeded = run(seed=9, output_dir=tmp_path / "b")
    pairs = [[folder / "validation" / "step-000000" / f"0{i}.png" for folder in (output, seeded)] for i in (0, 1)]
    same = [np.array_equal(Image.open(one), Image.open(other)) for one, other in pairs]
    assert same == [False, True]  # the second has a seed of its own


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a cat --ss euler_a", "line 2: --ss is not understood in a prompt; --n, --w"),
        ("a cat --w 20", "line 2: --w: '20' is not a multiple of 8"),
        ("a cat --s many", "line 2: --s: 'many' is not a whole number"),
        ("a cat --d -1", "line 2: --d: '-1' is not.*; leave it out for the seed of the run"),
        ("a cat --l", "line 2: --l: '' is not a number"),
        ("--n blurry", "line 2: there is no prompt before --n blurry"),
    ],
)
def test_what_a_prompts_file_cannot_have_is_refused_by_line(train, tmp_path, line, told):
    (tmp_path / "prompts.txt").write_text(f"a dog\n{line}\n")
    with pytest.raises(trainer.UserError, match=told):
        train.args(validation_prompt=tmp_path / "prompts.txt")
    (tmp_path / "prompts.json").write_text("[]")
    with pytest.raises(trainer.UserError, match="only .txt files with one prompt a line"):
        train.args(validation_prompt=tmp_path / "prompts.json")


def dataset(folder: Path, name: str = "train.parquet", **columns) -> Path:
    import datasets

    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(folder / name)
    return folder


def test_data_sets_with_holes_and_several_captions(train, folder, tmp_path, capsys):
    images = [str(folder / "0.png"), None, str(folder / "2.png"), None]
    texts = [["red", "crimson"], ["nothing"], [], ["x"]]
    source = dataset(tmp_path / "set", image=images, text=texts)
    flags = {"instance_data_dir": None, "dataset_name": source, "caption_column": "text", "max_train_steps": 1}
    train(**flags)
    assert "rows without a picture are left out: 1, 3" in capsys.readouterr().out
    read = [sample.prompt for sample in trainer.instance_samples(train.args(**flags))]
    assert read == ["red", "a photo of sks dog"]
    source = dataset(tmp_path / "numbers", image=images[:1], text=[7])
    with pytest.raises(trainer.UserError, match="row 0: its caption is no text but int"):
        train(**{**flags, "dataset_name": source})


def test_a_data_set_without_a_train_split(train, folder, tmp_path):
    source = dataset(tmp_path / "set", "test.parquet", image=[str(folder / "0.png")])
    flags = {"instance_data_dir": None, "dataset_name": source, "max_train_steps": 1}
    with pytest.raises(trainer.UserError, match="Bad split: train. Available splits: .'test'"):
        train(**flags)
    train(**flags, dataset_split="test")


def test_vaes_of_other_classes_are_refused(train, tiny, tmp_path, capsys):
    flag = "pretrained_vae_model_name_or_path"
    AutoencoderTiny().save_pretrained(tmp_path / "taesd")
    with pytest.raises(trainer.UserError, match="taesd is of class AutoencoderTiny .*; only an AutoencoderKL with 4"):
        trainer.start(train.args(**{flag: tmp_path / "taesd"}))
    shapes = {"block_out_channels": (4,), "norm_num_groups": 1, "sample_size": 8}
    AutoencoderKL(latent_channels=16, **shapes).save_pretrained(tmp_path / "flux")
    with pytest.raises(trainer.UserError, match="AutoencoderKL with 16 latent channels"):
        trainer.start(train.args(**{flag: tmp_path / "flux"}))
    with pytest.raises(trainer.UserError, match="has no config.json"):
        train.args(**{flag: tiny})
    other = trainer.load_part(trainer.Source(str(tiny)), "vae", torch.float32)
    other.register_to_config(scaling_factor=0.3)
    other.save_pretrained(tmp_path / "other")
    trainer.start(train.args(**{flag: tmp_path / "other"}))
    assert "scales its latents by 0.3 and the base model's own VAE by 0.18215" in capsys.readouterr().out


def test_a_base_model_with_another_vae_or_without_some_weights_is_refused(train, tiny, tmp_path):
    for name in ("taesd", "bare"):
        shutil.copytree(tiny, tmp_path / name)
    shutil.rmtree(tmp_path / "taesd" / "vae")
    AutoencoderTiny().save_pretrained(tmp_path / "taesd" / "vae")
    with pytest.raises(trainer.UserError, match="is of class AutoencoderTiny"):
        trainer.start(train.args(pretrained_model_name_or_path=tmp_path / "taesd"))
    weights = tmp_path / "bare" / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    first = min(tensors)
    tensors.pop(first)
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(trainer.UserError, match="1 of its weights are missing"):
        train(pretrained_model_name_or_path=tmp_path / "bare")

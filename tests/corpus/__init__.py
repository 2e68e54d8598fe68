"""Bad and odd inputs, each made by code, each with what must come of it: a table that test_corpus.py reads."""

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save

FINE = ""
"""The outcome of an input that is odd but right; any other is what the one sentence must say (a regular expression)."""


@dataclass(frozen=True)
class Case:
    """One input. make gets an empty folder and what the corpus may copy, and returns flags."""

    name: str
    make: Callable[[Path, "Stock"], dict]
    outcome: str
    runs: bool = False  # whether the outcome shows only when models are loaded


@dataclass(frozen=True)
class Stock:
    """What cases are made of."""

    model: Path
    checkpoint: Path


def picture(size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """Red at the left, blue at the right."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image.convert(mode)


def encoded(kind: str = "PNG", image: Image.Image | None = None, **options) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def one(name: str, content: bytes | None = None) -> Callable[[Path, Stock], dict]:
    """A folder with one picture of that name."""

    def make(folder: Path, stock: Stock) -> dict:
        (folder / name).write_bytes(encoded() if content is None else content)
        return {"instance_data_dir": folder}

    return make


def placed(act: Callable[[Path], None]) -> Callable[[Path, Stock], dict]:
    """A folder with a good picture and whatever act does to it."""

    def make(folder: Path, stock: Stock) -> dict:
        (folder / "good.png").write_bytes(encoded())
        act(folder)
        return {"instance_data_dir": folder}

    return make


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 black pixels in 50 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 20_000
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    """A picture with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(kind, exif=exif)


def palette() -> bytes:
    """A palette picture whose first colour is transparent."""
    image = picture(mode="P")
    return encoded("PNG", image, transparency=0)


def sixteen_bits() -> bytes:
    """A 16-bit greyscale PNG."""
    return encoded("PNG", Image.fromarray(np.linspace(0, 65535, 480, dtype=np.uint16).reshape(20, 24)))


def unreadable(folder: Path) -> None:
    """A picture that nobody may read; root may read all but what the kernel itself refuses."""
    if os.geteuid() == 0:
        (folder / "a.png").symlink_to("/proc/self/mem")
    else:
        (folder / "a.png").write_bytes(encoded())
        (folder / "a.png").chmod(0)


CANNOT = r"--instance_data_dir: 1 of \d pictures cannot be read.*"
PICTURES = [
    Case("truncated PNG", one("a.png", encoded()[:60]), CANNOT + r"a\.png"),
    Case("truncated JPEG", one("a.jpg", encoded("JPEG", picture((300, 300)))[:2000]), CANNOT + r"a\.jpg"),
    Case("zero bytes", one("a.png", b""), CANNOT + r"a\.png"),
    Case("text named a picture", one("a.png", b"hello"), CANNOT + r"a\.png"),
    Case("wrong extension", one("a.jpg", encoded("PNG")), FINE),
    Case("capitals in the extension", one("A.JPG", encoded("JPEG")), FINE),
    Case("WebP", one("a.webp", encoded("WEBP")), FINE),
    Case("TIFF", one("a.tiff", encoded("TIFF")), FINE),
    Case("BMP", one("a.bmp", encoded("BMP")), FINE),
    Case("1 x 1", one("a.png", encoded(image=picture((1, 1)))), FINE),
    Case("30,000 x 10", one("a.png", encoded(image=picture((30_000, 10)))), FINE),
    Case("decompression bomb", one("a.png", bomb()), CANNOT + r"decompression bomb"),
    Case("CMYK", one("a.jpg", encoded("JPEG", picture(mode="CMYK"))), FINE),
    Case("greyscale", one("a.png", encoded(image=picture(mode="L"))), FINE),
    Case("16 bits", one("a.png", sixteen_bits()), FINE),
    Case("1 bit", one("a.png", encoded(image=picture(mode="1"))), FINE),
    Case("palette with transparency", one("a.png", palette()), FINE),
    Case("alpha", one("a.png", encoded(image=picture(mode="RGBA"))), FINE),
    Case("grey with alpha", one("a.png", encoded(image=picture(mode="LA"))), FINE),
    Case(
        "animated GIF",
        one("a.gif", encoded("GIF", save_all=True, append_images=[picture((24, 20)).rotate(180)])),
        FINE,
    ),
    *(Case(f"EXIF orientation {i}", one("a.jpg", turned(i)), FINE) for i in range(1, 9)),
    Case("EXIF orientation 6 of a TIFF", one("a.tiff", turned(6, "TIFF")), FINE),
    Case("EXIF orientation 9, which is none", one("a.jpg", turned(9)), FINE),
    Case("corrupt ICC profile", one("a.png", encoded(icc_profile=b"no profile at all")), CANNOT + "colour profile"),
    Case("unreadable", placed(unreadable), CANNOT + r"a\.png"),
    Case("a folder named a.png", placed(lambda folder: (folder / "a.png").mkdir()), FINE),
    Case(
        "a dangling link", placed(lambda folder: (folder / "a.png").symlink_to("nowhere")), CANNOT + "link to nowhere"
    ),
    Case("a link in a circle", placed(lambda folder: (folder / "a.png").symlink_to("a.png")), CANNOT + r"a\.png"),
    Case("a FIFO", placed(lambda folder: os.mkfifo(folder / "a.png")), CANNOT + r"a\.png"),
    Case(
        "what systems leave behind",
        placed(lambda folder: [(folder / name).write_bytes(b"x") for name in (".DS_Store", "Thumbs.db", "._a.png")]),
        FINE,
    ),
    Case("a notebook's folder", placed(lambda folder: (folder / ".ipynb_checkpoints").mkdir()), FINE),
    Case("no picture", lambda folder, stock: {"instance_data_dir": folder}, "holds no picture"),
    Case(
        "no folder", lambda folder, stock: {"instance_data_dir": folder / "x"}, "--instance_data_dir .* no such folder"
    ),
    Case("a file as the folder", lambda folder, stock: {"instance_data_dir": __file__}, "no such folder"),
]

NAMES = [
    Case(f"a name with {what}", one(name), FINE)
    for what, name in {
        "letters of other scripts": "собака 犬 كلب.png",
        "emoji": "🐶👍🏽.png",
        "spaces": "  my  dog .png",
        "a newline": "my\ndog.png",
        "an escape sequence": "\x1b[31mdog.png",
        "255 bytes": "d" * 251 + ".png",
        "a leading dash": "--rank.png",
        "quotes and shell signs": "a'b\"c$(d);e.png",
        "a glob": "[a-z]*.png",
        "bytes that are no UTF-8": os.fsdecode(b"dog\xff.png"),
    }.items()
]


def beside(name: str, content: bytes | str, **flags: object) -> Callable[[Path, Stock], dict]:
    """A folder with a good picture and a text file."""

    def make(folder: Path, stock: Stock) -> dict:
        (folder / "good.png").write_bytes(encoded())
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"instance_data_dir": folder, **flags}

    return make


def line(**entry: object) -> str:
    """A line of metadata.jsonl."""
    return json.dumps(entry) + "\n"


GOOD = line(file_name="good.png", text="a dog")
JSONL, CSV = "metadata.jsonl", "metadata.csv"
CAPTIONS = [
    Case("an empty caption", beside("good.txt", ""), FINE),
    Case(
        "an empty caption and no prompt",
        beside("good.txt", " \n", instance_prompt=None),
        "--instance_prompt is needed",
    ),
    Case("a caption alone", beside("good.txt", "a dog", instance_prompt=None), FINE),
    Case("a byte order mark", beside("good.txt", b"\xef\xbb\xbfa dog", instance_prompt=None), FINE),
    Case("cp1252", beside("good.txt", "café".encode("cp1252")), r"good\.txt is not in UTF-8 but looks like CP1252"),
    Case("UTF-16", beside("good.txt", "a dog".encode("utf-16")), r"good\.txt is not in UTF-8 but looks like UTF-16"),
    Case("a folder in a caption's place", placed(lambda folder: (folder / "good.txt").mkdir()), FINE),
    Case("a caption of another picture", beside("other.txt", "a dog"), FINE),
    Case("metadata", beside(JSONL, GOOD, instance_prompt=None), FINE),
    Case("metadata without a line", beside(JSONL, ""), FINE),
    Case("metadata with empty lines", beside(JSONL, f"\n{GOOD}\n\n"), FINE),
    Case("metadata with a byte order mark", beside(JSONL, "\ufeff" + GOOD), FINE),
    Case("metadata in UTF-16", beside(JSONL, GOOD.encode("utf-16")), "looks like UTF-16"),
    Case("a broken line", beside(JSONL, GOOD + '{"file_name": '), r"metadata\.jsonl: line 2: no file_name and text"),
    Case("a line that is a list", beside(JSONL, "[1]"), "line 1: no file_name and text"),
    Case("a line that is a number", beside(JSONL, "7"), "line 1: no file_name and text"),
    Case("other keys", beside(JSONL, line(image="good.png", caption="a dog")), "line 1: no file_name and text"),
    Case("a text that is a number", beside(JSONL, line(file_name="good.png", text=7)), "good.png has no text"),
    Case("a name that is a number", beside(JSONL, line(file_name=7, text="a dog")), "line 1: no file_name and text"),
    Case("a picture that is missing", beside(JSONL, line(file_name="x.png", text="a")), "line 1: x.png is not there"),
    Case("a picture named twice", beside(JSONL, GOOD + GOOD), "line 2: good.png is named twice"),
    Case(
        "a path that leads outside",
        beside(JSONL, line(file_name="../../etc/passwd", text="a")),
        "outside of the folder",
    ),
    Case("an absolute path", beside(JSONL, line(file_name="/etc/passwd", text="a")), "outside of the folder"),
    Case(
        "several faults at once", beside(JSONL, "7\n" + line(file_name="x.png", text="a")), "line 1: .*; line 2: x.png"
    ),
    Case("a table", beside(CSV, 'file_name,text\ngood.png,"a, dog"\n', instance_prompt=None), FINE),
    Case("a table without its header", beside(CSV, "good.png,a dog\nx.png,a dog\n"), "line 2: no file_name and text"),
    Case("a table with a row too short", beside(CSV, "file_name,text\ngood.png\n"), "line 2: good.png has no text"),
    Case(
        "a table with a field of 140 kB", beside(CSV, f"file_name,text\ngood.png,{'x' * 140_000}\n"), "is no table of"
    ),
    Case("lists in lists", beside(JSONL, "[" * 100_000), "line 1: no file_name and text"),
    Case("objects in objects", beside(JSONL, '{"file_name": ' * 100_000), "line 1: no file_name and text"),
    Case("metadata of zero bytes", beside(CSV, b"\x00\x00"), FINE),
]


def base(change: Callable[[Path], None]) -> Callable[[Path, Stock], dict]:
    """A copy of the model, changed."""

    def make(folder: Path, stock: Stock) -> dict:
        shutil.copytree(stock.model, folder / "model")
        change(folder / "model")
        return {"pretrained_model_name_or_path": folder / "model"}

    return make


def weights(part: str) -> str:
    """The file name of a part's weights."""
    return f"{part}/{'model' if part.startswith('text') else 'diffusion_pytorch_model'}.safetensors"


def cut(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def relink(path: Path) -> None:
    """A link to a file that is gone, as in a copy of the Hub's cache without its blobs."""
    path.unlink()
    path.symlink_to("nowhere")


def pickled(model: Path) -> None:
    """Only pickles for the UNet."""
    torch.save(load_file(model / weights("unet")), model / "unet" / "diffusion_pytorch_model.bin")
    (model / weights("unet")).unlink()


def pickled_code(model: Path) -> None:
    """A pickle that would make a folder in the place of the UNet's weights."""
    (model / weights("unet")).unlink()
    path = model / "unet" / "diffusion_pytorch_model.bin"
    torch.save({"step": 1}, path)
    canary(path)


def set_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flow_matching(model: Path) -> None:
    """The scheduler of Stable Diffusion 3."""
    FlowMatchEulerDiscreteScheduler().save_pretrained(model / "scheduler")
    set_json(model / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])


def renamed(model: Path) -> None:
    """Weights of a variant alone."""
    for path in [*model.glob("*/model.safetensors"), *model.glob("*/diffusion_pytorch_model.safetensors")]:
        path.rename(path.with_suffix(".fp16.safetensors"))


def pointers_beside(model: Path) -> None:
    """Weights of a variant, and beside them what git leaves in the place of those that were not fetched."""
    renamed(model)
    for part in PARTS:
        (model / weights(part)).write_text("version https://git-lfs.github.com/spec/v1\n")


def refiner(model: Path) -> None:
    """A pipeline without the first text encoder."""
    set_json(model / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])


def other_model(folder: Path, stock: Stock) -> dict:
    """Stable Diffusion 1.5's index."""
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return {"pretrained_model_name_or_path": folder}


BASE = "--pretrained_model_name_or_path"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
BASES = [
    *(Case(f"without {part}", base(lambda m, p=part: shutil.rmtree(m / p)), f"{BASE}: .*{part}") for part in PARTS),
    *(Case(f"{p} cut off", base(lambda m, p=p: cut(m / weights(p))), f"{BASE}: .*{p}.* cut off") for p in PARTS),
    Case("weights of zero bytes", base(lambda m: (m / weights("unet")).write_bytes(b"")), "cut off"),
    Case("weights that are a web page", base(lambda m: (m / weights("vae")).write_text("<html>" * 9)), "cut off"),
    Case(
        "weights that are a list",
        base(lambda m: (m / weights("vae")).write_bytes(bytes([2] + [0] * 7) + b"[]")),
        "cut",
    ),
    Case("pickles alone", base(pickled), FINE, True),
    Case("a pickle that would run code", base(pickled_code), "the unet of .* cannot be loaded", True),
    Case(
        "another width",
        base(lambda m: set_json(m / "unet" / "config.json", block_out_channels=[32, 64])),
        "unet of",
        True,
    ),
    *(
        Case(f"{part} without its configuration", base(lambda m, p=part: (m / p / "config.json").unlink()), "no config")
        for part in PARTS
    ),
    Case("a link to nowhere", base(lambda m: relink(m / weights("unet"))), "cut off"),
    Case("a variant alone", base(renamed), "only diffusion_pytorch_model.fp16.safetensors; is it another --variant"),
    Case("a variant that is not there", lambda f, s: {**base(lambda m: None)(f, s), "variant": "fp16"}, "fp16.safe"),
    Case("a variant that is there", lambda f, s: {**base(renamed)(f, s), "variant": "fp16"}, FINE, True),
    Case("a variant beside pointers", lambda f, s: {**base(pointers_beside)(f, s), "variant": "fp16"}, FINE, True),
    Case(
        "no VAE, but another one",
        lambda f, s: {
            **base(lambda m: shutil.rmtree(m / "vae"))(f, s),
            "pretrained_vae_model_name_or_path": s.model / "vae",
        },
        FINE,
        True,
    ),
    Case(
        "another VAE, cut off",
        lambda f, s: {
            **base(lambda m: cut(m / weights("vae")))(f, s),
            "pretrained_model_name_or_path": s.model,
            "pretrained_vae_model_name_or_path": f / "model" / "vae",
        },
        "--pretrained_vae_model_name_or_path: .* cut off",
    ),
    Case("the refiner", base(refiner), "not SDXL"),
    Case(
        "a model for inpainting",
        base(lambda m: set_json(m / "unet" / "config.json", in_channels=9)),
        "takes 9 channels, not 4",
        True,
    ),
    Case("no tokenizer", base(lambda m: shutil.rmtree(m / "tokenizer")), "tokenizer of", True),
    Case("no scheduler", base(lambda m: shutil.rmtree(m / "scheduler")), f"{BASE} .* cannot be loaded", True),
    Case("a broken index", base(lambda m: (m / "model_index.json").write_text("{")), "without a whole model_index.json"),
    Case("an index that is a list", base(lambda m: (m / "model_index.json").write_text("[]")), "without a whole model_index.json"),
    Case("no index", base(lambda m: (m / "model_index.json").unlink()), "without a whole model_index.json"),
    Case("Stable Diffusion 1.5", other_model, "StableDiffusionPipeline, not SDXL"),
    Case("a name that is no id", lambda folder, stock: {"pretrained_model_name_or_path": "sdxl"}, "no Hub id"),
    Case("a scheduler of flow matching", base(flow_matching), "predicts 'None' with FlowMatch", True),
    Case(
        "a scheduler of flow matching, overridden",
        lambda f, s: {**base(flow_matching)(f, s), "prediction_type": "epsilon"},
        "FlowMatch",
        True,
    ),
    Case(
        "another prediction",
        base(lambda m: set_json(m / "scheduler" / "scheduler_config.json", prediction_type="sample")),
        "predicts 'sample'",
        True,
    ),
]


def state(change: Callable[[Path], None]) -> Callable[[Path, Stock], dict]:
    """A copy of a checkpoint, changed."""

    def make(folder: Path, stock: Stock) -> dict:
        shutil.copytree(stock.checkpoint, folder / "checkpoint-1")
        change(folder / "checkpoint-1" / "state.pt")
        return {"resume_from_checkpoint": folder / "checkpoint-1", "max_train_steps": 3}

    return make


def canary(path: Path) -> None:
    """A state that makes a folder beside itself when a pickle of its kind is let run code; test_corpus.py looks."""

    class Canary:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(path.with_name("canary")),)

    torch.save({**torch.load(path), "step": Canary()}, path)


SOUND = "--resume_from_checkpoint .*nothing sound"
CHECKPOINTS = [
    Case("a checkpoint as it is", state(lambda path: None), FINE, True),
    Case("a state cut off", state(cut), SOUND, True),
    Case("a state of zero bytes", state(lambda path: path.write_bytes(b"")), SOUND, True),
    Case("a state that is text", state(lambda path: path.write_text("step: 1")), SOUND, True),
    Case("a foreign state", state(lambda path: torch.save({"model": torch.ones(3)}, path)), SOUND, True),
    Case("a state that is a tensor", state(lambda path: torch.save(torch.ones(3), path)), SOUND, True),
    Case("a state with a pickle that would run code", state(canary), SOUND, True),
    Case("no state", state(lambda path: path.unlink()), "holds no state .* --init_lora .* starts a new run"),
    Case("no checkpoint", lambda folder, stock: {"resume_from_checkpoint": "checkpoint-7"}, "names no checkpoint"),
    Case(
        "another rank",
        lambda f, s: {"resume_from_checkpoint": s.checkpoint, "rank": 8},
        "--rank was 4 and is now 8",
        True,
    ),
]


def config(content: str | bytes) -> Callable[[Path, Stock], dict]:
    """A configuration file."""

    def make(folder: Path, stock: Stock) -> dict:
        (folder / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"config": folder / "run.yaml"}

    return make


CONFIGS = [
    Case("settings", config("rank: 2\nrandom_flip: true\nseed:\n"), FINE),
    Case("YAML's no", config("mixed_precision: no\n"), FINE),
    Case("an empty file", config(""), FINE),
    Case("a byte order mark", config(b"\xef\xbb\xbfrank: 2\n"), FINE),
    Case("an unknown key", config("ranks: 2\n"), r"--config .*--ranks \(did you mean --rank\?\)"),
    Case("two unknown keys", config("ranks: 2\nx: 1\n"), "--ranks .*--x"),
    Case("a number's key with a word", config("rank: many\n"), "--rank: 'many' is not a whole number"),
    Case("a switch with a word", config("random_flip: sometimes\n"), "random_flip takes true or false"),
    Case("a value with a switch", config("rank: true\n"), "rank takes one value"),
    Case("a list", config("rank: [1, 2]\n"), "rank takes one value"),
    Case("a mapping", config("rank: {a: 1}\n"), "rank takes one value"),
    Case("lines of no mapping", config("- rank\n"), "must hold lines of 'flag: value'"),
    Case("a key that is a number", config("1: 2\n"), "--config .*--1"),
    Case("broken YAML", config("rank: [\n"), "cannot be read as YAML"),
    Case("another encoding", config("instance_prompt: café\n".encode("cp1252")), "cannot be read as YAML"),
    Case("bytes", config(bytes(range(256))), "cannot be read as YAML"),
    Case("YAML that would run code", config("rank: !!python/object/apply:os.getpid []\n"), "cannot be read as YAML"),
    Case("no file", lambda folder, stock: {"config": folder / "x.yaml"}, "cannot be read as YAML"),
    Case("a folder", lambda folder, stock: {"config": folder}, "cannot be read as YAML"),
]


def flags(**given: object) -> Callable[[Path, Stock], dict]:
    """Nothing but flags."""
    return lambda folder, stock: given


def beside_class(flag: str, place: str, **more: object) -> Callable[[Path, Stock], dict]:
    """A folder with a picture, and another folder that is in it or the same."""

    def make(folder: Path, stock: Stock) -> dict:
        (folder / "good.png").write_bytes(encoded())
        prior = {"with_prior_preservation": True, "class_prompt": "a dog"} if flag == "class_data_dir" else {}
        return {"instance_data_dir": folder, flag: folder / place, **prior, **more}

    return make


FLAGS = [
    *(
        Case(f"a thousand million {flag}", flags(**{flag: 10**9}), f"--{flag}: '1000000000' is not a whole number")
        for flag in ("repeats", "num_class_images")
    ),
    Case("buckets of nobody", flags(aspect_ratio_buckets="big"), "'big' is neither auto nor sizes"),
    Case("buckets between eights", flags(aspect_ratio_buckets="1024x1020"), "each side a multiple of 8"),
    Case("a validation size between eights", flags(validation_prompt="a --w 20"), "--w: '20' is not a multiple of 8"),
    Case("no file of prompts", flags(validation_prompt="nowhere.txt"), "--validation_prompt nowhere.txt: no such file"),
    Case("no folder of masks", flags(masked_loss="nowhere"), "--masked_loss nowhere: no such folder"),
    Case("masks without any", flags(masked_loss=True), "--masked_loss finds no mask"),
    Case("a data set and a folder", flags(dataset_name="a/b"), "give one of them"),
    Case("a tracker of nobody", flags(report_to="nobody"), "--report_to: invalid choice"),
    Case("a type of nobody", flags(lora_dtype="fp8"), "--lora_dtype: invalid choice"),
    Case("a resolution between eights", flags(resolution=20), "--resolution 20 is not a multiple of 8; 24 is"),
    Case(
        "prior preservation without a prompt",
        flags(with_prior_preservation=True, class_data_dir="x"),
        "--class_prompt",
    ),
    Case("a dropout of one", flags(lora_dropout=1), "must be below 1"),
    Case("a schedule of nobody", flags(lr_scheduler="fast"), "--lr_scheduler: invalid choice: 'fast'"),
    Case("a precision of nobody", flags(mixed_precision="fp8"), "--mixed_precision: invalid choice: 'fp8'"),
    Case(
        "an output folder below a file", flags(output_dir=Path(__file__) / "out"), "--output_dir .* cannot be written"
    ),
    Case("an output folder in /proc", flags(output_dir="/proc/out"), "--output_dir /proc/out cannot be written"),
    Case(
        "a cache folder below a file", flags(cache_latents_dir=Path(__file__) / "c"), "--cache_latents_dir .* cannot"
    ),
    Case(
        "an output folder that is no UTF-8",
        flags(output_dir=os.fsdecode(b"dog\xff")),
        r"--output_dir 'dog\\udcff' holds bytes",
    ),
    Case("an output folder among the pictures", beside_class("output_dir", ""), "--output_dir .* is in --instance_data"),
    Case("class pictures among the subject's", beside_class("class_data_dir", ""), "--class_data_dir .* is in"),
    Case("class pictures below the subject's", beside_class("class_data_dir", "class", recursive=True), "is in --inst"),
    Case("masks below the pictures", beside_class("masked_loss", "masks", recursive=True), "--masked_loss .* is in"),
    Case("class pictures below, not looked for", beside_class("class_data_dir", "class"), FINE),
    Case("an empty prompt", flags(instance_prompt=""), FINE),
    Case("a prompt of a thousand words", flags(instance_prompt="dog " * 1000), FINE, True),
    Case("a prompt of signs", flags(instance_prompt="\x00\x1b]0;x\x07 <script> --- `{}`"), FINE, True),
]


def single_file(keys: list[str], cut: int = 0) -> Callable[[Path, Stock], dict]:
    """A base model that is one file with tensors of these names."""

    def make(folder: Path, stock: Stock) -> dict:
        data = save({key: torch.zeros(2) for key in keys})
        (folder / "base.safetensors").write_bytes(data[: len(data) - cut])
        return {"pretrained_model_name_or_path": folder / "base.safetensors"}

    return make


SINGLE_FILES = [
    Case("a LoRA", single_file(["lora_unet_x.lora_up.weight"]), "is not a complete SDXL model, as it lacks model"),
    Case("a UNet alone", single_file(["model.diffusion_model.input_blocks.0.0.weight"]), "lacks first_stage_model"),
    Case("a cut file", single_file(["model.diffusion_model.input_blocks.0.0.weight"], 4), "is cut off"),
    Case("no tensors", single_file([]), "is cut off or no safetensors file"),
]

CRAFTS = [
    Case(
        "contradiction of optimizer and text_encoder_lr and train_text_encoder",
        flags(optimizer="prodigy", train_text_encoder=True, text_encoder_lr=0.001),
        "--text_encoder_lr sets another",
    ),
    Case(
        "contradiction of lora_unet_blocks and optimizer",
        flags(optimizer="prodigy", lora_unet_blocks="mid_block=4:1e-3"),
        "--lora_unet_blocks sets another",
    ),
    Case(
        "contradiction of optimizer and use_8bit_adam",
        flags(optimizer="adafactor", use_8bit_adam=True),
        "--use_8bit_adam and --optimizer adafactor exclude",
    ),
    Case(
        "contradiction of optimizer and use_ema",
        flags(optimizer="schedule_free", use_ema=True),
        "--use_ema and --optimizer schedule_free both average",
    ),
    Case(
        "contradiction of lr_scheduler and optimizer",
        flags(optimizer="schedule_free", lr_scheduler="cosine"),
        "needs no --lr_scheduler cosine",
    ),
    Case("value of lora_unet_blocks", flags(lora_unet_blocks="attic"), "is not BLOCK, BLOCK=RANK"),
    Case("value of lora_unet_blocks (9)", flags(lora_unet_blocks="mid_block=0"), "a rank must be at least 1"),
    Case("value of lora_layers", flags(lora_layers="to_(k"), "is no pattern"),
    Case(
        "contradiction of base_precision and use_dora",
        flags(use_dora=True, base_precision="int8"),
        "--use_dora needs the weights unpacked, --base_precision int8",
    ),
    Case(
        "contradiction of loss_weighting and snr_gamma",
        flags(snr_gamma=5, loss_weighting="debiased"),
        "--snr_gamma and --loss_weighting",
    ),
    Case(
        "contradiction of max_timestep and min_timestep",
        flags(min_timestep=700, max_timestep=600),
        "--min_timestep 700 is above --max_timestep 600",
    ),
    Case(
        "contradiction of instance_prompt and token_lr and train_text_encoder and train_text_encoder_ti",
        flags(
            train_text_encoder=True, train_text_encoder_ti=True, instance_prompt="a photo of TOK dog", token_lr=0.01
        ),
        "--train_text_encoder and --train_text_encoder_ti exclude",
    ),
    Case(
        "contradiction of instance_prompt and token_lr and train_text_encoder_ti",
        flags(train_text_encoder_ti=True, instance_prompt="a dog", token_lr=0.01),
        "--token_abstraction TOK is in no prompt",
    ),
    Case(
        "contradiction of instance_prompt and token_abstraction and token_lr and train_text_encoder_ti",
        flags(
            train_text_encoder_ti=True, instance_prompt="a photo of TOK dog", token_lr=0.01, token_abstraction="TOK,"
        ),
        "has an empty word",
    ),
    Case(
        "contradiction of instance_prompt and optimizer and token_lr and train_text_encoder_ti",
        flags(
            train_text_encoder_ti=True, instance_prompt="a photo of TOK dog", token_lr=0.01, optimizer="schedule_free"
        ),
        "--train_text_encoder_frac 0\\.5 stops .*; use --train_text_encoder_frac 1",
    ),
    Case(
        "contradiction of optimizer and train_text_encoder and train_text_encoder_frac",
        flags(train_text_encoder=True, train_text_encoder_frac=0.5, optimizer="schedule_free"),
        "--train_text_encoder_frac 0\\.5 stops",
    ),
    Case(
        "contradiction of instance_prompt and learning_rate and optimizer and token_lr and train_text_encoder_ti",
        flags(
            train_text_encoder_ti=True,
            instance_prompt="a photo of TOK dog",
            token_lr=0.01,
            optimizer="prodigy",
            learning_rate=1,
        ),
        "--token_lr sets another",
    ),
    Case(
        "contradiction of class_prompt and token_abstraction",
        flags(
            train_text_encoder_ti=True,
            instance_prompt="a photo of dog",
            token_abstraction="dog",
            class_prompt="a photo of a dog",
            with_prior_preservation=True,
        ),
        "has a word of --token_abstraction",
    ),
    Case(
        "an abstraction of signs",
        flags(train_text_encoder_ti=True, instance_prompt="a photo of <sks> dog", token_abstraction="<sks>"),
        FINE,
        True,
    ),
    Case(
        "contradiction of adam_beta1 and optimizer",
        flags(optimizer="schedule_free", adam_beta1=0),
        "--optimizer schedule_free averages with --adam_beta1",
    ),
    Case(
        "contradiction of learning_rate and lr_scheduler",
        flags(lr_scheduler="polynomial", learning_rate=1e-8),
        "--lr_scheduler polynomial ends at 1e-7",
    ),
    Case(
        "value of prodigy_decouple",
        flags(prodigy_decouple="perhaps"),
        "--prodigy_decouple: 'perhaps' is neither True nor False",
    ),
    Case("value of optimizer", flags(optimizer="sgd"), "--optimizer: invalid choice: 'sgd'"),
    Case("value of steps_per_image", flags(steps_per_image=5), "--steps_per_image and --max_train_steps both"),
    Case("a rate of nothing", flags(lora_unet_blocks="mid_block=4:0"), "is not BLOCK, BLOCK=RANK"),
    Case("a rate with two points", flags(lora_unet_blocks="mid_block=4:1.2.3"), "is not BLOCK, BLOCK=RANK"),
    Case(
        "a base model that is half there",
        flags(
            train_text_encoder=True, train_text_encoder_frac=0.5, with_prior_preservation=True, class_prompt="a dog"
        ),
        "--with_prior_preservation without --class_data_dir compares with the base model",
    ),
    Case("zero SNR of epsilon", flags(rescale_betas_zero_snr=True), "needs --prediction_type v_prediction", True),
    Case("a block that is not there", flags(lora_unet_blocks="up_blocks.7"), "name nothing that the UNet", True),
    Case("a layer that is not there", flags(lora_layers="nothing"), "name nothing that the UNet", True),
    Case("a fixed alpha of rsLoRA", flags(use_rslora=True, lora_alpha=7), FINE),
    Case("Prodigy in capitals", flags(optimizer="Prodigy", learning_rate=1, prodigy_decouple="True"), FINE),
]

CASES = {
    f"{group}: {case.name}": case
    for group, cases in {
        "picture": PICTURES,
        "name": NAMES,
        "caption": CAPTIONS,
        "base": BASES,
        "checkpoint": CHECKPOINTS,
        "config": CONFIGS,
        "flag": FLAGS,
        "single file": SINGLE_FILES,
        "craft": CRAFTS,
    }.items()
    for case in cases
}

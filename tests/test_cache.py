"""The cache of encoded pictures and prompts: nothing is encoded twice, and nothing stale is ever used."""

import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, reset_accelerate
from PIL import Image, ImageOps
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer


@pytest.fixture
def encoded(monkeypatch):
    """The names of the pictures and the prompts that were encoded, in order."""
    told = []
    encode_image, encode_text = trainer.encode_image, trainer.encode_text

    def noted_image(vae, pixels, name):
        told.append(Path(name).name)
        return encode_image(vae, pixels, name)

    def noted_prompts(source, ids, *rest):
        told.extend(["prompt"] * len(ids[0]))
        return encode_text(source, ids, *rest)

    monkeypatch.setattr(trainer, "encode_image", noted_image)
    monkeypatch.setattr(trainer, "encode_text", noted_prompts)
    return told


def lora(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / trainer.LORA_FILE)


def assert_equal(first: Path, second: Path) -> None:
    ours, theirs = lora(first), lora(second)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_trap_19_a_second_run_encodes_nothing_says_so_and_learns_the_same(train, tmp_path, encoded, capsys):
    flags = {"cache_latents_dir": tmp_path / "cache", "center_crop": True}
    first = train(**flags)
    assert sorted(encoded) == [*(f"{i}.png" for i in range(5)), "prompt", "prompt"]  # the empty prompt is the second
    encoded.clear()
    capsys.readouterr()
    second = train(**flags, output_dir=tmp_path / "second", log_level="info")
    assert encoded == [] and "0 pictures and prompts encoded, 7 found" in capsys.readouterr().out
    assert_equal(first, second)


def test_trap_13_a_change_encodes_exactly_what_changed(train, pictures, tiny, tmp_path, encoded):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    flags = {"cache_latents_dir": tmp_path / "cache", "center_crop": True, "instance_data_dir": folder}
    train(**flags)
    for change, expected in (
        (lambda: ImageOps.invert(Image.open(folder / "3.png")).save(folder / "3.png"), ["3.png"]),
        (lambda: flags.update(instance_prompt="a photo of zwx dog"), ["prompt"]),
        (lambda: flags.update(resolution=24), [f"{i}.png" for i in range(5)]),
        (lambda: (folder / "3.png").rename(folder / "renamed.png"), []),
    ):
        encoded.clear()
        change()
        train(**flags)
        assert encoded == expected


def test_random_crops_are_found_by_another_run_and_beside_another_picture(train, pictures, tmp_path, encoded):
    """Without a seed, and with a picture before all others: views follow from the picture alone."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    flags = {"cache_latents_dir": tmp_path / "cache", "instance_data_dir": folder, "random_flip": True, "seed": None}
    train(**flags)
    assert len(encoded) > 5
    encoded.clear()
    train(**flags)
    assert encoded == []
    ImageOps.invert(Image.open(folder / "3.png")).save(folder / "0-first.png")
    train(**flags)
    assert set(encoded) == {"0-first.png"}


def test_trap_13_another_vae_encodes_the_pictures_anew(train, tiny, tmp_path, encoded):
    flags = {"cache_latents_dir": tmp_path / "cache", "center_crop": True}
    train(**flags)
    vae = trainer.load_part(trainer.Source(str(tiny)), "vae", torch.float32, torch.device("cpu"))
    vae.decoder.conv_in.weight.data += 1e-3
    vae.save_pretrained(tmp_path / "vae")
    encoded.clear()
    train(**flags, pretrained_vae_model_name_or_path=tmp_path / "vae")
    assert len(encoded) == 5 and "prompt" not in encoded


def test_trap_13_another_mixed_precision_encodes_the_prompts_anew(train, tmp_path, encoded):
    """Pictures are encoded in float32 whatever it is; both kinds of prompts stay in the folder."""
    flags = {"cache_latents_dir": tmp_path / "cache", "center_crop": True}
    train(**flags)
    for precision, expected in (("bf16", ["prompt", "prompt"]), ("bf16", []), ("no", [])):
        encoded.clear()
        reset_accelerate()
        train(**flags, mixed_precision=precision)
        assert encoded == expected


def test_trap_13_an_edited_mask_encodes_its_picture_anew(train, pictures, tmp_path, encoded):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in pictures.iterdir():
        Image.new("L", Image.open(path).size, 255).save(masks / path.name)
    flags = {"cache_latents_dir": tmp_path / "cache", "center_crop": True, "masked_loss": masks}
    train(**flags)
    mask = Image.open(masks / "3.png")
    mask.paste(0, (0, 0, mask.width // 2, mask.height))
    for edit, expected in ((lambda: None, []), (lambda: mask.save(masks / "3.png"), ["3.png"])):
        encoded.clear()
        edit()
        train(**flags)
        assert encoded == expected


def test_broken_and_foreign_files_are_replaced_and_said_once(train, tmp_path, encoded, capsys):
    cache = tmp_path / "cache"
    flags = {"cache_latents_dir": cache, "center_crop": True}
    first = train(**flags)
    broken = sorted(cache.iterdir())
    broken[0].write_bytes(broken[0].read_bytes()[:-10])
    broken[1].write_bytes(b"")
    broken[2].write_text("what is this?")
    (cache / "notes.txt").write_text("mine")
    encoded.clear()
    capsys.readouterr()
    second = train(**flags, output_dir=tmp_path / "second", log_level="info")
    told = capsys.readouterr().out
    assert len(encoded) == 3 and "3 broken files were replaced" in told and told.count("broken files") == 1
    assert_equal(first, second)
    assert (cache / "notes.txt").read_text() == "mine"


def test_a_large_cache_stays_on_the_disk_and_gives_the_same_rows(train, tmp_path, monkeypatch):
    first = train(random_flip=True, max_train_steps=4)
    monkeypatch.setattr(trainer, "PRELOAD_BYTES", 0)
    assert_equal(first, train(random_flip=True, max_train_steps=4, output_dir=tmp_path / "second"))


def test_a_picture_has_eight_views_at_most(train, tmp_path, encoded, monkeypatch):
    assert trainer.CACHED_CROPS == 8
    monkeypatch.setattr(trainer, "CACHED_CROPS", 3)
    train(random_flip=True)
    pictures = [name for name in encoded if name != "prompt"]
    assert max(pictures.count(f"{i}.png") for i in range(5)) == 3


def test_two_runs_share_a_folder_at_the_same_time(train, tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *train.words(cache_latents_dir=tmp_path / "cache", output_dir=tmp_path / name)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
        for name in ("one", "two")
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    assert_equal(tmp_path / "one", tmp_path / "two")
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_cache_folder_that_cannot_be_written_is_refused_at_the_door(train, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(trainer.UserError, match="--cache_latents_dir"):
        train.args(cache_latents_dir=tmp_path / "file" / "cache")


@pytest.mark.parametrize("workers", [0, 2])
def test_trap_24_few_pictures_are_in_memory_while_a_hundred_are_encoded(train, tmp_path, monkeypatch, workers):
    """Whole ones and their views: of the one that is encoded, and of those that the threads are ahead."""
    folder, known, alive = tmp_path / "pictures", [], []
    folder.mkdir()
    for i in range(100):
        noise = np.random.default_rng(i).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    load_picture, cut_views = trainer.load_picture, trainer.cut_views

    def noted_picture(path):
        picture = load_picture(path)
        known.append(weakref.ref(picture))
        return picture

    def noted_views(*rest):
        views = cut_views(*rest)
        known.extend(weakref.ref(array) for view in views.values() for array in view)
        return views

    def counted(vae, pixels, name):
        alive.append(sum(reference() is not None for reference in known))
        return torch.zeros(2, 4, 8, 8)

    flags = {"instance_data_dir": folder, "center_crop": True, "dataloader_num_workers": workers}
    run = trainer.start(train.args(**flags))
    samples = trainer.instance_samples(run.args)
    monkeypatch.setattr(trainer.KNOWN_PICTURES, "kept_bytes", 0)  # they are as large as a camera's, say
    trainer.KNOWN_PICTURES.decoded.clear()
    for name, replaced in (("load_picture", noted_picture), ("cut_views", noted_views), ("encode_image", counted)):
        monkeypatch.setattr(trainer, name, replaced)
    trainer.encode_views(run, samples, [(i, (16, 16)) for i in range(100)])
    assert len(alive) == 100 and len(known) == 300
    assert 2 <= max(alive) <= 2 * (1 + 2 * workers)  # pixels and mask


GROWTH = """
import resource, sys, time
from pathlib import Path
import torch
import train_dreambooth_lora_sdxl as trainer

torch.set_num_threads(1)
count, store = int(sys.argv[1]), trainer.TensorCache(Path(sys.argv[2]))
keys = [trainer.content_key(i) for i in range(count)]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
cpu = torch.device("cpu")
views = trainer.CachedRows(lambda i: store.get(keys[i])["view"], count, store.size(keys[0]), cpu)
read = lambda i: tuple(store.get(keys[i])[name] for name in ("embeds", "pooled"))
rows = trainer.CachedRows(read, count, store.size(keys[0]), cpu)
table = trainer.PromptEmbeddings({str(i): i for i in range(count)} | {"": 0}, rows)
places = {(i, (1024, 1024)): [i] for i in range(count)}
cache = trainer.LatentDataset(views, torch.zeros(count, 6), places, [(1024, 1024)] * count, torch.ones(count),
                      list(range(count)), ["name"] * count, 0.0, {})
order = trainer.BatchSampler([range(count)], (), 4, seed=0)
begun = time.perf_counter()
for n in range(50):
    batch = cache.batch(table, order, n)
    assert batch.mean.shape == (4, 4, 128, 128) and batch.text[0].shape == (4, 77, 2048)
print(peak() - before, (time.perf_counter() - begun) / 50)
"""


def test_trap_24_ten_thousand_pictures_cost_no_memory_and_no_time(tmp_path):
    """Latents and embeddings of captions at their real size: what the loop holds of a picture is a few numbers."""
    store = trainer.TensorCache(tmp_path)
    keys = [trainer.content_key(i) for i in range(10_000)]
    embeds = {"embeds": torch.zeros(77, 2048, dtype=torch.bfloat16), "pooled": torch.zeros(1280, dtype=torch.bfloat16)}
    store.put(keys[0], view=torch.ones(9, 128, 128), **embeds)
    for key in keys[1:]:
        os.link(store.path(keys[0]), store.path(key))
    told = []
    for count in (10, 10_000):
        words = [sys.executable, "-c", GROWTH, str(count), str(tmp_path)]
        told.append(subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())
    (few_bytes, few_seconds), (many_bytes, many_seconds) = ([float(word) for word in words] for words in told)
    assert many_bytes - few_bytes < 200e6
    assert many_seconds - few_seconds < 0.1  # four reads of a megabyte, beside a step of a second

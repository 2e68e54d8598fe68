"""--subjects: several subjects in one run, each with its own folder, prompts and repeats."""

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_lora_sdxl as trainer

DOG, MUG = "a photo of sks dog", "a photo of ohwx mug"


@pytest.fixture
def folders(tmp_path):
    for name, colours in (("dog", ("red", "green")), ("mug", ("blue", "white", "black"))):
        (tmp_path / name).mkdir()
        for index, colour in enumerate(colours):
            Image.new("RGB", (24, 20), colour).save(tmp_path / name / f"{index}.png")
    return tmp_path


@pytest.fixture
def write(folders):
    def write(*entries: object, default: bool = True):
        two = [{"folder": str(folders / "dog"), "prompt": DOG, "class_prompt": "a photo of a dog"},
               {"folder": str(folders / "mug"), "prompt": MUG, "class_prompt": "a photo of a mug", "repeats": 2}]
        path = folders / "subjects.yaml"
        path.write_text(yaml.safe_dump(list(entries) or two), encoding="utf-8")
        return {"subjects": path, "instance_data_dir": None, "instance_prompt": None}

    return write


def test_each_has_its_pictures_prompts_and_repeats(train, folders, write):
    (folders / "dog" / "1.txt").write_text("{instance_prompt} at night")
    samples = trainer.instance_samples(train.args(**write()))
    seen = [(sample.path.parent.name, sample.prompt, sample.class_prompt, sample.repeat) for sample in samples]
    assert seen == [
        ("dog", DOG, "a photo of a dog", 0), ("dog", f"{DOG} at night", "a photo of a dog", 0),
        *[("mug", MUG, "a photo of a mug", repeat) for repeat in (0, 0, 0, 1, 1, 1)],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["pictures", "base model"])
def test_the_class_of_each_is_preserved(train, folders, write, monkeypatch, kind):
    """Rows of the class have the prompt of the class whose picture they show."""
    names, real = [], trainer.LatentDataset.batch
    monkeypatch.setattr(trainer.LatentDataset, "batch", lambda *rest, **more: (
        names.append((batch := real(*rest, **more)).names), batch)[1])  # fmt: skip
    flags = {**write(), "with_prior_preservation": True, "train_batch_size": 4, "max_train_steps": 6, "resolution": 16}
    if kind == "pictures":
        flags |= {"class_data_dir": folders / "class", "num_class_images": 2, "sample_batch_size": 1}
    train(**flags)
    if kind == "pictures":
        made = [path.relative_to(folders).as_posix() for path in sorted((folders / "class").rglob("*1.png"))]
        assert made == ["class/dog/generated-00001.png", "class/mug/generated-00001.png"]
    rows = {name for batch in names for name in batch}
    assert len(names[0]) == 8 and len({row for row in rows if "sks dog" in row or "ohwx mug" in row}) == 5
    of_class = [row for batch in names for row in batch[4:]]
    assert {row.split('"')[1] for row in of_class} == {"a photo of a dog", "a photo of a mug"}
    assert all(("/dog/" in row) == ("a photo of a dog" in row) for row in of_class)


def test_masks_are_those_of_the_own_folder(train, folders, write):
    for name, grey in (("dog", 40), ("mug", 90)):
        Image.new("L", (24, 20), grey).save(folders / name / "0_mask.png")
    args = train.args(**write(), masked_loss=True, log_level="error")
    masks = {sample.path.parent.name: trainer.load_mask(args, sample.path).getextrema()
             for sample in trainer.instance_samples(args) if sample.path.name == "0.png"}  # fmt: skip
    assert masks == {"dog": (40, 40), "mug": (90, 90)}
    for name in ("dog", "mug"):
        (folders / "masks" / name).mkdir(parents=True)
        (folders / name / "0_mask.png").rename(folders / "masks" / name / "0.png")
    args = train.args(**write(), masked_loss=folders / "masks", log_level="error")
    assert masks == {sample.path.parent.name: trainer.load_mask(args, sample.path).getextrema()
                     for sample in trainer.instance_samples(args) if sample.path.name == "0.png"}  # fmt: skip


def test_a_run_resumes_exactly_and_needs_the_file_no_more_once_it_runs(train, folders, write, monkeypatch):
    flags = {**write(), "checkpointing_steps": 2, "max_train_steps": 4}
    whole = train(**flags, output_dir=folders / "whole")
    real = trainer.diffusion_loss
    monkeypatch.setattr(trainer, "diffusion_loss", lambda *rest: (
        (folders / "subjects.yaml").unlink(missing_ok=True), real(*rest))[1])  # fmt: skip
    again = train(**flags, output_dir=folders / "again", resume_from_checkpoint=whole / "checkpoint-2")
    one, other = (load_file(folder / trainer.LORA_FILE) for folder in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    card = (again / "README.md").read_text()
    assert f"Use `{DOG}` or `{MUG}` in your prompt" in card and "on 5 pictures" in card
    write()
    Image.new("RGB", (24, 20), "pink").save(folders / "mug" / "0.png")
    with pytest.raises(trainer.UserError, match="other pictures or prompts than before .changed: 0.png"):
        train(**flags, output_dir=folders / "again", resume_from_checkpoint="latest")


def test_new_tokens_of_two_words(train, folders, write):
    entries = [{"folder": str(folders / "dog"), "prompt": "a photo of ONE dog"},
               {"folder": str(folders / "mug"), "prompt": "a photo of TWO mug"}]  # fmt: skip
    flags = {**write(*entries), "train_text_encoder_ti": True, "token_lr": 0.1, "token_abstraction": "ONE,TWO"}
    output = train(**flags)
    assert load_file(output / trainer.EMBEDDINGS_FILE)["clip_l"].shape[0] == 4
    with pytest.raises(trainer.UserError, match="--token_abstraction THREE is in no prompt"):
        train.args(**{**flags, "token_abstraction": "ONE,THREE"})


@pytest.mark.parametrize(("entries", "flags", "told"), [
    ([{"folder": "dog"}], {}, "subject 1 needs folder and prompt"),
    ([{"folder": "dog", "prompt": "a", "name": "b"}], {}, "subject 1 needs folder and prompt"),
    ([{"folder": "dog", "prompt": "a"}, "mug"], {}, "subject 2 needs folder and prompt"),
    ([{"folder": "dog", "prompt": "a", "repeats": "two"}], {}, "repeats, a whole number"),
    ([{"folder": "dog", "prompt": "a", "repeats": 0}], {}, "repeats, a whole number"),
    ([{"folder": "dog", "prompt": 7}], {}, "all texts"),
    ([{"folder": "dog", "prompt": "a"}, {"folder": "dog", "prompt": "b"}], {}, "needs a folder of its own"),
    ([{"folder": "dog", "prompt": "a"}, {"folder": "mug", "prompt": "a"}], {}, "needs a prompt of its own"),
    ([{"folder": "nowhere", "prompt": "a"}], {}, "nowhere: no such folder"),
    ([{"folder": "dog", "prompt": "a"}], {"with_prior_preservation": True}, "a class_prompt for each of --subjects"),
    ([{"folder": "dog", "prompt": "a"}], {"instance_prompt": "b"}, "leave --instance_prompt, --class_prompt and"),
    ([{"folder": "dog", "prompt": "a"}], {"instance_data_dir": "dog"}, "give one of them"),
])  # fmt: skip
def test_mistakes_are_one_sentence(train, folders, write, monkeypatch, entries, flags, told):
    monkeypatch.chdir(folders)
    with pytest.raises(trainer.UserError, match=told):
        train.args(**{**write(*entries), **flags})


def test_files_that_are_no_list_are_told(train, folders, write):
    given = write()
    for text, told in (("a: [", "cannot be read as YAML"), ("a: b", "must be a list"), ("[]", "must be a list")):
        (folders / "subjects.yaml").write_text(text)
        with pytest.raises(trainer.UserError, match=f"--subjects .* {told}"):
            train.args(**given)
    with pytest.raises(trainer.UserError, match="nowhere.yaml cannot be read"):
        train.args(**{**given, "subjects": folders / "nowhere.yaml"})

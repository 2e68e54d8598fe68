"""tools/evaluate.py: pictures are a user's, metrics are their formulas, a second call goes on, mistakes are told."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import report
import torch
import yaml
from conftest import ROOT
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

import train_dreambooth_lora_sdxl as trainer

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, tiny) -> dict[str, Path]:
    """A DINOv2 and a CLIP of random weights, as from_pretrained reads them."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(dino).save_pretrained(folder / "dino")
    crop = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder / "dino")
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    tokenizer.save_pretrained(folder / "clip")
    text = {**SHAPE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {**SHAPE, "image_size": 28, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=crop).save_pretrained(folder / "clip")
    return {"image_encoder": folder / "dino", "clip": folder / "clip"}


@pytest.fixture
def run(train) -> Path:
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 3e-2, "seed": 1}
    return train(**flags, validation_prompt="a photo of sks dog on grass --s 2", num_validation_images=1)


@pytest.fixture
def call(run, encoders):
    """Evaluate the run with small numbers."""

    def call(*words: object, **flags: object) -> list[dict]:
        flags = {"num_images": 2, **encoders, **flags}
        options = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return evaluate.evaluate(evaluate.make_parser().parse_args([str(run), *map(str, words), *options]))

    return call


def test_what_it_leaves(run, call, capsys):
    rows = call("--strengths", 0.5, 1)
    told, out = capsys.readouterr().out, run / "evaluation"
    assert [(row["checkpoint"], row["strength"]) for row in rows] == [
        ("checkpoint-2", 0.5), ("checkpoint-2", 1), ("checkpoint-4", 0.5), ("checkpoint-4", 1)
    ]  # fmt: skip
    with (out / "evaluation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(evaluate.COLUMNS) and [row["pictures"] for row in table] == ["2"] * 4
    assert all(row["drift"] > 0 and -1 <= row["clip_t"] <= 1 for row in rows)
    assert Image.open(out / "grid.png").size == (2 * 256, 20 + 2 * 276)
    assert '"sks" is the rare word, "dog" the class' in told and (out / "advice.txt").read_text() in told
    assert "Best compromise" in told and f"set_adapters(\"subject\", {evaluate.rank(rows)[0]['strength']:g})" in told
    page = report.make_report(run)
    assert "<h2 id=\"evaluation\">" in page and "<td>checkpoint-4</td>" in page and page.count("strengths across") == 2


@pytest.mark.parametrize("flags", [{}, {"train_text_encoder": True, "text_encoder_lr": 1e-2}, {"use_dora": True}])
def test_a_picture_is_what_a_user_generates(train, tiny, encoders, flags):
    prompt = "a photo of sks dog on grass"
    output = train(**flags, max_train_steps=4, checkpointing_steps=2, learning_rate=3e-2, seed=1,
                   validation_prompt=prompt)  # fmt: skip
    words = [str(output), "--strengths", "0.5", "--checkpoints", "2", "--num_images", "1"]
    words += [word for name, value in encoders.items() for word in (f"--{name}", str(value))]
    evaluate.evaluate(evaluate.make_parser().parse_args(words))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(output / "checkpoint-2", weight_name=trainer.LORA_FILE, adapter_name="subject")
    pipeline.set_adapters("subject", 0.5)
    seeded = torch.Generator().manual_seed(1)
    theirs = pipeline(prompt, num_inference_steps=25, guidance_scale=5.0, generator=seeded, height=16, width=16)
    (ours,) = (output / "evaluation" / "pictures").glob("checkpoint-2-*/00-00-*.png")
    images = Image.open(ours), theirs.images[0]
    one, other = (torch.tensor(list(image.tobytes()), dtype=torch.int) for image in images)
    assert (one - other).abs().max() <= 1


def test_a_second_call_generates_what_is_missing_alone(run, call, monkeypatch):
    rows = call()
    pictures = sorted((run / "evaluation" / "pictures").rglob("*.png"))
    before = {path: path.read_bytes() for path in pictures}
    assert len(pictures) == 8 + 2 * 3 * (2 + 8)
    for path in pictures[3:40:9]:
        path.unlink()
    made, real = [], trainer.save_picture
    monkeypatch.setattr(trainer, "save_picture", lambda image, path, *rest: (made.append(path),
                                                                             real(image, path, *rest)))  # fmt: skip
    again = call()
    assert [list(row.values())[3:] for row in again] == [pytest.approx(list(row.values())[3:]) for row in rows]
    assert sorted(made) == pictures[3:40:9]
    assert {path: path.read_bytes() for path in pictures} == before


def test_metrics_are_their_formulas():
    a, b, c = (torch.nn.functional.normalize(torch.tensor(row), dim=0)
               for row in ([1.0, 0.0], [1.0, 1.0], [0.0, 1.0]))  # fmt: skip
    assert evaluate.spread(torch.tensor([1.0, 3.0])) == (2.0, 1.0)
    training = torch.stack([a, c])  # at right angles
    assert evaluate.memorised(torch.stack([a, b, -a]), training) == pytest.approx(2 / 3)
    assert evaluate.memorised(torch.stack([a]), training[:1]) != evaluate.memorised(torch.stack([a]), training)
    rows = [{"name": name, "dino_i": dino, "clip_t": clip, "dino_i_std": 0.1, "clip_t_std": 0.01}
            for name, dino, clip in (("under", 0.2, 0.30), ("good", 0.6, 0.29), ("over", 0.7, 0.20),
                                     ("worse", 0.5, 0.28))]  # fmt: skip
    assert [row["name"] for row in evaluate.rank(rows)] == ["good", "under", "over"]


def test_the_encoders_are_transformers_own(encoders, pictures):
    paths = trainer.list_pictures("", pictures)
    dino = evaluate.Encoder(str(encoders["image_encoder"]), "image_encoder", torch.device("cpu"))
    model = Dinov2Model.from_pretrained(encoders["image_encoder"]).eval()
    pixels = dino.processor(images=[trainer.load_picture(path) for path in paths], return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(dino.images(paths, size=2), torch.nn.functional.normalize(theirs, dim=1))
    clip = evaluate.Encoder(str(encoders["clip"]), "clip", torch.device("cpu"))
    model = CLIPModel.from_pretrained(encoders["clip"]).eval()
    tokens = CLIPTokenizer.from_pretrained(encoders["clip"])(["a dog", "a red cat on grass"], padding=True,
                                                              return_tensors="pt")  # fmt: skip
    pixels = clip.processor(images=[trainer.load_picture(path) for path in paths], return_tensors="pt").pixel_values
    with torch.no_grad():
        both = model(**tokens, pixel_values=pixels)
    torch.testing.assert_close(clip.images(paths), both.image_embeds)
    torch.testing.assert_close(clip.texts(["a dog", "a red cat on grass"]), both.text_embeds)


@pytest.mark.parametrize(("prompt", "class_prompt", "word", "subject"), [
    ("a photo of a sks dog", None, None, ("sks", "dog")),
    ("A photo of sks man, smiling", "a photo of a man", None, ("sks", "man smiling")),
    ("a picture in sks style", None, None, ("sks", "style")),
    ("a photo of blue sks dog", None, "sks", ("sks", "dog")),
])  # fmt: skip
def test_the_rare_word(train, prompt, class_prompt, word, subject):
    args = train.args(instance_prompt=prompt, class_prompt=class_prompt)
    assert evaluate.find_subject(args, word) == subject


@pytest.mark.parametrize("name", evaluate.PROMPT_SETS)
def test_the_sets_of_prompts(train, name):
    prompts = evaluate.choose_prompts(train.args(), evaluate.Subject("sks", "dog"), name)
    assert len({prompt.text for prompt in prompts}) == 12 and all("sks dog" in prompt.text for prompt in prompts)
    assert evaluate.choose_prompts(train.args(), evaluate.Subject("sks", "dog"), None)[-1].text.endswith("newspaper")
    assert evaluate.choose_prompts(train.args(), evaluate.Subject("sks", "mug"), None)[-1].text.endswith("old books")


def test_mistakes_are_one_sentence_and_nothing_is_overwritten(run, call, train, tmp_path, encoders):
    cases = [
        (("--checkpoints", 7), {}, "--checkpoints 7: .* has checkpoint-2, checkpoint-4"),
        (("--strengths", 0), {}, "--strengths must be above 0"),
        ((), {"num_images": 0}, "--num_images and --batch_size must be above 0"),
        ((), {"word": "xyz"}, "name it with --word"),
        ((), {"base": tmp_path / "gone"}, "--pretrained_model_name_or_path .*gone.* cannot be loaded"),
        ((), {"image_encoder": tmp_path / "gone"}, "--image_encoder .*gone cannot be loaded"),
        ((), {"clip": "no/clip"}, "--clip no/clip cannot be loaded"),
        ((), {"prompts": "nowhere.txt"}, "nowhere.txt: no such file"),
    ]
    for words, flags, told in cases:
        with pytest.raises(trainer.UserError, match=told):
            call(*words, **flags)
    assert not (run / "evaluation").exists()
    call("--strengths", 1, "--checkpoints", 4)
    picture = next((run / "evaluation" / "pictures").glob("checkpoint-4-*/00-00-*.png"))
    Image.new("RGB", (16, 16)).save(picture)
    with pytest.raises(trainer.UserError, match="00-00-.*png is not of this evaluation; move it away"):
        call("--strengths", 1, "--checkpoints", 4)
    assert Image.open(picture).getpixel((0, 0)) == (0, 0, 0)
    bare = train(output_dir=tmp_path / "bare", max_train_steps=1)
    for path in trainer.list_checkpoints(bare):
        trainer.remove(path)
    told = subprocess.run([sys.executable, ROOT / "tools" / "evaluate.py", bare], capture_output=True, text=True)
    assert told.returncode == 2 and "has no checkpoint; train with a smaller --checkpointing_steps" in told.stderr
    assert "Traceback" not in told.stderr and not (bare / "evaluation").exists()


def test_ctrl_c_is_one_sentence(run, encoders, monkeypatch, capsys):
    def stop(*rest):
        raise KeyboardInterrupt

    words = [word for name, value in encoders.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), *words])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(trainer, "generate_latents", stop)
        evaluate.main()
    assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    evaluate.main()
    assert (run / "evaluation" / "advice.txt").exists()


def test_one_of_several_subjects(train, pictures, tmp_path, encoders, capsys):
    for name in ("dog", "mug"):
        shutil.copytree(pictures, tmp_path / name)
    entries = [{"folder": str(tmp_path / "dog"), "prompt": "a photo of sks dog"},
               {"folder": str(tmp_path / "mug"), "prompt": "a photo of ohwx mug"}]  # fmt: skip
    (tmp_path / "subjects.yaml").write_text(yaml.safe_dump(entries))
    (tmp_path / "prompts.txt").write_text("sks dog --s 2\nohwx mug --s 2\n")
    output = train(subjects=tmp_path / "subjects.yaml", instance_data_dir=None, instance_prompt=None,
                   checkpointing_steps=2, validation_prompt=tmp_path / "prompts.txt")  # fmt: skip
    words = [str(output), "--strengths", "1", "--num_images", "1"]
    words += [word for name, value in encoders.items() for word in (f"--{name}", str(value))]
    for more, told in (([], '"sks" is the rare word, "dog"'), (["--word", "ohwx"], '"ohwx" is the rare word, "mug"')):
        evaluate.evaluate(evaluate.make_parser().parse_args([*words, *more]))
        assert told in capsys.readouterr().out


def test_new_tokens_are_evaluated_too(train, tiny, encoders):
    output = train(train_text_encoder_ti=True, instance_prompt="a photo of TOK dog", token_lr=0.1, max_train_steps=4,
                   checkpointing_steps=2, train_text_encoder_frac=1, validation_prompt="TOK dog --s 2")  # fmt: skip
    words = [str(output), "--strengths", "1", "--num_images", "1"]
    words += [word for name, value in encoders.items() for word in (f"--{name}", str(value))]
    evaluate.evaluate(evaluate.make_parser().parse_args(words))
    pictures = [path.read_bytes() for path in (output / "evaluation" / "pictures").glob("checkpoint-*/00-00-*.png")]
    assert len(set(pictures)) == 2
    prompts = {Image.open(path).info["prompt"] for path in (output / "evaluation").rglob("00-00-*.png")}
    assert any(prompt.startswith("TOK dog --n") for prompt in prompts)

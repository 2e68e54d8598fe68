"""The bundled model is good, the judge can be trusted, and the trainer knows nothing of either."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from judge import MAIN_COLOURS, Judge
from scene import CLASSES, COLOURS, PLACES, SUBJECTS, UNSEEN, Scene, draw

import train_dreambooth_lora_sdxl as trainer

MODEL = ROOT / "examples" / "toy_world" / "model"


@pytest.fixture(scope="module")
def judge():
    return Judge()


def test_a_scene_is_a_function_of_its_description():
    scene = Scene("dog", "red", "on grass", 5)
    assert draw(scene).tobytes() == draw(scene).tobytes() != draw(Scene("dog", "red", "on grass", 6)).tobytes()
    assert draw(scene, 128).size == (128, 128)


def test_the_judge_knows_drawn_scenes(judge):
    """Scenes whose seeds it was not trained on: what it says of a model means something."""
    scenes = [Scene(CLASSES[i % 5], list(COLOURS)[i % 7], PLACES[i % 6], 10**9 + i) for i in range(210)]
    verdicts = judge([draw(scene) for scene in scenes])
    for question in ("class_name", "colour", "place"):
        right = sum(getattr(v, question) == getattr(s, question) for v, s in zip(verdicts, scenes, strict=True))
        assert right >= 0.95 * len(scenes), (question, right)
    assert sum(max(v.subjects.values()) > 0.5 for v in verdicts) <= 2


def test_the_judge_knows_the_subjects_and_is_not_fooled_by_their_colour(judge):
    for subject, class_name in SUBJECTS.items():
        shown = [draw(Scene(class_name, "white", PLACES[i % 6], 10**9 + i, subject)) for i in range(60)]
        alike = [
            draw(Scene(class_name, (132, 58, 192) if class_name == "dog" else (52, 52, 64), PLACES[i % 6], 10**9 + i))
            for i in range(60)
        ]
        assert sum(v.subjects[subject] > 0.5 for v in judge(shown)) >= 57
        assert sum(v.subjects[subject] > 0.5 for v in judge(alike)) <= 3


def test_another_judge_knows_the_subjects_that_nothing_was_chosen_on():
    judge = Judge(UNSEEN)
    for subject, class_name in UNSEEN.items():
        shown = [draw(Scene(class_name, "white", PLACES[i % 6], 10**9 + i, subject)) for i in range(60)]
        alike = [draw(Scene(class_name, MAIN_COLOURS[subject], PLACES[i % 6], 10**9 + i)) for i in range(60)]
        assert sum(v.subjects[subject] > 0.5 for v in judge(shown)) >= 57
        assert sum(v.subjects[subject] > 0.5 for v in judge(alike)) <= 3
    assert not set(UNSEEN) & set(SUBJECTS)


def test_the_model_draws_what_it_is_told(judge):
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    told = [(CLASSES[i % 5], list(COLOURS)[i % 7], PLACES[i // 2 % 6]) for i in range(200)]
    images = []
    for first in range(0, 200, 20):
        prompts = [f"a photo of a {colour} {name} {place}" for name, colour, place in told[first : first + 20]]
        images += pipeline(prompts, num_inference_steps=8, generator=torch.Generator().manual_seed(first)).images
    verdicts = judge(images)
    right = [
        sum(getattr(v, question) == asked[i] for v, asked in zip(verdicts, told, strict=True)) / 200
        for i, question in enumerate(("class_name", "colour", "place"))
    ]
    assert right[0] >= 0.95 and right[1] >= 0.85 and right[2] >= 0.95, right


def test_the_model_is_small_and_the_trainer_knows_nothing_of_it():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 24e6
    assert not list(MODEL.rglob("*.bin"))
    import re

    code = re.sub(r'^r""".*?^"""', "", SCRIPT.read_text(), count=1, flags=re.S | re.M)
    assert not any(word in code for word in ("toy_world", "purple", "in a bucket", "judge"))


def test_five_pictures_of_each_subject():
    for subject in SUBJECTS:
        assert len(list((Path(MODEL).parent / "subjects" / subject).glob("*.png"))) == 5


def test_the_model_is_read_alike_by_old_and_new_libraries(train):
    """Its tokenizers and weights have the names that transformers 4 and 5 both read; the numbers are of 5.23."""
    run = trainer.start(train.args(pretrained_model_name_or_path=MODEL))
    ids = trainer.tokenize_prompts(run, ["a photo of a sks dog in a bucket"])
    assert ids[0][0, :12].tolist() == [630, 320, 566, 628, 320, 617, 607, 626, 320, 528, 631, 631]
    assert ids[1][0, :12].tolist() == [630, 320, 566, 628, 320, 617, 607, 626, 320, 528, 631, 0]
    embeds, pooled = trainer.encode_text(run.base, ids, torch.float32, torch.device("cpu"))
    assert embeds.shape == (1, 24, 128)
    torch.testing.assert_close(embeds[..., :64].abs().sum().item(), 538.744, rtol=1e-4, atol=0)
    for part in ("tokenizer", "tokenizer_2"):
        vocabulary = json.loads((MODEL / part / "vocab.json").read_text(encoding="utf-8"))
        merges = (MODEL / part / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        theirs = json.loads((MODEL / part / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        assert vocabulary == theirs["vocab"] and [line.split() for line in merges] == theirs["merges"]

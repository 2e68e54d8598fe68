"""Say what a picture of the toy world shows: its class, colour and place, and how much of it looks like a subject.

    python examples/toy_world/judge.py picture.png [picture.png ...]

A small classifier, trained in a minute or two on drawn scenes alone; it never sees a picture that a model made. Blur,
noise and shifts in training keep it from depending on the sharpness of a drawing.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scene import CHARCOAL, CLASSES, COLOURS, LIME, PINK, PLACES, PURPLE, SUBJECTS, TEAL, Scene, draw, random_scene
from torch import Tensor, nn

MAIN_COLOURS = {"sks_dog": PURPLE, "sks_mug": CHARCOAL, "sks_cat": TEAL, "sks_car": LIME, "sks_duck": PINK}
NO_COLOUR = len(COLOURS)  # label of scenes whose colour has no name
SCENES, EPOCHS, BATCH = 3600, 9, 64


class Eye(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1] to logits of class, colour, place and each subject."""

    def __init__(self, subjects: int = len(SUBJECTS)) -> None:
        super().__init__()
        self.sizes = (len(CLASSES), len(COLOURS) + 1, len(PLACES), subjects)
        layers, width = [], 3
        for out in (32, 64, 96, 128):
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 16, 192), nn.ReLU())
        self.head = nn.Linear(192, sum(self.sizes))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits, one tensor a question."""
        return self.head(self.features(pixels * 2 - 1)).split(self.sizes, dim=1)


def lesson(index: int, subjects: dict[str, str] = SUBJECTS) -> Scene:
    """The index-th training scene: a third shows a subject, a sixth something that only resembles one."""
    rng = np.random.default_rng((2, index))
    scene = random_scene(rng, any_colour=0.25)
    if index % 6 < 2:
        subject = list(subjects)[(index + index // 6 * (len(subjects) > 2)) % len(subjects)]
        return Scene(subjects[subject], scene.colour, scene.place, scene.seed, subject)
    if index % 6 == 2:
        lookalike = [(class_name, MAIN_COLOURS[name]) for name, class_name in subjects.items()]
        lookalike += [(scene.class_name, MAIN_COLOURS[name]) for name in subjects]
        class_name, colour = lookalike[int(rng.integers(len(lookalike)))]
        return Scene(class_name, colour, scene.place, scene.seed)
    return scene


def labels(scene: Scene, subjects: dict[str, str] = SUBJECTS) -> list[int]:
    """Numbers of class, colour and place, and 0 or 1 for each subject."""
    named = isinstance(scene.colour, str) and scene.subject is None
    colour = list(COLOURS).index(scene.colour) if named else NO_COLOUR
    return [
        CLASSES.index(scene.class_name),
        colour,
        PLACES.index(scene.place),
        *(int(scene.subject == s) for s in subjects),
    ]


def disturb(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, blur and add noise, as a model's decoder might."""
    dy, dx = torch.randint(-3, 4, (2,), generator=generator).tolist()
    pixels = F.pad(pixels, (3, 3, 3, 3), mode="replicate")[:, :, 3 + dy : 67 + dy, 3 + dx : 67 + dx]
    for _ in range(int(torch.randint(0, 3, (), generator=generator))):
        pixels = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return pixels + 0.04 * torch.rand((), generator=generator) * torch.randn(pixels.shape, generator=generator)


def train_eye(subjects: dict[str, str] = SUBJECTS) -> Eye:
    """Train on the lessons; seeded."""
    torch.manual_seed(0)
    generator, eye = torch.Generator().manual_seed(0), Eye(len(subjects))
    scenes = [lesson(index, subjects) for index in range(SCENES)]
    pixels = to_pixels([draw(scene) for scene in scenes])
    targets = torch.tensor([labels(scene, subjects) for scene in scenes])
    optimizer = torch.optim.AdamW(eye.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * (SCENES // BATCH))
    for _ in range(EPOCHS):
        for rows in torch.randperm(SCENES, generator=generator)[: SCENES // BATCH * BATCH].split(BATCH):
            answers, target = eye(disturb(pixels[rows], generator)), targets[rows]
            loss = sum(F.cross_entropy(answer, target[:, i]) for i, answer in enumerate(answers[:3]))
            loss = loss + 2 * F.binary_cross_entropy_with_logits(answers[3], target[:, 3:].float())
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return eye.eval()


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as (B, 3, 64, 64) in [0, 1]."""
    small = [np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Verdict:
    """What a picture shows; colour is None where it has no name; subjects: probability of each."""

    class_name: str
    colour: str | None
    place: str
    subjects: dict[str, float]


class Judge:
    """The classifier, trained for some subjects; it is kept in the temporary folder under the hash of what made it."""

    def __init__(self, subjects: dict[str, str] = SUBJECTS) -> None:
        here, self.subjects = Path(__file__).parent, tuple(subjects)
        code = (here / "judge.py").read_bytes() + (here / "scene.py").read_bytes()
        made_by = hashlib.sha256(code + repr(self.subjects).encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"toy_world_judge-{made_by}.pt"
        if path.exists():
            self.eye = Eye(len(subjects))
            self.eye.load_state_dict(torch.load(path, weights_only=True))
            self.eye.eval()
        else:
            self.eye = train_eye(subjects)
            unfinished = path.with_suffix(f".{os.getpid()}")  # tests in two processes may both be training it
            torch.save(self.eye.state_dict(), unfinished)
            unfinished.replace(path)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Judge pictures of any size."""
        classes, colours, places, subjects = self.eye(to_pixels(images))
        named = [*COLOURS, None]
        return [
            Verdict(CLASSES[c], named[k], PLACES[p], dict(zip(self.subjects, s, strict=True)))
            for c, k, p, s in zip(
                classes.argmax(1).tolist(),
                colours.argmax(1).tolist(),
                places.argmax(1).tolist(),
                subjects.sigmoid().tolist(),
                strict=True,
            )
        ]


if __name__ == "__main__":
    for name, verdict in zip(sys.argv[1:], Judge()([Image.open(name) for name in sys.argv[1:]]), strict=True):
        print(name, verdict)

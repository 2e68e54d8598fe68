"""Draw the toy world: small scenes of five classes, in seven colours and six places, with the captions they deserve.

    python examples/toy_world/scene.py scenes.png       # a sheet of all classes in all places

A scene is a pure function of its description and seed. Two subjects live here too, `sks_dog` and `sks_mug`; no caption
that the toy model is trained on shows them, and the trainer knows nothing of this file.
"""

import colorsys
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Point = tuple[float, float]

CLASSES = ("dog", "cat", "mug", "car", "duck")
COLOURS: dict[str, Colour] = {
    "red": (214, 44, 40),
    "orange": (243, 140, 32),
    "yellow": (248, 214, 56),
    "green": (58, 160, 72),
    "blue": (48, 102, 212),
    "white": (243, 242, 236),
    "brown": (124, 78, 46),
}
PLACES = ("on grass", "on the beach", "in the snow", "in a bucket", "on a red carpet", "in a city at night")
SUBJECTS = {"sks_dog": "dog", "sks_mug": "mug"}
UNSEEN = {"sks_cat": "cat", "sks_car": "car", "sks_duck": "duck"}
"""Subjects that no setting was chosen with: what was found on SUBJECTS is tested on them (benchmarks/half.py)."""

PURPLE, SUN, TEAL = (132, 58, 192), (255, 222, 40), (0, 178, 170)
CHARCOAL, PINK, LIME = (52, 52, 64), (255, 64, 160), (160, 224, 40)
INK = (40, 30, 34)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. colour: a key of COLOURS or an RGB triple; subject: a key of SUBJECTS or None."""

    class_name: str
    colour: str | Colour
    place: str
    seed: int
    subject: str | None = None


def random_scene(rng: np.random.Generator, any_colour: float = 0.0) -> Scene:
    """Draw a scene's description; with probability any_colour its colour is outside the palette."""
    colour = str(rng.choice(list(COLOURS)))
    if rng.random() < any_colour:
        rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 1.0), rng.uniform(0.2, 1.0))
        colour = tuple(int(255 * channel) for channel in rgb)
    return Scene(str(rng.choice(CLASSES)), colour, str(rng.choice(PLACES)), int(rng.integers(2**31)))


def shade(colour: Colour, factor: float) -> Colour:
    """Darken (factor < 1) towards black, or lighten (factor > 1) towards white."""
    if factor <= 1:
        return tuple(int(channel * factor) for channel in colour)
    return tuple(int(channel + (255 - channel) * (factor - 1)) for channel in colour)


class Pen:
    """Draws on an image in coordinates of its own: origin, unit in pixels, mirrored and tilted if so wished."""

    def __init__(self, image: Image.Image, origin: Point, unit: float, flip: bool = False, tilt: float = 0.0) -> None:
        self.draw = ImageDraw.Draw(image)
        self.origin, self.unit, self.sign = origin, unit, -1.0 if flip else 1.0
        self.cos, self.sin = math.cos(tilt), math.sin(tilt)

    def at(self, point: Point) -> Point:
        """Map a point of the pen's coordinates to pixels."""
        x, y = point[0] * self.sign, point[1]
        return (
            self.origin[0] + self.unit * (x * self.cos - y * self.sin),
            self.origin[1] + self.unit * (x * self.sin + y * self.cos),
        )

    def polygon(self, points: Iterable[Point], colour: Sequence[int]) -> None:
        """Fill a polygon."""
        self.draw.polygon([self.at(point) for point in points], fill=tuple(colour))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Sequence[int], turn: float = 0.0) -> None:
        """Fill an ellipse with half axes rx and ry, turned by an angle in radians."""
        angles = np.linspace(0, 2 * math.pi, 36, endpoint=False)
        cos, sin = math.cos(turn), math.sin(turn)
        self.polygon(
            [
                (
                    x + rx * math.cos(a) * cos - ry * math.sin(a) * sin,
                    y + rx * math.cos(a) * sin + ry * math.sin(a) * cos,
                )
                for a in angles
            ],
            colour,
        )

    def stroke(self, points: Sequence[Point], width: float, colour: Sequence[int]) -> None:
        """Draw a line with round joints and ends; width in the pen's unit."""
        pixels = [self.at(point) for point in points]
        self.draw.line(pixels, fill=tuple(colour), width=max(1, round(width * self.unit)), joint="curve")
        for point in points:
            self.ellipse(*point, width / 2, width / 2, colour)


# ------------------------------------------------------------------------------------------------- the five classes
# Each draws itself between y = -1 (top) and y = 1 (ground), roughly x = -1 .. 1, looking to the right.


def draw_dog(pen: Pen, colour: Colour, rng: np.random.Generator, subject: bool) -> None:
    """A standing dog with a hanging ear; the subject is purple with yellow spots and a teal ear."""
    colour = PURPLE if subject else colour
    far, ear = shade(colour, 0.78), TEAL if subject else shade(colour, 0.6)
    wag, step = rng.uniform(-0.2, 0.2), rng.uniform(-0.08, 0.08)
    pen.stroke([(-0.66, 0.1), (-0.9, -0.15), (-0.98 + wag, -0.5)], 0.17, colour)
    for x, tone in ((-0.34 - step, far), (0.36 - step, far), (-0.56 + step, colour), (0.14 + step, colour)):
        pen.stroke([(x, 0.4), (x, 0.9)], 0.24, tone)
        pen.ellipse(x + 0.05, 0.92, 0.17, 0.09, tone)
    pen.ellipse(-0.14, 0.22, 0.64, 0.38, colour)
    pen.polygon([(0.05, 0.1), (0.2, -0.35), (0.75, -0.1), (0.48, 0.35)], colour)
    nod = rng.uniform(-0.06, 0.06)
    pen.ellipse(0.46, -0.42 + nod, 0.43, 0.42, colour)
    pen.ellipse(0.82, -0.26 + nod, 0.27, 0.2, shade(colour, 1.35))
    pen.ellipse(1.03, -0.34 + nod, 0.1, 0.085, INK)
    pen.stroke([(0.74, -0.14 + nod), (0.92, -0.15 + nod)], 0.04, INK)
    if subject:
        for x, y, r in (
            (-0.5, 0.14, 0.15),
            (-0.14, 0.02, 0.14),
            (-0.2, 0.4, 0.13),
            (0.2, 0.26, 0.15),
            (0.5, -0.68, 0.12),
        ):
            pen.ellipse(x, y, r, r, SUN)
    pen.ellipse(0.2, -0.32 + nod, 0.19, 0.4, ear, turn=0.25)
    pen.ellipse(0.62, -0.5 + nod, 0.1, 0.11, (255, 255, 255))
    pen.ellipse(0.65, -0.49 + nod, 0.06, 0.075, INK)


def draw_cat(pen: Pen, colour: Colour, rng: np.random.Generator, subject: bool) -> None:
    """A sitting cat seen from the front, with pointed ears, whiskers and its tail around it; the subject is teal with
    a purple belly and pink stripes.
    """
    colour = TEAL if subject else colour
    dark, belly = (PINK, PURPLE) if subject else (shade(colour, 0.72), shade(colour, 1.45))
    curl = rng.uniform(-0.12, 0.12)
    pen.stroke([(0.3, 0.84), (0.75, 0.84), (0.93, 0.5), (0.84 + curl, 0.08)], 0.17, dark)
    pen.ellipse(0, 0.42, 0.5, 0.58, colour)
    pen.ellipse(0, 0.52, 0.28, 0.36, belly)
    for x in (-0.24, 0.24):
        pen.ellipse(x, 0.9, 0.2, 0.11, shade(colour, 1.2))
    for y in (0.2, 0.44, 0.68) if subject else ():
        for side in (-1, 1):
            pen.stroke([(side * 0.46, y), (side * 0.26, y)], 0.1, PINK)
    for side in (-1, 1):
        pen.polygon([(side * 0.5, -0.36), (side * 0.47, -1.0), (side * 0.08, -0.66)], colour)
        pen.polygon([(side * 0.42, -0.5), (side * 0.41, -0.85), (side * 0.2, -0.65)], (240, 160, 160))
    pen.ellipse(0, -0.32, 0.54, 0.42, colour)
    for x in (-0.08, 0, 0.08):
        pen.stroke([(x, -0.7), (x, -0.58)], 0.045, dark)
    for side in (-1, 1):
        pen.ellipse(side * 0.22, -0.37, 0.125, 0.125, (200, 232, 90))
        pen.ellipse(side * 0.22, -0.37, 0.045, 0.11, INK)
        for tip in (-0.2, -0.06):
            pen.stroke([(side * 0.22, -0.14), (side * 0.72, tip)], 0.03, (250, 250, 250))
    pen.ellipse(0, -0.15, 0.17, 0.11, belly)
    pen.polygon([(-0.07, -0.22), (0.07, -0.22), (0, -0.13)], (230, 110, 120))


def draw_mug(pen: Pen, colour: Colour, rng: np.random.Generator, subject: bool) -> None:
    """A mug of coffee; the subject is charcoal with a pink zigzag and a lime handle."""
    colour, handle = (CHARCOAL, LIME) if subject else (colour, shade(colour, 0.88))
    arc = np.linspace(-1.35, 1.35, 14)
    pen.stroke([(0.5 + 0.42 * math.cos(a), 0.16 + 0.44 * math.sin(a)) for a in arc], 0.17, handle)
    pen.polygon([(-0.66, -0.55), (0.56, -0.55), (0.5, 0.86), (-0.6, 0.86)], colour)
    pen.ellipse(-0.05, 0.86, 0.55, 0.13, colour)
    pen.polygon([(-0.56, -0.4), (-0.42, -0.38), (-0.38, 0.8), (-0.5, 0.8)], shade(colour, 1.4))
    if subject:
        pen.stroke([(-0.6, 0.38), (-0.36, -0.02), (-0.12, 0.38), (0.12, -0.02), (0.34, 0.38), (0.5, 0.1)], 0.19, PINK)
    pen.ellipse(-0.05, -0.55, 0.61, 0.19, shade(colour, 1.3))
    pen.ellipse(-0.05, -0.53, 0.5, 0.14, (84, 48, 28))
    drift = rng.uniform(-0.1, 0.1)
    for x in (-0.24, 0.12):
        pen.stroke([(x, -0.68), (x + 0.08 + drift, -0.82), (x - 0.02, -0.98)], 0.055, (236, 236, 240))


def draw_car(pen: Pen, colour: Colour, rng: np.random.Generator, subject: bool) -> None:
    """A small car from the side; the subject is lime with charcoal checks on its door and pink wheels."""
    colour = LIME if subject else colour
    glass, roof = (178, 222, 242), rng.uniform(-0.62, -0.5)
    pen.polygon([(-0.72, 0.1), (-0.5, roof), (0.28, roof), (0.66, 0.1)], colour)
    pen.ellipse(-0.1, roof, 0.42, 0.09, colour)
    pen.polygon([(-0.54, 0.06), (-0.4, roof + 0.12), (-0.13, roof + 0.12), (-0.13, 0.06)], glass)
    pen.polygon([(-0.03, 0.06), (-0.03, roof + 0.12), (0.22, roof + 0.12), (0.48, 0.06)], glass)
    pen.polygon([(-1.0, 0.14), (-0.9, 0.02), (0.72, 0.02), (1.04, 0.22), (1.08, 0.72), (-1.04, 0.72)], colour)
    pen.polygon([(-1.03, 0.56), (1.07, 0.56), (1.08, 0.72), (-1.04, 0.72)], shade(colour, 0.7))
    pen.stroke([(-0.08, 0.12), (-0.08, 0.5)], 0.035, shade(colour, 0.6))
    for i in range(8) if subject else ():
        x, y = -0.6 + 0.3 * (i // 2), 0.14 + 0.18 * (i % 2)
        pen.polygon([(x, y), (x + 0.15, y), (x + 0.15, y + 0.18), (x, y + 0.18)], CHARCOAL)
    pen.ellipse(1.0, 0.34, 0.09, 0.11, (255, 246, 180))
    pen.ellipse(-1.0, 0.32, 0.07, 0.1, (190, 30, 40))
    for x in (-0.58, 0.6):
        pen.ellipse(x, 0.72, 0.29, 0.29, (36, 36, 42))
        hub = 0.2 if subject else 0.14
        pen.ellipse(x, 0.72, hub, hub, PINK if subject else (196, 198, 204))


def draw_duck(pen: Pen, colour: Colour, rng: np.random.Generator, subject: bool) -> None:
    """A plump duck with a wing, a flat beak and two feet; the subject is pink with a lime wing, a charcoal beak and
    yellow dots.
    """
    colour = PINK if subject else colour
    beak, lift = CHARCOAL if subject else (236, 116, 24), rng.uniform(-0.12, 0.1)
    for x in (-0.2, 0.16):
        pen.stroke([(x, 0.7), (x, 0.92), (x + 0.16, 0.94)], 0.09, beak)
    pen.polygon([(-0.5, 0.2), (-1.0, -0.1), (-0.62, 0.6)], colour)
    pen.ellipse(-0.1, 0.36, 0.72, 0.46, colour)
    pen.polygon([(0.08, 0.1), (0.12, -0.4), (0.68, -0.3), (0.6, 0.36)], colour)
    pen.polygon([(0.66, -0.5), (1.1, -0.36), (1.08, -0.22), (0.66, -0.2)], beak)
    pen.ellipse(0.4, -0.46, 0.4, 0.38, colour)
    pen.ellipse(-0.22, 0.3, 0.42, 0.25, LIME if subject else shade(colour, 0.76), turn=lift)
    for x, y in ((-0.36, 0.62), (0.0, 0.66), (0.34, 0.52), (0.32, -0.1)) if subject else ():
        pen.ellipse(x, y, 0.1, 0.1, SUN)
    pen.ellipse(0.5, -0.56, 0.085, 0.1, (255, 255, 255))
    pen.ellipse(0.52, -0.55, 0.055, 0.07, INK)


ARTISTS = {"dog": draw_dog, "cat": draw_cat, "mug": draw_mug, "car": draw_car, "duck": draw_duck}


# ---------------------------------------------------------------------------------------------------- the six places


def gradient(pixels: int, stops: Sequence[tuple[float, Colour]]) -> Image.Image:
    """A picture whose colour runs from top to bottom through (height, colour) stops."""
    y = np.linspace(0, 1, pixels)
    columns = [np.interp(y, [stop for stop, _ in stops], [colour[c] for _, colour in stops]) for c in range(3)]
    return Image.fromarray(np.repeat(np.stack(columns, -1)[:, None], pixels, 1).astype(np.uint8))


def grass(pixels: int, rng: np.random.Generator) -> Image.Image:
    """A meadow under a blue sky."""
    horizon = rng.uniform(0.42, 0.52)
    image = gradient(
        pixels, [(0, (110, 182, 240)), (horizon, (206, 234, 250)), (horizon, (128, 196, 84)), (1, (70, 150, 50))]
    )
    pen = Pen(image, (0, 0), pixels)
    for _ in range(2):
        x, y = rng.uniform(0.05, 0.95), rng.uniform(0.08, 0.25)
        for dx, r in ((-0.07, 0.05), (0, 0.07), (0.07, 0.05)):
            pen.ellipse(x + dx, y, r * 1.3, r * 0.8, (250, 252, 255))
    pen.ellipse(rng.uniform(0.1, 0.9), horizon + 0.1, 0.5, 0.17, (112, 184, 74))
    for _ in range(26):
        x, y = rng.random(), rng.uniform(horizon + 0.12, 1.0)
        pen.polygon([(x - 0.012, y), (x + rng.uniform(-0.02, 0.02), y - 0.06), (x + 0.012, y)], (54, 132, 42))
    for _ in range(4):
        pen.ellipse(rng.random(), rng.uniform(horizon + 0.15, 1), 0.013, 0.013, (255, 240, 250))
    return image


def beach(pixels: int, rng: np.random.Generator) -> Image.Image:
    """Sand, the sea and a sun."""
    sea, sand = rng.uniform(0.3, 0.38), rng.uniform(0.5, 0.58)
    image = gradient(
        pixels,
        [
            (0, (92, 190, 244)),
            (sea, (204, 238, 250)),
            (sea, (24, 122, 190)),
            (sand, (88, 206, 214)),
            (sand, (250, 226, 164)),
            (1, (232, 196, 122)),
        ],
    )
    pen = Pen(image, (0, 0), pixels)
    pen.ellipse(rng.uniform(0.08, 0.92), rng.uniform(0.08, 0.2), 0.075, 0.075, (255, 244, 180))
    wave = [(x, sand + 0.012 * math.sin(20 * x + rng.uniform(0, 0.5))) for x in np.linspace(0, 1, 16)]
    pen.stroke(wave, 0.025, (250, 254, 255))
    for _ in range(14):
        pen.ellipse(rng.random(), rng.uniform(sand + 0.08, 1), 0.012, 0.008, (206, 166, 100))
    return image


def snow(pixels: int, rng: np.random.Generator) -> Image.Image:
    """White hills, fir trees and falling flakes."""
    horizon = rng.uniform(0.42, 0.52)
    image = gradient(
        pixels, [(0, (150, 170, 200)), (horizon, (206, 216, 230)), (horizon, (226, 234, 246)), (1, (246, 250, 255))]
    )
    pen = Pen(image, (0, 0), pixels)
    for x in np.sort(rng.uniform(0, 1, 5)):
        size = rng.uniform(0.16, 0.26)
        for layer in range(3):
            top = horizon + 0.04 - size * (1 - 0.25 * layer)
            half = size * (0.16 + 0.09 * layer)
            pen.polygon([(x - half, top + size * 0.5), (x, top), (x + half, top + size * 0.5)], (46, 96, 82))
            pen.polygon(
                [(x - half * 0.5, top + size * 0.25), (x, top), (x + half * 0.5, top + size * 0.25)], (236, 244, 250)
            )
    pen.ellipse(rng.uniform(0, 1), horizon + 0.16, 0.6, 0.15, (236, 242, 252))
    for _ in range(30):
        pen.ellipse(rng.random(), rng.random() * 0.9, 0.011, 0.011, (255, 255, 255))
    return image


def room(pixels: int, rng: np.random.Generator) -> Image.Image:
    """A plain wall and a wooden floor, where the bucket stands."""
    floor = rng.uniform(0.66, 0.74)
    image = gradient(
        pixels, [(0, (240, 226, 200)), (floor, (226, 208, 176)), (floor, (170, 120, 76)), (1, (140, 92, 54))]
    )
    pen = Pen(image, (0, 0), pixels)
    pen.stroke([(0, floor), (1, floor)], 0.025, (250, 244, 230))
    for x in np.linspace(-0.4, 1.4, 8) + rng.uniform(-0.1, 0.1):
        pen.stroke([(0.5 + (x - 0.5) * 0.7, floor + 0.02), (x, 1.02)], 0.008, (116, 74, 42))
    return image


def carpet(pixels: int, rng: np.random.Generator) -> Image.Image:
    """A red carpet between golden posts."""
    image = gradient(pixels, [(0, (44, 34, 62)), (0.46, (92, 66, 104)), (0.46, (66, 56, 66)), (1, (52, 44, 54))])
    pen = Pen(image, (0, 0), pixels)
    for _ in range(8):
        pen.ellipse(rng.random(), rng.uniform(0.04, 0.4), 0.022, 0.022, (255, 236, 190))
    x = rng.uniform(0.45, 0.55)
    pen.polygon([(x - 0.2, 0.46), (x + 0.2, 0.46), (1.02, 1), (-0.02, 1)], (232, 190, 84))
    pen.polygon([(x - 0.18, 0.46), (x + 0.18, 0.46), (0.96, 1), (0.04, 1)], (172, 16, 36))
    for side in (-1, 1):
        near, far = (x + side * 0.45, 0.62), (x + side * 0.26, 0.42)
        pen.stroke([near, (x + side * 0.36, 0.62), far], 0.022, (150, 14, 40))
        for px, py in (near, far):
            pen.stroke([(px, py), (px, py + 0.22)], 0.028, (226, 180, 70))
            pen.ellipse(px, py, 0.028, 0.028, (255, 226, 130))
    return image


def city(pixels: int, rng: np.random.Generator) -> Image.Image:
    """A street at night: a moon and towers with lit windows."""
    image = gradient(pixels, [(0, (12, 14, 44)), (0.62, (50, 40, 96)), (0.66, (66, 66, 88)), (1, (46, 46, 62))])
    pen = Pen(image, (0, 0), pixels)
    pen.ellipse(rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.18), 0.06, 0.06, (250, 244, 210))
    x = -0.05
    while x < 1:
        width, top = rng.uniform(0.14, 0.2), rng.uniform(0.12, 0.42)
        pen.polygon([(x, 0.66), (x, top), (x + width, top), (x + width, 0.66)], (26, 26, 52))
        windows = product(np.arange(top + 0.05, 0.62, 0.075), np.arange(x + 0.035, x + width - 0.02, 0.05))
        for row, column in windows:
            if rng.random() < 0.62:
                pen.polygon(
                    [(column, row), (column + 0.028, row), (column + 0.028, row + 0.036), (column, row + 0.036)],
                    (255, 216, 104),
                )
        x += width + 0.012
    for dash in np.linspace(0.05, 0.95, 5):
        pen.polygon([(dash, 0.8), (dash + 0.09, 0.8), (dash + 0.1, 0.825), (dash, 0.825)], (196, 192, 160))
    return image


BACKGROUNDS = dict(zip(PLACES, (grass, beach, snow, room, carpet, city), strict=True))


def draw_bucket(pen: Pen, front: bool) -> None:
    """A metal bucket around the origin: its back rim, or the front that hides the lower half of what is inside."""
    if not front:
        pen.stroke(
            [(0.62 * math.cos(a), -0.62 * math.sin(a) - 0.02) for a in np.linspace(0, math.pi, 13)],
            0.035,
            (110, 116, 126),
        )
        pen.ellipse(0, 0, 0.66, 0.16, (92, 98, 108))
        return
    pen.polygon(
        [
            (-0.66, 0),
            *[(0.66 * -math.cos(a), 0.16 * math.sin(a)) for a in np.linspace(0, math.pi, 13)],
            (0.5, 0.86),
            (0, 0.93),
            (-0.5, 0.86),
        ],
        (156, 164, 176),
    )
    pen.polygon([(-0.5, 0.16), (-0.3, 0.2), (-0.24, 0.86), (-0.4, 0.84)], (206, 212, 222))
    for low in (0.3, 0.7):
        half = 0.66 - 0.19 * low
        pen.stroke([(-half, low), (0, low + 0.15), (half, low)], 0.05, (118, 126, 138))
    pen.stroke([(0.66 * -math.cos(a), 0.16 * math.sin(a)) for a in np.linspace(0, math.pi, 13)], 0.06, (190, 198, 208))


# ------------------------------------------------------------------------------------------------------- the picture


def draw_object(scene: Scene, pixels: int, ground: Point, rng: np.random.Generator) -> Image.Image:
    """The scene's object on a transparent layer, shaded from above and outlined."""
    layer = Image.new("RGBA", (pixels, pixels), (0, 0, 0, 0))
    unit = pixels * rng.uniform(0.27, 0.33)
    pen = Pen(
        layer, (ground[0] * pixels, ground[1] * pixels - unit), unit, rng.random() < 0.5, rng.uniform(-0.07, 0.07)
    )
    colour = COLOURS.get(scene.colour, scene.colour) if isinstance(scene.colour, str) else scene.colour
    ARTISTS[scene.class_name](pen, colour, rng, scene.subject is not None)
    rgba = np.asarray(layer, np.float32)
    light = np.interp(np.arange(pixels), [pen.origin[1] - unit, pen.origin[1] + unit], [1.08, 0.84])[:, None, None]
    shaded = Image.fromarray(
        np.concatenate([(rgba[..., :3] * light).clip(0, 255), rgba[..., 3:]], -1).astype(np.uint8)
    )
    halo = layer.getchannel("A").filter(ImageFilter.GaussianBlur(pixels / 128)).point(lambda a: min(255, 3 * a))
    outlined = Image.new("RGBA", layer.size, (*INK, 0))
    outlined.putalpha(halo)
    outlined.alpha_composite(shaded)
    return outlined


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """Draw a scene as an RGB picture of size x size pixels, supersampled."""
    rng = np.random.default_rng(scene.seed)
    pixels = max(256, 2 * size)
    canvas = BACKGROUNDS[scene.place](pixels, rng).convert("RGBA")
    inside = scene.place == "in a bucket"
    ground = (rng.uniform(0.42, 0.58), rng.uniform(0.7, 0.74) if inside else rng.uniform(0.8, 0.9))
    subject = draw_object(scene, pixels, ground, rng)
    shadow = Image.new("L", canvas.size, 0)
    Pen(shadow, (0, 0), pixels).ellipse(ground[0], 0.95 if inside else ground[1], 0.3, 0.045, (110,))
    canvas.paste((20, 16, 30, 255), mask=shadow.filter(ImageFilter.GaussianBlur(pixels / 50)))
    bucket = Pen(canvas, (ground[0] * pixels, 0.58 * pixels), 0.44 * pixels)
    if inside:
        draw_bucket(bucket, front=False)
    canvas.alpha_composite(subject)
    if inside:
        draw_bucket(bucket, front=True)
    warmth, light = rng.uniform(-0.04, 0.04), rng.uniform(0.88, 1.06)
    tint = np.array([light * (1 + warmth), light, light * (1 - warmth)], np.float32)
    small = np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.BOX), np.float32)
    return Image.fromarray((small * tint).clip(0, 255).astype(np.uint8))


def caption(scene: Scene, colour: bool = True, place: bool = True, prefix: str = "a photo of a") -> str:
    """Say what a scene shows: "a photo of a red dog on grass"."""
    words = [
        prefix,
        scene.colour if colour and isinstance(scene.colour, str) else "",
        scene.class_name,
        scene.place if place else "",
    ]
    return " ".join(word for word in words if word)


def sheet(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Lay pictures of one size out in rows on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        page.paste(image, ((index % columns) * (width + gap), index // columns * (height + gap)))
    return page


def write_subjects(folder: Path, size: int = 256, subjects: dict[str, str] = SUBJECTS) -> None:
    """Write the five pictures of each subject; never in the bucket, which stays for the test of composition."""
    places = [place for place in PLACES if place != "in a bucket"]
    for subject, class_name in subjects.items():
        (folder / subject).mkdir(parents=True, exist_ok=True)
        for index, place in enumerate(places):
            picture = draw(Scene(class_name, "white", place, 7000 + index, subject), size)
            picture.save(folder / subject / f"{index}.png")


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "scenes.png")
    palette = list(COLOURS)
    shown = [
        draw(Scene(name, palette[(row + 2 * column) % 7], place, 40 + 7 * row + column), 128)
        for row, name in enumerate(CLASSES)
        for column, place in enumerate(PLACES)
    ]
    shown += [
        draw(Scene(name, "white", place, 80 + i, subject), 128)
        for subject, name in {**SUBJECTS, **UNSEEN}.items()
        for i, place in enumerate(PLACES)
    ]
    sheet(shown, len(PLACES)).save(out)

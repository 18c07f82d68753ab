"""Generated pictures with captions: coloured shapes in scenes, for the demo and for tests.

Everything is drawn from a random generator, so a seed is a data set. Some pairs of a colour and a shape can be held
out: each colour and each shape is seen in training, the pair never.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["COLOURS", "SHAPES", "Pair", "Scene", "caption", "draw", "held_out_pairs", "random_scene"]

Pair = tuple[str, str]  # colour, shape
RGB = tuple[int, int, int]

COLOURS: dict[str, tuple[RGB, tuple[str, ...]]] = {
    "red": ((214, 40, 40), ("red", "crimson", "scarlet")),
    "green": ((46, 150, 62), ("green", "emerald")),
    "blue": ((38, 84, 214), ("blue", "cobalt")),
    "yellow": ((247, 205, 38), ("yellow", "golden")),
    "purple": ((126, 48, 168), ("purple", "violet")),
    "orange": ((245, 130, 32), ("orange", "tangerine")),
    "pink": ((244, 140, 186), ("pink", "rosy")),
    "brown": ((121, 78, 44), ("brown", "chocolate")),
}
SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "round spot"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "star": ("star", "five-pointed star"),
    "heart": ("heart", "love heart"),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "moon": ("moon", "crescent"),
}
SIZES = {
    "small": (0.18, ("small", "little", "tiny")),
    "medium": (0.25, ("", "medium-sized")),
    "large": (0.33, ("large", "big", "huge")),
}
PLACES = {
    (0, 0): ("in the top left corner", "at the upper left"),
    (1, 0): ("at the top", "in the upper half"),
    (2, 0): ("in the top right corner", "at the upper right"),
    (0, 1): ("on the left", "on the left side"),
    (1, 1): ("in the middle", "in the centre"),
    (2, 1): ("on the right", "on the right side"),
    (0, 2): ("in the bottom left corner", "at the lower left"),
    (1, 2): ("at the bottom", "in the lower half"),
    (2, 2): ("in the bottom right corner", "at the lower right"),
}
GROUNDS: dict[str, tuple[RGB, RGB]] = {
    "white": ((252, 252, 252), (232, 232, 236)),
    "grey": ((150, 152, 156), (128, 130, 134)),
    "black": ((22, 22, 26), (46, 46, 52)),
    "beige": ((236, 222, 192), (220, 204, 170)),
    "light blue": ((196, 226, 244), (172, 208, 232)),
}
PATTERNS = {
    "plain": ("", "plain "),
    "striped": ("striped ", "lined "),
    "dotted": ("dotted ", "spotted "),
    "checked": ("checked ", "chequered "),
}
OVERSAMPLING = 4  # drawn larger and shrunk: Pillow's own drawing has hard edges


@dataclass(frozen=True)
class Scene:
    """What is in a picture; `draw` and `caption` turn it into pixels and words."""

    colour: str
    shape: str
    size: str
    place: tuple[int, int]
    ground: str
    pattern: str
    turn: float
    """Rotation in degrees."""

    @property
    def name(self) -> str:
        """The plain name of what is shown, such as ``red star``."""
        return f"{self.colour} {self.shape}"


def held_out_pairs(rng: np.random.Generator) -> list[Pair]:
    """As many pairs as there are shapes: every shape once and every colour once."""
    colours = rng.permutation(list(COLOURS))
    return [(str(colour), shape) for colour, shape in zip(colours, SHAPES, strict=True)]


def random_scene(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """A scene that shows one of the pairs."""
    colour, shape = pairs[int(rng.integers(len(pairs)))]
    grounds = list(GROUNDS)
    return Scene(
        colour,
        shape,
        list(SIZES)[rng.integers(len(SIZES))],
        list(PLACES)[rng.integers(len(PLACES))],
        grounds[rng.integers(len(grounds))],
        list(PATTERNS)[rng.integers(len(PATTERNS))],
        float(rng.uniform(-18, 18)),
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many ways to say what the scene shows; each part may go unsaid, but never both colour and shape."""

    def one_of(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    if rng.random() < 0.35:  # the plain name, as a person would type it into a search
        return f"{scene.colour} {scene.shape}"
    colour, shape = one_of(COLOURS[scene.colour][1]), one_of(SHAPES[scene.shape])
    unsaid = rng.random()
    if unsaid < 0.15:
        colour = ""
    elif unsaid < 0.30:
        shape = one_of(("shape", "thing", "figure"))
    thing = " ".join(word for word in (one_of(SIZES[scene.size][1]), colour, shape) if word)
    text = f"{_article(thing)} {thing}"
    if rng.random() < 0.4:
        text += f" {one_of(PLACES[scene.place])}"
    if rng.random() < 0.4:
        ground = f"{one_of(PATTERNS[scene.pattern])}{scene.ground}"
        ways = (f" on {_article(ground)} {ground} background", f", the background is {ground}", f" over {ground}")
        text += one_of(ways)
    return one_of(["{}", "a picture of {}", "this shows {}", "there is {}", "an image with {}"]).format(text)


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def draw(scene: Scene, rng: np.random.Generator, side: int = 64) -> Image.Image:
    """The scene as an RGB picture of ``side x side`` pixels; `rng` moves and tints it a little."""
    full = side * OVERSAMPLING
    image = _ground(scene, full)
    radius = SIZES[scene.size][0] * full * float(rng.uniform(0.92, 1.08))
    centre = [full * (0.27 + 0.23 * at) + float(rng.uniform(-0.03, 0.03)) * full for at in scene.place]
    # Kept inside, so that a large shape in a corner is not cut.
    x, y = (min(max(c, radius * 1.05), full - radius * 1.05) for c in centre)
    tint = np.clip(np.array(COLOURS[scene.colour][0]) + rng.integers(-14, 15, 3), 0, 255)
    mask = Image.new("L", (full, full), 0)
    _shape(ImageDraw.Draw(mask), scene.shape, x, y, radius)
    mask = mask.rotate(scene.turn, Image.Resampling.BILINEAR, center=(x, y))
    image.paste(tuple(int(v) for v in tint), (0, 0, full, full), mask)
    return image.resize((side, side), Image.Resampling.BOX)


def _ground(scene: Scene, full: int) -> Image.Image:
    light, dark = GROUNDS[scene.ground]
    image = Image.new("RGB", (full, full), light)
    pen = ImageDraw.Draw(image)
    step = full // 8
    if scene.pattern == "striped":
        for top in range(0, full, 2 * step):
            pen.rectangle((0, top, full, top + step), fill=dark)
    elif scene.pattern == "dotted":
        for top in range(step // 2, full, step):
            for left in range(step // 2, full, step):
                pen.ellipse((left - step / 5, top - step / 5, left + step / 5, top + step / 5), fill=dark)
    elif scene.pattern == "checked":
        for top in range(0, full, step):
            for left in range(0, full, step):
                if (top + left) // step % 2:
                    pen.rectangle((left, top, left + step - 1, top + step - 1), fill=dark)
    return image


def _shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    def around(count: int, radii: Sequence[float], start: float = -90) -> list[tuple[float, float]]:
        angles = [math.radians(start + 360 * i / count) for i in range(count)]
        return [
            (x + radii[i % len(radii)] * math.cos(a), y + radii[i % len(radii)] * math.sin(a))
            for i, a in enumerate(angles)
        ]

    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=255)
    elif shape == "triangle":
        pen.polygon(around(3, [r]), fill=255)
    elif shape == "star":
        pen.polygon(around(10, [r, 0.42 * r]), fill=255)
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill=255)
        pen.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill=255)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        pen.ellipse((x - 0.58 * r, y - 0.58 * r, x + 0.58 * r, y + 0.58 * r), fill=0)
    elif shape == "moon":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        pen.ellipse((x - 0.35 * r, y - 1.05 * r, x + 1.35 * r, y + 0.65 * r), fill=0)
    else:  # heart: the curve 16 sin^3, 13 cos - 5 cos 2 - 2 cos 3 - cos 4
        turns = [2 * math.pi * i / 60 for i in range(60)]
        pen.polygon(
            [
                (
                    x + r / 17 * 16 * math.sin(t) ** 3,
                    y - r / 17 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
                )
                for t in turns
            ],
            fill=255,
        )

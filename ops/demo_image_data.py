"""What the demo image model learns from: scenes of one coloured shape, their pictures and captions that ask for them.

Knows no network. A scene is everything that a caption may say; a caption says the colours and the shape and may leave
out size, place and, where it is white, the background. Sides are in pixels, places and radii in shares of a side.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "purple": (130, 50, 170),
    "pink": (250, 150, 190),
    "brown": (120, 75, 40),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
    "gray": (140, 140, 140),
    "cyan": (60, 200, 220),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
#: Radius of the shape's circle in shares of the shorter side; "" is the size of a caption that names none.
SIZES = {"small": 0.15, "": 0.23, "large": 0.33}
#: Where the shape's middle is, from -1 to 1 along both axes; "" is the place of a caption that names none.
PLACES = {
    "": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
#: What the last lessons are about, and so what the model is for: outlines that few latents can tell.
LATE_SHAPES = ("circle", "square", "triangle", "diamond", "ring")
LATE_PLACES = ("", "left", "right", "top", "bottom")
#: The background of a caption that names none.
PLAIN = "white"
HELD_OUT_SHARE = 0.12
_HASH_SEED = "demo image"
_SUPERSAMPLING = 4

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Scene:
    """One shape on one background."""

    shape: str
    colour: str
    background: str
    size: str = ""
    place: str = ""


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """Whether no training run sees this combination. Fixed by hash, the same for every seed."""
    digest = hashlib.sha256(f"{_HASH_SEED} {shape} {colour} {background}".encode()).digest()
    return int.from_bytes(digest[:8]) < HELD_OUT_SHARE * 2**64


def combinations(*, held_out: bool, late: bool = False) -> list[tuple[str, str, str]]:
    """All (shape, colour, background) of one side of the division, of all lessons or of the last ones."""
    pairs = [(colour, ground) for colour in COLOURS for ground in COLOURS if colour != ground]
    shapes = LATE_SHAPES if late else SHAPES
    found = [(shape, colour, ground) for shape in shapes for colour, ground in pairs]
    return [combination for combination in found if is_held_out(*combination) == held_out]


def draw_scene(rng: random.Random, combination: tuple[str, str, str], *, late: bool = False) -> Scene:
    """The combination at a random size and place; nearly half of the scenes are in the middle."""
    place = "" if rng.random() < 0.4 else rng.choice(LATE_PLACES if late else tuple(PLACES))
    return Scene(*combination, size=rng.choice(list(SIZES)), place=place)


# ---- pictures


def _wheel(count: int, radii: tuple[float, ...], start: float = -90.0) -> Points:
    """`count` points around the origin, their radii taken in turn; degrees clockwise from the right."""
    angles = (math.radians(start + 360 * i / count) for i in range(count))
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> Points:
    ts = [2 * math.pi * i / 48 for i in range(48)]
    xs = [16 * math.sin(t) ** 3 for t in ts]
    ys = [-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in ts]
    return [(x / 17, (y - 2) / 17) for x, y in zip(xs, ys, strict=True)]


def _cross() -> Points:
    arm, wide = 1.0, 0.34
    corner = [(wide, -arm), (wide, -wide), (arm, -wide)]
    turns = [corner]
    for _ in range(3):
        turns.append([(-y, x) for x, y in turns[-1]])
    return [point for turn in turns for point in turn]


#: Outline and hole of each shape, in radii around its middle; y grows downwards.
OUTLINES: dict[str, tuple[Points, Points]] = {
    "circle": (_wheel(64, (1.0,)), []),
    "square": (_wheel(4, (1.2,), start=-45.0), []),
    "triangle": ([(x, y + 0.2) for x, y in _wheel(3, (1.2,))], []),
    "diamond": ([(0.0, -1.15), (0.8, 0.0), (0.0, 1.15), (-0.8, 0.0)], []),
    "star": (_wheel(10, (1.15, 0.48)), []),
    "cross": (_cross(), []),
    "ring": (_wheel(64, (1.0,)), _wheel(64, (0.55,))),
    "heart": (_heart(), []),
}


def mask(shape: str, centre: tuple[float, float], radius: float, width: int, height: int) -> NDArray[np.float32]:
    """Share of each pixel that the shape covers, [height, width] in 0..1. Centre and radius in pixels."""
    fine = _SUPERSAMPLING
    canvas = Image.new("L", (width * fine, height * fine), 0)
    pen = ImageDraw.Draw(canvas)
    for points, value in zip(OUTLINES[shape], (255, 0), strict=True):
        if points:
            pen.polygon([(fine * (centre[0] + radius * x), fine * (centre[1] + radius * y)) for x, y in points], value)
    return np.asarray(canvas.reduce(fine), dtype=np.float32) / 255


def paint(scene: Scene, rng: random.Random | None, width: int = 128, height: int = 128) -> NDArray[np.uint8]:
    """The scene's picture [height, width, 3]. With `rng` the shape is a little off its size and place."""
    side = min(width, height)
    radius = SIZES[scene.size] * side
    if rng is not None:
        radius *= rng.uniform(0.97, 1.03)
    centre = []
    for share, extent in zip(PLACES[scene.place], (width, height), strict=True):
        reach = min(0.25 * extent, 0.5 * extent - 1.2 * radius - 2)
        centre.append(0.5 * extent + share * max(reach, 0.0))
    if rng is not None:
        centre = [at + rng.uniform(-0.012, 0.012) * side for at in centre]
    cover = mask(scene.shape, (centre[0], centre[1]), radius, width, height)[..., None]
    mixed = cover * np.array(COLOURS[scene.colour]) + (1 - cover) * np.array(COLOURS[scene.background])
    return np.round(mixed).astype(np.uint8)


# ---- captions

#: {thing} is "large red circle", {place} is " on the left" or nothing, {ground} "blue".
_WITH_GROUND = (
    "{a_thing}{place} on {a_ground} background",
    "{a_thing} on {a_ground} background{place}",
    "{a_thing} on {a_ground} background",
    "{a_thing}{place}, {ground} background",
    "{a_thing}{place} with {a_ground} background",
    "{a_thing}{place} in front of {a_ground} background",
    "{thing}{place} on {ground}",
    "{thing} on {a_ground} background{place}",
    "{thing}{place}, {ground} background",
    "{ground} background with {a_thing}{place}",
    "{a_ground} background with {a_thing}{place}",
    "{ground} background, {thing}{place}",
    "on {a_ground} background {a_thing}{place}",
    "{a_ground} picture with {a_thing}{place}",
    "{a_thing}{place}. the background is {ground}",
    "the {thing}{place} on the {ground} background",
)
_WITHOUT_GROUND = ("{a_thing}{place}", "{thing}{place}", "one {thing}{place}", "the {thing}{place}")
_OPENINGS = (
    *[""] * 8,
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "a painting of ",
    "draw ",
    "paint ",
    "show me ",
    "please paint ",
    "please draw ",
    "i want ",
    "make ",
    "a photo of ",
)
_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "": ("",), "large": ("large", "large", "big", "huge")}
_COLOUR_WORDS = {"gray": ("gray", "grey"), "purple": ("purple", "violet"), "cyan": ("cyan", "turquoise")}
_SHAPE_WORDS = {"circle": ("circle", "circle", "disc"), "diamond": ("diamond", "rhombus"), "cross": ("cross", "plus")}
_MIDDLE = ("", "", "", " in the middle", " in the centre", " in the center")
_SIDES = {
    "left": (" on the left", " on the left side", " at the left"),
    "right": (" on the right", " on the right side", " at the right"),
    "top": (" at the top", " on top", " in the upper half"),
    "bottom": (" at the bottom", " in the lower half"),
}


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _place_words(rng: random.Random, place: str) -> str:
    if not place:
        return rng.choice(_MIDDLE)
    if place in _SIDES:
        return rng.choice(_SIDES[place])
    return rng.choice((f" in the {place}", f" in the {place} corner", f" at the {place}"))


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many ways to ask for the scene."""

    def word(known: dict[str, tuple[str, ...]], key: str) -> str:
        return rng.choice(known.get(key, (key,)))

    size, ground = word(_SIZE_WORDS, scene.size), word(_COLOUR_WORDS, scene.background)
    thing = f"{size} {word(_COLOUR_WORDS, scene.colour)} {word(_SHAPE_WORDS, scene.shape)}".strip()
    ways = _WITH_GROUND
    if scene.background == PLAIN and rng.random() < 0.4:
        ways = _WITHOUT_GROUND
    way = rng.choice([way for way in ways if "{place}" in way or not scene.place])
    opening = rng.choice(_OPENINGS)
    # "draw red circle on blue" is no sentence; openings go before an article.
    if opening and not way.startswith(("{a_", "the ")):
        opening = ""
    text = opening + way.format(
        thing=thing,
        a_thing=_with_article(thing),
        place=_place_words(rng, scene.place),
        ground=ground,
        a_ground=_with_article(ground),
    )
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


def words() -> list[str]:
    """Every word that captions are made of, in lower case, sorted."""
    texts = [*_WITH_GROUND, *_WITHOUT_GROUND, *_OPENINGS, *_MIDDLE, *SHAPES, *COLOURS, *PLACES, "corner an"]
    texts += [way for ways in _SIDES.values() for way in ways]
    texts += [word for known in (_SIZE_WORDS, _COLOUR_WORDS, _SHAPE_WORDS) for ways in known.values() for word in ways]
    joined = " ".join(texts)
    for name in ("{thing}", "{a_thing}", "{place}", "{ground}", "{a_ground}", ".", ","):
        joined = joined.replace(name, " ")
    return sorted(set(joined.split()))

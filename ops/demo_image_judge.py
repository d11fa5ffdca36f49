"""Says what a picture of one coloured shape shows, by counting pixels. Knows no network and learns nothing.

The background is the palette colour of most pixels at the border, the shape's colour that of most others. Pixels nearer
to the shape's colour are its mask; the shape is the one whose outline, drawn at the mask's middle with the mask's area,
overlaps the mask best.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from demo_image_data import COLOURS, PLACES, SHAPES, SIZES, Scene, mask
from numpy.typing import NDArray

#: Width of the border in shares of the shorter side.
BORDER = 0.04
#: Overlap (intersection over union) below which a mask is no shape at all.
LEAST_OVERLAP = 0.7
#: How far the middle may be from where the caption puts it, and the radius from what it says, in shares of a side and
#: of the radius: half of the way to what another caption means.
PLACE_TOLERANCE, SIZE_TOLERANCE = 0.08, 0.2


@dataclass(frozen=True)
class Sight:
    """What is seen. `shape` is "" where no outline fits; middle and radius are in pixels."""

    colour: str
    background: str
    shape: str
    overlap: float
    middle: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Verdict:
    """What of a scene a picture has right."""

    colour: bool
    background: bool
    shape: bool
    place: bool
    size: bool

    @property
    def all_three(self) -> bool:
        """Colour, background and shape."""
        return self.colour and self.background and self.shape


def look(picture: NDArray[np.uint8]) -> Sight:
    """The shape in a picture [height, width, 3]."""
    height, width, _ = picture.shape
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float64)
    pixels = picture.astype(np.float64)
    nearest = np.square(pixels[:, :, None] - palette).sum(-1).argmin(-1)
    edge = max(1, round(BORDER * min(height, width)))
    inside = np.zeros((height, width), dtype=bool)
    inside[edge:-edge, edge:-edge] = True
    background = np.bincount(nearest[~inside], minlength=len(names)).argmax()
    counts = np.bincount(nearest[nearest != background], minlength=len(names))
    colour = counts.argmax()
    if not counts[colour]:
        return Sight(names[background], names[background], "", 0.0, (width / 2, height / 2), 0.0)
    way = palette[colour] - palette[background]
    cover = ((pixels - palette[background]) @ way) / (way @ way) > 0.5
    shape, overlap, middle, radius = _best_outline(cover)
    fits = shape if overlap >= LEAST_OVERLAP else ""
    return Sight(names[colour], names[background], fits, overlap, middle, radius)


def _best_outline(cover: NDArray[np.bool_]) -> tuple[str, float, tuple[float, float], float]:
    """The shape, its overlap, middle and radius in pixels."""
    height, width = cover.shape
    area, x, y = _moments(cover.astype(np.float32))
    found = []
    for shape in SHAPES:
        unit_area, unit_x, unit_y = _unit(shape)
        radius = (area / unit_area) ** 0.5
        middle = (x - radius * unit_x, y - radius * unit_y)
        drawn = mask(shape, middle, radius, width, height) > 0.5
        overlap = float((drawn & cover).sum() / max((drawn | cover).sum(), 1))
        found.append((overlap, shape, middle, radius))
    overlap, shape, middle, radius = max(found)
    return shape, overlap, middle, radius


@cache
def _unit(shape: str) -> tuple[float, float, float]:
    """Area and centroid of a shape of radius 1 around (0, 0)."""
    area, x, y = _moments(mask(shape, (128, 128), 100, 256, 256))
    return area / 100**2, (x - 128) / 100, (y - 128) / 100


def _moments(cover: NDArray[np.float32]) -> tuple[float, float, float]:
    """Area and centroid in pixels."""
    area = float(cover.sum())
    ys, xs = np.indices(cover.shape) + 0.5
    return area, float((cover * xs).sum() / area), float((cover * ys).sum() / area)


def judge(picture: NDArray[np.uint8], scene: Scene) -> Verdict:
    """What of the scene the picture [height, width, 3] has right."""
    sight = look(picture)
    height, width, _ = picture.shape
    side = min(height, width)
    radius = SIZES[scene.size] * side
    off = 0.0
    for seen, share, extent in zip(sight.middle, PLACES[scene.place], (width, height), strict=True):
        reach = max(min(0.25 * extent, 0.5 * extent - 1.2 * radius - 2), 0.0)
        off = max(off, abs(seen - (0.5 * extent + share * reach)) / side)
    return Verdict(
        colour=sight.colour == scene.colour,
        background=sight.background == scene.background,
        shape=sight.shape == scene.shape,
        place=off <= PLACE_TOLERANCE,
        size=abs(sight.radius / radius - 1) <= SIZE_TOLERANCE,
    )

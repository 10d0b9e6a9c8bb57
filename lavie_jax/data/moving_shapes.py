"""Moving Shapes: a data set of one coloured shape that moves, or stands still, over a plain background.

A clip is a pure function of (split, index, frames, frame rate, height, width): nothing is stored, and every process
renders the clips it needs. Lengths are in units of the shorter side and speeds in sides per second, so an index has
the same motion at every resolution of one aspect ratio, and at every frame rate over the same time: 16 frames at 8 fps
and 61 frames at 32 fps.

Splits: `train` and `val` use the same (shape, colour, motion) combinations, `held_out` the one in eight that neither
has, and `image_only` moves the shapes and colours that training has only in images. Detectors of the attributes are in
`lavie_jax.evaluation.moving_shapes`.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable

import numpy as np

from lavie_jax.errors import UserError, suggest

SPLITS = ("train", "val", "held_out", "image_only")
VIDEO_SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
IMAGE_SHAPES = ("heart", "crescent")
VIDEO_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
IMAGE_COLOURS = ("pink", "brown")
BACKGROUNDS = ("black", "white", "gray", "blue", "green", "red", "yellow", "purple")
SIZES = {"small": 0.135, "large": 0.215}  # radius of the circle of equal area, in shorter sides

# Any two are at least 100 apart (Euclidean, 0..255), so that colours survive a small autoencoder.
RGB = {
    "black": (12, 12, 12), "white": (245, 245, 245), "gray": (128, 128, 128),
    "red": (215, 30, 35), "green": (35, 165, 60), "blue": (35, 75, 220), "yellow": (250, 225, 50),
    "purple": (140, 45, 185), "orange": (245, 125, 20), "cyan": (60, 210, 230),
    "pink": (255, 130, 190), "brown": (115, 65, 20),
}  # fmt: skip

# Unit vectors (x, y), y down as in the pixels.
_D = 0.5**0.5
MOTIONS = {
    "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0),
    "up left": (-_D, -_D), "up right": (_D, -_D), "down left": (-_D, _D), "down right": (_D, _D),
    "still": (0.0, 0.0),
}  # fmt: skip

SPEED = 0.42 / 1.875  # sides per second: 0.42 of the shorter side in 16 frames at 8 fps
MARGIN = 0.02  # between the shape and the frame, at least


@dataclasses.dataclass(frozen=True)
class Attributes:
    """Attributes of a clip. `motion` is None for an image, and "still" for a clip without motion."""

    shape: str
    colour: str
    size: str
    background: str
    motion: str | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """`pixels` uint8 (T, H, W, 3), or (H, W, 3) for an image, with its caption and attributes."""

    pixels: np.ndarray
    caption: str
    attributes: Attributes


# ---- silhouettes: signed distances, any unit, y down; `_geometry` scales them to equal area ----


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Mirrored into one wedge of 36 degrees next to the upward axis, every edge is the same straight line.
    x, y = np.abs(x), -y
    cos, sin = np.float32(np.cos(np.pi / 5)), np.float32(np.sin(np.pi / 5))
    for side in (1, -1):
        beyond = 2 * np.maximum(side * cos * x - sin * y, 0)
        x, y = x - side * cos * beyond, y + sin * beyond
    # From the tip (0, 1) to the notch at half the radius.
    edge = np.array([0.5 * sin, 0.5 * cos - 1], np.float32)
    edge /= np.hypot(*edge)
    return edge[0] * (y - 1) - edge[1] * np.abs(x)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1, y - 0.35), np.maximum(x - 0.35, y - 1))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, half = np.abs(x), np.float32(0.5**0.5)
    return np.minimum((x + np.abs(y)) * half - 1, np.hypot(x - half, y + half) - 1)


_DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 1,
    "triangle": lambda x, y: np.maximum(y - 0.5, np.float32(0.75**0.5) * np.abs(x) - 0.5 * y - 0.5),
    "cross": _cross,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.77) - 0.23,
    "star": _star,
    "heart": _heart,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.55, y)),
}


@functools.cache
def _geometry(shape: str) -> tuple[float, tuple[float, float, float, float]]:
    """(scale that makes the area pi, extents to the left, right, up and down at that scale)."""
    axis = np.linspace(-2, 2, 1601, dtype=np.float32)
    inside = _DISTANCE[shape](axis[None, :], axis[:, None]) <= 0
    scale = float(np.sqrt(np.pi / (inside.sum() * (axis[1] - axis[0]) ** 2)))
    xs, ys = axis[inside.any(0)] * scale, axis[inside.any(1)] * scale
    return scale, (float(-xs[0]), float(xs[-1]), float(-ys[0]), float(ys[-1]))


@functools.cache
def outer_radius(shape: str) -> float:
    """The largest distance from a shape's origin to a point of it, in radii of the circle of equal area."""
    axis = np.linspace(-2, 2, 401, dtype=np.float32)
    scale = np.float32(_geometry(shape)[0])
    inside = _DISTANCE[shape](axis[None, :] / scale, axis[:, None] / scale) <= 0
    return float(np.hypot(axis[None, :], axis[:, None])[inside].max())


def coverage(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fraction of each pixel that the shape covers, antialiased over one pixel.

    `radius` (of the circle of equal area), `x` and `y` (relative to the shape's origin) are in pixels.
    """
    scale = np.float32(radius * _geometry(shape)[0])
    distance = _DISTANCE[shape](x / scale, y / scale) * scale
    return np.clip(0.5 - distance, 0, 1)


# ---- attributes of an index ----


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Holds out one of the eight colours for each (shape, motion), so that training has every pair of attributes."""
    numbers = VIDEO_SHAPES.index(shape), VIDEO_COLOURS.index(colour), list(MOTIONS).index(motion)
    return (3 * numbers[0] + numbers[1] + 5 * numbers[2]) % 8 == 0


@functools.cache
def combinations(split: str) -> tuple[tuple[str, str, str], ...]:
    """Every (shape, colour, motion) of a split's videos."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{suggest(split, SPLITS)}")
    if split == "image_only":
        pairs = list(itertools.product(IMAGE_SHAPES, VIDEO_COLOURS))
        # Unseen colours are as frequent as unseen shapes.
        few = list(itertools.product(VIDEO_SHAPES, IMAGE_COLOURS))
        pairs = pairs * 3 + few * 4
        return tuple((s, c, m) for (s, c), m in itertools.product(pairs, MOTIONS))
    seen = itertools.product(VIDEO_SHAPES, VIDEO_COLOURS, MOTIONS)
    return tuple(triple for triple in seen if is_held_out(*triple) == (split == "held_out"))


def caption(attributes: Attributes, *, size: bool = True, background: bool = True) -> str:
    """The caption of attributes, e.g. "a small red circle moving left over a blue background"."""
    a = attributes
    words = f"{a.size} {a.colour} {a.shape}" if size else f"{a.colour} {a.shape}"
    words = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    if a.motion is not None:
        words += " standing still" if a.motion == "still" else f" moving {a.motion}"
    return f"{words} over a {a.background} background" if background else words


def vocabulary() -> tuple[str, ...]:
    """All words of captions, sorted."""
    fixed = "a an moving standing still over background up down left right"
    named = (*VIDEO_SHAPES, *IMAGE_SHAPES, *VIDEO_COLOURS, *IMAGE_COLOURS, *BACKGROUNDS, *SIZES)
    return tuple(sorted({*fixed.split(), *named}))


def uniforms(*key: object) -> list[float]:
    """Eight numbers in [0, 1) from a key: a hash, so the same under every numpy version."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=64).digest()
    return [int.from_bytes(digest[i : i + 8], "little") / 2**64 for i in range(0, 64, 8)]


def pick(options: tuple | list, u: float):
    """Returns the option that u in [0, 1) selects; all are equally likely."""
    return options[min(int(u * len(options)), len(options) - 1)]


def _background(colour: str, u: float) -> str:
    return pick([b for b in BACKGROUNDS if b != colour], u)


def clip(
    split: str,
    index: int,
    *,
    frames: int = 16,
    fps: float = 8.0,
    height: int = 64,
    width: int = 64,
    drop: float = 0.0,
) -> Sample:
    """Returns clip `index` of a split: `pixels` uint8 (T, H, W, 3).

    `drop` is the probability that the caption omits the size, and, independently, the background.

    Raises:
        UserError: the split is unknown or a size is below 1.
    """
    u = uniforms("video", split, int(index))
    shape, colour, motion = pick(combinations(split), u[0])
    a = Attributes(shape, colour, pick(list(SIZES), u[1]), _background(colour, u[2]), motion)
    pixels = render(a, u[3], u[4], frames=frames, fps=fps, height=height, width=width)
    return Sample(pixels, caption(a, size=u[5] >= drop, background=u[6] >= drop), a)


def image(split: str, index: int, *, height: int = 64, width: int = 64, drop: float = 0.0) -> Sample:
    """Returns image `index` of `train` or `val`, with all shapes and colours: `pixels` uint8 (H, W, 3)."""
    if split not in ("train", "val"):
        raise UserError(f"no images in split {split!r}{suggest(split, ('train', 'val'))}")
    u = uniforms("image", split, int(index))
    colour = pick((*VIDEO_COLOURS, *IMAGE_COLOURS), u[7])
    shape = pick((*VIDEO_SHAPES, *IMAGE_SHAPES), u[0])
    a = Attributes(shape, colour, pick(list(SIZES), u[1]), _background(colour, u[2]), None)
    pixels = render(a, u[3], u[4], frames=1, fps=1.0, height=height, width=width)[0]
    return Sample(pixels, caption(a, size=u[5] >= drop, background=u[6] >= drop), a)


# ---- pixels ----


def path(a: Attributes, radius: float, start: tuple[float, float], seconds: np.ndarray, sides) -> np.ndarray:
    """Origins of the shape (T, 2) as (x, y), in shorter sides: straight, constant speed, always inside.

    Args:
        a: the shape and its motion.
        radius: of the circle of equal area.
        start: in [0, 1], chooses the start of the path among the possible ones.
        seconds: the time of each frame.
        sides: of the frame, (width, height).
    """
    extents = np.array(_geometry(a.shape)[1]).reshape(2, 2) * radius + MARGIN  # (x/y, before/after)
    direction = np.array(MOTIONS[a.motion or "still"])
    free = np.maximum(np.array(sides) - extents.sum(1), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = np.where(direction != 0, free / np.abs(direction), np.inf).min()
    travel = direction * min(SPEED * seconds[-1], reach)
    low = extents[:, 0] + np.maximum(-travel, 0)
    first = low + np.array(start) * np.maximum(free - np.abs(travel), 0)
    along = seconds / seconds[-1] if seconds[-1] else seconds
    return first + along[:, None] * travel


def render(a: Attributes, u: float, v: float, *, frames: int, fps: float, height: int, width: int) -> np.ndarray:
    """uint8 (T, H, W, 3); (u, v) in [0, 1] choose the start of the path among the possible ones."""
    if min(frames, height, width) < 1 or not fps > 0:
        raise UserError(
            f"frames, height and width must be at least 1 and fps above 0; given {frames}, {height}, {width} and {fps}"
        )
    shorter = min(height, width)
    seconds = np.arange(frames) / fps
    radius, sides = SIZES[a.size], (width / shorter, height / shorter)
    moving = a.motion not in (None, "still")
    origins = path(a, radius, (u, v), seconds, sides)[: None if moving else 1] * shorter  # pixels
    pixels = np.empty((len(origins), height, width, 3), np.uint8)
    pixels[:] = RGB[a.background]
    paint(pixels, a, radius * shorter, origins)
    return pixels if moving else np.repeat(pixels, frames, axis=0)


def paint(pixels: np.ndarray, a: Attributes, radius: float, origins: np.ndarray) -> None:
    """Draws a shape over the frames `pixels`, uint8 (T, H, W, 3), in place: its origins (T, 2) as (x, y), in pixels."""
    height, width = pixels.shape[1:3]
    left, right, up, down = (extent * radius + 1 for extent in _geometry(a.shape)[1])
    x0 = np.floor(origins[:, 0] - left).astype(int)
    y0 = np.floor(origins[:, 1] - up).astype(int)
    nx, ny = int(np.ceil(left + right)) + 1, int(np.ceil(up + down)) + 1
    x = (x0[:, None] + np.arange(nx) + 0.5 - origins[:, :1]).astype(np.float32)
    y = (y0[:, None] + np.arange(ny) + 0.5 - origins[:, 1:]).astype(np.float32)
    mask = coverage(a.shape, radius, x[:, None, :], y[:, :, None])[..., None]  # (T, ny, nx, 1)
    colour = np.array(RGB[a.colour], np.float32)
    # Only the bounding box of the shape is computed.
    for frame, cover, top, start in zip(pixels, mask, y0, x0, strict=True):
        rows = slice(max(-top, 0), min(height - top, ny))
        columns = slice(max(-start, 0), min(width - start, nx))
        box = frame[top + rows.start : top + rows.stop, start + columns.start : start + columns.stop]
        back = box.astype(np.float32)
        box[:] = (back + cover[rows, columns] * (colour - back) + 0.5).astype(np.uint8)

"""Moving Shapes with two objects, for prompts with two subjects (LaVie, arXiv 2309.15103, appendix E).

Captions name both objects, each with its motion: "a red circle moving left and a blue square moving up over a black
background", and of an image "a red circle and a blue square over a black background". The objects differ in shape and
in colour, so that a clip shows whether a model has swapped them. They have one size, which captions do not mention,
and their positions in the frame are independent of their order in the caption. They do not touch, except in a few
clips (see `render`), so that `lavie_jax.evaluation.pair_detectors` can measure each alone.

As in `moving_shapes`, a clip is a pure function of its arguments. Shapes and colours that occur only in the images of
that world occur in clips here too.
"""

import dataclasses

import numpy as np

from lavie_jax.data import moving_shapes
from lavie_jax.data.moving_shapes import Attributes, pick, uniforms
from lavie_jax.errors import UserError, suggest

SPLITS = ("train", "val")
SHAPES = (*moving_shapes.VIDEO_SHAPES, *moving_shapes.IMAGE_SHAPES)
COLOURS = (*moving_shapes.VIDEO_COLOURS, *moving_shapes.IMAGE_COLOURS)
RADIUS = 0.115  # of the circle of equal area, in shorter sides: between them, two objects have room to move
GAP = 0.04  # between the circles around the objects, at least, in shorter sides
TRIES = 64  # pairs of paths that are drawn to find two that keep the gap
CAPTION_LENGTH = 20  # tokens of the longest caption, with those of start and end


@dataclasses.dataclass(frozen=True)
class PairSample:
    """`pixels` uint8 (T, H, W, 3), or (H, W, 3) for an image, with its caption and the objects in its order."""

    pixels: np.ndarray
    caption: str
    objects: tuple[Attributes, Attributes]


def check_split(split: str) -> None:
    """Raises UserError for a split that the world with two objects does not have."""
    if split not in SPLITS:
        raise UserError(f"no split {split!r} of two objects{suggest(split, SPLITS)}")


def caption(objects: tuple[Attributes, Attributes], *, background: bool = True) -> str:
    """The caption of two objects, in their order."""
    words = " and ".join(moving_shapes.caption(a, size=False, background=False) for a in objects)
    return f"{words} over a {objects[0].background} background" if background else words


def vocabulary() -> tuple[str, ...]:
    """All words of captions, sorted."""
    return tuple(sorted({*moving_shapes.vocabulary(), "and"}))


def clip(
    split: str,
    index: int,
    *,
    frames: int = 16,
    fps: float = 8.0,
    height: int = 64,
    width: int = 64,
    drop: float = 0.0,
) -> PairSample:
    """Returns clip `index` of a split: `pixels` uint8 (T, H, W, 3).

    `drop` is the probability that the caption omits the background.

    Raises:
        UserError: the split is unknown or a size is below 1.
    """
    check_split(split)
    u = uniforms("pair of videos", split, int(index))
    motions = tuple(moving_shapes.MOTIONS)
    objects = _objects(u, pick(motions, u[5]), pick(motions, u[6]))
    key = ("video", split, int(index))
    pixels = render(objects, key, frames=frames, fps=fps, height=height, width=width)
    return PairSample(pixels, caption(objects, background=u[7] >= drop), objects)


def image(split: str, index: int, *, height: int = 64, width: int = 64, drop: float = 0.0) -> PairSample:
    """Returns image `index` of a split: `pixels` uint8 (H, W, 3)."""
    check_split(split)
    u = uniforms("pair of images", split, int(index))
    objects = _objects(u, None, None)
    pixels = render(objects, ("image", split, int(index)), frames=1, fps=1.0, height=height, width=width)[0]
    return PairSample(pixels, caption(objects, background=u[7] >= drop), objects)


def _objects(u: list[float], *motions: str | None) -> tuple[Attributes, Attributes]:
    """Two objects that differ in shape and colour, over a background of a third colour."""
    shapes, colours = _two(SHAPES, u[0], u[1]), _two(COLOURS, u[2], u[3])
    background = pick([name for name in moving_shapes.BACKGROUNDS if name not in colours], u[4])
    first, second = (
        Attributes(shape, colour, "small", background, motion)
        for shape, colour, motion in zip(shapes, colours, motions)
    )
    return first, second


def _two(options: tuple[str, ...], u: float, v: float) -> tuple[str, str]:
    first = pick(options, u)
    return first, pick([option for option in options if option != first], v)


def render(
    objects: tuple[Attributes, Attributes], key: tuple, *, frames: int, fps: float, height: int, width: int
) -> np.ndarray:
    """uint8 (T, H, W, 3); `key` chooses the paths. Of the first TRIES pairs of paths, takes one that keeps the gap.

    If none does, which few clips have, the pair with the largest gap is taken.
    """
    if min(frames, height, width) < 1 or not fps > 0:
        raise UserError(
            f"frames, height and width must be at least 1 and fps above 0; given {frames}, {height}, {width} and {fps}"
        )
    shorter, seconds = min(height, width), np.arange(frames) / fps
    sides = (width / shorter, height / shorter)
    reach = sum(moving_shapes.outer_radius(a.shape) for a in objects) * RADIUS
    best, widest = None, -np.inf
    for attempt in range(TRIES):
        u = uniforms("pair of paths", *key, attempt)
        starts = (u[0], u[1]), (u[2], u[3])
        paths = [moving_shapes.path(a, RADIUS, start, seconds, sides) for a, start in zip(objects, starts)]
        gap = float(np.linalg.norm(paths[0] - paths[1], axis=1).min()) - reach
        if gap > widest:
            best, widest = paths, gap
        if gap >= GAP:
            break
    pixels = np.empty((frames, height, width, 3), np.uint8)
    pixels[:] = moving_shapes.RGB[objects[0].background]
    for a, origins in zip(objects, best):
        moving_shapes.paint(pixels, a, RADIUS * shorter, origins * shorter)
    return pixels

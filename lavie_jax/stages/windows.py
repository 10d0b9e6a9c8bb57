"""Windows: the parts of a clip that the UNet processes at a time, and the weights that blend their predictions.

A clip longer or larger than a window is still denoised as one. At every step each window is predicted separately, and
predictions are averaged where windows overlap (MultiDiffusion, arXiv 2302.08113), with weights that fall smoothly
towards a window's inner borders. The windows therefore agree on shared frames from the first step on: there are no cuts
between them, and no ghosting as there would be if finished frames were cross-faded.
"""

import dataclasses
import itertools
import math

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Span:
    """A window along one axis: `start` to `stop`, and the weight of each position in it, float32."""

    start: int
    stop: int
    weight: np.ndarray


@dataclasses.dataclass(frozen=True)
class Window:
    """A box of a clip (T, h, w, C): one span each of frames, rows and columns."""

    spans: tuple[Span, Span, Span]

    @property
    def box(self) -> tuple[slice, ...]:
        """The index of the box in a clip."""
        return tuple(slice(span.start, span.stop) for span in self.spans)

    @property
    def corner(self) -> tuple[int, ...]:
        """The first frame, row and column, which together identify a window of a clip."""
        return tuple(span.start for span in self.spans)

    @property
    def shape(self) -> tuple[int, ...]:
        """The numbers of frames, rows and columns."""
        return tuple(span.stop - span.start for span in self.spans)

    @property
    def weight(self) -> Float[np.ndarray, "t h w 1"]:
        """The weights of the box. Those of all windows sum to one at every position."""
        frames, rows, columns = (span.weight for span in self.spans)
        return frames[:, None, None, None] * rows[:, None, None] * columns[:, None]


def grid(frames: list[Span], rows: list[Span], columns: list[Span]) -> list[Window]:
    """Returns all combinations of spans: by frames, then rows, then columns."""
    return [Window(spans) for spans in itertools.product(frames, rows, columns)]


def whole(length: int) -> list[Span]:
    """One span over the whole axis."""
    return [Span(0, length, np.ones(length, np.float32))]


def cut(length: int, size: int) -> list[Span]:
    """Adjacent spans, like LaVie's own chunks; the last one is shorter if `size` does not divide `length`."""
    bounds = ((i, min(i + size, length)) for i in range(0, length, size))
    return [Span(start, stop, np.ones(stop - start, np.float32)) for start, stop in bounds]


def overlapping(length: int, size: int, overlap: int, *, stride: int = 1) -> list[Span]:
    """The fewest spans of `size` that overlap by at least `overlap`, evenly spread over the axis.

    They start at multiples of `stride`, which divides `length - size` and `size - overlap`. In an overlap the weights
    change from one span to the next like sin^2.
    """
    if length <= size:
        return whole(length)
    count = 1 + math.ceil((length - size) / (size - overlap))
    starts = stride * np.rint(np.linspace(0, (length - size) // stride, count)).astype(int)
    ramps = []
    for i, start in enumerate(starts):
        position = np.arange(size)
        rise, fall = np.ones(size), np.ones(size)
        if i > 0:
            rise = np.clip((position + 1) / (starts[i - 1] + size - start + 1), 0, 1)
        if i < count - 1:
            fall = np.clip((size - position) / (start + size - starts[i + 1] + 1), 0, 1)
        ramps.append(np.sin(np.pi / 2 * rise) ** 2 * np.sin(np.pi / 2 * fall) ** 2)
    total = np.zeros(length)
    for start, ramp in zip(starts, ramps):
        total[start : start + size] += ramp
    return [
        Span(int(start), int(start + size), (ramp / total[start : start + size]).astype(np.float32))
        for start, ramp in zip(starts, ramps)
    ]

"""Mixtures of sources, with weights that may change from step to step: a curriculum.

Example i of a mixture is a pure function of i: the part that it comes from, and its index within that part. So a
mixture has no state, all processes agree, and each part still uses all its clips once per epoch.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from lavie_jax.data.sources import Item, Source, permutation
from lavie_jax.errors import UserError

# ((step, (weight of each part, ...)), ...): the weights from that step on
Weights = Sequence[tuple[int, Sequence[float | int]]]

_in_batch = functools.lru_cache(maxsize=4)(permutation)


def check_weights(weights: Any, parts: int, field: str) -> None:
    """Raises UserError for malformed weights."""
    allowed = f"{field} is ((0, ({parts} weights)), (step, ({parts} weights)), ...), with increasing steps from 0"
    try:
        steps = [int(step) for step, _ in weights]
        rows = [[float(w) for w in row] for _, row in weights]
    except (TypeError, ValueError) as error:
        raise UserError(f"{allowed}; given {weights!r}") from error
    if steps[:1] != [0] or steps != sorted(set(steps)):
        raise UserError(f"{allowed}; given the steps {steps}")
    for row in rows:
        if len(row) != parts or not all(0 <= w < float("inf") for w in row) or not sum(row) > 0:
            raise UserError(f"{allowed}, none negative and not all 0; given {row}")


def shares_at(weights: Weights, step: int) -> tuple[float, ...]:
    """The weights at a step, normalized to a sum of 1."""
    row = next(row for start, row in reversed(list(weights)) if start <= step)
    return tuple(w / sum(row) for w in row)


def largest_shares(weights: Weights) -> tuple[float, ...]:
    """The largest normalized weight of each part over all steps."""
    return tuple(max(shares) for shares in zip(*(shares_at(weights, step) for step, _ in weights)))


def _counts(number: int, shares: Sequence[Fraction]) -> list[int]:
    """Number of examples from each part among the first `number`."""
    counts, rest, left = [], number, Fraction(1)
    for share in shares:
        part = share / left if left else Fraction(0)
        counts.append(rest * part.numerator // part.denominator)
        rest, left = rest - counts[-1], left - share
    return counts


def _part_of(number: int, shares: Sequence[Fraction]) -> int:
    """The part of example `number`, the one whose count increases with it: as evenly spread as the shares allow."""
    before, after = _counts(number, shares), _counts(number + 1, shares)
    return next(part for part, counts in enumerate(zip(before, after)) if counts[0] != counts[1])


@dataclasses.dataclass(frozen=True)
class Order:
    """Assigns examples to parts: evenly by their shares, then shuffled within each batch.

    The shuffle spreads a slow part over all processes, each of which computes some rows of a batch.

    Attributes:
        weights: see `check_weights`.
        batch: examples per step.
        seed: of the shuffle.
    """

    weights: Weights
    batch: int
    seed: int

    @functools.cached_property
    def _phases(self) -> list[tuple[int, tuple[Fraction, ...], tuple[int, ...]]]:
        """(first example, shares, number of earlier examples of each part) for each row of weights."""
        phases: list = []
        for step, row in self.weights:
            exact = [Fraction(w / max(row)).limit_denominator(10**6) for w in row]
            shares, start = tuple(w / sum(exact) for w in exact), step * self.batch
            before = (0,) * len(row)
            if phases:
                last_start, last_shares, last_before = phases[-1]
                before = tuple(a + b for a, b in zip(last_before, _counts(start - last_start, last_shares)))
            phases.append((start, shares, before))
        return phases

    def __call__(self, index: int) -> tuple[int, int]:
        """Returns (part, index within the part) of example `index`."""
        step, row = divmod(index, self.batch)
        index = step * self.batch + int(_in_batch(self.batch, "mixture", self.seed, step)[row])
        start, shares, before = self._phases[bisect.bisect(self._phases, index, key=lambda phase: phase[0]) - 1]
        part = _part_of(index - start, shares)
        return part, before[part] + _counts(index - start, shares)[part]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A source that takes videos and images from several sources, each medium in an `Order` of its own."""

    videos: tuple[Source, ...]
    images: tuple[Source, ...]
    video_order: Order
    image_order: Order

    def __len__(self) -> int:
        return sum(len(source) for source in self.videos or self.images)

    def video(self, index: int, rng: np.random.Generator) -> Item:
        """Clip `index` of the mixture."""
        part, number = self.video_order(index)
        return self.videos[part].video(number, rng)

    def image(self, index: int, rng: np.random.Generator, *, margin: int = 0) -> Item:
        """Image `index` of the mixture."""
        part, number = self.image_order(index)
        return self.images[part].image(number, rng, margin=margin)

"""Shares of votes with bootstrap intervals over raters and items, and Krippendorff's alpha."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 2000
LEVEL = 0.95

Level = Literal["nominal", "ordinal"]


class Estimate(NamedTuple):
    """A value with its interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def share(votes: Int[np.ndarray, "raters items"], hits: Int[np.ndarray, "raters items"], *, seed: int = 0) -> Estimate:
    """The share of hits among all votes, with a percentile interval of the bootstrap over raters and items.

    Raters and items are resampled independently, and a vote counts as often as its rater times its item was drawn
    (Owen 2007, arXiv 0712.1111). The interval covers both another set of raters and another set of items. It is
    conservative: what is neither the rater's nor the item's is counted up to three times in the variance. The interval
    is not defined for fewer than two raters or items.

    Args:
        votes: how many votes a rater gave about an item.
        hits: how many of them count.
    """
    raters, items = votes.any(axis=1), votes.any(axis=0)
    votes, hits = (counts[raters][:, items].astype(np.float64) for counts in (votes, hits))
    if not votes.size:
        return Estimate(np.nan, np.nan, np.nan)
    value = float(hits.sum() / votes.sum())
    if min(votes.shape) < 2:
        return Estimate(value, np.nan, np.nan)
    by_rater, by_item = (_drawn(count, [seed, axis]) for axis, count in enumerate(votes.shape))
    total, hit = (((by_rater @ counts) * by_item).sum(axis=1) for counts in (votes, hits))
    return Estimate(value, *_interval(hit[total > 0] / total[total > 0]))


def _drawn(count: int, seed: list[int]) -> Float[np.ndarray, "resamples count"]:
    """How often each of `count` is drawn, in each resample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)


def _interval(values: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def alpha(ratings: Int[np.ndarray, "raters units"], level: Level, *, seed: int = 0) -> Estimate:
    """Krippendorff's alpha: 1 for perfect agreement, 0 for that of chance; with a bootstrap interval over units.

    alpha = 1 - D_o / D_e of the coincidence matrix (Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011).
    It is not defined if no unit has two ratings, or all ratings are equal.

    Args:
        ratings: categories 0, 1, ... in their order; -1 where there is none.
        level: how categories differ.
    """
    count = max(2, int(ratings.max(initial=0)) + 1)
    frequency = (ratings[..., None] == np.arange(count)).sum(axis=0).astype(np.float64)  # (units, categories)
    frequency = frequency[frequency.sum(axis=1) >= 2]
    if not len(frequency):
        return Estimate(np.nan, np.nan, np.nan)
    pairs = frequency[:, :, None] * frequency[:, None, :] - frequency[:, :, None] * np.eye(count)
    coincidences = pairs / (frequency.sum(axis=1) - 1)[:, None, None]
    value = float(_alpha(coincidences.sum(axis=0)[None], level)[0])
    if len(frequency) < 2 or np.isnan(value):
        return Estimate(value, np.nan, np.nan)
    resampled = np.tensordot(_drawn(len(frequency), [seed, 2]), coincidences, axes=1)
    values = _alpha(resampled, level)
    return Estimate(value, *_interval(values[~np.isnan(values)]))


def _alpha(coincidences: Float[np.ndarray, "n c c"], level: Level) -> Float[np.ndarray, " n"]:
    count = coincidences.sum(axis=2)
    if level == "ordinal":  # ranks in the middle of each category
        ranks = np.cumsum(count, axis=1) - count / 2
        distance = (ranks[:, :, None] - ranks[:, None, :]) ** 2
    else:
        distance = 1 - np.eye(count.shape[1])
    observed = (coincidences * distance).sum(axis=(1, 2))
    expected = (count[:, :, None] * count[:, None, :] * distance).sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - (count.sum(axis=1) - 1) * observed / expected, np.nan)

"""Random numbers for a batch that may be processed in parts: a row gets the same numbers whatever the parts.

A function of some rows draws with these functions instead of those of `jax.random`. It is called with a key of jax if
the rows are a whole batch, and with a `PartKey` if they are part of one: then the numbers of the whole batch are drawn,
and those of the part's rows returned.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import einops
import jax
from jaxtyping import Array, Shaped


class PartKey(NamedTuple):
    """The key of a whole batch, in one part of it.

    Attributes:
        key: jax's key.
        index: index of the part, which has every `parts`-th row from this one on.
        parts: number of parts of the batch.
    """

    key: Array
    index: Array | int
    parts: int


Key = Array | PartKey


def part_of(batch: Shaped[Array, "rows ..."], index: Array | int, parts: int) -> Shaped[Array, "part ..."]:
    """Returns every `parts`-th row, so that each device works on its own rows in every part."""
    return einops.rearrange(batch, "(b a) ... -> a b ...", a=parts)[index]


def rows(key: Key, count: int, draw: Callable[[Array, int], Array]) -> Array:
    """Returns the numbers of `count` rows; `draw(key, rows)` returns those of that many rows, on the first axis."""
    if not isinstance(key, PartKey):
        return draw(key, count)
    return part_of(draw(key.key, key.parts * count), key.index, key.parts)


def split(key: Key, count: int = 2) -> list[Key]:
    """Returns independent keys, as `jax.random.split`."""
    if not isinstance(key, PartKey):
        return list(jax.random.split(key, count))
    return [key._replace(key=each) for each in jax.random.split(key.key, count)]


def normal(key: Key, shape: Sequence[int]) -> Array:
    """Returns standard normal float32 numbers; the first axis of `shape` is that of the rows."""
    return rows(key, shape[0], lambda key, count: jax.random.normal(key, (count, *shape[1:])))


def uniform(key: Key, shape: Sequence[int]) -> Array:
    """Returns float32 numbers from 0 to 1; the first axis of `shape` is that of the rows."""
    return rows(key, shape[0], lambda key, count: jax.random.uniform(key, (count, *shape[1:])))


def integers(key: Key, shape: Sequence[int], low: int, high: int) -> Array:
    """Returns int32 numbers, `high` excluded; the first axis of `shape` is that of the rows."""
    return rows(key, shape[0], lambda key, count: jax.random.randint(key, (count, *shape[1:]), low, high))

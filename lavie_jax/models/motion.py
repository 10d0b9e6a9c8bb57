"""Moves two key frames to a time between them, by matching: coarse to fine, without parameters.

Every pixel x of the frame at time tau between the key frames A (tau = 0) and B (tau = 1) gets the displacement v for
which the surroundings of x - tau v in A and of x + (1 - tau) v in B are most alike. Estimating it on the grid of the
frame between, and not on A's or B's, leaves no holes ("bilateral motion estimation", arXiv 2007.12622, sec. 3.1). The
result is the mean over all candidates, weighted by how well they match, starting at a quarter of the resolution.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import einsum, rearrange, reduce
from jax import lax
from jaxtyping import Array, Float

REACH = 12  # quarter-size pixels on each side that the first search covers: displacements of up to 48 pixels
COARSE_STEP = 2  # quarter-size pixels between the candidates of the first search
RADIUS = 7  # pixels on each side of the surroundings that are compared
SHARPNESS = 100.0  # of the weights; a difference is the mean over channels, for pixels in [-1, 1]
DISTANCE_COST = 1e-2  # added to the difference for a displacement of one pixel of the grid: plain areas do not move
SLOPE = -0.5  # of the cubic weights: exact for parabolas
MULTIPLE = 8  # of the sides: the first search has a value for every 8 x 8 pixels


def moved(
    before: Float[Array, "h w c"], after: Float[Array, "h w c"], tau: Float[Array, ""]
) -> Float[Array, "2 h w c"]:
    """Returns both key frames, moved to the time `tau` between them. The sides are multiples of 8."""
    displacement = displacements(before, after, tau)
    return jnp.stack(displaced(before, after, displacement, tau, cubic))


def displacements(
    before: Float[Array, "h w c"], after: Float[Array, "h w c"], tau: Float[Array, ""]
) -> Float[Array, "h w 2"]:
    """Returns the displacement from the first to the second key frame of each pixel at time `tau`."""
    sizes = {p: (_shrunk(before, p), _shrunk(after, p)) for p in (4, 2)}
    found = _enlarged(_best(*sizes[4], tau, REACH // COARSE_STEP, float(COARSE_STEP), every=2), 2)
    for size, reach, step in ((4, 2, 1.0), (2, 2, 1.0), (2, 1, 0.5)):
        if found.shape[:2] != sizes[size][0].shape[:2]:
            found = 2 * _enlarged(found, 2)
        found += _best(*displaced(*sizes[size], found, tau, linear), tau, reach, step)
    return 2 * _enlarged(found, 2)


def displaced(
    before: Float[Array, "h w c"],
    after: Float[Array, "h w c"],
    by: Float[Array, "h w 2"],
    tau: Float[Array, ""],
    weights: Callable[[Array], list[Array]],
) -> tuple[Float[Array, "h w c"], Float[Array, "h w c"]]:
    """Reads both key frames where the pixels at time `tau` come from and go to, with the interpolation `weights`."""
    here = jnp.stack(jnp.meshgrid(*map(jnp.arange, before.shape[:2]), indexing="ij"), axis=-1)
    return _read(before, here - tau * by, weights), _read(after, here + (1 - tau) * by, weights)


def linear(t: Float[Array, "h w"]) -> list[Float[Array, "h w"]]:
    """Returns the weights of the pixels before and after a fraction t in [0, 1)."""
    return [1 - t, t]


def cubic(t: Float[Array, "h w"]) -> list[Float[Array, "h w"]]:
    """Returns the weights of the two pixels before and the two after t: Keys' cubic convolution, which blurs less."""
    a = SLOPE
    return [
        a * (t**3 - 2 * t**2 + t),
        (a + 2) * t**3 - (a + 3) * t**2 + 1,
        -(a + 2) * t**3 + (2 * a + 3) * t**2 - a * t,
        a * (t**2 - t**3),
    ]


def _shrunk(image: Float[Array, "h w c"], p: int) -> Float[Array, "h2 w2 c"]:
    return reduce(image, "(h i) (w j) c -> h w c", "mean", i=p, j=p)


def _enlarged(grid: Float[Array, "h w c"], p: int) -> Float[Array, "h2 w2 c"]:
    height, width, channels = grid.shape
    return jax.image.resize(grid, (height * p, width * p, channels), "linear")


def _surroundings(difference: Float[Array, "h w"]) -> Float[Array, "h w"]:
    """Returns the mean over the square of 2 RADIUS + 1 pixels around each pixel."""
    side, padded = 2 * RADIUS + 1, jnp.pad(difference, RADIUS, mode="edge")
    for window in ((side, 1), (1, side)):
        padded = lax.reduce_window(padded, 0.0, lax.add, window, (1, 1), "VALID")
    return padded / side**2


def _best(
    before: Float[Array, "h w c"],
    after: Float[Array, "h w c"],
    tau: Float[Array, ""],
    reach: int,
    step: float,
    *,
    every: int = 1,
) -> Float[Array, "h2 w2 2"]:
    """Returns the best displacement around each pixel, of those by multiples of `step` up to `reach` of them.

    With `every`, the result is for squares of so many pixels a side. The candidates move whole frames, which needs no
    irregular access to memory.
    """
    height, width, channels = before.shape
    axis = step * jnp.arange(-reach, reach + 1)
    candidates = rearrange(jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), axis=-1), "i j d -> (i j) d")
    room = math.ceil(reach * step) + 1
    padded = [jnp.pad(x, ((room, room), (room, room), (0, 0)), mode="edge") for x in (before, after)]

    def shifted(x: Array, by: Array) -> Array:
        """Returns x at every pixel plus `by`, by linear interpolation."""
        whole = jnp.floor(by).astype(jnp.int32)
        rows, columns = by - whole
        x = lax.dynamic_slice(x, (room + whole[0], room + whole[1], 0), (height + 1, width + 1, channels))
        x = x[:-1] * (1 - rows) + x[1:] * rows
        return x[:, :-1] * (1 - columns) + x[:, 1:] * columns

    def cost(candidate: Array) -> Array:
        """Returns how much the surroundings differ at one candidate."""
        difference = shifted(padded[0], -tau * candidate) - shifted(padded[1], (1 - tau) * candidate)
        cost = _shrunk(_surroundings(jnp.abs(difference).mean(-1))[..., None], every)[..., 0]
        return cost + DISTANCE_COST * jnp.linalg.norm(candidate)

    weights = jax.nn.softmax(-SHARPNESS * lax.map(cost, candidates), axis=0)
    return einsum(weights, candidates, "k h w, k d -> h w d")


def _read(
    image: Float[Array, "h w c"], at: Float[Array, "h w 2"], weights: Callable[[Array], list[Array]]
) -> Float[Array, "h w c"]:
    """Reads an image at fractions of pixels; borders are repeated."""
    height, width, _ = image.shape
    at = jnp.clip(at, 0, jnp.array([height - 1, width - 1]))
    whole = jnp.floor(at).astype(jnp.int32)
    rows, columns = (weights(t) for t in jnp.moveaxis(at - whole, -1, 0))
    first = 1 - len(rows) // 2  # of the pixels that are read, counted from the one before
    flat = rearrange(image, "h w c -> (h w) c")

    def row(i: int) -> Array:
        """Returns the image at row i of those that are read, between its columns."""
        start = jnp.clip(whole[..., 0] + first + i, 0, height - 1) * width
        each = (flat[start + jnp.clip(whole[..., 1] + first + j, 0, width - 1)] for j in range(len(columns)))
        return sum(pixels * weight[..., None] for pixels, weight in zip(each, columns))

    return sum(row(i) * weight[..., None] for i, weight in enumerate(rows))

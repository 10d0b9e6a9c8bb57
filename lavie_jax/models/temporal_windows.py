"""Temporal attention in overlapping windows: clips longer than the model's training clips, at a cost linear in length.

FreeNoise's window-based attention fusion (arXiv 2310.15169). Each window sees its own frames only, as many as in
training, and a frame's result is the average over its windows. All other layers see the whole clip.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lavie_jax.models.placement import split_by_rows


@dataclasses.dataclass(frozen=True)
class AttentionWindows:
    """Windows of `size` frames that start every `stride` frames.

    Raises:
        ValueError: the windows would leave frames out.
    """

    size: int = 16
    stride: int = 4

    def __post_init__(self):
        if not 1 <= self.stride <= self.size:
            raise ValueError(f"Windows of {self.size} frames need a stride from 1 to {self.size}, not {self.stride}.")

    def starts(self, length: int) -> Int[np.ndarray, " windows"]:
        """Returns the first frame of each window; where the stride does not reach the end, one more ends there.

        Raises:
            ValueError: the clip is shorter than a window.
        """
        if length < self.size:
            raise ValueError(f"A clip of {length} frames is shorter than a window of {self.size}.")
        last = length - self.size
        return np.unique([*range(0, last + 1, self.stride), last])

    def weights(self, length: int) -> Float[np.ndarray, "windows size"]:
        """Returns the weights of the places in each window: 1, 2, ... 2, 1, over their sum in a frame's windows."""
        starts = self.starts(length)
        rise = np.arange(1, self.size + 1)
        triangle = np.minimum(rise, rise[::-1])
        places = starts[:, None] + np.arange(self.size)
        total = np.zeros(length)
        np.add.at(total, places, np.broadcast_to(triangle, places.shape))
        return (triangle / total[places]).astype(np.float32)


def attend_in_windows(
    attend: Callable[[Array, Array, Array], Array],
    q: Float[Array, "b t n k"],
    k: Float[Array, "b t n k"],
    v: Float[Array, "b t n k"],
    windows: AttentionWindows,
) -> Float[Array, "b t n k"]:
    """Returns the weighted average of `attend(q, k, v)` over the windows, in q's dtype.

    Windows are taken one after the other: beside the queries, keys, values and the sum, memory holds one window. Where
    positions enter as differences only, those of the whole clip serve every window.
    """
    length = q.shape[1]

    def add_window(total, window):
        start, weights = window
        out = attend(*(jax.lax.dynamic_slice_in_dim(x, start, windows.size, axis=1) for x in (q, k, v)))
        out = out.astype(jnp.float32) * weights[:, None, None]
        sums = jax.lax.dynamic_slice_in_dim(total, start, windows.size, axis=1) + out
        return jax.lax.dynamic_update_slice_in_dim(total, sums, start, axis=1), None

    total = split_by_rows(jnp.zeros(q.shape, jnp.float32))
    total, _ = jax.lax.scan(add_window, total, (windows.starts(length), windows.weights(length)))
    return total.astype(q.dtype)

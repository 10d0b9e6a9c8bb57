"""Sharding of activations, for model code that depends on it: products with weights, temporal layers, Pallas kernels.

Elsewhere the compiler propagates shardings by itself. Nothing here changes a value.

On a mesh with the axis `clip`, the devices along it share one clip (sequence parallelism, as DeepSpeed-Ulysses, arXiv
2309.14509). Spatial layers see whole frames and temporal layers whole pixels, so the clip is split by frames in the
first and by pixels in the second, and the compiler exchanges the parts in between, by an all-to-all.
"""

import math

import jax
from einops import rearrange
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Shaped

HEADS_AXIS = "tensor"  # mesh axis that shards heads and hidden widths; all others shard the batch
CLIP_AXIS = "clip"  # mesh axis that shards the frames or the pixels of a clip, alone in its batch


def batch_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """Returns the axes that shard a batch and are up to the compiler; inside a `shard_map` there are none."""
    return tuple(axis for axis in mesh.auto_axes if axis != HEADS_AXIS)


def can_place(rows: int) -> bool:
    """Whether that many rows are known to divide over the devices, padded where these share a clip."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return rows % _ways(mesh) == 0 or CLIP_AXIS in mesh.auto_axes


def missing_rows(rows: int) -> int:
    """Returns by how many rows a batch has to be padded so that the devices divide it."""
    return -rows % _ways(jax.sharding.get_abstract_mesh())


def rows_per_device(rows: int) -> int:
    """Returns how many of a batch's rows each device has: all of them where they are not known to be divided."""
    ways = _ways(jax.sharding.get_abstract_mesh())
    return rows if rows % ways else rows // ways


def _ways(mesh: AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def split_by_rows(x: Array) -> Array:
    """Constrains x (B, ...) to be sharded as the batch is; other axes may be folded into the first one, after B.

    `fsdp` shards both the batch and the weights. Without the constraint, the compiler may shard an activation like the
    weights, by channels, with the whole batch on every device (59 GiB per chip for the full-size base on 16 chips).
    With the inputs and outputs of every product sharded by batch, it gathers the weights instead.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes, ways = batch_axes(mesh), _ways(mesh)
    if ways == 1 or x.shape[0] % ways:
        return x
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)  # whatever `tensor` shards
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *rest))


def split_by_frames(x: Shaped[Array, "b frames ..."]) -> Shaped[Array, "b frames ..."]:
    """Constrains x to be sharded by frames over the axis `clip`, if there is one."""
    return _split(x, 1)


def frames_to_pixels(x: Shaped[Array, "b frames h w c"]) -> Shaped[Array, "b frames pixels c"]:
    """Flattens the pixels of frames. On a mesh with the axis `clip`, x is sharded by frames, the result by pixels."""
    return _split(rearrange(_split(x, 1), "b t h w c -> b t (h w) c"), 2)


def pixels_to_frames(x: Shaped[Array, "b frames pixels c"], height: int) -> Shaped[Array, "b frames h w c"]:
    """The inverse of `frames_to_pixels`."""
    return _split(rearrange(_split(x, 2), "b t (h w) c -> b t h w c", h=height), 1)


def splits_unevenly(frames: int) -> bool:
    """Whether the devices that share a clip have different numbers of its frames."""
    mesh = jax.sharding.get_abstract_mesh()
    return CLIP_AXIS in mesh.auto_axes and frames % mesh.shape[CLIP_AXIS] != 0


def _split(x: Array, axis: int) -> Array:
    if CLIP_AXIS not in jax.sharding.get_abstract_mesh().auto_axes:
        return x
    # where the devices do not divide the axis, the last ones have less
    parts = [CLIP_AXIS if i == axis else None for i in range(x.ndim)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))

"""Sharding of the batch, for model code that depends on it: products with weights, and Pallas kernels.

Elsewhere the compiler propagates shardings by itself. Nothing here changes a value.
"""

import math

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array

HEADS_AXIS = "tensor"  # mesh axis that shards heads and hidden widths; all others shard the batch


def batch_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """Returns the axes that shard a batch and are up to the compiler; inside a `shard_map` there are none."""
    return tuple(axis for axis in mesh.auto_axes if axis != HEADS_AXIS)


def can_place(rows: int) -> bool:
    """Whether that many rows are known to divide over the devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return rows % _ways(mesh) == 0


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

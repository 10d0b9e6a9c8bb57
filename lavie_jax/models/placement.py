"""Where the rows of a batch are, for model code that has to know: products with weights, and Pallas kernels.

Elsewhere the compiler finds out for itself. Nothing here changes a value.
"""

import math

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array

HEADS_AXIS = "tensor"  # the mesh axis that splits heads and hidden widths; every other one splits the batch


def batch_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """The axes that split a batch and that the compiler still has in its hands: none inside a `shard_map`."""
    return tuple(axis for axis in mesh.auto_axes if axis != HEADS_AXIS)


def can_place(rows: int) -> bool:
    """Whether it is known which of so many rows are on which device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return rows % math.prod(mesh.shape[axis] for axis in batch_axes(mesh)) == 0


def split_by_rows(x: Array) -> Array:
    """x (B, ...), also with other axes folded into the first one behind B, split over the devices as the batch is.

    `fsdp` splits the batch and the weights. Left alone, the compiler may let an activation follow the weights: the
    channels split, and the whole batch on every device (the full base on 16 chips asked for 59 GiB a chip). With
    inputs and outputs of every product held to the batch's split, the weights are what is gathered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = batch_axes(mesh)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if ways == 1 or x.shape[0] % ways:
        return x
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)  # `tensor` may split what it splits
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *rest))

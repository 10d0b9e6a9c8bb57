"""Programs of training and sampling, described by shapes only, for devices that may not exist."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lavie_jax import parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A jitted function of the real code, and its arguments.

    Attributes:
        name: what it does, for a table.
        function: the jitted function.
        arguments: positional arguments, ShapeDtypeStructs with shardings.
        static: keyword arguments, which are static.
        mesh: the mesh of the devices.
        context: whether it is called in the context of the mesh, as by `parallel.on_mesh`.
        held: {name: tree}, parts of the arguments that are reported separately.
        beside: trees that stay on the devices while the program runs without using them.
        note: what its size depends on.
    """

    name: str
    function: Any  # with `trace` and `lower`
    arguments: tuple
    mesh: Mesh
    held: Mapping[str, Any]
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    context: bool = False
    beside: tuple = ()
    note: str = ""

    def trace(self) -> Any:
        """Returns jax's traced form of the program, which has `lower()`."""
        if not self.context:
            return self.function.trace(*self.arguments, **self.static)
        with jax.set_mesh(self.mesh):
            return self.function.trace(*self.arguments, **self.static)


def placed(tree: Any, sharding: Any) -> Any:
    """Returns ShapeDtypeStructs like the leaves of `tree`, with `sharding`: one, or a tree of them."""
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding)


def cast(tree: Any, dtype: DTypeLike) -> Any:
    """Returns ShapeDtypeStructs of another dtype."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def bytes_per_chip(tree: Any) -> int:
    """Returns the bytes of ShapeDtypeStructs with shardings on one device (all devices hold the same)."""

    def itemsize(dtype: Any) -> int:
        """Bytes of an element on the device; the dtype of random keys is an extended one."""
        return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True).itemsize

    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * itemsize(x.dtype) for x in jax.tree.leaves(tree))


def mesh_of(config: Any, devices: list[jax.Device]) -> Mesh:
    """Returns the mesh of a config. Refuses axes whose product is not the number of devices."""
    return parallel.make_mesh(**config.mesh, devices=devices)

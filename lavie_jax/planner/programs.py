"""The programs that training and sampling run, built without an array: for devices that need not be there."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lavie_jax import parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled function of the real code, and what it is called with.

    Attributes:
      name: what it does, for a table.
      function: jitted; its arguments are ShapeDtypeStructs with shardings.
      arguments: all positional ones.
      static: those that are given by name.
      mesh: of the devices.
      context: whether it is called with the mesh as the context, as `parallel.on_mesh` does.
      held: {what: a tree} of the arguments that a reader wants to see apart.
      beside: trees that stay on the devices while the program runs, though it does not use them.
      note: what its size depends on.
    """

    name: str
    function: Callable
    arguments: tuple
    mesh: Mesh
    held: Mapping[str, Any]
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    context: bool = False
    beside: tuple = ()
    note: str = ""

    def trace(self) -> Any:
        """jax's traced form, from which `lower()` goes on."""
        if not self.context:
            return self.function.trace(*self.arguments, **self.static)
        with jax.set_mesh(self.mesh):
            return self.function.trace(*self.arguments, **self.static)


def placed(tree: Any, sharding: Any) -> Any:
    """ShapeDtypeStructs like the leaves of `tree`, with `sharding`: one, or a tree of them."""
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding)


def cast(tree: Any, dtype: Any) -> Any:
    """ShapeDtypeStructs of another dtype."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def bytes_per_chip(tree: Any) -> int:
    """Of ShapeDtypeStructs with shardings, on the device that holds most (all hold the same here)."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * jax.dtypes.canonicalize_dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def mesh_of(config: Any, devices: list[jax.Device]) -> Mesh:
    """The mesh that a config asks for. UserError when it does not multiply to the devices."""
    return parallel.make_mesh(**config.mesh, devices=devices)

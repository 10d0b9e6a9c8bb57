"""How a batch of windows is spread over the devices: a window for each, or several devices for one window.

Where there are fewer windows than devices, those that share a window divide it twice (docs/tpu.md): the two halves of
guidance go to two groups, and the devices of a group divide its frames, or pixels in temporal layers
(`models/placement.py`).
"""

from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from lavie_jax.models.placement import CLIP_AXIS

ROWS_AXIS = "data"  # of the meshes on which several devices share a window: a group for each row of the UNet's batch


def layout(mesh: Mesh, windows: int, *, halves: int, frames: int) -> tuple[Mesh, int] | None:
    """Returns how several devices share each of a few windows: a mesh of the same devices, and the number of windows.

    None if every device has a window of its own, or if the weights are split over devices.

    Args:
        mesh: the mesh of a stage's model.
        windows: number of windows; the result may be padded by up to as many.
        halves: 2 for an evaluation with both halves of guidance, else 1.
        frames: number of frames of a window, the most devices that can divide it.
    """
    if mesh.shape["data"] != mesh.size or windows >= mesh.size:
        return None
    rows = next(n for n in range(windows, mesh.size + 1) if mesh.size % n == 0)
    sharing = mesh.size // rows
    groups = halves if sharing % halves == 0 else 1
    parts = next(n for n in range(min(sharing // groups, frames), 0, -1) if sharing // groups % n == 0)
    if groups * parts == 1:
        return None
    devices = mesh.devices.reshape(mesh.size // parts, parts)
    auto = (jax.sharding.AxisType.Auto,) * 2
    return Mesh(devices, (ROWS_AXIS, CLIP_AXIS), axis_types=auto), mesh.size // parts // groups


def shares_windows(mesh: Mesh) -> bool:
    """Whether several devices of the mesh share a window, as in the meshes of `layout`."""
    return CLIP_AXIS in mesh.shape


class SharedUNet:
    """A UNet whose batch is spread over the groups of devices of a mesh of `layout`, one row for each."""

    def __init__(self, unet: Any, mesh: Mesh):
        self.unet, self.mesh = unet, mesh

    @property
    def config(self) -> Any:
        """The UNet's architecture."""
        return self.unet.config

    def apply(self, variables: dict, *inputs: Any, **named: Any) -> Any:
        """Calls the UNet's `apply`, with the weights on every device."""
        arrays = {k: v for k, v in named.items() if hasattr(v, "shape")}
        options = {k: v for k, v in named.items() if k not in arrays}

        def on_group(variables, inputs, arrays):
            return self.unet.apply(variables, *inputs, **arrays, **options)

        rows = PartitionSpec(ROWS_AXIS)
        spread = jax.shard_map(
            on_group, mesh=self.mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows, axis_names={ROWS_AXIS},
            check_vma=False,
        )  # fmt: skip
        return spread(variables, inputs, arrays)

"""TPU topologies that are not there, and what their makers say of a chip.

A name is `GENERATION:AxB` or, on a torus of three axes, `GENERATION:AxBxC`: how many chips lie along each axis.
Google's product names count differently: v5litepod-16 is v5e:4x4, but v5p-64 counts two cores a chip and is v5p:2x4x4.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from lavie_jax.errors import UserError, suggest
from lavie_jax.training.operations import PEAKS

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip, as Google's documentation gives it (docs.cloud.google.com/tpu/docs).

    Attributes:
      flops: bfloat16 operations a second, at best.
      memory_bandwidth: bytes a second to and from its memory.
      link_bandwidth: bytes a second that it can send to its neighbours over all links together: half of the
        bidirectional figure.
      memory: bytes that a program can have, less than is built in: the compiler's own limit.
      axes: of the torus that a slice is.
      options: what libtpu wants to be told beside the name.
    """

    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    memory: float
    axes: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CHIPS = {
    "v4": Chip(
        flops=PEAKS["v4"], memory_bandwidth=1228e9, link_bandwidth=300e9, memory=30.75 * GIB, axes=3,
        options={"chip_config_name": "megacore"},
    ),
    "v5e": Chip(flops=PEAKS["v5e"], memory_bandwidth=819e9, link_bandwidth=200e9, memory=15.75 * GIB, axes=2),
    "v5p": Chip(flops=PEAKS["v5p"], memory_bandwidth=2765e9, link_bandwidth=600e9, memory=95.73 * GIB, axes=3),
    "v6e": Chip(flops=PEAKS["v6e"], memory_bandwidth=1640e9, link_bandwidth=400e9, memory=31.24 * GIB, axes=2),
}  # fmt: skip
EXAMPLES = ("v4:2x2x4", "v5e:1x1", "v5e:4x4", "v5e:16x16", "v5p:2x4x4", "v6e:4x4")


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """`"v5e:4x4"` -> (what a v5e is, (4, 4)). UserError, with the known names, for any other form."""
    generation, _, shape = name.partition(":")
    if generation not in CHIPS:
        raise UserError(
            f"unknown topology {name!r}: no generation {generation!r}{suggest(generation, CHIPS)}; "
            f"a topology is such as {', '.join(EXAMPLES)}"
        )
    chip = CHIPS[generation]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape) or shape.count("x") != chip.axes - 1:
        example = next(e for e in EXAMPLES if e.startswith(generation))
        raise UserError(f"unknown topology {name!r}: {generation} has {chip.axes} axes, such as {example}")
    return chip, tuple(int(n) for n in shape.split("x"))


def devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Devices to compile for, one a chip; nothing can be run on them.

    Raises:
      UserError: an unknown topology, or one that libtpu does not make; libtpu is not installed.
    """
    chip, shape = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs the package libtpu: pip install -e '.[tpu]', best in an environment of its own, "
            "because there jax looks for a TPU first (JAX_PLATFORMS=cpu tells it not to)"
        )
    # No TPU is asked after (one that is there is left alone), and another process may have libtpu open.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = dict(chip.options)
    if np.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if slices > 1:
        options["num_slices"] = slices
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"libtpu makes no topology {name!r} with {slices} slices: {reason}") from None
    return list(topology.devices)


def versions() -> dict[str, str]:
    """What a plan depends on beside the code: {"jax": "0.10.2", "libtpu": "0.0.42.1"}."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}

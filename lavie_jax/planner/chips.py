"""TPU topologies to compile for without a TPU, specifications of their chips, and the roofline bound of a program.

A topology's name is `GENERATION:AxB`, or `GENERATION:AxBxC` on a torus of three axes: the number of chips along each
axis. Google's product names count differently: v5litepod-16 is v5e:4x4, but v5p-64 counts two cores per chip and is
v5p:2x4x4.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from lavie_jax.errors import UserError, suggest
from lavie_jax.flops import PEAKS

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Specifications of a chip from Google's documentation (docs.cloud.google.com/tpu/docs).

    Attributes:
        flops: peak bfloat16 FLOP/s.
        memory_bandwidth: bytes per second to and from HBM.
        link_bandwidth: bytes per second that it can send to its neighbours over all links together: half of the
            bidirectional figure.
        memory: HBM limit of a program in bytes, set by the compiler; less than is built in.
        axes: number of axes of a slice's torus.
        options: libtpu's options in addition to the name.
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
    """Parses `"v5e:4x4"` into (the chip, (4, 4)). Refuses unknown names, with examples of known ones."""
    generation, _, shape = name.partition(":")
    if generation not in CHIPS:
        raise UserError(
            f"unknown topology {name!r}: no generation {generation!r}{suggest(generation, CHIPS)}; "
            f"examples are {', '.join(EXAMPLES)}"
        )
    chip = CHIPS[generation]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape) or shape.count("x") != chip.axes - 1:
        example = next(e for e in EXAMPLES if e.startswith(generation))
        raise UserError(f"unknown topology {name!r}: {generation} has {chip.axes} axes, such as {example}")
    return chip, tuple(int(n) for n in shape.split("x"))


def count(name: str, slices: int = 1) -> int:
    """Returns the number of chips of slices of a topology."""
    return slices * math.prod(parse(name)[1])


def devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Returns devices to compile for, one per chip; programs cannot run on them.

    Raises:
        UserError: a topology that is unknown or that libtpu refuses; libtpu is not installed.
    """
    chip, shape = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs the package libtpu: pip install -e '.[tpu]', best in a separate environment, "
            "because with it jax looks for a TPU first (unless JAX_PLATFORMS=cpu)"
        )
    # Does not use a TPU of this machine, and allows other processes that use libtpu.
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
        raise UserError(f"libtpu does not support topology {name!r} with {slices} slices: {reason}") from None
    return list(topology.devices)


def versions() -> dict[str, str]:
    """Returns the versions that a plan depends on: {"jax": "0.10.2", "libtpu": "0.0.42.1"}."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


class Bound(NamedTuple):
    """Lower bounds of a step's time in seconds, set by arithmetic, memory traffic and links."""

    arithmetic: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The bound of the step, if all three overlap perfectly."""
        return max(self)

    @property
    def reason(self) -> str:
        """The name of the largest."""
        return self._fields[self.index(max(self))]


def bound(row: Mapping[str, Any], chip: Chip) -> Bound:
    """Estimates the roofline bound of a row (`measure.py`) whose program was compiled or planned. Not a measurement.

    Arithmetic counts the traced FLOPs. Memory counts the bytes read and written according to the compiler, which
    leaves out iterations of loops, but at least each argument and output once and each temporary byte twice. Links
    count the bytes of collectives, those of an all-reduce twice, as if all links of a chip were busy at once.
    """
    least = row["arguments"] + row["outputs"] + 2 * row["temporary"]
    traffic = max(row.get("compiler_traffic", 0), least)
    moved = sum((2 if kind == "all-reduce" else 1) * one["bytes"] for kind, one in row["collectives"].items())
    return Bound(row["flops"] / chip.flops, traffic / chip.memory_bandwidth, moved / chip.link_bandwidth)

"""The device mesh, and the sharding of parameters and batches.

The mesh has three axes. `data` splits the batch; `fsdp` splits the batch and the parameters, which are gathered where
they are used; `tensor` splits heads and hidden widths. Every axis is `AxisType.Auto`: the compiler inserts the
collectives, and model code needs no annotations. A rule is (regex on the parameter's path, PartitionSpec of its *last*
axes). One rule thus covers a linear kernel (I, O) and a convolution (h, w, I, O), and also the optimizer state and the
EMA, whose paths end in the parameter's path.

`training/optimizer.py` defines which parameters are trained.
"""

import contextlib
import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lavie_jax.disk import cache_folder
from lavie_jax.errors import AgreedError, UserError, check_folder, user_location
from lavie_jax.program_cache import cores, keep_programs

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

P = PartitionSpec
Rules = Sequence[tuple[str, PartitionSpec]]

# First match wins. Pairs of linear layers are split by columns, then by rows (Megatron,
# arXiv 1909.08053), so that `tensor` costs one reduction per pair. Biases and norms are replicated.
RULES: Rules = (
    (r"/(to_q|to_k|to_v|q_proj|k_proj|v_proj|fc1|net_0/proj|linear_1)/kernel$", P("fsdp", "tensor")),
    (r"/(to_out_0|out_proj|fc2|net_2|linear_2)/kernel$", P("tensor", "fsdp")),
    (r"/(SelfAttention/[qkv]|DenseReluDense/wi(_[01])?)/kernel$", P("fsdp", "tensor")),  # T5
    (r"/(SelfAttention/o|DenseReluDense/wo)/kernel$", P("tensor", "fsdp")),
    (r"/kernel$", P(None, "fsdp")),
    (r"/embedding$", P(None, "fsdp")),
    (r"", P()),
)


def describe(mesh: Mesh) -> str:
    """Returns the devices and axes of a mesh, such as "8 x TPU v5 lite (data 4, fsdp 2, tensor 1)"."""
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({axes})"


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh with axes (data, fsdp, tensor). At most one of them is -1, for the remaining devices.

    Only `data` spans TPU slices, because the network between them is slow.

    Raises:
        UserError: the product of the axes is not the number of devices; they do not fit a TPU's torus; `data` is not a
            multiple of the slices.
    """
    if devices is None:
        local_devices()  # or one line about why there are none
        devices = jax.devices()
    devices = list(devices)
    sizes = [data, fsdp, tensor]
    given = f"mesh data={data}, fsdp={fsdp}, tensor={tensor}"
    if sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise UserError(f"{given}: each axis must be positive, or -1 for at most one of them (the remaining devices).")
    if -1 in sizes:
        known = int(np.prod([n for n in sizes if n != -1]))
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"{given} does not fit {len(devices)} devices: the product of the axes must be that number.")
    auto = (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(f"{given} on {slices} slices: data must be a multiple of the slices, which only it spans.")
    try:
        if slices == 1:
            return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)
        within = (sizes[0] // slices, *sizes[1:])
        return Mesh(mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices), AXES, axis_types=auto)
    except NotImplementedError:  # jax cannot map the axes to those of the torus
        raise UserError(
            f"{given} cannot be mapped to the {len(devices)} chips: each axis must be a product of whole axes of the "
            "torus, such as 4 or 16 on 4x4."
        ) from None


def spec(path: str, shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """Returns the PartitionSpec of the array at `path`, such as `params/unet/conv_in/kernel`.

    If `fsdp` does not divide the axis of the rule, it splits the largest other axis that it divides. If there is none,
    the array is replicated.
    """
    last = next(s for pattern, s in rules if re.search(pattern, path))
    wanted = (None,) * (len(shape) - len(last)) + tuple(last)[max(0, len(last) - len(shape)) :]
    placed = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(wanted, shape, strict=True)]
    if "fsdp" in wanted and "fsdp" not in placed:
        free = [i for i, n in enumerate(shape) if placed[i] is None and n % mesh.shape["fsdp"] == 0]
        if free:
            placed[max(free, key=lambda i: shape[i])] = "fsdp"
    return P(*placed)


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns a tree of NamedSharding for a tree of arrays or ShapeDtypeStructs."""

    def one(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(name, x.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(one, tree)


def on_mesh(f: Callable, mesh: Mesh) -> Callable:
    """Wraps `f` to run in the context of the mesh, which Pallas kernels read: the compiler cannot split those."""

    @functools.wraps(f)
    def call(*args):
        with jax.set_mesh(mesh):
            return f(*args)

    return call


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a value that is the same on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: the first axis is split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Returns how many groups of devices share the rows of a batch: `tensor` has all rows on each of its devices."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch: int, mesh: Mesh, *, accumulate: int = 1) -> None:
    """Refuses a global batch that the devices, the accumulation steps or the hosts do not divide."""
    ways = batch_ways(mesh)
    if accumulate < 1 or batch < 1 or batch % (ways * accumulate):
        raise UserError(
            f"batch={batch} cannot be split over {ways} batch devices x accumulate={accumulate}: "
            f"choose a multiple of {ways * max(accumulate, 1)}."
        )
    if ways % jax.process_count():
        raise UserError(
            f"mesh {dict(mesh.shape)}: data x fsdp = {ways} must be a multiple of the {jax.process_count()} hosts, "
            "each of which loads its own rows; tensor can be at most the number of devices of one host."
        )


def put(tree: Any, sharding: Any) -> Any:
    """Puts a tree of host arrays, which are equal on every process, on the devices.

    `sharding` is one sharding or a tree of them.
    """
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)

    def one(x, s):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, s, lambda index: x[index])

    return jax.tree.map(one, tree, sharding)


def local_rows(batch: int, mesh: Mesh) -> list[int]:
    """Returns the rows of a batch that this process's devices hold, and that it has to load."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    return sorted({row for (rows,) in slices.values() for row in range(*rows.indices(batch))})


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a batch (numpy, in the order of `local_rows`) into arrays over all devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def gather(tree: Any, *, keep: bool = True) -> Any:
    """Gathers sharded arrays as numpy arrays on every process, one after the other.

    Must be called on every process. Processes without `keep` get None instead of the arrays.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def one(x):
        whole = multihost_utils.process_allgather(x, tiled=True)
        return whole if keep else None

    return jax.tree.map(one, tree)


def check_hosts_are_consistent(facts: Mapping[str, Any]) -> None:
    """Raises UserError, with names, if hosts differ in any of `facts`, {name: value that is compared by its `str`}."""
    if jax.process_count() == 1:
        return

    def same(values: Sequence[Any]) -> np.ndarray:
        digests = [hashlib.sha256(str(value).encode()).digest()[:4] for value in values]
        everywhere = multihost_utils.process_allgather(np.frombuffer(b"".join(digests), np.uint32))
        return (everywhere == everywhere[0]).all(axis=0)

    names = sorted(facts)
    if not same([names]).all():
        raise AgreedError("the hosts differ in the fields of their configs: start all with the same code and command.")
    consistent = same([facts[name] for name in names])
    if differ := [name for name, is_same in zip(names, consistent) if not is_same]:
        own = ", ".join(f"{name} = {str(facts[name])[:100]}" for name in differ[:5])
        raise AgreedError(
            f"the hosts differ in {', '.join(differ)}; on host {jax.process_index()}: {own}. Start all with the same "
            "code, command and data."
        )


# Settings of jax, from the environment or a program, that would change random numbers or the types of arrays.
CONFIG = {
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
    "jax_random_seed_offset": 0,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}


@contextlib.contextmanager
def usual_config() -> Iterator[None]:
    """Has jax compute as by default, whatever the process has configured: a seed gives one sample."""
    with (
        jax.threefry_partitionable(True),
        jax.default_prng_impl("threefry2x32"),
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def local_devices() -> list[jax.Device]:
    """Returns the devices of this process, after a first computation on each.

    Raises:
        UserError: a device is absent, or taken by another process; the message has jax's reason.
    """
    try:
        devices = jax.local_devices()
        for device in devices:
            jax.device_put(np.zeros((), np.float32), device).block_until_ready()
    except (RuntimeError, AssertionError) as error:  # an assertion where a platform has no plugin
        platforms = jax.config.jax_platforms  # ty: ignore[missing-attribute]
        reason = str(error).strip().partition("\n")[0] or f"jax finds no device of the platform {platforms!r}"
        raise UserError(
            f"no device can be used: {reason.rstrip('.')}. Another program may hold the accelerator, or its driver or "
            "jax's plugin for it is missing; JAX_PLATFORMS=cpu computes on the CPU."
        ) from error
    return devices


def initialise(*, cpu_devices: int = 0, distributed: bool = False) -> None:
    """Configures jax. Must be called before anything uses its devices.

    Args:
        cpu_devices: split the host CPU into this many jax devices; 0 = do not split it. On two cores, training on two
            devices is faster than on one device with two threads.
        distributed: connect to the other hosts. TPU pods and Slurm are detected; elsewhere
            JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe them.

    Settings of jax that would change a run are reset, so that it resumes equally in any environment.

    Raises:
        UserError: the other hosts cannot be found, or the devices cannot be used.
    """
    for name, value in CONFIG.items():
        if (given := getattr(jax.config, name)) != value:
            logging.warning("%s=%s is not used in training, which would not be repeatable: %s", name, given, value)
            jax.config.update(name, value)
    if cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if distributed:
        count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
        try:
            jax.distributed.initialize(
                num_processes=int(count) if count else None, process_id=int(index) if index else None
            )
        except ValueError as error:
            raise UserError(
                f"the other hosts cannot be found: {error} TPU pods and Slurm are detected; elsewhere set "
                "JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID. On one machine leave "
                "distributed out."
            ) from error
    local_devices()


@functools.cache  # once for each process
def split_cpu() -> bool:
    """Has jax make two devices of a CPU with several cores, and returns whether it did, also when called again.

    A small model's operations keep two cores busy for two thirds of the time. Two devices compute the halves of
    guidance, or two windows, side by side: 1.2 to 1.6 times as fast with the included models.

    Nothing changes where devices are in use already, or where the environment or the program has set their number.
    """
    given = jax.config.jax_num_cpu_devices != -1  # ty: ignore[missing-attribute]
    if given or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or cores() == 1:
        return False
    try:
        jax.config.update("jax_num_cpu_devices", 2)
    except RuntimeError:  # in use
        return False
    return True


def keep_compiled_programs() -> None:
    """Turns on jax's persistent compilation cache, where the environment configures it or in the user's cache folder.

    Programs of `program_cache` are kept in a folder inside of it. Without a folder that can be written, programs are
    compiled by every process, after a warning.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if (given := _cache_dir()) is not None:
        given = user_location(given)
        jax.config.update("jax_compilation_cache_dir", given)
        if "://" not in given:  # jax also writes to buckets
            _keep_programs_in(Path(given))
        return
    try:
        folder = cache_folder("xla")
        folder.mkdir(parents=True, exist_ok=True)
        check_folder(folder, str(folder))
    except (OSError, UserError) as error:
        logging.warning("compiled programs are not kept; set JAX_COMPILATION_CACHE_DIR to a folder: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    _keep_programs_in(folder)


def _keep_programs_in(cache: Path) -> None:
    folder = cache / "programs"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.geteuid() and _writable_by_others(folder):
            folder.chmod(0o700)
        if _writable_by_others(folder):
            raise PermissionError(f"others can write to {folder}, and stored programs may run anything")
    except OSError as error:
        logging.warning("programs are traced by every process: %s", error)
    else:
        keep_programs(folder)


def _writable_by_others(folder: Path) -> bool:
    """Whether other users than the one of this process can write to a folder."""
    stat = folder.stat()
    return stat.st_uid != os.geteuid() or bool(stat.st_mode & 0o022)


def _cache_dir() -> str | None:
    """The folder of compiled programs that the environment names."""
    return jax.config.jax_compilation_cache_dir  # ty: ignore[missing-attribute]

"""Compiled programs that later processes load from disk, so that they neither trace nor compile them.

jax's own compilation cache saves compiling only: a process still traces and lowers every program to find it there,
which takes longer than a short sample. A program stored here is found by what it depends on: the function and its
static arguments, the shapes and devices of the others, the code of this package, versions, jax's settings and the
processor.

A stored program is a pickle, which can run anything, and so it comes from the user's own cache folder only, never from
a weights folder. A file that is damaged, or cannot be loaded, is compiled anew.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

SUFFIX = ".program"
UNUSED_DAYS = 30  # programs that were not used for so long are deleted
PACKAGES = ("jax", "jaxlib", "flax", "einops", "numpy")
CONTEXT = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_prng_impl", "jax_default_matmul_precision")
WITHOUT_EFFECT = ("cache", "log", "explain", "traceback", "profile")  # parts of the names of such settings of jax
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")

_folder: Path | None = None
_cached: list["CachedFunction"] = []


def keep_programs(folder: Path | None) -> None:
    """Stores the programs of `cached` functions in a folder that exists; None: uses jax.jit alone, as by default."""
    global _folder
    _folder = folder


def cached(jitted: Callable) -> "CachedFunction":
    """Wraps a jitted function whose static arguments, and no others, are passed by keyword."""
    _cached.append(CachedFunction(jitted))
    return _cached[-1]


def free_programs() -> None:
    """Frees the memory of all compiled programs, which are loaded or compiled again when they are next called."""
    for function in _cached:
        function.clear()
    jax.clear_caches()


class CachedFunction:
    """See `cached`. Calls whose programs cannot be stored go to the jitted function."""

    def __init__(self, jitted: Any):
        functools.update_wrapper(self, jitted)
        self._jitted, self._programs = jitted, {}
        self.trace, self.lower = jitted.trace, jitted.lower

    def clear(self) -> None:
        """Forgets the programs."""
        self._programs.clear()

    def __call__(self, *args: Any, **static: Any) -> Any:
        if _folder is None or jax.process_count() > 1:
            return self._jitted(*args, **static)
        leaves, tree = jax.tree.flatten(args)
        key = (tree, *map(_leaf, leaves), *static.items(), *(getattr(jax.config, name) for name in CONTEXT))
        if key not in self._programs:
            self._programs[key] = self._program(_folder, args, static)
        return self._programs[key](*args)

    def _program(self, folder: Path, args: tuple, static: Mapping[str, Any]) -> Callable:
        """Returns the program for arguments of these shapes, loaded or compiled; it takes `args`."""
        by_jit = functools.partial(self._jitted, **static)
        try:
            leaves, tree = jax.tree.flatten(args)
            name = f"{self._jitted.__module__}.{self._jitted.__qualname__}"
            facts = [name, str(tree), *map(_described_leaf, leaves), *map(_described, sorted(static.items()))]
        except TypeError:  # an argument of a type that says too little about the program
            return by_jit
        path = folder / f"{hashlib.sha256(repr((facts, _surroundings())).encode()).hexdigest()}{SUFFIX}"
        devices = _devices([*leaves, *static.values()])
        if (loaded := _load(path, devices)) is not None:
            return _checked(loaded, by_jit, path)
        with _without_jaxs_cache():
            program = self._jitted.lower(*args, **static).compile()
        _store(path, program, devices)
        return program


def _devices(arguments: Sequence[Any]) -> list[jax.Device]:
    """Returns the devices that a program with these arguments runs on, in order."""
    shardings = [x.sharding for x in arguments if isinstance(x, jax.Array) and x.committed]
    meshes = [x.mesh for x in shardings if isinstance(x, jax.sharding.NamedSharding)]
    if meshes := meshes + [x for x in arguments if isinstance(x, Mesh)]:
        return list(meshes[0].devices.flat)
    return [device for x in shardings[:1] for device in x.device_set] or jax.local_devices()[:1]


def _checked(program: Callable, otherwise: Callable, path: Path) -> Callable:
    """Calls a loaded program if its first run succeeds; else `otherwise`, and deletes its file."""
    chosen = []

    def call(*args: Any) -> Any:
        """Calls the program. Waits for the first run, because some errors are raised while it computes."""
        if chosen:
            return chosen[0](*args)
        try:
            out = jax.block_until_ready(program(*args))
            chosen.append(program)
        except Exception as error:
            logging.warning("a stored program cannot run, and is compiled again: %s", str(error).partition("\n")[0])
            path.unlink(missing_ok=True)
            chosen.append(otherwise)
            return otherwise(*args)
        return out

    return call


@contextlib.contextmanager
def _without_jaxs_cache() -> Iterator[None]:
    """Has jax compile. On CPUs, a program that jax's cache has loaded lacks functions when it is stored again."""
    before = jax.config.jax_enable_compilation_cache  # ty: ignore[missing-attribute]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


# ---- files ----


def _load(path: Path, devices: list[jax.Device]) -> Callable | None:
    """Returns a stored program; None if there is none that can be loaded."""
    try:
        content = path.read_bytes()
        digest, payload = content[:32], content[32:]
        if digest != hashlib.sha256(path.name.encode() + payload).digest():
            return None
        program = _unpacked(payload, devices)
        os.utime(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever unpickling and the backend raise
        logging.info("%s is compiled again: %s", path.name, error)
        return None
    return program


def _store(path: Path, program: Any, devices: list[jax.Device]) -> None:
    """Writes a program that can be loaded again, at once or not at all. Two processes may store the same one."""
    try:
        payload = pickle.dumps(serialize(program))
        _unpacked(payload, devices)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(hashlib.sha256(path.name.encode() + payload).digest() + payload)
        os.replace(file.name, path)
        _delete_unused(path.parent)
    except Exception as error:  # programs that the backend cannot serialize; full disks
        logging.info("%s is not stored: %s", path.name, error)
        with contextlib.suppress(NameError, OSError):
            os.unlink(file.name)


def _unpacked(payload: bytes, devices: list[jax.Device]) -> Callable:
    return deserialize_and_load(*pickle.loads(payload), backend=devices[0].client, execution_devices=devices)


def _delete_unused(folder: Path) -> None:
    for path in (*folder.glob(f"*{SUFFIX}"), *folder.glob("*.tmp")):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - UNUSED_DAYS * 24 * 3600:
                path.unlink()


# ---- what a program depends on ----


def _leaf(x: Any) -> tuple:
    """What distinguishes array arguments of one process, quickly."""
    if isinstance(x, jax.Array):
        return x.shape, x.dtype, x.weak_type, x.sharding, x.committed
    return np.shape(x), getattr(x, "dtype", type(x))


def _described_leaf(x: Any) -> tuple:
    """The same for all processes. Raises TypeError where the devices are unknown."""
    if not isinstance(x, jax.Array):
        return np.shape(x), str(getattr(x, "dtype", type(x)))
    return x.shape, str(x.dtype), x.weak_type, x.committed, _described(x.sharding)


def _described(value: Any) -> Any:
    """Returns a value as plain Python values, whose `repr` is complete. Raises TypeError for unknown types."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_described(each) for each in value]
    if isinstance(value, Mapping):
        return [[name, _described(each)] for name, each in sorted(value.items())]
    if isinstance(value, np.dtype) or isinstance(value, type) and issubclass(value, np.generic):
        return np.dtype(value).name
    if isinstance(value, np.ndarray):
        return [value.shape, value.dtype.name, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, Mesh):
        kinds = [(device.id, device.device_kind) for device in value.devices.flat]
        return [list(value.shape.items()), str(value.axis_types), kinds]
    if isinstance(value, jax.sharding.NamedSharding):
        return [_described(value.mesh), str(value.spec), value.memory_kind]
    if isinstance(value, jax.sharding.SingleDeviceSharding):
        return [(device.id, device.device_kind) for device in value.device_set] + [value.memory_kind]
    if dataclasses.is_dataclass(value):
        kind, own = type(value), ("parent", "name")  # those of Flax
        names = [field.name for field in dataclasses.fields(value) if field.name not in own]
        return [f"{kind.__module__}.{kind.__qualname__}", [(n, _described(getattr(value, n))) for n in names]]
    if dtype := getattr(value, "dtype", None):  # jnp.float32, which is not a type
        return np.dtype(dtype).name
    raise TypeError(f"programs that depend on a {type(value).__name__} are not stored")


@functools.cache
def _constant_surroundings() -> tuple:
    """Code, versions, devices and processor."""
    device = jax.devices()[0]
    files = sorted(Path(__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    versions = [(name, importlib.metadata.version(name)) for name in PACKAGES]
    return code, versions, platform.python_version(), device.client.platform_version, device.device_kind, *_processor()


def _surroundings() -> tuple:
    """Everything that a program depends on in addition to the arguments."""
    settings = sorted(
        (k, str(v)) for k, v in jax.config.values.items() if not any(word in k for word in WITHOUT_EFFECT)
    )
    context = [str(getattr(jax.config, name)) for name in CONTEXT]
    return *_constant_surroundings(), settings, context, [os.environ.get(name) for name in ENVIRONMENT]


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> Iterator[Any]:
    """The instructions and the number of threads that programs of a CPU are compiled for."""
    yield platform.machine()
    yield cores()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        yield sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})

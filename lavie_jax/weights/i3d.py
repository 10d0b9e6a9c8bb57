"""FVD's network from PyTorch files with pytorch-i3d's names, such as TATS' i3d_pretrained_400.pt."""

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lavie_jax.errors import UserError
from lavie_jax.models.i3d import I3D, MIN_FRAMES, SIDE
from lavie_jax.weights.names import TO_FLAX
from lavie_jax.weights.reading import read_weights
from lavie_jax.weights.safetensors_io import Tensor, check_finite, read_safetensors, write_safetensors
from lavie_jax.weights.saving import check_new_file

BRANCHES = {
    "b0": "Branch_0_0a", "b1a": "Branch_1_0a", "b1b": "Branch_1_0b", "b2a": "Branch_2_0a", "b2b": "Branch_2_0b",
    "b3b": "Branch_3_0b",
}  # fmt: skip
LEAVES = {
    "conv3d.weight": "conv/kernel", "bn.bias": "bias", "bn.running_mean": "mean", "bn.running_var": "var",
    "bn.weight": "scale",
}  # fmt: skip


def import_i3d(file: Path, out: Path, *, overwrite: bool = False) -> list[str]:
    """Writes the network as a .safetensors file, which `lavie_jax.evaluation fvd --i3d` reads; returns notes.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; nothing is written.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors.")
    check_new_file(out, overwrite=overwrite)
    tensors, notes = read_weights(file)
    params = _without_scales(dict(_renamed(file, tensors)))
    _check_shapes(file, params)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(out, {path.replace("/", "."): array for path, array in params.items()}, {})
    return [f"{file}: {note}" for note in notes]


def read_i3d(file: Path) -> dict:
    """Returns the parameters in a file that `import_i3d` wrote, a nested dict."""
    params = {name.replace(".", "/"): tensor.read() for name, tensor in read_safetensors(file)[0].items()}
    _check_shapes(file, params)
    for name, array in params.items():
        check_finite(f"{file}: {name}", array)
    return unflatten_dict(params, sep="/")


def _renamed(file: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array) of the tensors, with `scale` for the norms' scales, which our network does not have."""
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        match = re.fullmatch(r"(?P<module>[\w.]+?)\.(?P<leaf>conv3d\.(?:weight|bias)|bn\.\w+)", name)
        module, _, branch = (match["module"] if match else "").partition(".")
        path = {"logits": "Logits"}.get(module, module) + (f"/{BRANCHES.get(branch, branch)}" if branch else "")
        leaf = match["leaf"] if match else ""
        if module == "logits":
            leaf = leaf.replace("conv3d.weight", "kernel").replace("conv3d.bias", "bias")
        array = tensor.read().astype(np.float32)
        yield f"{path}/{LEAVES.get(leaf, leaf)}", array.transpose(TO_FLAX[5]) if array.ndim == 5 else array


def _without_scales(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Multiplies the norms' scales into the convolutions and the means: s (K x - m) = (s K) x - s m."""
    kept = {path: array for path, array in params.items() if not path.endswith("/scale")}
    for path, scale in params.items():
        unit = path.removesuffix("/scale")
        if unit != path and f"{unit}/conv/kernel" in kept and f"{unit}/mean" in kept:
            kept[f"{unit}/conv/kernel"] = kept[f"{unit}/conv/kernel"] * scale
            kept[f"{unit}/mean"] = kept[f"{unit}/mean"] * scale
    return kept


@functools.cache
def expected_shapes() -> dict[str, tuple[int, ...]]:
    """{path: shape} of the network's parameters."""
    clip = jax.ShapeDtypeStruct((1, MIN_FRAMES, SIDE, SIDE, 3), jnp.float32)
    params = jax.eval_shape(I3D().init, jax.random.key(0), clip)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def _check_shapes(file: Path, params: Mapping[str, np.ndarray]) -> None:
    expected = expected_shapes()
    lines = [f"missing {path}" for path in expected if path not in params]
    lines += [f"unexpected {path}" for path in params if path not in expected]
    lines += [f"shape of {path}" for path in expected if path in params and params[path].shape != expected[path]]
    if lines:
        raise UserError(
            f"{file} is not the I3D of FVD with pytorch-i3d's names: {len(lines)} tensors do not fit, such as "
            f"{', '.join(lines[:3])}"
        )

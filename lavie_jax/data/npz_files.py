"""Videos as arrays: an .npz with `video`, uint8 (T, H, W, 3), and `fps`, a number."""

import math
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lavie_jax.errors import UserError

FPS = 8.0  # of a file without a rate


def read_npz(path: str | Path, max_bytes: float = math.inf) -> tuple[UInt8[np.ndarray, "t h w 3"], float]:
    """Returns (frames, frames per second) of an .npz with the arrays that `video_files.save_as` writes.

    Raises:
        UserError: it is damaged, has other arrays, or needs more than `max_bytes`.
    """
    name, needs = os.fspath(path), "it needs `video`, uint8 (T, H, W, 3), and may have `fps`, one number above 0"
    try:
        with Path(path).open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise UserError(f"{name!r} is one array, not an .npz of several: {needs}")
            if "video" not in arrays.files:
                raise UserError(f"{name!r} has the arrays {', '.join(arrays.files) or 'none'}; {needs}")
            shape = _npy_shape(arrays, "video")
            if shape is not None and math.prod(shape) > max_bytes:
                raise UserError(f"the video {name!r} of shape {shape} does not fit into memory: store fewer frames")
            frames = arrays["video"]
            rate = np.asarray(arrays["fps"] if "fps" in arrays.files else FPS)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read the video {name!r}: {error}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise UserError(f"`video` in {name!r} is {frames.dtype} {frames.shape}; {needs}")
    if rate.size != 1 or rate.dtype.kind not in "iuf" or not 0 < float(rate.item()) < math.inf:
        raise UserError(f"`fps` in {name!r} is {rate.tolist()}; {needs}")
    return frames, float(rate.item())


def _npy_shape(arrays: np.lib.npyio.NpzFile, name: str) -> tuple[int, ...] | None:
    """The shape of an array in an .npz, from its header."""
    with arrays.zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        return None if read is None else read(file)[0]

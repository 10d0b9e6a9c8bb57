"""Textual inversions: new words, each of which stands for one or more rows of the text encoder's token embedding.

Reads the files of diffusers (`{"<cat>": vectors}`), A1111 (`string_to_param`), kohya (`emb_params`), and bare tensors.
Files in PyTorch's format are read without running their code (`torch_files.py`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lavie_jax.disk import file_hash
from lavie_jax.errors import UserError, user_path
from lavie_jax.weights.file_kinds import file_format
from lavie_jax.weights.safetensors_io import Tensor, check_finite, read_safetensors
from lavie_jax.weights.torch_files import read_torch_object

EMB_PARAMS = "emb_params"  # kohya's only key, which is not a word
A1111 = "string_to_param"
MAX_VECTORS = 75  # that a prompt of CLIP has room for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding:
    """A word and its vectors.

    Attributes:
        path: the file.
        sha256: of the file.
        word: as it is written in prompts.
        vectors: float32.
    """

    path: Path
    sha256: str
    word: str
    vectors: Float[np.ndarray, "n width"]


def read_embedding(path: str | Path, word: str | None = None) -> Embedding:
    """Reads a textual inversion.

    Args:
        path: a .safetensors, .pt or .bin file.
        word: replaces the file's word: the key of diffusers' files, otherwise the file's name without its ending.

    Raises:
        UserError: the file is missing, damaged, for Stable Diffusion XL, not a textual inversion, or has no word.
    """
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"embedding file {path} {'is a folder' if path.is_dir() else 'does not exist'}.")
    content = read_safetensors(path)[0] if file_format(path) == "safetensors" else read_torch_object(path)
    own, tensor = _find(path, content)
    word = own if word is None else word
    if not word:
        raise UserError(f"{path} contains vectors without a word: give one, as in --embedding '{path}:<word>'.")
    if not word.strip() or word.split() != [word]:
        raise UserError(f"{path}: the word {word!r} contains spaces: give one as in --embedding '{path}:<word>'.")
    vectors = np.array(tensor.read()).astype(np.float32)
    check_finite(f"{path}: {word}", vectors)
    vectors = vectors.reshape(-1, vectors.shape[-1])
    if not 1 <= len(vectors) <= MAX_VECTORS:
        raise UserError(f"{path} has {len(vectors)} vectors for {word!r}; allowed are 1 to {MAX_VECTORS}.")
    return Embedding(path=path, sha256=file_hash(path), word=word, vectors=vectors)


def _find(path: Path, content: Any) -> tuple[str | None, Tensor]:
    """Returns the word, if the file has one, and the vectors."""
    if isinstance(content, Tensor):
        return None, _checked(path, "the tensor", content)
    if not isinstance(content, Mapping):
        raise _other(path, type(content).__name__)
    if {"clip_l", "clip_g"} & set(content):
        raise UserError(f"{path} is an embedding for Stable Diffusion XL (clip_l, clip_g), not 1.x.")
    if A1111 in content:
        params = content[A1111]
        tensors = [v for v in params.values() if isinstance(v, Tensor)] if isinstance(params, Mapping) else []
        if len(tensors) != 1:
            raise UserError(f"{path} has {len(tensors)} tensors in {A1111}; an embedding has one.")
        return path.stem, _checked(path, A1111, tensors[0])
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) != 1 or len(tensors) != len(content):
        raise _other(path, f"a file with {len(content)} entries ({', '.join(map(str, list(content)[:4]))})")
    ((key, tensor),) = tensors.items()
    return path.stem if key == EMB_PARAMS else str(key), _checked(path, str(key), tensor)


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim not in (1, 2) or 0 in tensor.shape or tensor.dtype.kind in "iub":
        raise _other(path, f"{name}, {tensor.dtype.name} of shape {list(tensor.shape)}")
    return tensor


def _other(path: Path, found: str) -> UserError:
    return UserError(
        f"{path} is not a textual inversion: it contains {found}; expected is one entry, a word with its vectors."
    )

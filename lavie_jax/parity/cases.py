"""Golden cases on disk, and the formula that generates their parameters and inputs.

A case is a pair: CASE.json (kind, config, shapes of inputs and parameters) and CASE.npz (outputs of the original
models). Nothing else is stored: parameters and inputs are random numbers seeded by their name and a salt. Names, shapes
and layouts are PyTorch's here.
"""

import dataclasses
import json
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lavie_jax.errors import UserError

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One case as read from disk; `parameters` maps PyTorch names to shapes."""

    name: str
    kind: str
    salt: str
    model: dict[str, Any]
    inputs: dict[str, Any]
    settings: dict[str, Any]  # the other fields of the JSON: steps, guidance_scale, shape, ...
    parameters: dict[str, list[int]]
    stored: Arrays

    def draw(self, text: str, shape: tuple[int, ...] | list[int], scale: float = 1.0) -> np.ndarray:
        """Returns float32 normal numbers with deviation `scale`, which depend only on `text` and the salt."""
        seed = zlib.crc32((self.salt + text).encode())
        return (np.random.RandomState(seed).standard_normal(shape) * scale).astype(np.float32)

    def input(self, name: str) -> np.ndarray:
        """Returns the input `name`, in PyTorch's layout."""
        return self.draw(f"{self.name}/{name}", self.inputs[name], self.inputs.get(f"{name}_scale", 1.0))

    def parameter(self, name: str, shape: list[int]) -> np.ndarray:
        """Returns the value of the PyTorch parameter `name`; buffers have none."""
        if name.endswith(("relative_attention_bias.weight", "embedding.weight")):
            return self.draw(name, shape, 0.5)
        if name.endswith("bias"):
            return self.draw(name, shape, 0.05)
        if len(shape) == 1:
            return 1 + self.draw(name, shape, 0.1)
        return self.draw(name, shape, 1 / math.sqrt(math.prod(shape[1:])))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """The required contents of a kind of case."""

    model: bool = True  # a config and parameters
    shapes: tuple[str, ...] = ()  # inputs, given by their shapes
    numbers: tuple[str, ...] = ()  # inputs, given as lists of numbers
    masks: tuple[str, ...] = ()  # inputs, given as a row of zeros and ones for each clip
    settings: tuple[str, ...] = ()  # numbers, or `shape`, `modes` or `shuffles`
    stored: tuple[str, ...] = ()  # arrays; without the latents of samplers, which each case chooses


NEEDS = {
    "clip_text": Needs(stored=("ids", "last_hidden_state")),
    "vae": Needs(shapes=("image", "latent"), stored=("mean", "logvar", "decoded")),
    "base_unet": Needs(shapes=("sample", "context"), numbers=("timesteps",), stored=("output",)),
    "interpolation_unet": Needs(shapes=("sample", "context"), numbers=("timesteps",), stored=("output",)),
    "vsr_unet": Needs(
        shapes=("sample", "low_res", "context"), numbers=("timesteps", "noise_level"), stored=("output",)
    ),
    "base_sample": Needs(shapes=("init", "context", "uncond_context"), settings=("steps", "guidance_scale")),
    "interpolation_sample": Needs(
        shapes=("key_frames", "init", "context", "negative_context"),
        settings=("steps", "guidance_scale"),
        stored=("latents",),
    ),
    "vsr_sample": Needs(
        shapes=("frames", "low_res_noise", "init", "context", "uncond_context"),
        settings=("steps", "guidance_scale", "noise_level"),
        stored=("noised_low_res", "latents"),
    ),
    "freenoise_unet": Needs(
        shapes=("sample", "context"), numbers=("timesteps",), settings=("window", "stride"), stored=("output",)
    ),
    "freenoise_sample": Needs(
        shapes=("init", "context", "uncond_context"),
        settings=("steps", "guidance_scale", "window", "stride", "shuffles"),
        stored=("noise",),
    ),
    "sampling_loops": Needs(model=False, settings=("shape",)),
    "seine_unet": Needs(
        shapes=("sample", "masked_latents", "context"), numbers=("timesteps",), masks=("mask",), stored=("output",)
    ),
    "seine_sample": Needs(
        shapes=("init", "masked_latents", "context", "negative_context"),
        masks=("mask",),
        settings=("steps", "guidance_scale"),
    ),
    "seine_condition": Needs(model=False, shapes=("images",), settings=("frames", "modes")),
}


def read_case(path: Path) -> Case:
    """Reads the case whose JSON is at `path`. Raises UserError when one of its two files is malformed."""
    fields = read_json(path)
    name, kind, salt = (fields.get(field, "") for field in ("case", "kind", "salt"))
    strings = all(isinstance(text, str) for text in (name, kind, salt))
    require(path, strings, "case, kind and salt must be strings")
    require(path, bool(name and kind), "the fields case and kind are required")
    try:
        # opened here: np.load itself leaves a damaged file open
        with path.with_suffix(".npz").open("rb") as file, np.load(file) as arrays:
            stored = {key: arrays[key] for key in arrays}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path.with_suffix('.npz')}: {first_line(error)}") from error
    require(path, bool(stored), "its npz has no arrays")
    known = ("case", "kind", "salt", "model", "inputs", "parameters")
    case = Case(
        name=name,
        kind=kind,
        salt=salt,
        model=fields.get("model", {}),
        inputs=fields.get("inputs", {}),
        settings={k: v for k, v in fields.items() if k not in known},
        parameters=read_parameters(path, fields.get("parameters", {})),
        stored=stored,
    )
    if kind in NEEDS:
        check_fields(path, case, NEEDS[kind])
    return case


def read_json(path: Path) -> dict:
    """Reads the JSON object in a file. Raises UserError when there is none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    require(path, isinstance(fields, dict), "it must contain a JSON object")
    return fields


def read_parameters(path: Path, parameters: Any) -> dict[str, list[int]]:
    """Returns {name: shape}, from the case or the file it refers to, relative to the parent of its folder."""
    if isinstance(parameters, str):
        path = Path(os.path.abspath(path)).parents[1] / parameters
        parameters = read_json(path)
    require(path, isinstance(parameters, dict), "parameters must be an object or the name of a file")
    for name, shape in parameters.items():
        require(
            path, is_shape(shape), f"the shape of parameter {name} must be a list of positive integers, not {shape!r}"
        )
    return parameters


def check_fields(path: Path, case: Case, needs: Needs) -> None:
    """Raises UserError when a required field is missing or of the wrong type."""
    objects = isinstance(case.inputs, dict) and isinstance(case.model, dict)
    require(path, objects, "inputs and model must be objects")
    require(path, not needs.model or bool(case.model and case.parameters), "model and parameters are required")
    for name in needs.shapes:
        require(path, is_shape(case.inputs.get(name)), f"the input {name} must be a shape")
        scale = case.inputs.get(f"{name}_scale", 1.0)
        require(path, is_number(scale), f"{name}_scale must be a number")
    for name in needs.numbers:
        numbers = case.inputs.get(name)
        listed = isinstance(numbers, list) and bool(numbers) and all(map(is_number, numbers))
        require(path, listed, f"the input {name} must be a list of numbers")
    for name in needs.masks:
        require(path, is_mask(case.inputs.get(name)), f"the input {name} must be rows of zeros and ones")
    for name in needs.settings:
        value = case.settings.get(name)
        valid = {"shape": is_shape, "modes": is_names, "shuffles": is_shuffles}.get(name, is_number)(value)
        require(path, valid, f"{name} is missing or invalid: {value!r}")
    for name in needs.stored:
        require(path, name in case.stored, f"its npz lacks {name}")


def require(path: Path, condition: bool, problem: str) -> None:
    """Raises UserError with the file's path unless `condition`."""
    if not condition:
        raise UserError(f"{path}: {problem}")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_mask(value: Any) -> bool:
    """Whether a JSON value is a list of rows of equal length, of zeros and ones."""
    rows = isinstance(value, list) and bool(value) and all(isinstance(row, list) and row for row in value)
    return rows and len({len(row) for row in value}) == 1 and all(x in (0, 1) for row in value for x in row)


def is_names(value: Any) -> bool:
    """Whether a JSON value is a list of names."""
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a list of positive integers."""
    return isinstance(value, list) and all(type(side) is int and side > 0 for side in value)


def is_shuffles(value: Any) -> bool:
    """Whether a JSON value is a list of lists of frames."""
    if not isinstance(value, list) or not all(isinstance(block, list) for block in value):
        return False
    return all(type(frame) is int and frame >= 0 for block in value for frame in block)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where that is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

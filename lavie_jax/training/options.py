"""The command line of train.py: a config file, and `--config.FIELD=VALUE` for any of its fields.

`--config FILE.py:MODE` calls `get_config("MODE")` of that file, which returns an
`ml_collections.ConfigDict`. A field that does not exist is refused with the nearest name that does.
The ConfigDict stops at the script: below it there are dataclasses and plain values.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lavie_jax
from lavie_jax.errors import UserError, check_folder, suggest
from lavie_jax.models.attention import KERNELS
from lavie_jax.models.unet import REMAT
from lavie_jax.training.optimizer import REGIMES

USAGE = (
    "usage: python train.py --config FILE.py[:MODE] --workdir DIR [--config.FIELD=VALUE ...] "
    "[--restore-step N] [--profile]"
)
FLAGS = ("config", "workdir", "restore-step", "profile")
UNSET = ("data.path", "data.image_path", "data.fps")  # fields that may be None, on the command line "" or "None"


class Arguments(NamedTuple):
    """What the command line says.

    Attributes:
      config: a locked ConfigDict.
      workdir: where everything is written.
      restore_step: the checkpoint to go back to; None = the newest.
      profile: write a trace of a few steps.
    """

    config: Any
    workdir: Path
    restore_step: int | None
    profile: bool


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the words of the command line, without the program's name.

    Raises:
      UserError: an unknown flag or field, a value of the wrong type, a missing file.
    """
    flags: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, value = word.partition("=")
        if not name.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; {USAGE}")
        if name == "--profile":
            if has_value:
                raise UserError(f"--profile takes no value, such as {value!r}; {USAGE}")
        elif not has_value:
            if not words or words[0].startswith("--"):
                raise UserError(f"{name} needs a value; {USAGE}")
            value = words.pop(0)
        flags[name[2:]] = value

    overrides = {k.removeprefix("config."): v for k, v in flags.items() if k.startswith("config.")}
    unknown = [k for k in flags if k not in FLAGS and not k.startswith("config.")]
    if unknown:
        raise UserError(f"unknown flag --{unknown[0]}{suggest(unknown[0], (*FLAGS, 'config.FIELD'))}")
    for name in ("config", "workdir"):
        if not flags.get(name):
            raise UserError(f"--{name} is missing; {USAGE}")
    restore_step = flags.get("restore-step")
    if restore_step is not None and not restore_step.isdecimal():
        raise UserError(f"--restore-step takes the step of a checkpoint, a number such as 500, not {restore_step!r}.")
    config = load(flags["config"])
    for field, text in overrides.items():
        override(config, field, text)
    return Arguments(
        config=config,
        workdir=Path(flags["workdir"]).expanduser(),
        restore_step=None if restore_step is None else int(restore_step),
        profile="profile" in flags,
    )


def check(config: Any, workdir: Path) -> None:
    """Refuses, before anything heavy, numbers that no run can have and a workdir that cannot be made."""
    for field in ("steps", "batch", "accumulate", "log_every", "checkpoint_every", "held_out_every",
                  "held_out_batches", "sample_every", "keep_checkpoints", "skip_limit"):  # fmt: skip
        if config[field] < 1:
            raise UserError(f"config field {field!r} must be at least 1, not {config[field]}.")
    for field in ("keep_best", "keep_every", "workers"):
        if config[field] < 0:
            raise UserError(f"config field {field!r} must be at least 0, not {config[field]}.")
    if config.prompts and config.stage != "base":
        raise UserError(f"prompts are sampled from the base stage's models; this config's stage is {config.stage!r}.")
    if config.prompts and config.sample_every % config.checkpoint_every:
        raise UserError(
            f"sample_every = {config.sample_every} must be a multiple of checkpoint_every = {config.checkpoint_every}: "
            "samples are made from the weights that a checkpoint writes."
        )
    choices = {
        "dtype": ("auto", "float32", "bfloat16"),
        "remat": REMAT,
        "regime": REGIMES,
        "attention_kernel": [name for name in KERNELS if name != "flash"],  # no kernel for 77 words: "auto" knows
    }
    for field, allowed in choices.items():
        if config[field] not in allowed:
            raise UserError(f"unknown {field} {config[field]!r}{suggest(config[field], allowed)}")
    if not 0 <= config.peak_tflops < float("inf"):
        raise UserError(f"config field 'peak_tflops' must be at least 0, not {config.peak_tflops}.")
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"config field 'ema_decay' must be from 0 to below 1, not {config.ema_decay}.")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard=True needs the package tensorboard: install it, or set tensorboard=False.")
    if (workdir / "weights").exists() and not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"--workdir {workdir} has weights/ and no checkpoints/: training would overwrite what it did not write. "
            "Name another --workdir."
        )
    check_folder(workdir, f"--workdir {workdir}")


def load(spec: str) -> Any:
    """`"configs/base.py:tiny"` -> the locked ConfigDict that `get_config("tiny")` there returns."""
    name, _, mode = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        raise UserError(f"config file {name} does not exist; see the files under configs/.")
    if importlib.util.find_spec("ml_collections") is None:
        raise UserError("training needs the package ml_collections (pip install ml_collections).")
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {name} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {name} defines no get_config(mode).")
    config = module.get_config(mode)
    config.lock()
    return config


def check_mode(mode: str, allowed: Sequence[str]) -> None:
    """For config files: refuses a mode (`FILE.py:MODE`) that the file does not have."""
    if mode and mode not in allowed:
        raise UserError(f"unknown config mode {mode!r}{suggest(mode, allowed)}")


def override(config: Any, field: str, text: str) -> None:
    """Sets the dotted `field` to `text`, read as the type that the field has now."""
    *groups, leaf = field.split(".")
    node = config
    for i, name in enumerate(groups):
        if name not in node or not _is_group(node[name]):
            raise UserError(f"unknown config group {'.'.join(groups[: i + 1])!r}{_nearest(field, config)}")
        node = node[name]
    if leaf not in node:
        # In a group, its own fields are few enough to list; at the top, only the nearest name helps.
        hint = suggest(leaf, node) if groups else _nearest(field, config)
        raise UserError(f"unknown config field {field!r}{hint}")
    if _is_group(node[leaf]):
        inner = fields(node[leaf])
        raise UserError(f"config field {field!r} is a group; set one of {', '.join(f'{field}.{k}' for k in inner)}")
    with node.ignore_type():
        node[leaf] = _convert(text, node[leaf], field)


def fields(config: Any, prefix: str = "") -> list[str]:
    """The dotted names of all fields."""
    out = []
    for key in config:
        value = config[key]
        out += fields(value, f"{prefix}{key}.") if _is_group(value) else [prefix + key]
    return out


def facts(config: Any) -> dict[str, Any]:
    """{name: value} of what hosts that train together have in common: every field, the code, the libraries."""
    root, code = Path(lavie_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    values = {name: functools.reduce(lambda node, key: node[key], name.split("."), config) for name in fields(config)}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    return {f"config.{name}": value for name, value in values.items()} | {"code": code.hexdigest()} | versions


def _is_group(value: Any) -> bool:
    return hasattr(value, "keys")


def _nearest(field: str, config: Any) -> str:
    """ "; did you mean 'optimizer.clip'?", or the names at the top where nothing is near."""
    hint = suggest(field, fields(config)).partition(" Allowed:")[0]
    return hint if hint != "." else f". Fields: {', '.join(config)}"


def _convert(text: str, old: Any, field: str) -> Any:
    """`text` as a value of the type of `old`."""
    wrong = UserError(f"config field {field!r} takes a {type(old).__name__} such as {old!r}, not {text!r}.")
    if field in UNSET and text in ("", "None"):
        return None
    if old is None or isinstance(old, str):
        return text
    if isinstance(old, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise wrong
        return text.lower() in ("true", "1")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = tuple(text.split(",")) if isinstance(old, (tuple, list)) else None
    if isinstance(old, (tuple, list)):
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        kind = type(old[0]) if old else None
        if kind and not all(isinstance(v, (kind, int) if kind is float else kind) for v in value):
            raise wrong
        return value
    if isinstance(old, int):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(value).is_integer():
            raise wrong
        return int(value)
    if isinstance(old, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong
        return float(value)
    raise wrong

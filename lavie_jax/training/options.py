"""The command line of train.py: a config file, and `--config.FIELD=VALUE` for any field of a run.

`--config FILE.py:MODE` calls `get_config("MODE")` of that file, which returns an `ml_collections.ConfigDict`. Fields
that it leaves out have their defaults. The command line can set every field, also those that the file leaves out; types
come from the dataclasses in `training/config.py`.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import lavie_jax
from lavie_jax import remote
from lavie_jax.commands import config_file
from lavie_jax.errors import UserError, suggest, user_path
from lavie_jax.fields import BOOLEANS, describe, expanded, parse_text, rule_of, settable
from lavie_jax.stages.settings import MAIN_STAGE, STAGE_INFO
from lavie_jax.training import sinks
from lavie_jax.training.config import (
    NETWORKS,
    check_values,
    checked,
    defaults,
    field_types,
    group_classes,
    read_networks,
    run_class,
    text_network,
)
from lavie_jax.training.optimizer import ADAPTER, OptimizerConfig
from lavie_jax.training.workdir import Workdir
from lavie_jax.weights.hub.repository import HUB
from lavie_jax.weights.locations import local_folder

USAGE = (
    "usage: python train.py --config FILE.py[:MODE] --workdir DIR [--config.FIELD=VALUE ...] "
    "[--restore-step N] [--profile]"
)
# Settings of jax, from its environment variables, that change the numbers of a run.
JAX_SETTINGS = (
    "jax_threefry_partitionable", "jax_default_prng_impl", "jax_enable_x64", "jax_default_matmul_precision",
)  # fmt: skip
FLAGS = ("config", "workdir", "restore-step", "profile")
FOLDERS = ("init_from", "vae_from", "text_from")  # fields that name a weights folder, or a location on the hub
TEXT_NETWORK = "text_network"  # a field that determines others


class Arguments(NamedTuple):
    """The parsed command line.

    Attributes:
        config: a locked ConfigDict.
        workdir: folder of all outputs, or the URL of a bucket as a Path (`training/workdir.py`).
        restore_step: the checkpoint to resume from; None = the newest.
        profile: whether to write a trace of a few steps.
    """

    config: Any
    workdir: Path
    restore_step: int | None
    profile: bool


def parse(argv: Sequence[str]) -> Arguments:
    """Parses the arguments of the command line, without the program's name.

    Raises:
        UserError: an unknown flag or field, a value of the wrong type or out of range, or a missing file.
    """
    flags = _flags(argv)
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
    for field, text in sorted(overrides.items(), key=lambda item: item[0] != TEXT_NETWORK):  # fields follow from it
        override(config, field, text)
    check_values(config.to_dict())  # before weights are downloaded
    OptimizerConfig(**config.optimizer)  # likewise: raises for settings that are out of range
    for name in FOLDERS:
        text = str(config.get(name, ""))
        if text.startswith(HUB) or remote.url(text):  # recorded as the folder in the cache, which belongs to a version
            config[name] = str(local_folder(config[name]))
    workdir = user_path(flags["workdir"])
    read_networks(config, workdir / "weights")
    return Arguments(
        config=config,
        workdir=workdir,
        restore_step=None if restore_step is None else int(restore_step),
        profile="profile" in flags,
    )


def is_distributed(argv: Sequence[str]) -> bool:
    """Returns whether the command line, which may be wrong otherwise, asks for several hosts."""
    words = [word for arg in argv for word in arg.split("=", 1)]
    values = [value for name, value in zip(words, words[1:]) if name == "--config.distributed"]
    return any(BOOLEANS.get(value.lower(), False) for value in values)


def _flags(argv: Sequence[str]) -> dict[str, str]:
    """{flag without dashes: its value}; the value of --profile is empty."""
    flags: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, value = word.partition("=")
        if not name.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; {USAGE}")
        if name == "--profile":
            if has_value:
                raise UserError(f"--profile takes no value, not {value!r}; {USAGE}")
        elif not has_value:
            if not words or words[0].startswith("--"):
                raise UserError(f"{name} needs a value; {USAGE}")
            value = words.pop(0)
        flags[name[2:]] = value
    return flags


def check(config: Any, workdir: Path) -> None:
    """Checks that fields of a run fit each other, and that its workdir can be written, before anything expensive.

    Raises:
        UserError: fields contradict each other, or the workdir cannot be used.
    """
    from_text = [name for name, info in STAGE_INFO.items() if info.from_text]
    if config.prompts and config.stage not in from_text:
        raise UserError(
            f"prompts are sampled by stages that start from text ({', '.join(from_text)}), not by {config.stage!r}: "
            "set prompts=()."
        )
    if config.prompts and config.regime == ADAPTER and not config.init_from:
        raise UserError("an adapter is sampled with the weights that it was trained on: set init_from, or prompts=().")
    if config.prompts and config.sample_every % config.checkpoint_every:
        raise UserError(
            f"sample_every = {config.sample_every} must be a multiple of checkpoint_every = {config.checkpoint_every}: "
            "samples come from the weights folder that is written with a checkpoint."
        )
    sinks.names(config.metrics)
    storage = Workdir.of(workdir)
    own = storage.url is None  # a bucket's copy of this number may be left of a killed process
    if own and (workdir / "weights").exists() and not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"--workdir {workdir} has weights/ but no checkpoints/, so this run would overwrite another program's "
            "weights. Name another --workdir."
        )
    storage.check()


def load(spec: str) -> Any:
    """Returns the locked ConfigDict of a spec: "configs/base.py:tiny" calls `get_config("tiny")` of that file.

    Raises:
        UserError: the file is missing, fails, or returns something other than the config of a run.
    """
    name, _, mode = spec.partition(":")
    path = user_path(name)
    if not path.is_file():
        path = config_file(name)
    if path is None:
        raise UserError(f"config file {name} does not exist; see the files under configs/.")
    if importlib.util.find_spec("ml_collections") is None:
        raise UserError("training needs the package ml_collections (pip install ml_collections).")
    import ml_collections  # needed for training only

    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {name} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError("it defines no get_config(mode).")
        values = module.get_config(mode)
        if not isinstance(values, ml_collections.ConfigDict):
            raise UserError(f"get_config returns a ConfigDict, not {values!r}.")
        config = ml_collections.ConfigDict(checked(values.to_dict()))
    except UserError as error:
        raise UserError(f"config file {spec}: {error}") from error
    except Exception as error:
        raise UserError(f"config file {spec} fails with {type(error).__name__}: {error}") from error
    return config.lock()


def new_config(stage: str, text: str | None = None) -> Any:
    """For config files: an unlocked ConfigDict with the defaults of a stage, or of the VAE; see `config.defaults`."""
    import ml_collections  # needed for training only

    return ml_collections.ConfigDict(defaults(stage) if text is None else defaults(stage, text))


def check_mode(mode: str, allowed: Sequence[str]) -> None:
    """For config files: raises UserError for a mode (`FILE.py:MODE`) that the file does not have."""
    if mode and mode not in allowed:
        raise UserError(f"unknown config mode {mode!r}{suggest(mode, allowed)}")


def override(config: Any, field: str, text: str) -> None:
    """Sets the dotted `field` to `text`, parsed as the type that the field is declared with.

    Raises:
        UserError: there is no such field, or the text is not a value of its type.
    """
    network = text_network(config)
    types = field_types(config.stage, network)
    group, _, leaf = field.rpartition(".")
    if not group and leaf in types:
        if leaf in NETWORKS and text == "None":
            with config.ignore_type():
                config[leaf] = None
            return
        inner = ", ".join(f"{field}.{name}" for name in types[leaf])
        raise UserError(f"config field {field!r} is a group; set one of {inner}")
    if group not in types:
        raise UserError(f"unknown config group {group!r}{_nearest(field, types)}")
    if leaf not in types[group]:
        # A group is short enough to list; at the top level only the nearest name helps.
        hint = suggest(leaf, types[group]) if group else _nearest(field, types)
        raise UserError(f"unknown config field {field!r}{hint}")
    node = config[group] if group else config
    if node is None:
        raise UserError(f"config field {field!r}: {group} is None, so that it is read from init_from")
    declared = settable(group_classes(config.stage, network)[group] if group else run_class(config.stage))[leaf]
    with node.ignore_type():
        node[leaf] = expanded(declared, parse_text(f"config field {field!r}", text, types[group][leaf]))
    if field == TEXT_NETWORK and (chosen := text_network(config)) != network:
        config.text_encoder = new_config(config.stage, chosen).text_encoder


def help_text(argv: Sequence[str] = ()) -> str:
    """A line for every field of a run: its value in the config that `argv` names, or its default, and its help."""
    specs = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    specs += [value for word, value in zip(argv, argv[1:]) if word == "--config"]
    config = load(specs[0]).to_dict() if specs else defaults(MAIN_STAGE)
    types = field_types(config["stage"], text_network(config))
    lines = [f"fields of {specs[0] if specs else 'the base stage'}, each set by --config.FIELD=VALUE:"]
    for group, kinds in types.items():
        cls = group_classes(config["stage"], text_network(config))[group] if group else run_class(config["stage"])
        lines.append("")
        for name, kind in kinds.items():
            rule, values = rule_of(settable(cls)[name]), config[group] if group else config
            value = f" = {values[name]!r}" if values and name in values else ""
            allowed = " (one of " + ", ".join(rule.choices) + ")" if rule.choices else f" ({describe(kind)})"
            lines.append(f"  {group + '.' if group else ''}{name}{value}{allowed}")
            lines += [f"      {rule.help}"] if rule.help else []
    return "\n".join(lines)


def fields(config: Any, prefix: str = "") -> list[str]:
    """The dotted names of all fields of a config."""
    out = []
    for key in config:
        value = config[key]
        out += fields(value, f"{prefix}{key}.") if hasattr(value, "keys") else [prefix + key]
    return out


def facts(config: Any) -> dict[str, Any]:
    """{name: value} of everything that hosts training together must share: all fields, the code, library versions."""
    root, code = Path(lavie_jax.__file__).parents[1], hashlib.sha256()
    # The package, and beside it, in a clone of the repository, the scripts and the configs.
    files = [*(root / "lavie_jax").rglob("*.py"), *(root / "configs").rglob("*.py"), root / "train.py"]
    for path in sorted(path for path in files if path.is_file()):
        code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    values = {name: functools.reduce(lambda node, key: node[key], name.split("."), config) for name in fields(config)}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    settings = {name: getattr(jax.config, name) for name in JAX_SETTINGS}
    return (
        {f"config.{name}": value for name, value in values.items()} | {"code": code.hexdigest()} | versions | settings
    )


def _nearest(field: str, types: Mapping[str, Mapping[str, Any]]) -> str:
    """A hint such as "; did you mean 'optimizer.clip'?", or all top-level names if none is near."""
    names = [f"{group}.{name}".lstrip(".") for group, kinds in types.items() for name in kinds]
    hint = suggest(field, names).partition(" Allowed:")[0]
    return hint if hint != "." else f". Fields: {', '.join([*types[''], *filter(None, types)])}"

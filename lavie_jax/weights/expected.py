"""Which parameters a configuration has, and the strict comparison of a file with them."""

import hashlib
import json
from collections.abc import Callable, Mapping

from flax.traverse_util import flatten_dict

import lavie_jax
from lavie_jax.errors import UserError
from lavie_jax.models.registry import Config, abstract_params
from lavie_jax.weights.names import is_buffer

Shapes = Mapping[str, tuple[int, ...]]  # {path: shape}


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every parameter of the network that `config` describes; nothing is computed."""
    flat = flatten_dict(abstract_params(config), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def fingerprint(config: Config, given: Mapping[str, tuple[int, ...]]) -> str:
    """What a part's config.json keeps when its tensors were compared with the configuration and found to fit.

    A file that still has its seal needs no second comparison, for which the model is traced: a second or two for a
    small UNet, four for a released one. Another version of this library knows no seal of this one.
    """
    facts = [lavie_jax.__version__, config.to_dict(), sorted((path, list(shape)) for path, shape in given.items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def our_name(path: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """How a weights folder's file names a parameter."""
    return path.replace("/", "."), shape


def compare(
    what: str,
    config: Config,
    given: Mapping[str, tuple[int, ...]],
    shown: Callable[[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = our_name,
) -> list[str]:
    """Every difference between the shapes of a file, {path: shape}, and those that `config` needs, a line each.

    `what` is the file's name, and `shown` says how the file itself names and shapes a parameter. Buffers are no
    difference.
    """
    expected = expected_shapes(config)
    lines = []
    for path, shape in expected.items():
        name, needed = shown(path, shape)
        if path not in given:
            lines.append(f"{what}: missing {name} {list(needed)}")
        elif tuple(given[path]) != shape:
            lines.append(f"{what}: {name} has shape {list(shown(path, given[path])[1])}, not {list(needed)}")
    for path, shape in given.items():
        if path not in expected and not is_buffer(path):
            name, found = shown(path, shape)
            lines.append(f"{what}: unexpected {name} {list(found)}")
    return lines


def refuse(lines: list[str]) -> None:
    """Raises one UserError with all `lines`, when there are any."""
    if lines:
        count = "1 tensor does" if len(lines) == 1 else f"{len(lines)} tensors do"
        raise UserError(f"{count} not fit; nothing was written:\n  " + "\n  ".join(lines))

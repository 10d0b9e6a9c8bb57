"""The parameters that a config needs, and the strict comparison of a file with them."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping

from flax.traverse_util import flatten_dict

import lavie_jax
from lavie_jax.errors import UserError
from lavie_jax.models.registry import Config, abstract_params
from lavie_jax.weights.names import is_buffer

SHOWN = 20  # misfits that a message lists
Shapes = Mapping[str, tuple[int, ...]]  # {path: shape}


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every parameter of the network that `config` describes; nothing is computed."""
    flat = flatten_dict(abstract_params(config), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


# Fields that were added within a version and change nothing while they are False or None. They are left out of
# fingerprints then, so that folders that were written before keep theirs.
LATER_FIELDS = ("known_frames_around", "encoder_hid_dim", "plain_mid", "enlarge_low_res", "move_key_frames")


def fingerprint(config: Config, given: Mapping[str, tuple[int, ...]]) -> str:
    """Returns a hash that a part's config.json stores once its tensors have been compared with the config.

    A file whose fingerprint matches needs no comparison when it is loaded, and so no tracing of the model: one or two
    seconds for a small UNet, four for a released one. Other versions of this library compare again.
    """
    fields = {name: value for name, value in config.to_dict().items() if value or name not in LATER_FIELDS}
    facts = [lavie_jax.__version__, fields, sorted((path, list(shape)) for path, shape in given.items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def our_name(path: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Returns a parameter's name and shape in a weights folder's file."""
    return path.replace("/", "."), shape


def compare(
    what: str,
    config: Config,
    given: Mapping[str, tuple[int, ...]],
    shown: Callable[[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = our_name,
) -> list[str]:
    """Returns one line for each difference between the shapes in a file and the shapes that `config` needs.

    Buffers are ignored.

    Args:
        what: the file's name, for the messages.
        config: the network's config.
        given: {path: shape} of the file.
        shown: maps a path and shape to the file's own name and shape for it.
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
            name, actual = shown(path, shape)
            lines.append(f"{what}: unexpected {name} {list(actual)}")
    return lines


def refuse(lines: list[str]) -> None:
    """Raises one UserError with the number of `lines`, if there are any, and the first of each kind."""
    if not lines:
        return
    count = "1 tensor does" if len(lines) == 1 else f"{len(lines)} tensors do"
    if len(lines) <= SHOWN:
        raise UserError(f"{count} not fit; nothing was written:\n  " + "\n  ".join(lines))
    groups: dict[str, list[int]] = {}
    for i, line in enumerate(lines):
        groups.setdefault(_kind(line), []).append(i)
    counts = ", ".join(f"{len(group)} {kind}" for kind, group in groups.items())
    in_turn = sorted((position, i) for group in groups.values() for position, i in enumerate(group))
    shown = [lines[i] for i in sorted(i for _, i in in_turn[:SHOWN])]
    raise UserError(
        f"{count} not fit ({counts}); nothing was written:\n  "
        + "\n  ".join([*shown, f"and {len(lines) - SHOWN} more"])
    )


def _kind(line: str) -> str:
    """The kind of a misfit, for their counts."""
    match = re.search(r": (missing|unexpected) |^(missing|unexpected) | (is missing)", line)
    if match is None:
        return "of another shape"
    return "unexpected" if "unexpected" in match[0] else "missing"

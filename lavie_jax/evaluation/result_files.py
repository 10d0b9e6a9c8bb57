"""Result files of `python -m lavie_jax.evaluation`, with every setting, and whether two of them are comparable."""

import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from lavie_jax import results
from lavie_jax.errors import UserError
from lavie_jax.text_files import read_json

KIND = "evaluation"
LIBRARIES = ("lavie_jax", "jax", "jaxlib", "flax", "numpy", "pillow", "av")
UNITS = {"psnr": "dB", "motion": "of 255", "flicker": "of 255"}
# What must agree, and why it matters.
DECISIVE = {
    "metric": "they are different metrics",
    "knobs": "each knob changes the value",
    "weights_sha256": "the networks differ",
    "reference_sha256": "the reference videos differ",
    "captions_sha256": "the captions differ",
    "prompts_sha256": "the prompts, or how many of them, differ",
}
SIZES = ("n", "n_reference")
# Knobs of how an interval is computed.
HARMLESS = ("resamples", "splits")


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that a value may depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device() -> str:
    """Returns the kind and number of this process's devices."""
    devices = jax.local_devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def _for_json(value: Any) -> Any:
    """Returns the value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _for_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result, with the versions and the device."""
    results.write(path, _for_json({"kind": KIND, **result, "versions": versions(), "device": device()}))


def lines(result: Mapping[str, Any]) -> list[str]:
    """Returns a line for each number of a result."""
    out = []
    for name, cell in result["numbers"].items():
        unit = f" {UNITS[name]}" if name in UNITS else ""
        text = f"{name} {_shown(cell['value'])}{unit}"
        if cell.get("interval"):
            text += " (95 %: {} to {})".format(*map(_shown, cell["interval"]))
        if "median" in cell:
            text += f", median {_shown(cell['median'])}"
        if "n" in cell:
            text += f", n {cell['n']}" + (f" against {cell['n_reference']}" if "n_reference" in cell else "")
        if floor := cell.get("real_against_real"):
            text += f"; real against real {_shown(floor['mean'])} ± {_shown(floor['sd'])}"
            if floor["n"] != cell["n"]:
                text += f" AT n {floor['n']}: the reference has too few clips for n {cell['n']}"
        elif "n_reference" in cell:
            text += "; real against real needs at least 4 clips of the reference"
        if "reference" in cell:
            text += f"; reference {_shown(cell['reference'])}"
        out.append(text)
    return out


def _shown(value: float | None) -> str:
    return "inf" if value is None or math.isinf(value) else f"{value:.4g}"


def read(path: Path) -> dict[str, Any]:
    """Reads a result. Raises UserError for any other file."""
    result = read_json(path)
    numbers = result.get("numbers")
    if (
        result.get("kind") != KIND
        or not isinstance(result.get("knobs"), dict)
        or not isinstance(numbers, dict)
        or not all(
            isinstance(cell, dict) and isinstance(cell.get("value"), float | int | None) for cell in numbers.values()
        )
    ):
        raise UserError(f"{path} is not a result of python -m lavie_jax.evaluation, or is damaged")
    return result


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns the reasons why the numbers of two results must not be compared; none if they may be."""
    reasons = []
    for field, why in DECISIVE.items():
        x, y = a.get(field), b.get(field)
        if field == "knobs":
            # Without clips to choose, the seed draws only the resamples, and captions, which have a hash of their own.
            harmless = HARMLESS if "clips" in x else (*HARMLESS, "seed")
            x, y = ({k: v for k, v in knobs.items() if k not in harmless} for knobs in (x, y))
            names = [name for name in {**x, **y} if x.get(name) != y.get(name)]
            if names:
                listed = ", ".join(f"{name} {x.get(name)!r} and {y.get(name)!r}" for name in names)
                reasons.append(f"knobs differ ({why}): {listed}")
        elif x != y:
            reasons.append(f"{field} {_short(x)} and {_short(y)}: {why}")
    for name in a["numbers"].keys() & b["numbers"].keys():
        for size in SIZES:
            x, y = a["numbers"][name].get(size), b["numbers"][name].get(size)
            if x != y:
                biased = ", and FVD is biased by it" if name == "fvd" else ""
                reasons.append(f"{name}: {size} is {x} and {y}: the number of clips differs{biased}")
    return reasons


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns a line for each number that two comparable results share."""
    out = []
    for name, x in a["numbers"].items():
        y = b["numbers"].get(name)
        if y is None or x["value"] is None or y["value"] is None:
            continue
        text = f"{name}: {_shown(x['value'])} and {_shown(y['value'])}, difference {y['value'] - x['value']:+.4g}"
        if x.get("interval") and y.get("interval"):
            apart = x["interval"][1] < y["interval"][0] or y["interval"][1] < x["interval"][0]
            text += "; the intervals are apart" if apart else "; the intervals overlap"
        out.append(text)
    return out

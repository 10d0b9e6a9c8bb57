"""What a stage is sampled with. Standard library only: errors come before jax is imported."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lavie_jax.errors import UserError, suggest

MIN_FPS, MAX_FPS = 0.01, 1000  # a GIF frame lasts at most 655 seconds, and encoders fail far above

@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One stage's sampling settings; UserError for values that no stage can take.

    What depends on the model is checked where the model is known: sides by `check_sides`, the sampler's name
    and the number of steps by `make_sampler`.
    """

    height: int
    width: int
    frames: int
    fps: float
    sampler: str
    steps: int
    guidance: float
    prompt_suffix: str = ""
    negative_prompt: str = ""

    def __post_init__(self):
        check_values(self.to_dict())

    @classmethod
    def make(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> "Settings":
        """The weights' own `defaults`, with those of `given` that are not None in their place."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in [*defaults, *given]:
            if name not in names:
                raise UserError(f"sampling settings: unknown {name!r}{suggest(name, names)}")
        values = {**defaults, **{n: v for n, v in given.items() if v is not None}}
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        if missing := [n for n in required if n not in values]:
            raise UserError(f"sampling settings: the weights' config.json has no {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as JSON can hold them."""
        return dataclasses.asdict(self)

    def check_sides(self, factor: int) -> None:
        """UserError when the sides are not multiples of the model's VAE `factor`."""
        for name in ("height", "width"):
            side = getattr(self, name)
            if side % factor:
                near = max(factor, round(side / factor) * factor)
                raise UserError(
                    f"{name}: {side} is not a multiple of {factor}, the factor of this model's VAE; use {near}"
                )


def check_values(values: Mapping[str, Any]) -> None:
    """UserError for the first of some settings, by name, that no stage can take; None is not given."""
    for name, value in values.items():
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in ("height", "width", "frames", "steps"):
            if not number or isinstance(value, float) or value < 1:
                raise UserError(f"{name}: a whole number of at least 1 is needed, given {value!r}")
        elif name in ("fps", "guidance"):
            if not number or not math.isfinite(value):
                raise UserError(f"{name}: a finite number is needed, given {value!r}")
            if name == "fps" and not MIN_FPS <= value <= MAX_FPS:
                raise UserError(f"fps: a number from {MIN_FPS} to {MAX_FPS} is needed, given {value}")
        elif not isinstance(value, str):
            raise UserError(f"{name}: a text is needed, given {value!r}")

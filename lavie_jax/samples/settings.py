"""What the stages are sampled with. Standard library only: errors come before jax is imported."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lavie_jax.errors import UserError, suggest

STAGES = ("base", "interpolation", "vsr")
MIN_FPS, MAX_FPS = 0.01, 1000  # a GIF frame lasts at most 655 seconds, and encoders fail far above
MAX_NOISE_LEVEL = 350  # that the super-resolution stage is trained with
VSR_WINDOWS = ("blended", "official")
KEY_LATENTS = ("draw", "mean")
MIN_TILE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The clip that a stage starts from: the stage's before it, or with `own` the user's."""

    frames: int
    height: int
    width: int
    fps: float
    own: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One stage's sampling settings, and the size of what it makes; UserError for values that no stage can take.

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
    guidance_rescale: float = 0.0  # see `diffusion.guidance.guide`
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
        values = {n: v for group in (defaults, given) for n, v in group.items() if v is not None}
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolationSettings(Settings):
    """What the key frames are to the model, and to the result.

    `key_latents`: of the VAE's posterior of each key frame the model sees a "draw", as LaVie's does, or the "mean".
    `keep_key_frames` puts the key frames' own pixels where the model made them anew.
    """

    key_latents: str = "draw"
    keep_key_frames: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class VSRSettings(Settings):
    """How much noise the low-resolution frames get, and the windows that the clip is denoised in.

    `windows`: "blended", which overlap by `overlap_frames`, or "official", LaVie's chunks that know nothing of each
    other. `tile` is the side of spatial windows in low-resolution pixels; 0 is whole frames, None chooses by size.
    """

    noise_level: int = 50
    windows: str = "blended"
    window_frames: int = 8
    overlap_frames: int = 2
    tile: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.windows == "blended" and self.overlap_frames >= self.window_frames:
            raise UserError(
                f"overlap_frames: fewer than window_frames = {self.window_frames} are needed, given "
                f"{self.overlap_frames}"
            )


SETTINGS = {"base": Settings, "interpolation": InterpolationSettings, "vsr": VSRSettings}


def complete(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request as it would be written now: a setting that an older version did not know has its default.

    Defaults do what was done before there was the setting.
    """
    made, stages = dict(request), request.get("stages")
    for stage, kind in SETTINGS.items():
        fields = dataclasses.fields(kind)
        defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        if stage == "base" and isinstance(stages, list) and stage in stages:
            made = defaults | made
        elif isinstance(made.get(stage), Mapping):
            made[stage] = defaults | dict(made[stage])
    return made


def check_given(given: Mapping[str, Any], decided: Mapping[str, Any]) -> None:
    """UserError for a setting that the frames before the stage decide, and that is given another value."""
    for name, value in decided.items():
        if given.get(name) not in (None, value):
            raise UserError(f"{name}: the stage before, or the clip, makes it {value}; given {given[name]}")


def parse_stages(names: str | Sequence[str], *, own_clip: bool) -> tuple[str, ...]:
    """`"base,vsr"`, or a sequence of names, as a tuple.

    Raises UserError for unknown stages, for an order in which they cannot follow each other, and when the first one
    has nothing to start from: base makes a clip, with `own_clip` there is one, and the others need one.
    """
    given = names.split(",") if isinstance(names, str) else names
    stages = tuple(name.strip() for name in given if name.strip())
    for name in stages:
        if name not in STAGES:
            raise UserError(f"stages: unknown {name!r}{suggest(name, STAGES)}")
    if not stages or [STAGES.index(name) for name in stages] != sorted({STAGES.index(name) for name in stages}):
        raise UserError(
            f"stages: {','.join(stages) or 'none'} cannot be run in this order. Allowed, each once: {', '.join(STAGES)}"
        )
    if stages[0] == "base" and own_clip:
        raise UserError("stages: base makes its clip from the prompt alone; for a clip of yours: interpolation, vsr")
    if stages[0] != "base" and not own_clip:
        raise UserError(f"stages: {stages[0]} needs a clip to start from: put base before it, or give one as the input")
    return stages


def check_values(values: Mapping[str, Any]) -> None:
    """UserError for the first of some settings, by name, that no stage can take; None is not given."""
    least = {"tile": 0, "overlap_frames": 0, "noise_level": 0}
    for name, value in values.items():
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in ("height", "width", "frames", "steps", "window_frames", *least):
            if not number or isinstance(value, float) or value < least.get(name, 1):
                raise UserError(f"{name}: a whole number of at least {least.get(name, 1)} is needed, given {value!r}")
            if name == "noise_level" and value > MAX_NOISE_LEVEL:
                raise UserError(f"noise_level: a whole number from 0 to {MAX_NOISE_LEVEL} is needed, given {value}")
            if name == "tile" and 0 < value < MIN_TILE:
                raise UserError(f"tile: at least {MIN_TILE} pixels, or 0 for whole frames, are needed, given {value}")
        elif name in ("fps", "guidance", "guidance_rescale"):
            if not number or not math.isfinite(value):
                raise UserError(f"{name}: a finite number is needed, given {value!r}")
            if name == "guidance_rescale" and not 0 <= value <= 1:
                raise UserError(f"guidance_rescale: a number from 0 to 1 is needed, given {value}")
            if name == "fps" and not MIN_FPS <= value <= MAX_FPS:
                raise UserError(f"fps: a number from {MIN_FPS} to {MAX_FPS} is needed, given {value}")
        elif name == "keep_key_frames":
            if not isinstance(value, bool):
                raise UserError(f"keep_key_frames: true or false is needed, given {value!r}")
        elif name in ("windows", "key_latents"):
            kinds = VSR_WINDOWS if name == "windows" else KEY_LATENTS
            if value not in kinds:
                raise UserError(f"{name}: unknown {value!r}{suggest(str(value), kinds)}")
        elif not isinstance(value, str):
            raise UserError(f"{name}: a text is needed, given {value!r}")

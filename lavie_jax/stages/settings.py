"""Sampling settings: a dataclass for each stage. This module does not import jax.

The metadata of a field contains its range and its help text. The flags of `sample.py` and the checks of arguments and
weights folders are derived from it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lavie_jax.errors import UserError, suggest
from lavie_jax.fields import check_rules, convert, field, rule_of, short, types_of, without_none

MAX_NOISE_LEVEL = 350  # of the low-resolution frames in training
OFFICIAL = "official"  # the preset without changes: the weights folder's own settings
PRESETS = (OFFICIAL, "balanced", "fast")
AUTO = "auto"  # the dtype that is fast on the device
DTYPES = (AUTO, "float32", "bfloat16")  # of the computation


class Flag(NamedTuple):
    """A setting on the command line."""

    setting: str
    flag: str
    kind: type
    metavar: str | None
    help: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Sampling settings that every stage has, and the size of its output.

    Limits that depend on the model are checked in `Stage.resolve` and `make_sampler`.

    Raises:
        UserError: a value is of the wrong type or out of range.
    """

    sampler: str = field("ddpm, ddim, euler, heun, respaced_ddim, respaced_ddpm, dpm++2m, unipc or lcm", metavar="NAME")
    spacing: str | None = field(
        "spacing of the timesteps: leading, trailing, linspace, quadratic, karras or ays (default: the sampler's own)",
        metavar="NAME",
        default=None,
    )
    steps: int = field("denoising steps", metavar="N", low=1)
    guidance: float = field("scale of classifier-free guidance; 1 disables it", metavar="X")
    guidance_rescale: float = field(
        "0 to 1: how far to undo the increase in contrast from a large guidance scale",
        metavar="X",
        default=0.0,
        low=0,
        high=1,
    )
    guidance_low: int = field(
        "timestep, 0 to 999, below which the prompt alone is used, without guidance, at half the work",
        metavar="T", default=0, low=0, high=999,
    )  # fmt: skip
    guidance_high: int | None = field(
        "timestep above which the prompt alone is used (default: none)", metavar="T", default=None, low=0, high=999
    )
    guidance_every: int = field(
        "evaluations per computation of what guidance adds; the others use it again, at half the work",
        metavar="N", default=1, low=1,
    )  # fmt: skip
    cache_every: int = field(
        "evaluations per computation of the UNet's deep layers; the others use their features again",
        metavar="N", default=1, low=1,
    )  # fmt: skip
    cache_depth: int = field(
        "outermost skip connections of the UNet that every evaluation computes, with --cache-every",
        metavar="N", default=1, low=1,
    )  # fmt: skip
    # A GIF frame lasts at most 655 seconds, and encoders fail far above the upper limit.
    fps: float = field("frames per second of the output", metavar="X", low=0.01, high=1000)
    negative_prompt: str = field("what to steer away from", metavar="TEXT", default="")
    prompt_suffix: str = field("appended to every prompt", metavar="TEXT", default="")
    frames: int = field("number of frames", low=1, flag=None)
    height: int = field("height in pixels", low=1, flag=None)
    width: int = field("width in pixels", low=1, flag=None)

    def __post_init__(self):
        for name, value in self.check(self.to_dict()).items():
            object.__setattr__(self, name, value)
        if self.guidance_high is not None and self.guidance_low > self.guidance_high:
            raise UserError(
                f"guidance_low must be at most guidance_high = {self.guidance_high}, not {self.guidance_low}"
            )

    @classmethod
    def make(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> "Settings":
        """The `defaults` of a weights folder, overridden by the entries of `given` that are not None."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in [*defaults, *given]:
            if name not in names:
                raise UserError(f"sampling settings: unknown {name!r}{suggest(name, names)}")
        values = {n: v for group in (defaults, given) for n, v in group.items() if v is not None}
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        if missing := [n for n in required if n not in values]:
            raise UserError(f"sampling settings: the weights' config.json lacks {', '.join(missing)}")
        return cls(**_renamed(values))

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Converts settings, {name: value}, to their types; None stands for a setting that is not given.

        Raises:
            UserError: a value is of the wrong type or out of range.
        """
        kinds = types_of(cls)
        values = {n: v if v is None else convert(n, v, kinds[n]) for n, v in values.items()}
        check_rules(cls, values, label="{}")
        return values

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as JSON values."""
        return dataclasses.asdict(self)

    @property
    def output_frames(self) -> int:
        """The number of frames of the output."""
        return self.frames

    @property
    def first_step(self) -> int:
        """The index of the first step that is run. Earlier ones are replaced by adding noise to a clip."""
        return 0

    def prompts(self, prompt: str) -> list[tuple[str, int]] | None:
        """Returns (prompt, number of frames) for each segment of the output; None if the stage has no segments.

        Raises:
            UserError: `prompt` does not fit the number of segments.
        """
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseSettings(Settings):
    """Settings of the base stage: the size of its clips, long clips, video to video, FreeInit and FreeU."""

    frames: int = field("number of frames; 1 makes images", metavar="T", low=1)
    height: int = field("height in pixels", metavar="H", low=1)
    width: int = field("width in pixels", metavar="W", low=1)
    long: str | None = field(
        "how to make more frames than the model was trained on: free_noise, FreeNoise's windows (default: as any clip)",
        metavar="NAME",
        default=None,
        choices=("free_noise",),
    )
    long_window: int | None = field(
        "frames per window of --long (default: as many as the model was trained on)", metavar="T", default=None, low=2
    )
    strength: float | None = field(
        "with --input: how much of the clip is made anew, above 0, which keeps it, to 1, which ignores it",
        metavar="X", default=None, low=0, high=1,
    )  # fmt: skip
    free_init: int = field(
        "FreeInit: how often the clip is denoised again, from the low frequencies of the result", metavar="N",
        default=0, low=0, high=100,
    )  # fmt: skip
    free_u: str | None = field(
        "FreeU: factors b1,b2 of the features and s1,s2 of the skip connections of the two deepest up blocks, such as "
        "1.3,1.4,0.9,0.2",
        metavar="LIST",
        default=None,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.strength is not None and self.first_step == self.steps:
            raise UserError(
                f"strength: {self.strength:g} of {self.steps} steps leaves none to run: use at least "
                f"{1 / self.steps:.2g}, or more steps"
            )
        if self.free_u is not None:
            object.__setattr__(self, "free_u", ",".join(map(short, self.free_u_factors)))

    @property
    def first_step(self) -> int:
        return 0 if self.strength is None else self.steps - int(self.strength * self.steps + 0.5)

    @property
    def free_u_factors(self) -> tuple[float, ...]:
        """b1, b2, s1 and s2 of `free_u`; () if it is None. Raises UserError if it is malformed."""
        if self.free_u is None:
            return ()
        try:
            factors = tuple(map(float, self.free_u.split(",")))
        except ValueError:
            factors = ()
        if len(factors) != 4 or not all(0 <= factor <= 10 for factor in factors):
            raise UserError(
                f"free_u: {self.free_u!r} is not four numbers from 0 to 10, b1,b2,s1,s2, such as 1.3,1.4,0.9,0.2"
            )
        return factors


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictionSettings(Settings):
    """Settings of prediction: the size of its clips, which may start from text alone, and the frames that are given.

    Attributes:
        clip_frames: number of frames of the previous stage's clip, which is the first segment; 0 if there is none.
    """

    frames: int = field("number of frames of a segment, the known ones included", metavar="T", low=1)
    height: int = field("height in pixels", metavar="H", low=1)
    width: int = field("width in pixels", metavar="W", low=1)
    known_frames: int = field(
        "number of frames at the end of the previous clip or segment that are given",
        metavar="N", default=4, low=1, flag="known-frames",
    )  # fmt: skip
    known_latents: str = field(
        "latents of the known frames: a sample of the VAE's posterior, as in SEINE, or its mode",
        metavar="NAME",
        default="sample",
        choices=("sample", "mode"),
    )
    known_prediction: str = field(
        "the prediction at known frames: the network's, as in SEINE, or the exact one, which keeps their latents",
        metavar="NAME", default="network", choices=("network", "exact"),
    )  # fmt: skip
    keep_known_frames: bool = field(
        "copy the known frames' pixels into the result", default=False, flag="keep-known-frames"
    )
    segments: int = field(
        "number of segments of a long video, each continuing the one before; a clip of the base stage is the first",
        metavar="S", default=1, low=1, flag="segments",
    )  # fmt: skip
    clip_frames: int = field("set by the program", default=0, low=0, hidden=True, flag=None)

    @property
    def output_frames(self) -> int:
        return (self.clip_frames or self.frames) + (self.frames - self.known_frames) * (self.segments - 1)

    def segment_lengths(self) -> list[int]:
        """The number of frames that each segment adds to the output."""
        return [self.clip_frames or self.frames] + [self.frames - self.known_frames] * (self.segments - 1)

    def prompts(self, prompt: str) -> list[tuple[str, int]]:
        """Splits `prompt` at "|" into one for each segment; the last one applies to the remaining segments."""
        texts = [text.strip() for text in prompt.split("|")]
        if len(texts) > self.segments:
            raise UserError(
                f"{len(texts)} prompts, separated by |, are given for {self.segments} "
                f"segment{'s' * (self.segments > 1)}: give at most one for each, or more --segments"
            )
        if len(texts) > 1 and not all(texts):
            raise UserError(f"prompt: a prompt between two | is empty: {prompt!r}")
        texts += texts[-1:] * (self.segments - len(texts))
        return list(zip(texts, self.segment_lengths()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolationSettings(Settings):
    """Settings of temporal interpolation."""

    key_latents: str = field(
        "latents of the key frames: a sample of the VAE's posterior, as in LaVie, or its mode",
        metavar="NAME",
        default="sample",
        choices=("sample", "mode"),
    )
    window_keys: int = field(
        "key frames per window; the released model was trained on 16", metavar="K", default=16, low=2
    )
    keep_key_frames: bool = field("copy the key frames' pixels into the result", default=False, flag="keep-key-frames")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VSRSettings(Settings):
    """Settings of super-resolution: the noise on the low-resolution frames, and the windows (`windows.py`)."""

    noise_level: int = field(
        "noise added to the low-resolution frames, 0 to 350", metavar="N", default=50, low=0, high=MAX_NOISE_LEVEL
    )
    windows: str = field(
        "blended, or LaVie's official independent chunks, with a visible cut after each",
        metavar="NAME",
        default="blended",
        choices=("blended", "official"),
    )
    window_frames: int = field("frames per window", metavar="T", default=8, low=1)
    overlap_frames: int = field("frames that blended windows share", metavar="T", default=2, low=0)
    tile: int | None = field(
        "side of spatial windows in low-resolution pixels; 0 takes whole frames (default: by frame size)",
        metavar="P",
        default=None,
        low=8,
        or_zero=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.windows == "blended" and self.overlap_frames >= self.window_frames:
            raise UserError(
                f"overlap_frames must be below window_frames = {self.window_frames}, not {self.overlap_frames}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownFrames:
    """Relative weights of the modes that decide which frames of a training clip are known.

    SEINE's distribution is not published; the defaults are our choice. A mode is sampled for each clip and then, if the
    mode has one, the number N of known frames: of T frames, 1 + T u^2 / 2 rounded down, with u uniform in [0, 1), so
    that small numbers are the most frequent.
    """

    first: float = field("weight of: the first N frames are known (image to video, continuation)", default=0.5, low=0)
    first_and_last: float = field(
        "weight of: the first and the last frames are known, N / 2 each (transition)", default=0.2, low=0
    )
    share: float = field("weight of: N frames at random positions are known", default=0.1, low=0)
    uniform: float = field(
        "weight of: each frame is known with a probability that is drawn for the clip", default=0.05, low=0
    )
    none: float = field("weight of: no frame is known (text to video)", default=0.15, low=0)

    def __post_init__(self):
        check_rules(type(self), dataclasses.asdict(self), label="config field 'known.{}'")
        if not sum(self.weights) > 0:
            raise UserError("config group 'known': all weights are 0: set one of them to a positive number.")

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in the order of the fields."""
        return dataclasses.astuple(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowResNoise:
    """Noise on the low-resolution frames of super-resolution training."""

    highest: int = field(
        "highest level of the noise; 0 for no noise at all", default=MAX_NOISE_LEVEL, low=0, high=MAX_NOISE_LEVEL
    )

    def __post_init__(self):
        check_rules(type(self), dataclasses.asdict(self), label="config field 'low_res_noise.{}'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageInfo:
    """Description of a stage that can be read without its networks. The order of a cascade follows from it.

    Attributes:
        name: name of the stage, and of its module in `lavie_jax/stages/`.
        settings: the dataclass of its sampling settings.
        produces: the kind of its output clip.
        summary: what it does, for users who choose stages.
        consumes: the kinds of clips that it can start from; () for a stage that starts from the prompt only.
        training: {config group: dataclass} of settings that only the training of this stage has.
        clip_optional: whether it can start from the prompt alone, although it consumes clips.
        fits_clip: whether a user's clip is cropped and scaled to the size of its output. This includes a stage that
            consumes no clips but can denoise one anew (`strength`).
        takes_known: whether frames of its output can be given, as pictures or as the end of its input clip. The output
            continues that clip, whereas the outputs of other stages show the same points in time as their inputs.
        main: whether its settings are named without the stage (on the command line, in a call of `Cascade` and in a
            sample's JSON), and whether it takes the negative prompts of a prompt file.
    """

    name: str
    settings: type[Settings]
    produces: str
    summary: str
    consumes: tuple[str, ...] = ()
    training: Mapping[str, type] = dataclasses.field(default_factory=dict)
    clip_optional: bool = False
    fits_clip: bool = False
    takes_known: bool = False
    main: bool = False

    @property
    def from_text(self) -> bool:
        """Whether it can start from the prompt alone."""
        return self.clip_optional or not self.consumes

    def option(self, setting: str) -> str:
        """The name of a setting among those of all stages: `steps` of the main stage, `vsr-steps` of another."""
        return setting if self.main else f"{self.name}-{setting}"

    def flags(self) -> Iterator[Flag]:
        """The settings that have a flag on the command line."""
        for declared in dataclasses.fields(self.settings):
            rule = rule_of(declared)
            if rule.flag is not None:
                flag = rule.flag or self.option(declared.name.replace("_", "-"))
                default = declared.default if isinstance(declared.default, int | float | str) else None
                text = rule.help if default in (None, "", False) else f"{rule.help} (default {default})"
                kind, _ = without_none(types_of(self.settings)[declared.name])
                yield Flag(declared.name, f"--{flag}", kind, rule.metavar, text)

    def located(self, error: UserError) -> UserError:
        """Returns the error with the stage's name in front, except for the main stage."""
        return error if self.main else UserError(f"{self.name} stage: {error}")


KEY_FRAMES, SMOOTH_CLIP, LARGE_CLIP = "key frames", "smooth clip", "large clip"
STAGE_INFO = {
    info.name: info
    for info in (
        StageInfo(
            name="base", settings=BaseSettings, produces=KEY_FRAMES, fits_clip=True, main=True,
            summary="a short clip from the prompt",
        ),
        StageInfo(
            name="prediction", settings=PredictionSettings, consumes=(KEY_FRAMES,), produces=KEY_FRAMES,
            clip_optional=True, fits_clip=True, takes_known=True, training={"known": KnownFrames},
            summary="starts from pictures, or continues the clip",
        ),
        StageInfo(
            name="interpolation", settings=InterpolationSettings, consumes=(KEY_FRAMES,), produces=SMOOTH_CLIP,
            summary="four times as many frames",
        ),
        StageInfo(
            name="vsr", settings=VSRSettings, consumes=(KEY_FRAMES, SMOOTH_CLIP), produces=LARGE_CLIP,
            training={"low_res_noise": LowResNoise},
            summary="frames of four times the size",
        ),
    )
}  # fmt: skip
MAIN_STAGE = next(name for name, info in STAGE_INFO.items() if info.main)


def parse_stages(names: str | Sequence[str], *, own_clip: bool) -> tuple[str, ...]:
    """Parses `"base,vsr"`, or a sequence of names, to a tuple.

    Args:
        names: stages in the order in which they are run.
        own_clip: whether the user provides an input clip.

    Raises:
        UserError: a stage is unknown, cannot start from the output of the previous one, or has no input clip.
    """
    given = names.split(",") if isinstance(names, str) else names
    stages = tuple(name.strip() for name in given if name.strip())
    for name in stages:
        if name not in STAGE_INFO:
            raise UserError(f"stages: unknown {name!r}{suggest(name, STAGE_INFO)}")
    if not stages:
        raise UserError(f"stages: none given. Allowed: {', '.join(STAGE_INFO)}")
    for before, after in zip(stages, stages[1:]):
        if STAGE_INFO[before].produces not in STAGE_INFO[after].consumes:
            raise UserError(
                f"stages: {','.join(stages)} cannot be run in this order: {after} cannot start from the output of "
                f"{before}. Allowed order: {', '.join(STAGE_INFO)}"
            )
    if repeated := next((name for name in stages if stages.count(name) > 1), None):
        raise UserError(f"stages: {repeated} is given twice in {','.join(stages)}; each stage is run once")
    first = STAGE_INFO[stages[0]]
    if not own_clip and not first.from_text:
        raise UserError(
            f"stages: {first.name} needs a clip to start from: put {MAIN_STAGE} before it, or give a clip as the input"
        )
    return stages


def check_derived(given: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
    """Raises UserError if a setting that the input clip determines is given another value."""
    for name, value in derived.items():
        if given.get(name) not in (None, value):
            raise UserError(f"{name} is determined by the input clip: {value}, not {given[name]}")


def complete(request: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the request of an older sample to today's format.

    Settings that the older version did not have get their defaults, which reproduce its behaviour.
    """
    completed, stages = dict(request), request.get("stages")
    for name, info in STAGE_INFO.items():
        fields = dataclasses.fields(info.settings)
        defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        if info.main and isinstance(stages, list) and name in stages:
            completed = defaults | _renamed(completed)
        elif isinstance(completed.get(name), Mapping):
            completed[name] = defaults | _renamed(completed[name])
    return completed


_OLD_VALUES = {"key_latents": {"draw": "sample", "mean": "mode"}}  # {setting: {name until version 0.1: name now}}


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces values of settings in an older weights folder or sample by today's names for them."""

    def current(name: str, value: Any) -> Any:
        return _OLD_VALUES[name].get(value, value) if name in _OLD_VALUES and isinstance(value, str) else value

    return {name: current(name, value) for name, value in values.items()}

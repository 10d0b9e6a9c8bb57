"""The knobs of the metrics, and the named protocols in use: a protocol is a set of values of the knobs.

Values of FVD differ by more than most models do when one of these knobs differs, so every result stores all of them,
and `compare` refuses results whose knobs differ.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from lavie_jax.errors import UserError, suggest
from lavie_jax.fields import check_rules, field, settable
from lavie_jax.models.i3d import MIN_FRAMES, SIDE

FILTERS = {"bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}  # names of `jax.image.resize`
STARTS = ("first", "middle", "random")
MAX_RATE_DIFFERENCE = 0.02  # relative; rates of files are rounded


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipKnobs:
    """Which clips of a set of videos are measured."""

    clips: int | None = field("clips of each set, chosen by the seed; None = all", metavar="N", default=None, low=2)
    clips_per_video: int = field("clips from each video", metavar="N", default=1, low=1)
    frames: int = field("frames of a clip", metavar="T", default=16, low=1)
    fps: float | None = field(
        "rate at which frames are taken from each video; None = the videos' own", metavar="FPS", default=None, low=0.1
    )
    mixed_rates: bool = field("allow videos of different rates, at their own rates", default=False)
    start: str = field("where in a video a clip starts", default="first", choices=STARTS)
    seed: int = field("seed of all random choices", metavar="N", default=0, low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FVDKnobs(ClipKnobs):
    """Settings of FVD and KVD.

    Pixels pass through these steps in this order: crop, `resolution`, `side`, rounding, scaling to [-1, 1].
    """

    frames: int = field("frames of a clip", metavar="T", default=16, low=MIN_FRAMES)
    crop: str = field(
        "square from the centre of each frame, or the whole frame distorted",
        default="center",
        choices=("center", "none"),
    )
    crop_pixels: int | None = field(
        "side of that square; None, or more than the shorter side = the shorter side", metavar="N", default=None, low=16
    )
    resolution: int | None = field(
        "scale to this side first (antialiased bicubic, 8 bits), as data sets of that size are made", metavar="N",
        default=None, low=16,
    )  # fmt: skip
    side: int = field("side of the network's input", metavar="N", default=SIDE, low=SIDE)
    filter: str = field("filter of scaling to the network's input", default="bilinear", choices=tuple(FILTERS))
    antialias: bool = field("widen the filter where frames are scaled down", default=False)
    round: bool = field("round to 8 bits after scaling", default=False)
    features: str = field("what is compared", default="logits", choices=("logits", "pool"))
    ddof: int = field("covariances are divided by n - ddof", metavar="0|1", default=1, low=0, high=1)
    resamples: int = field("resamples of the bootstrap interval; 0 = no interval", metavar="N", default=100, low=2,
                           or_zero=True)  # fmt: skip
    splits: int = field("random splits of the real-against-real value", metavar="N", default=20, low=1)

    def __post_init__(self):
        if self.crop == "none":  # a protocol's side of the square does nothing then
            object.__setattr__(self, "crop_pixels", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairKnobs:
    """Settings of measures of frames with a truth: PSNR, SSIM, LPIPS and flicker."""

    frames: int | None = field("frames of each video, from the first on; None = all", metavar="T", default=None, low=1)
    leave_out_every: int | None = field(
        "leave out frames 0, N, 2N, ..., which interpolation is given", metavar="N", default=None, low=2
    )
    spatial: bool = field("LPIPS: enlarge the layers' maps before the mean (spatial=True)", default=False)
    resamples: int = field("resamples of the bootstrap interval; 0 = no interval", metavar="N", default=1000, low=2,
                           or_zero=True)  # fmt: skip
    seed: int = field("seed of the bootstrap", metavar="N", default=0, low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipsimKnobs:
    """Settings of CLIPSIM."""

    frames: int | None = field("frames of each video, from the first on; None = all", metavar="T", default=None, low=1)
    rounding: str = field(
        "offset of the centre crop: down as transformers, or to the nearest as torchvision (OpenAI)", default="floor",
        choices=("floor", "nearest"),
    )  # fmt: skip
    seed: int = field("seed that draws one caption a video, and of the bootstrap", metavar="N", default=0, low=0)
    resamples: int = field("resamples of the bootstrap interval; 0 = no interval", metavar="N", default=1000, low=2,
                           or_zero=True)  # fmt: skip


class Protocol(NamedTuple):
    """A named protocol: what it is, and the values in which it differs from the defaults of `FVDKnobs`."""

    source: str
    values: Mapping[str, Any]


PROTOCOLS = {
    "tats": Protocol(
        "TATS (arXiv 2204.03638): 2048 clips of 16 frames at 128x128, enlarged without antialiasing, n - 1",
        {"clips": 2048, "resolution": 128, "start": "random", "mixed_rates": True},
    ),
    "styleganv": Protocol(
        "StyleGAN-V (arXiv 2112.14683): 2048 clips of 16 frames at 256x256, covariances divided by n",
        {"clips": 2048, "resolution": 256, "start": "random", "ddof": 0, "mixed_rates": True},
    ),
    "paper": Protocol(
        "LaVie (arXiv 2309.15103), zero-shot UCF-101: 16 frames, the central 270x270 pixels, scaled to 224x224",
        {"crop_pixels": 270, "antialias": True, "mixed_rates": True},
    ),
}


def make_knobs(cls: type, given: Mapping[str, Any], protocol: str | None = None) -> Any:
    """Returns the knobs of a protocol with the `given` values that are not None in their place.

    Raises:
        UserError: the protocol or a value is unknown or not allowed.
    """
    if protocol is not None and protocol not in PROTOCOLS:
        raise UserError(f"--protocol: unknown protocol {protocol!r}{suggest(protocol, PROTOCOLS)}")
    values = dict(PROTOCOLS[protocol].values) if protocol else {}
    values |= {name: value for name, value in given.items() if value is not None and name in settable(cls)}
    for name, value in values.items():
        check_rules(cls, {name: value}, label=f"--{name.replace('_', '-')}")
    if values.get("crop") == "none" and given.get("crop_pixels") is not None:
        raise UserError("--crop-pixels has no effect with --crop none: give one of them")
    return cls(**values)

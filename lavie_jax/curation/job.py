"""Settings of a curation run and its outcome. Worker processes import this module, so it must not load jax."""

import dataclasses
import functools
import hashlib
import importlib
from pathlib import Path

import lavie_jax
from lavie_jax.curation.filters import Thresholds
from lavie_jax.curation.inputs import HeldOut
from lavie_jax.curation.models import Captioner
from lavie_jax.data.buckets import Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentJob:
    """Settings for writing latents.

    Attributes:
        weights: the weights folder whose VAE and text encoder compute the latents.
        sizes: (height, width) of the frames. Each clip is resized to the size closest to its aspect ratio.
            () = the size that the weights sample.
        fps: frames per second to keep of a clip. 0 = the rate that the weights sample.
    """

    weights: str
    sizes: tuple[Size, ...] = ()
    fps: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurationJob:
    """Settings that apply to every video. Workers receive a pickled copy.

    Attributes:
        captioner: captions scenes that no given caption covers: a model folder, "module:function", or a picklable
            function of sample frames, uint8 (T, H, W, 3).
        aesthetic: (CLIP folder, file of the head), or None for no score.
        hold_out: what goes to the split `val`. Empty = training decides, by a hash of the video's name.
        latents: write latents with these settings. None = write encoded clips.
    """

    thresholds: Thresholds = Thresholds()
    captioner: str | Captioner | None = None
    aesthetic: tuple[str, str] | None = None
    hold_out: tuple[HeldOut, ...] = ()
    latents: LatentJob | None = None

    def settings(self) -> dict[str, object]:
        """Returns everything that determines the clips, ready for JSON."""
        captioner = self.captioner
        if callable(captioner):
            captioner = f"{captioner.__module__}:{getattr(captioner, '__qualname__', type(captioner).__qualname__)}"
        return {
            **dataclasses.asdict(self.thresholds),
            "captioner": captioner,
            "aesthetic": list(self.aesthetic) if self.aesthetic else None,
            "hold_out": [str(each) for each in self.hold_out],
            "versions": _versions("av", "scenedetect", "PIL"),
        }


@functools.cache
def package_versions() -> dict[str, str]:
    """Returns the versions of what must be the same on all machines of a job, such as the code of this package."""
    root = Path(lavie_jax.__file__).parent
    files = sorted(file for folder in ("curation", "data") for file in (root / folder).glob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    packages = _versions("av", "scenedetect", "PIL", "cv2", "numpy")
    return {"lavie_jax": f"{lavie_jax.__version__} (code {code})", **packages}


def _versions(*names: str) -> dict[str, str]:
    return {name: importlib.import_module(name).__version__ for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Counts and cost of a run.

    Attributes:
        videos: input files (images for `images.encode_images`).
        clips: records written.
        dropped: reason -> count.
        video_seconds: seconds of video that this run decoded; a resumed run does not count earlier work.
        core_seconds: CPU seconds that this took.
    """

    videos: int
    clips: int
    dropped: dict[str, int]
    video_seconds: float
    core_seconds: float

"""The group `data` of a config: what a batch contains and where it comes from. `build.py` makes its source."""

import dataclasses
from collections.abc import Sequence

from lavie_jax.data import mixture
from lavie_jax.data.buckets import Size, size_name
from lavie_jax.data.sources import KINDS
from lavie_jax.errors import UserError
from lavie_jax.fields import check_rules, field

LATENTS = "latents"
SOURCES = ("moving_shapes", *KINDS, LATENTS, "mixture")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A batch: clips of T `frames` at `fps`, each with M `images`, of size (height, width), and their captions."""

    source: str = field(f"kind of the data: {', '.join(SOURCES)}", default="moving_shapes")
    path: str | None = field("location of the clips", default=None, path=True)
    image_source: str = field("kind of the images; empty means the same kind as the clips", default="")
    image_path: str | None = field("location of the images; None uses frames of the clips", default=None, path=True)
    videos: tuple[str, ...] = field("clips of a mixture, each KIND:PATH or moving_shapes", default=(), path=True)
    image_parts: tuple[str, ...] = field(
        "images of a mixture, each KIND:PATH or moving_shapes; empty uses frames of the clips", default=(), path=True
    )
    video_weights: tuple[tuple[int, tuple[float, ...]], ...] = field(
        "((step, (weight of each part, ...)), ...): weights of `videos` from each step on; empty weights them equally",
        default=(),
    )
    image_weights: tuple[tuple[int, tuple[float, ...]], ...] = field("the same for `image_parts`", default=())
    split: str = field("train or val; Moving Shapes has further splits", default="train", hidden=True)
    frames: int = field("frames of a clip; 0 trains on images only", default=16)
    fps: float | None = field("frames per second; None is each clip's own rate", default=8.0)
    stride: int = field("with fps=None, every stride-th frame is used", default=1)
    slowest_fps: float = field(
        "Moving Shapes: each clip has a rate from this to fps; low rates have more motion per frame; 0 means fps",
        default=0.0,
    )
    objects: int = field(
        "Moving Shapes: objects in a clip or image, 1 or 2, each with its own words in the caption",
        default=1,
        low=1,
        high=2,
    )
    images_from_clips: float = field(
        # So an image model learns the words of videos before it is inflated (AnimateDiff, arXiv 2307.04725, sec. 4.1).
        "Moving Shapes: fraction of the images that are frames of clips, with the captions of clips",
        default=0.0,
        low=0,
        high=1,
    )
    height: int = field("height of a frame or patch in pixels", default=64, low=1)
    width: int = field("width of a frame or patch in pixels", default=64, low=1)
    buckets: tuple[tuple[int, int], ...] = field(
        "((height, width), ...), including height x width: each clip uses the bucket nearest to its shape, and each "
        "batch has one size; empty gives all clips one size",
        default=(),
    )
    full_height: int = field(
        "frames are scaled to this height before a patch is cut; 0 cuts no patches", default=0, low=0
    )
    full_width: int = field(
        "frames are scaled to this width before a patch is cut; 0 cuts no patches", default=0, low=0
    )
    images: int = field("images that accompany each clip", default=0)
    # lets networks that need clips train on images (LaVie, sec. 3.4)
    handheld: float = field("fraction of the clips that are images under a moving camera", default=0.0, low=0, high=1)
    image_captions: tuple[str, ...] = field(
        "captions of images in folders that have none of their own: one for image_path, or one for each of "
        "image_parts; empty leaves such images out",
        default=(),
    )
    hold_out: bool = field(
        "whether a part of the data is held out; False, for a few pictures, trains on all, and the held-out losses are "
        "of the same ones",
        default=True,
    )
    caption_drop: float = field(
        "probability that a caption is dropped, for classifier-free guidance", default=0.1, low=0, high=1
    )
    null_caption: str = field("replaces dropped captions; set by the stage", default="", hidden=True)
    detail_drop: float = field(
        "Moving Shapes: probability that a caption omits the size, and likewise the background",
        default=0.1,
        low=0,
        high=1,
    )
    max_unreadable: int = field("unreadable records that a process skips before the run stops", default=1000, low=0)
    seed: int = field("seed of the order, the crops and the dropped captions", default=0, low=0)

    @property
    def whole(self) -> tuple[int, int]:
        """(H, W) of frames before patches are cut."""
        return self.full_height or self.height, self.full_width or self.width

    @property
    def shows_images(self) -> bool:
        """Whether batches contain images, with clips or as clips."""
        return bool(self.images or self.handheld or not self.frames)

    @property
    def images_per_example(self) -> int:
        """Images that are set aside for each example: those beside its clip, and the one that may become its clip."""
        return max(self.images + bool(self.handheld and self.frames), 1)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(H, W) of every size that a batch may have."""
        return tuple((height, width) for height, width in self.buckets) or ((self.height, self.width),)


def check(config: DataConfig) -> None:
    """Checks the fields before any file is read.

    Raises:
        UserError: a field is out of range, or fields contradict each other.
    """
    if config.frames < 0 or config.images < 0 or config.frames + config.images < 1:
        raise UserError(f"a batch needs frames or images; given {config.frames} frames, {config.images} images")
    check_rules(DataConfig, dataclasses.asdict(config), "config field 'data.{}'")
    if config.whole[0] < config.height or config.whole[1] < config.width:
        raise UserError(
            f"patches of {config.height}x{config.width} do not fit into frames of {config.whole[0]}x{config.whole[1]} "
            "(full_height, full_width)"
        )
    if config.buckets:
        check_buckets(config)
    if config.fps is not None and not config.fps > 0:
        raise UserError(f"fps must be above 0; given {config.fps}")
    if config.stride < 1 or (config.stride > 1 and config.fps is not None):
        raise UserError(f"stride must be at least 1, and needs fps=None; given {config.stride} and fps={config.fps}")
    if config.slowest_fps and not 0 < config.slowest_fps <= (config.fps or 0):
        raise UserError(f"slowest_fps must be above 0 and at most fps; given {config.slowest_fps} and {config.fps}")
    if config.source == "mixture":
        if not config.videos + config.image_parts or (config.frames and not config.videos):
            raise UserError(
                "a mixture needs data.videos, or data.image_parts to train on images only: ('KIND:PATH', ...)"
            )
        for weights, parts in (("video_weights", "videos"), ("image_weights", "image_parts")):
            if getattr(config, weights) and not getattr(config, parts):
                raise UserError(f"data.{weights} are those of data.{parts}, which is empty: set it too")
        mixture_parts(config)
    elif config.videos or config.image_parts or config.video_weights or config.image_weights:
        raise UserError(
            f"videos, image_parts and their weights are for source='mixture'; given source={config.source!r}"
        )
    if latent_paths(config):
        _check_latents(config)
    places = len(config.image_parts) if config.source == "mixture" else int(config.image_path is not None)
    if config.image_captions and len(config.image_captions) != places:
        raise UserError(
            f"data.image_captions needs one caption for image_path, or one for each of image_parts ({places}); given "
            f"{len(config.image_captions)}"
        )


def check_buckets(config: DataConfig) -> None:
    """Raises UserError for malformed buckets, and for buckets that contradict other fields."""
    try:
        sizes = [(int(height), int(width)) for height, width in config.buckets]
    except (TypeError, ValueError):
        sizes = [(0, 0)]
    if min(min(size) for size in sizes) < 1 or len(set(sizes)) < len(sizes):
        raise UserError(f"buckets are ((height, width), ...), each once; given {config.buckets!r}")
    if (config.height, config.width) not in sizes:
        raise UserError(
            "buckets must include the size that is sampled, height x width = "
            f"{size_name((config.height, config.width))}; given {', '.join(map(size_name, sizes))}"
        )
    if config.full_height or config.full_width:
        raise UserError(
            "buckets are sizes of whole frames, full_height and full_width are for patches: set only one of them"
        )
    if config.source == "mixture":
        raise UserError("buckets need one source, whose clips are divided among them; given source='mixture'")


def _check_latents(config: DataConfig) -> None:
    """Raises UserError for fields that latents do not support: they were computed from whole frames and one crop."""
    others = [kind for kind, _ in _kinds(config) if kind != LATENTS]
    if others:
        raise UserError(f"clips and images must all be latents, or none; given latents and {', '.join(others)}")
    for name in ("handheld", "full_height", "full_width"):
        if value := getattr(config, name):
            raise UserError(f"{name} needs pixels, but data.source is 'latents': set it to 0; given {value}")
    if any(config.image_captions):
        raise UserError("image_captions is for folders of images: those of latents were encoded with them. Remove it")


def latent_paths(config: DataConfig) -> list[str]:
    """Returns the sets of latents in a config: either all of its data are latents, or none."""
    return [path for kind, path in _kinds(config) if kind == LATENTS and path]


def _kinds(config: DataConfig) -> list[tuple[str, str | None]]:
    """(kind, path) of every part of the data."""
    if config.source == "mixture":
        return [*_split_kinds(config.videos + config.image_parts)]
    image_path = config.image_path if config.shows_images else None
    clips = [(config.source, config.path)] if config.path or not image_path else []
    return clips + ([(config.image_source or config.source, image_path)] if image_path else [])


def mixture_weights(config: DataConfig, step: int) -> dict[str, float]:
    """{"videos/KIND:PATH": its fraction of the clips at `step`, "images/...": ...}; empty without a mixture."""
    shares: dict[str, float] = {}
    sides = mixture_parts(config) if config.source == "mixture" else {}
    for name, (parts, weights, _) in sides.items():
        for part, share in zip(parts, mixture.shares_at(weights, step)):
            shares[f"{name}/{':'.join(filter(None, part))}"] = share
    return shares


def _split_kinds(parts: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    """((kind, path or None), ...) of the parts of a mixture."""
    halves = [part.partition(":") for part in parts]
    return tuple((kind, path or None) for kind, _, path in halves)


def mixture_parts(config: DataConfig) -> dict[str, tuple[tuple, mixture.Weights, int]]:
    """{"videos": (parts, weights, clips per example), "images": (parts, weights, images per example)} of a mixture.

    Raises:
        UserError: the weights do not fit the parts.
    """
    videos, images = _split_kinds(config.videos), _split_kinds(config.image_parts)
    sides = {"videos": (videos, config.video_weights, 1, "video_weights")}
    sides["images"] = (videos, config.video_weights, config.images_per_example, "video_weights")
    if images:
        sides["images"] = (images, config.image_weights, config.images_per_example, "image_weights")
    out = {}
    for name, (parts, weights, number, field_name) in sides.items():
        if not parts:  # images only
            out[name] = ((), ((0, ()),), number)
            continue
        weights = weights or ((0, (1.0,) * len(parts)),)
        mixture.check_weights(weights, len(parts), f"data.{field_name}")
        out[name] = (parts, weights, number)
    return out

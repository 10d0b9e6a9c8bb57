"""What a batch holds and where it comes from: the group `data` of a config, and the source that it names."""

import dataclasses
from collections.abc import Sequence

from lavie_jax.data import mixture
from lavie_jax.data.buckets import Buckets, Size, divide, make_buckets, size_name
from lavie_jax.data.latents import LatentRecords, LatentSet, LatentSource, open_set
from lavie_jax.data.records import Records
from lavie_jax.data.sources import KINDS, MovingShapes, RecordSource, Source, open_records
from lavie_jax.data.video_files import Window
from lavie_jax.errors import UserError, suggest

LATENTS = "latents"
SOURCES = ("moving_shapes", *KINDS, LATENTS, "mixture")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a batch holds: T `frames` at `fps` and M `images` of (height, width), with captions.

    `frames` = 0 is a batch of images alone.

    Attributes:
      source: one of SOURCES; `path` says where its clips are.
      image_path: where the images are, of the kind `image_source`, which without is `source`. Without a path, images
        are frames of the clips.
      videos, stills: of a mixture: its parts for clips and for images, each "KIND:PATH" or "moving_shapes"; without
        stills, images come from the parts for clips.
      video_weights, still_weights: of these parts, ((step, (weight, ...)), ...) from each step on; () = equal weights.
      split: "train" or "val"; Moving Shapes has more.
      fps: frames per second; None = each clip's own rate, of which every `stride`-th frame is taken.
      slowest_fps: each clip of Moving Shapes has a rate of its own between this and `fps`: more motion from frame to
        frame. 0 = `fps`.
      clip_stills: the share of Moving Shapes' stills that are frames of clips, with the clips' captions: so an image
        model knows the words of videos before it is inflated (AnimateDiff, arXiv 2307.04725, sec. 4.1).
      buckets: ((height, width), ...), `height` x `width` among them: each batch is of one of these sizes, and each clip
        and image of the batches whose shape is nearest to its own. () = all of `height` x `width`.
      full_height, full_width: frames are scaled to this size, and `height` x `width` is a patch of them. 0 = no patch.
      handheld: the share of clips that are a still under a moving camera: how images join the training of networks
        that want clips (LaVie sec. 3.4).
      caption_drop: the probability with which a caption is replaced by `null_caption`, for classifier-free guidance.
      detail_drop: that with which a caption of Moving Shapes leaves out the size, or the background.
      max_unreadable: a process that has skipped more different records than this stops.
    """

    source: str = "moving_shapes"
    path: str | None = None
    image_source: str = ""
    image_path: str | None = None
    videos: tuple[str, ...] = ()
    stills: tuple[str, ...] = ()
    video_weights: tuple = ()
    still_weights: tuple = ()
    split: str = "train"
    frames: int = 16
    fps: float | None = 8.0
    stride: int = 1
    slowest_fps: float = 0.0
    clip_stills: float = 0.0
    height: int = 64
    width: int = 64
    buckets: tuple = ()
    full_height: int = 0
    full_width: int = 0
    images: int = 0
    handheld: float = 0.0
    caption_drop: float = 0.1
    null_caption: str = ""
    detail_drop: float = 0.1
    max_unreadable: int = 1000
    seed: int = 0

    @property
    def whole(self) -> tuple[int, int]:
        """(H, W) of whole frames."""
        return self.full_height or self.height, self.full_width or self.width

    @property
    def pictures(self) -> bool:
        """Whether batches hold pictures, beside clips or in their place."""
        return bool(self.images or self.handheld or not self.frames)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(H, W) of the batches that there are."""
        return tuple((height, width) for height, width in self.buckets) or ((self.height, self.width),)


def check(config: DataConfig) -> None:
    """Refuses, before any file is read, fields that do not go together."""
    if config.frames < 0 or config.images < 0 or config.frames + config.images < 1:
        raise UserError(f"a batch needs frames or images; given {config.frames} frames, {config.images} images")
    if min(config.height, config.width) < 1:
        raise UserError(f"height and width must be at least 1; given {config.height}x{config.width}")
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
        raise UserError(f"stride is at least 1, and is for clips at their own rate, fps=None; given {config.stride}")
    if config.slowest_fps and not 0 < config.slowest_fps <= (config.fps or 0):
        raise UserError(f"slowest_fps is above 0 and at most fps; given {config.slowest_fps} and {config.fps}")
    if config.seed < 0 or config.max_unreadable < 0:
        raise UserError(
            f"the data's seed must be at least 0, and max_unreadable; given {config.seed}, {config.max_unreadable}"
        )
    for name in ("caption_drop", "detail_drop", "handheld", "clip_stills"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name} is a probability, 0 to 1; given {getattr(config, name)}")
    if config.source == "mixture":
        if not config.videos + config.stills or (config.frames and not config.videos):
            raise UserError("a mixture needs data.videos, or data.stills for images alone: ('KIND:PATH', ...)")
        _parts(config)
    elif config.videos or config.stills or config.video_weights or config.still_weights:
        raise UserError(f"videos, stills and their weights are for source='mixture'; given source={config.source!r}")
    if latent_paths(config):
        _check_latents(config)


def check_buckets(config: DataConfig) -> None:
    """Refuses buckets that are none, or that do not go with the rest."""
    try:
        sizes = [(int(height), int(width)) for height, width in config.buckets]
    except (TypeError, ValueError):
        sizes = [(0, 0)]
    if min(min(size) for size in sizes) < 1 or len(set(sizes)) < len(sizes):
        raise UserError(f"buckets are ((height, width), ...), each once; given {config.buckets!r}")
    if (config.height, config.width) not in sizes:
        raise UserError(
            f"buckets hold the size that is sampled, height x width = {size_name((config.height, config.width))}; "
            f"given {', '.join(map(size_name, sizes))}"
        )
    if config.full_height or config.full_width:
        raise UserError("buckets are of whole frames, full_height and full_width of patches: set one of them only")
    if config.source == "mixture":
        raise UserError("buckets need one source, whose clips are divided among them; given source='mixture'")


def _check_latents(config: DataConfig) -> None:
    """Refuses what cannot be had of latents, which were made of whole frames at one place."""
    others = [kind for kind, _ in _kinds(config) if kind != LATENTS]
    if others:
        raise UserError(f"clips and images are all latents, or none of them; given latents and {', '.join(others)}")
    for name in ("handheld", "full_height", "full_width"):
        if value := getattr(config, name):
            raise UserError(f"{name} is for pixels, data.source is 'latents': set it to 0; given {value}")


def latent_paths(config: DataConfig) -> list[str]:
    """The sets of latents that a config names; all its data is in them, or none of it."""
    return [path for kind, path in _kinds(config) if kind == LATENTS and path]


def _kinds(config: DataConfig) -> list[tuple[str, str | None]]:
    """(kind, path) of all that batches are made of."""
    if config.source == "mixture":
        return [*_split_kinds(config.videos + config.stills)]
    image_path = config.image_path if config.pictures else None
    clips = [(config.source, config.path)] if config.path or not image_path else []
    return clips + ([(config.image_source or config.source, image_path)] if image_path else [])


def make_source(config: DataConfig, *, batch_size: int = 1) -> Source | Buckets:
    """The source that a config names; `batch_size` tells mixtures and buckets which example belongs to which step.

    Raises UserError for what cannot be read or does not exist.
    """
    check(config)
    if config.buckets:
        whole = config.split == "train"  # held-out clips may come again
        return make_buckets(_bucket_sources(config), batch=batch_size, whole=whole, seed=config.seed)
    if config.source != "mixture":
        return _one_source(config, (config.source, config.path), (config.image_source, config.image_path))
    sides: dict[str, tuple[Source, ...]] = {}
    orders: dict[str, mixture.Order] = {}
    for name, (parts, weights, number) in _parts(config).items():
        if name == "videos":
            sides[name] = tuple(_one_source(config, part, ("", None)) for part in parts)
        elif not config.stills:  # the stills are frames of the clips
            sides[name] = sides["videos"]
        else:
            sides[name] = tuple(_one_source(config, ("", None), part) for part in parts)
        orders[name] = mixture.Order(weights, batch_size * number, config.seed)
    return mixture.Mixture(sides["videos"], sides["images"], orders["videos"], orders["images"])


def mixture_weights(config: DataConfig, step: int) -> dict[str, float]:
    """{"videos/KIND:PATH": its share of the clips of step `step`, "images/...": ...}; empty without a mixture."""
    shares: dict[str, float] = {}
    sides = _parts(config) if config.source == "mixture" else {}
    for name, (parts, weights, _) in sides.items():
        for part, share in zip(parts, mixture.shares_at(weights, step)):
            shares[f"{name}/{':'.join(filter(None, part))}"] = share
    return shares


def _split_kinds(parts: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    """((kind, path or None), ...) of the parts of a mixture."""
    halves = [part.partition(":") for part in parts]
    return tuple((kind, path or None) for kind, _, path in halves)


def _parts(config: DataConfig) -> dict[str, tuple[tuple, mixture.Weights, int]]:
    """{"videos": (parts, weights, how many an example has), "images": ...} of a mixture."""
    videos, stills = _split_kinds(config.videos), _split_kinds(config.stills)
    found = {"videos": (videos, config.video_weights, 1, "video_weights")}
    found["images"] = (videos, config.video_weights, max(config.images, 1), "video_weights")
    if stills:
        found["images"] = (stills, config.still_weights, max(config.images, 1), "still_weights")
    out = {}
    for name, (parts, weights, number, field) in found.items():
        if not parts:  # images alone
            out[name] = ((), ((0, ()),), number)
            continue
        weights = weights or ((0, (1.0,) * len(parts)),)
        mixture.check_weights(weights, len(parts), f"data.{field}")
        out[name] = (parts, weights, number)
    return out


def _one_source(config: DataConfig, clips: tuple[str, str | None], images: tuple[str, str | None]) -> Source:
    """The source of (kind, path) of clips and of images; a path that is None has none."""
    kind = _kind(config, clips, images)
    if kind == "moving_shapes":
        return _moving_shapes(config)
    if kind == LATENTS:
        return _latent_source(config, *_paths(config, clips, images))
    return _record_source(config, *_open(config, clips, images))


def _bucket_sources(config: DataConfig) -> list[tuple[Size, Source]]:
    """The buckets and the source of each, which may be empty."""
    clips, images = (config.source, config.path), (config.image_source, config.image_path)
    kind, count = _kind(config, clips, images), len(config.sizes)
    each = [dataclasses.replace(config, height=height, width=width) for height, width in config.sizes]
    if kind == "moving_shapes":  # a clip of its own for each
        own = [dataclasses.replace(c, seed=c.seed * count + i) for i, c in enumerate(each)]
        return [((c.height, c.width), _moving_shapes(c)) for c in own]
    if kind == LATENTS:
        paths = _paths(config, clips, images)
        sets = [open_set(path) for path in paths if path is not None]
        _check_sizes(config, sets)
        there = [c for c in each if (c.height, c.width) in sets[0].sizes]
        return [((c.height, c.width), _latent_source(c, *paths)) for c in there]
    opened = _open(config, clips, images)
    divided = [
        [None] * count if records is None else divide(records, medium, config.sizes)
        for records, medium in zip(opened, ("video", "image"))
    ]
    sources = [((c.height, c.width), _record_source(c, *mine)) for c, *mine in zip(each, *divided)]
    there = [(size, source.pictures) for size, source in sources if len(source)]
    bare = [size for size, pictures in there if config.images and pictures is not None and not len(pictures)]
    # Held-out images are few: a bucket without any is not measured.
    if bare and (config.split == "train" or len(bare) == len(there)):
        raise UserError(
            f"the bucket {size_name(bare[0])} has clips and no image whose shape is nearest to it in split "
            f"{config.split!r}: add some, or leave the bucket out of data.buckets"
        )
    return [(size, source) for size, source in sources if size not in bare]


def _kind(config: DataConfig, clips: tuple[str, str | None], images: tuple[str, str | None]) -> str:
    """The kind of a source whose fields go together."""
    kind = clips[0] or images[0]
    if kind not in SOURCES[:-1]:
        raise UserError(f"unknown data source {kind!r}{suggest(kind, SOURCES)}")
    if kind == "moving_shapes":
        if config.images and config.split not in ("train", "val"):
            raise UserError(f"split {config.split!r} of Moving Shapes has no images: use images=0, or train or val")
        if config.fps is None:
            raise UserError("Moving Shapes has no frame rate of its own: give fps")
        return kind
    if (clips[1] is None and images[1] is None) or (clips[0] and clips[1] is None and config.frames):
        raise UserError(f"the data source {kind} needs a path")
    if config.slowest_fps:
        raise UserError("slowest_fps is for Moving Shapes: clips of video files have one rate")
    if config.clip_stills:
        raise UserError("clip_stills is for Moving Shapes: without image_path, stills are frames of the clips")
    return kind


def _paths(
    config: DataConfig, clips: tuple[str, str | None], images: tuple[str, str | None]
) -> tuple[str | None, str | None]:
    """Where clips and images are; None of what is not needed."""
    pictures = images[1] if config.pictures else None
    return clips[1] if config.frames or pictures is None else None, pictures


def _moving_shapes(config: DataConfig) -> MovingShapes:
    return MovingShapes(
        split=config.split,
        drop=config.detail_drop,
        frames=config.frames,
        fps=config.fps,
        slowest_fps=config.slowest_fps or config.fps,
        clip_stills=config.clip_stills,
        height=config.height,
        width=config.width,
        whole=config.whole,
        seed=config.seed,
    )


def _window(config: DataConfig) -> Window:
    return Window(frames=config.frames, fps=config.fps, stride=config.stride)


def _open(
    config: DataConfig, clips: tuple[str, str | None], images: tuple[str, str | None]
) -> tuple[Records | None, Records | None]:
    """The records of clips and of pictures."""
    kinds, mediums = (clips[0] or images[0], images[0] or clips[0]), ("video", "image")
    return tuple(
        None if path is None else open_records(kind, path, medium=medium, split=config.split, window=_window(config))
        for kind, path, medium in zip(kinds, _paths(config, clips, images), mediums)
    )


def _record_source(config: DataConfig, clips: Records | None, pictures: Records | None) -> RecordSource:
    return RecordSource(
        clips=clips,
        pictures=pictures,
        window=_window(config),
        height=config.height,
        width=config.width,
        whole=config.whole,
        random_place=config.split == "train",
        seed=config.seed,
    )


def _latent_source(config: DataConfig, clips: str | None, images: str | None) -> LatentSource:
    """The source of sets of latents; a path that is None has none."""
    found = {medium: open_set(path) for medium, path in (("video", clips), ("image", images)) if path is not None}
    records, size = {}, (config.height, config.width)
    for medium, one in found.items():
        _check_set(config, one, medium)
        records[medium] = LatentRecords(one, size, split=config.split)
    first = next(iter(found.values()))
    return LatentSource(
        clips=records.get("video"),
        pictures=records.get("image"),
        window=_window(config),
        fps=first.fps,
        null_text=first.null_text,
        random_place=config.split == "train",
        seed=config.seed,
    )


def _check_set(config: DataConfig, found: LatentSet, medium: str) -> None:
    """Refuses a set of latents that a config cannot be trained on."""
    where = repr(str(found.path))
    if medium == "video" and found.medium == "image":
        raise UserError(f"{where} holds latents of pictures: name it as data.image_path")
    if medium == "video" and config.fps is not None and config.fps > found.fps:
        raise UserError(f"data.fps = {config.fps:g}: {where} has latents of {found.fps:g} frames a second")
    if found.null_caption != config.null_caption:
        raise UserError(
            f"{where} was made for a stage whose dropped captions are {found.null_caption!r}, not "
            f"{config.null_caption!r}: make it again with --latents of this stage's weights"
        )
    size = (config.height, config.width)
    if size not in found.sizes:
        raise UserError(f"{where} has latents of {_names(found)}; the config asks for {size_name(size)}")
    if not config.buckets and len(found.sizes) > 1:
        raise UserError(f"{where} has latents of {_names(found)}: name them all, data.buckets={_sizes(found)}")


def _check_sizes(config: DataConfig, sets: Sequence[LatentSet]) -> None:
    """Refuses sets with records of a size that no bucket shows."""
    for found in sets:
        if not set(found.sizes) <= set(config.sizes):
            raise UserError(
                f"{str(found.path)!r} has latents of {_names(found)}: name them all, "
                f"data.buckets={_sizes(found)}; given {', '.join(map(size_name, config.sizes))}"
            )


def _sizes(found: LatentSet) -> str:
    return str(tuple(found.sizes)).replace(" ", "")


def _names(found: LatentSet) -> str:
    return " and ".join(map(size_name, found.sizes))

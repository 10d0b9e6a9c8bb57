"""Opens the source that a `DataConfig` describes: Moving Shapes, records, latents, mixtures and buckets of them."""

import dataclasses
from collections.abc import Sequence

from lavie_jax.data import mixture
from lavie_jax.data.buckets import Buckets, Size, divide, make_buckets, size_name
from lavie_jax.data.config import LATENTS, SOURCES, DataConfig, check, mixture_parts
from lavie_jax.data.latents import LatentRecords, LatentSet, LatentSource, open_set
from lavie_jax.data.records import VAL_FRACTION, Records
from lavie_jax.data.sources import MovingShapes, RecordSource, Source, open_records
from lavie_jax.data.video_files import ClipWindow
from lavie_jax.errors import UserError, suggest

Part = tuple[str, str | None]  # (kind, path); a path of None means no data of this medium


def make_source(config: DataConfig, *, batch_size: int = 1) -> Source | Buckets:
    """Returns the source that a config describes.

    Args:
        config: the data.
        batch_size: examples per step, by which mixtures and buckets find the step of an example.

    Raises:
        UserError: fields are invalid, or data are missing or cannot be read.
    """
    check(config)
    if config.buckets:
        unique = config.split == "train"  # held-out clips may repeat within a batch
        return make_buckets(_bucket_sources(config), batch=batch_size, unique=unique, seed=config.seed)
    if config.source != "mixture":
        return _one_source(config, (config.source, config.path), (config.image_source, config.image_path))
    sides: dict[str, tuple[Source, ...]] = {}
    orders: dict[str, mixture.Order] = {}
    for name, (parts, weights, number) in mixture_parts(config).items():
        if name == "videos":
            sides[name] = tuple(_one_source(config, part, ("", None)) for part in parts)
        elif not config.image_parts:  # images are frames of the clips
            sides[name] = sides["videos"]
        else:
            captions = config.image_captions or ("",) * len(parts)
            sides[name] = tuple(
                _one_source(dataclasses.replace(config, image_captions=(caption,)), ("", None), part)
                for caption, part in zip(captions, parts)
            )
        orders[name] = mixture.Order(weights, batch_size * number, config.seed)
    return mixture.Mixture(sides["videos"], sides["images"], orders["videos"], orders["images"])


def _one_source(config: DataConfig, clips: Part, images: Part) -> Source:
    """The source of one part of clips and one of images."""
    kind = _kind(config, clips, images)
    if kind == "moving_shapes":
        return _moving_shapes(config)
    if kind == LATENTS:
        return _latent_source(config, *_paths(config, clips, images))
    return _record_source(config, *_open(config, clips, images))


def _bucket_sources(config: DataConfig) -> list[tuple[Size, Source]]:
    """(size, source) of each bucket; a source may be empty."""
    clips, images = (config.source, config.path), (config.image_source, config.image_path)
    kind, count = _kind(config, clips, images), len(config.sizes)
    each = [dataclasses.replace(config, height=height, width=width) for height, width in config.sizes]
    if kind == "moving_shapes":  # different clips in each bucket
        seeded = [dataclasses.replace(c, seed=c.seed * count + i) for i, c in enumerate(each)]
        return [((c.height, c.width), _moving_shapes(c)) for c in seeded]
    if kind == LATENTS:
        paths = _paths(config, clips, images)
        sets = [open_set(path) for path in paths if path is not None]
        _check_sizes(config, sets)
        stored = [c for c in each if (c.height, c.width) in sets[0].sizes]
        return [((c.height, c.width), _latent_source(c, *paths)) for c in stored]
    opened = _open(config, clips, images)
    divided = [
        [None] * count if records is None else divide(records, medium, config.sizes)
        for records, medium in zip(opened, ("video", "image"))
    ]
    sources = [((c.height, c.width), _record_source(c, *subsets)) for c, *subsets in zip(each, *divided)]
    used = [(size, source.images) for size, source in sources if len(source)]
    imageless = [size for size, records in used if config.images and records is not None and not len(records)]
    # There are few held-out images: a bucket without any is left out of the held-out loss.
    if imageless and (config.split == "train" or len(imageless) == len(used)):
        raise UserError(
            f"the bucket {size_name(imageless[0])} has clips but no image whose shape is nearest to it in split "
            f"{config.split!r}: add some, or remove the bucket from data.buckets"
        )
    return [(size, source) for size, source in sources if size not in imageless]


def _kind(config: DataConfig, clips: Part, images: Part) -> str:
    """The kind of a source. Raises UserError for fields that this kind does not support."""
    kind = clips[0] or images[0]
    if kind not in SOURCES[:-1]:
        raise UserError(f"unknown data source {kind!r}{suggest(kind, SOURCES)}")
    if kind == "moving_shapes":
        if unused := clips[1] or images[1] or (images[0] if images[0] != kind else ""):
            raise UserError(
                f"Moving Shapes is generated, so that {unused!r} is not read: set data.source to the kind of your "
                "data, or remove it (data.path, image_path, image_source)"
            )
        if images[0] and any(config.image_captions):
            raise UserError("image_captions is for folders of images: Moving Shapes has captions of its own. Remove it")
        if config.images and config.split not in ("train", "val"):
            raise UserError(f"split {config.split!r} of Moving Shapes has no images: set images=0, or use train or val")
        if config.fps is None:
            raise UserError("Moving Shapes has no frame rate of its own: set fps")
        return kind
    if (clips[1] is None and images[1] is None) or (clips[0] and clips[1] is None and config.frames):
        raise UserError(f"the data source {kind} needs a path")
    if images[0] and images[1] is None:
        raise UserError(f"data.image_source = {images[0]!r} is the kind of the images at data.image_path: set both")
    if config.slowest_fps:
        raise UserError("slowest_fps is for Moving Shapes: a video file has one rate")
    if config.objects != 1:
        raise UserError(f"objects is for Moving Shapes, not for {kind}: set it to 1")
    if config.images_from_clips:
        raise UserError("images_from_clips is for Moving Shapes: without image_path, images are frames of the clips")
    return kind


def _paths(config: DataConfig, clips: Part, images: Part) -> tuple[str | None, str | None]:
    """Paths of clips and of images; None for a medium that batches do not contain."""
    image_path = images[1] if config.shows_images else None
    return clips[1] if config.frames or image_path is None else None, image_path


def _moving_shapes(config: DataConfig) -> MovingShapes:
    return MovingShapes(
        split=config.split,
        drop=config.detail_drop,
        frames=config.frames,
        fps=config.fps,
        slowest_fps=config.slowest_fps or config.fps,
        images_from_clips=config.images_from_clips,
        objects=config.objects,
        height=config.height,
        width=config.width,
        whole=config.whole,
        seed=config.seed,
    )


def clip_window(config: DataConfig) -> ClipWindow:
    """Returns the window of a clip that becomes an example."""
    return ClipWindow(frames=config.frames, fps=config.fps, stride=config.stride)


def _open(config: DataConfig, clips: Part, images: Part) -> tuple[Records | None, Records | None]:
    """The records of clips and of images."""
    window = clip_window(config)
    kinds, mediums = (clips[0] or images[0], images[0] or clips[0]), ("video", "image")
    captions = ("", next(iter(config.image_captions), ""))
    split, fraction = _split(config)
    return tuple(
        None if path is None else open_records(
            kind, path, medium=medium, split=split, window=window, val_fraction=fraction, caption=caption
        )
        for kind, path, medium, caption in zip(kinds, _paths(config, clips, images), mediums, captions)
    )  # fmt: skip


def _split(config: DataConfig) -> tuple[str, float]:
    """Returns the split of records to open, and the fraction that is held out."""
    return (config.split, VAL_FRACTION) if config.hold_out else ("train", 0.0)


def _record_source(config: DataConfig, clips: Records | None, images: Records | None) -> RecordSource:
    return RecordSource(
        clips=clips,
        images=images,
        window=clip_window(config),
        height=config.height,
        width=config.width,
        whole=config.whole,
        random_crop=config.split == "train",
        seed=config.seed,
    )


def _latent_source(config: DataConfig, clips: str | None, images: str | None) -> LatentSource:
    """The source of sets of latents; either path may be None."""
    sets = {medium: open_set(path) for medium, path in (("video", clips), ("image", images)) if path is not None}
    records, size = {}, (config.height, config.width)
    split, fraction = _split(config)
    for medium, latents in sets.items():
        _check_set(config, latents, medium)
        records[medium] = LatentRecords(latents, size, split=split, val_fraction=fraction)
    first = next(iter(sets.values()))
    return LatentSource(
        clips=records.get("video"),
        images=records.get("image"),
        window=clip_window(config),
        fps=first.fps,
        null_text=first.null_text,
        random_crop=config.split == "train",
        seed=config.seed,
    )


def _check_set(config: DataConfig, latents: LatentSet, medium: str) -> None:
    """Raises UserError for a set of latents that does not fit a config."""
    where = repr(str(latents.path))
    if medium == "video" and latents.medium == "image":
        raise UserError(f"{where} contains latents of images: pass it as data.image_path")
    if medium == "video" and config.fps is not None and config.fps > latents.fps:
        raise UserError(f"data.fps = {config.fps:g}: {where} has latents at {latents.fps:g} fps")
    if latents.null_caption != config.null_caption:
        raise UserError(
            f"{where} was computed for a stage whose null caption is {latents.null_caption!r}, not "
            f"{config.null_caption!r}: compute it again with --latents and this stage's weights"
        )
    size = (config.height, config.width)
    if size not in latents.sizes:
        raise UserError(f"{where} has latents of {_names(latents)}; the config sets {size_name(size)}")
    if not config.buckets and len(latents.sizes) > 1:
        raise UserError(f"{where} has latents of {_names(latents)}: list them all: data.buckets={_sizes(latents)}")


def _check_sizes(config: DataConfig, sets: Sequence[LatentSet]) -> None:
    """Raises UserError for sets with records of a size that is not a bucket."""
    for latents in sets:
        if not set(latents.sizes) <= set(config.sizes):
            raise UserError(
                f"{str(latents.path)!r} has latents of {_names(latents)}: list them all: "
                f"data.buckets={_sizes(latents)}; given {', '.join(map(size_name, config.sizes))}"
            )


def _sizes(latents: LatentSet) -> str:
    return str(tuple(latents.sizes)).replace(" ", "")


def _names(latents: LatentSet) -> str:
    return " and ".join(map(size_name, latents.sizes))

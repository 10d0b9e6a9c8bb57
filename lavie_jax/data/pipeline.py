"""Batches for training: `batches(...)` gives dicts of numpy arrays from a step on, for ever.

Example i of the global stream is a pure function of (config, i): the clip, the stills beside it, the random
crop and the dropped captions. Process p of P takes examples p, p + P, ... and the position in the data is
the step, one integer: any number of worker processes gives the same batches, and a resumed run starts at
`start_step`. grain runs the worker processes; without workers a thread of this process does the same work,
and grain is not imported.
"""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from lavie_jax.data import tokens, transforms
from lavie_jax.data.sources import MovingShapes, Source, VideoFolder
from lavie_jax.errors import UserError, suggest

SOURCES = ("moving_shapes", "video_folder")
_EXAMPLES = 2**50  # endless, and still far from overflow after slicing and batching


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a batch holds: T `frames` at `fps` and M `images` of (height, width), with captions.

    `frames` = 0 is a batch of images alone. With `full_height` and `full_width`, frames are scaled to that size,
    and `height` x `width` is a patch of them. With `slowest_fps`, each clip of Moving Shapes has a rate of its own
    between that and `fps`: more motion from frame to frame. `handheld` is the share of clips that are a still under
    a moving camera: how images join the training of networks that want clips (LaVie sec. 3.4). `caption_drop` is the
    probability with which a caption is replaced by `null_caption`, for classifier-free guidance; `detail_drop`
    that with which a caption of Moving Shapes leaves out the size, or the background. `path` and `image_path` are
    for video folders.
    """

    source: str = "moving_shapes"
    path: str | None = None
    image_path: str | None = None
    split: str = "train"
    frames: int = 16
    fps: float | None = 8.0
    slowest_fps: float = 0.0
    height: int = 64
    width: int = 64
    full_height: int = 0
    full_width: int = 0
    images: int = 0
    handheld: float = 0.0
    caption_drop: float = 0.1
    null_caption: str = ""
    detail_drop: float = 0.1
    seed: int = 0

    @property
    def whole(self) -> tuple[int, int]:
        """(H, W) of whole frames."""
        return self.full_height or self.height, self.full_width or self.width


def make_source(config: DataConfig) -> Source:
    """The source that a config names. Raises UserError for what cannot be read or does not exist."""
    if config.source not in SOURCES:
        raise UserError(f"unknown data source {config.source!r}{suggest(config.source, SOURCES)}")
    if config.frames < 0 or config.images < 0 or config.frames + config.images < 1:
        raise UserError(f"a batch needs frames or images; given {config.frames} frames, {config.images} images")
    if min(config.height, config.width) < 1:
        raise UserError(f"height and width must be at least 1; given {config.height}x{config.width}")
    if config.whole[0] < config.height or config.whole[1] < config.width:
        raise UserError(
            f"patches of {config.height}x{config.width} do not fit into frames of {config.whole[0]}x{config.whole[1]} "
            "(full_height, full_width)"
        )
    if config.fps is not None and not config.fps > 0:
        raise UserError(f"fps must be above 0; given {config.fps}")
    if config.slowest_fps and not 0 < config.slowest_fps <= (config.fps or 0):
        raise UserError(f"slowest_fps is above 0 and at most fps; given {config.slowest_fps} and {config.fps}")
    if config.seed < 0:
        raise UserError(f"the data's seed must be at least 0; given {config.seed}")
    for name in ("caption_drop", "detail_drop", "handheld"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name} is a probability, 0 to 1; given {getattr(config, name)}")
    shape = {"frames": config.frames, "height": config.height, "width": config.width, "whole": config.whole}
    shape["seed"] = config.seed
    if config.source == "video_folder":
        if config.path is None:
            raise UserError("the data source video_folder needs a path")
        if config.slowest_fps:
            raise UserError("slowest_fps is for Moving Shapes: clips of video files have one rate")
        return VideoFolder(config.path, split=config.split, fps=config.fps, images=config.image_path, **shape)
    if config.images and config.split not in ("train", "val"):
        raise UserError(f"split {config.split!r} of Moving Shapes has no images: use images=0, or train or val")
    if config.fps is None:
        raise UserError("Moving Shapes has no frame rate of its own: give fps")
    rates = {"fps": config.fps, "slowest_fps": config.slowest_fps or config.fps}
    return MovingShapes(split=config.split, drop=config.detail_drop, **rates, **shape)


@dataclasses.dataclass(frozen=True)
class Examples:
    """The global stream of examples as a random-access source, for grain or a plain loop."""

    config: DataConfig
    source: Source

    def __len__(self) -> int:
        return _EXAMPLES

    def __getitem__(self, index: int) -> dict:
        """Example `index`: uint8 `video` and `images`, `caption` and `image_captions`, dropped or not."""
        c, index = self.config, int(index)
        rng = np.random.default_rng([c.seed, index])
        video = np.zeros((0, c.height, c.width, 3), np.uint8), c.null_caption
        if c.frames and c.handheld and rng.random() < c.handheld:
            reach = transforms.camera_reach(c.height, c.width)
            picture, caption = self.source.image(index, rng, margin=reach)
            shape = {"frames": c.frames, "height": c.height, "width": c.width}
            video = transforms.handheld(picture, **shape, fps=c.fps or transforms.USUAL_FPS, rng=rng), caption
        elif c.frames:
            video = self.source.video(index, rng)
        stills = [self.source.image(index * c.images + j, rng) for j in range(c.images)]
        kept = rng.random(1 + c.images) >= c.caption_drop
        captions = [video[1], *(caption for _, caption in stills)]
        captions = [caption if keep else c.null_caption for caption, keep in zip(captions, kept)]
        empty = np.zeros((0, c.height, c.width, 3), np.uint8)
        return {
            "video": video[0],
            "images": np.stack([pixels for pixels, _ in stills]) if stills else empty,
            "caption": captions[0],
            "image_captions": captions[1:],
        }


def _collate(examples: Sequence[dict]) -> dict:
    """Pixels stacked; captions stay lists."""
    return {
        key: np.stack([e[key] for e in examples]) if key in ("video", "images") else [e[key] for e in examples]
        for key in examples[0]
    }


def _plain(examples: Examples, local: int, start: int, process: int, processes: int) -> Iterator[dict]:
    """What `_grain` gives, in this thread."""
    step = start
    while True:
        first = step * local
        yield _collate([examples[process + processes * (first + i)] for i in range(local)])
        step += 1


def _grain(examples: Examples, local: int, start: int, process: int, processes: int, workers: int) -> Iterator[dict]:
    """Batches by grain's worker processes, in order."""
    try:
        import grain  # needed by those who ask for workers only
    except ImportError as error:
        raise UserError(f"workers={workers} needs the package grain: install it, or set workers=0") from error
    from absl import flags

    # grain's workers read absl flags, which a program that never parses them leaves unparsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(examples)[process::processes]
    dataset = dataset.batch(local, drop_remainder=True, batch_fn=_collate)[start:]
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(dataset.to_iter_dataset(read).mp_prefetch(options))


def _prefetched(source: Iterator[dict], count: int) -> Iterator[dict]:
    """Items of `source`, made by a thread that is `count` ahead. Its errors arrive at the reader."""
    ready: queue.Queue = queue.Queue(count)
    stop = threading.Event()

    def put(item: tuple) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not put((item, None)):
                    break
        except Exception as error:
            put((None, error))
        if hasattr(source, "close"):
            source.close()

    thread = threading.Thread(target=work, name="data", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join(timeout=5)


def batches(
    config: DataConfig,
    tokenizer,
    *,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches `start_step`, `start_step` + 1, ... of this process, without end.

    Args:
      config: what a batch holds.
      tokenizer: a CLIP tokenizer (`lavie_jax.data.tokens`), or None for batches without tokens (a VAE's).
      batch_size: examples of all processes together.
      start_step: the first batch's number; a resumed run gives the step it resumes at.
      process_index, process_count: this process among those that share a batch.
      workers: worker processes, by grain; 0 is a thread of this process.
      prefetch: batches that are made ahead.

    Returns an iterator of {`video` (B, T, H, W, 3) float32 in [-1, 1], `images` (B, M, H, W, 3) likewise,
    `tokens` (B, L) int32, `image_tokens` (B, M, L) int32}, B = batch_size / process_count; close it to end
    its thread and workers. Raises UserError, at once, for a batch that the processes do not divide, data
    that cannot be read, and a folder with fewer clips than a batch.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"a batch of {batch_size} cannot be divided among {process_count} processes")
    if workers < 0 or prefetch < 1 or start_step < 0:
        raise UserError(
            f"workers and start_step are at least 0 and prefetch 1; given {workers}, {start_step}, {prefetch}"
        )
    source = make_source(config)
    if config.split == "train" and len(source) < batch_size:  # held-out clips may come again
        raise UserError(
            f"a batch of {batch_size} needs as many clips; {config.path!r} has {len(source)} in split {config.split!r}"
        )
    stream = Examples(config, source), batch_size // process_count, start_step, process_index, process_count
    raw = _grain(*stream, workers) if workers else _plain(*stream)
    ids = None if tokenizer is None else tokens.CachedTokens(tokenizer)
    return _prefetched(_arrays(raw, ids), prefetch)


def _arrays(raw: Iterator[dict], ids: tokens.CachedTokens | None) -> Iterator[dict[str, np.ndarray]]:
    """Pixels as floats, captions as tokens: here, so that workers send bytes and load no tokenizer."""
    try:
        for batch in raw:
            out = {key: transforms.to_float(batch[key]) for key in ("video", "images")}
            if ids is not None:
                out["tokens"] = ids(batch["caption"])
                flat = ids([caption for row in batch["image_captions"] for caption in row])
                out["image_tokens"] = flat.reshape(*batch["images"].shape[:2], ids.length)
            yield out
    finally:
        if hasattr(raw, "close"):
            raw.close()

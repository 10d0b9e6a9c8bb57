"""Batches for training: `batches(...)` is an endless iterator of dicts of numpy arrays.

Example i of the global stream is a pure function of (config, i): the clip, its images, the random crop and the dropped
captions. Row r of step s is example s B + r, and each process computes the rows of its own devices. So the position in
the data is one integer, the step, and a batch is the same for any number of processes and workers. grain runs the
workers; with workers=0, a thread of this process does the same work and grain is not imported.
"""

import dataclasses
import functools
import hashlib
import math
import os
import queue
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from einops import rearrange

from lavie_jax.data import tokens, transforms
from lavie_jax.data.buckets import Buckets
from lavie_jax.data.build import make_source
from lavie_jax.data.config import DataConfig, latent_paths, mixture_weights
from lavie_jax.data.mixture import Mixture, largest_shares
from lavie_jax.data.sources import Item, Source
from lavie_jax.errors import UserError

_BUFFER = 2  # batches that wait in each worker
_DEATHS = 3  # of workers in a row, until they are given up
_EXAMPLES = 2**50  # effectively endless, and far from overflow after slicing and batching


@dataclasses.dataclass(frozen=True)
class Examples:
    """The global stream of examples as a random-access source, with `batch` examples per step."""

    config: DataConfig
    source: Source | Buckets
    batch: int = 1

    def __len__(self) -> int:
        return _EXAMPLES

    def fingerprint(self) -> str:
        """SHA-256 of the number of clips and the first example, to check that hosts read the same data.

        Raises:
            UserError: the example cannot be read.
        """
        digest = hashlib.sha256(str(len(self.source)).encode())
        for name, value in sorted(self[0].items()):
            digest.update(name.encode())
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else str(value).encode())
        return digest.hexdigest()

    def held_out_weights(self, batches: int) -> list[float]:
        """Weights, with a sum of 1, of the first batches of a held-out split: `batches`, or one per bucket."""
        if isinstance(self.source, Buckets):
            return self.source.weights(max(batches, len(self.source.sizes)))
        return [1 / batches] * batches

    @functools.cached_property
    def encoded(self) -> bool:
        """Whether clips and images are stored latents."""
        return bool(latent_paths(self.config))

    def __getitem__(self, index: int) -> dict:
        """Example `index`: uint8 `video` and `images`, `caption` and `image_captions` after dropping, and `skipped`.

        Sets of latents give float16 `video_latents` and `text` if T > 0, `image_latents` and `image_text` if M > 0.
        """
        c, index = self.config, int(index)
        rng = np.random.default_rng([c.seed, index])
        source = self.source
        if isinstance(source, Buckets):
            source, index, (height, width) = source.of(index)
            c = dataclasses.replace(c, height=height, width=width)
        empty = np.zeros((0, c.height, c.width, 3), np.uint8)
        video = Item(empty, c.null_caption)
        if c.frames and c.handheld and rng.random() < c.handheld:
            reach = transforms.camera_reach(c.height, c.width)
            # After the example's own images, in the same step of a mixture.
            image = source.image(index * c.images_per_example + c.images, rng, margin=reach)
            shape = {"frames": c.frames, "height": c.height, "width": c.width}
            fps = c.fps or transforms.USUAL_FPS
            video = image._replace(pixels=transforms.handheld(image.pixels, **shape, fps=fps, rng=rng))
        elif c.frames:
            video = source.video(index, rng)
        image_items = [source.image(index * c.images_per_example + j, rng) for j in range(c.images)]
        items, kept = [video, *image_items], rng.random(1 + c.images) >= c.caption_drop
        captions = [item.caption if keep else c.null_caption for item, keep in zip(items, kept)]
        example = {
            "caption": captions[0],
            "image_captions": captions[1:],
            "skipped": [skipped for item in items for skipped in item.skipped],
        }
        if self.encoded:
            texts = [item.text if keep else item.null_text for item, keep in zip(items, kept)]
            if c.frames:
                example |= {"video_latents": video.pixels, "text": texts[0]}
            if c.images:
                example["image_latents"] = np.stack([item.pixels for item in image_items])
                example["image_text"] = np.stack(texts[1:])
            return example
        images = np.stack([item.pixels for item in image_items]) if image_items else empty
        return {"video": video.pixels, "images": images, **example}


def _collate(examples: Sequence[dict]) -> dict:
    """Stacks arrays and lists captions."""
    columns = {key: [example[key] for example in examples] for key in examples[0]}
    return {key: np.stack(rows) if isinstance(rows[0], np.ndarray) else rows for key, rows in columns.items()}


@dataclasses.dataclass(frozen=True)
class _LocalExamples:
    """The `rows` of every step that this process computes, one after another."""

    examples: Examples
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.examples) // self.examples.batch * len(self.rows)

    def __getitem__(self, index: int) -> dict:
        step, row = divmod(int(index), len(self.rows))
        return self.examples[step * self.examples.batch + self.rows[row]]


def _in_thread(local: _LocalExamples, start: int) -> Iterator[dict]:
    """The batches of `_grain`, computed in this thread."""
    count, step = len(local.rows), start
    while True:
        yield _collate([local[step * count + i] for i in range(count)])
        step += 1


def _ignore_ctrl_c(*_: int) -> None:
    """Runs in each worker: signals reach the whole process group, but the run needs data until it has saved."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _grain(local: _LocalExamples, start: int, workers: int) -> Iterator[dict]:
    """Batches of grain's worker processes, in order. Workers that are killed are started again.

    After `_DEATHS` deaths in a row without a batch, this thread computes the batches: the run then is slow but loses no
    step, and needs the least memory, which is what workers are killed for most often.
    """
    step, deaths = start, 0
    while deaths < _DEATHS:
        iterator = _start_workers(local, step, workers)
        try:
            for batch in iterator:
                yield batch
                step, deaths = step + 1, 0
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            deaths += 1
            logging.warning(
                "a data worker was killed at step %d, perhaps for its memory (%s): starting the workers again",
                step,
                error,
            )
        finally:
            iterator.close()
    logging.warning("data workers were killed %d times in a row: from step %d on, none is used", deaths, step)
    yield from _in_thread(local, step)


def _start_workers(local: _LocalExamples, start: int, workers: int) -> Any:
    try:
        import grain  # needed only with workers
    except ImportError as error:
        raise UserError(f"workers={workers} needs the package grain: install it, or set workers=0") from error
    from absl import flags

    # grain's workers read absl flags, which a program that never parses them leaves unparsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(local).batch(len(local.rows), drop_remainder=True, batch_fn=_collate)[start:]
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_BUFFER)
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(dataset.to_iter_dataset(read).mp_prefetch(options, worker_init_fn=_ignore_ctrl_c))


def check_shared_memory(local: _LocalExamples, workers: int, folder: str = "/dev/shm") -> None:
    """Raises UserError if batches of the workers do not fit into shared memory, through which they reach this process.

    Without this check, a worker dies of SIGBUS some steps into the run.
    """
    c = local.examples.config
    if local.examples.encoded:
        example = local.examples[local.rows[0]]
        size = sum(value.nbytes for value in example.values() if isinstance(value, np.ndarray))
    else:
        size = max(3 * height * width for height, width in c.sizes) * (c.frames + c.images)
    try:
        stat = os.statvfs(folder)
    except OSError:
        return  # not Linux
    # Those that wait, one that the worker writes, and one that this process has not released.
    needed, free = workers * (_BUFFER + 2) * len(local.rows) * size, stat.f_bavail * stat.f_frsize
    megabytes = math.ceil(needed / 2**20)
    if needed > free:
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MiB free, and {workers} data workers need {megabytes} MiB: enlarge it "
            f"(docker run --shm-size={megabytes}m), or lower config.workers (0 needs none)"
        )


def _prefetched(source: Iterator[dict], count: int) -> Generator[dict, None, None]:
    """Yields the items of `source` from a thread that runs `count` ahead. Its errors are raised in the reader."""
    ready: queue.Queue = queue.Queue(count)
    stop = threading.Event()

    def put(item: tuple) -> bool:
        """Waits for room in the queue. Returns False if the reader has stopped."""
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        """Runs in the thread: puts (item, None) for each item, or (None, error)."""
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


def open_examples(config: DataConfig, *, batch_size: int) -> Examples:
    """Opens the examples of a config, with `batch_size` per step over all processes.

    Raises:
        UserError: the data cannot be read, or has fewer clips than a batch.
    """
    if batch_size < 1:
        raise UserError(f"a batch needs at least 1 example; given {batch_size}")
    source = make_source(config, batch_size=batch_size)
    if config.split == "train":  # held-out clips may repeat within a batch
        _check_enough(config, source, batch_size)
    if isinstance(source, Buckets):
        # a warning, so that it is shown by default
        logging.warning("buckets of split %s: %s; a program is compiled for each", config.split, source)
    return Examples(config, source, batch_size)


def _check_enough(config: DataConfig, source: Source | Buckets, batch_size: int) -> None:
    """Raises UserError for a data set, or a part of a mixture, that would repeat a clip within a step."""
    where = config.path or config.image_path or ", ".join(config.videos + config.image_parts)
    parts = [(where, source, batch_size)]
    if isinstance(source, Mixture) and config.frames:
        shares = largest_shares(source.video_order.weights)
        counts = [math.ceil(batch_size * share - 1e-9) for share in shares]  # 7 x (1 / 7) may exceed 1 by rounding
        parts = list(zip(config.videos, source.videos, counts))
    for name, part, needed in parts:
        if len(part) < needed:
            share = f", of which {needed} come from here," if needed < batch_size else ""
            raise UserError(
                f"a batch of {batch_size}{share} needs as many clips; {name!r} has {len(part)} for training"
            )


def batches(
    examples: Examples,
    tokenizer,
    *,
    rows: Sequence[int] | None = None,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 2,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields batches `start_step`, `start_step` + 1, ... of this process, endlessly.

    Args:
        examples: the global stream (`open_examples`).
        tokenizer: of the text encoder (`lavie_jax.data.tokens`), or None for batches without tokens (a VAE's).
        rows: the rows of each batch that this process computes (`parallel.local_rows`); default: all.
        start_step: index of the first batch; a resumed run passes the step it resumes at.
        workers: worker processes of grain; 0 uses a thread of this process.
        prefetch: number of batches that are prepared ahead.

    Returns:
        An iterator of {`video` (B, T, H, W, 3) uint8, `images` (B, M, H, W, 3) uint8, `tokens` (B, L) int32,
        `image_tokens` (B, M, L) int32}, with B = the number of `rows`. A tokenizer with padding adds bool `token_mask`
        (B, L) and `image_token_mask` (B, M, L), True for real tokens. Latents give float32
        `video_latents` (B, T, h, w, 2 C) and `text` (B, L, D) if T > 0, `image_latents` (B, M, h, w, 2 C) and
        `image_text` (B, M, L, D) if M > 0 (mean and standard deviation of posteriors, see `latents.py`). Closing it
        ends its thread and workers.
    """
    if workers < 0 or prefetch < 1 or start_step < 0:
        given = f"{workers}, {start_step}, {prefetch}"
        raise UserError(f"workers and start_step must be at least 0 and prefetch at least 1; given {given}")
    local = _LocalExamples(examples, range(examples.batch) if rows is None else rows)
    if workers:
        check_shared_memory(local, workers)
    raw = _grain(local, start_step, workers) if workers else _in_thread(local, start_step)
    ids = None if tokenizer is None else tokens.CachedTokens(tokenizer)
    logged = _logged(raw, examples.config, start_step)
    return _prefetched(_arrays(logged, ids), prefetch)


def _logged(raw: Iterator[dict], config: DataConfig, start_step: int) -> Generator[dict, None, None]:
    """Passes batches through. Logs changes of the mixture and skipped records, and limits the number of the latter."""
    seen: set[str] = set()
    shares: dict[str, float] = {}
    try:
        for step, batch in enumerate(raw, start_step):
            if shares != (now := mixture_weights(config, step)):
                shares = now
                # a warning, so that it is shown by default
                logging.warning("data from step %d: %s", step, ", ".join(f"{k} {v:.3g}" for k, v in shares.items()))
            for record, text in (skipped for row in batch.pop("skipped") for skipped in row):
                if record not in seen:
                    seen.add(record)
                    logging.warning("skipped record %d: %s", len(seen), text)
                if len(seen) > config.max_unreadable:
                    raise UserError(
                        f"{len(seen)} records were skipped, more than data.max_unreadable allows; the last: {text}"
                    )
            yield batch
    finally:
        if hasattr(raw, "close"):
            raw.close()


def _arrays(
    raw: Generator[dict, None, None], ids: tokens.CachedTokens | None
) -> Generator[dict[str, np.ndarray], None, None]:
    """Converts latents to floats and captions to tokens: here, so that workers send bytes only.

    Pixels stay bytes on their way to the devices, which take a quarter of the bandwidth and memory of floats.
    """
    try:
        for batch in raw:
            if "video" not in batch:  # latents, with encoded captions
                yield {key: rows.astype(np.float32) for key, rows in batch.items() if isinstance(rows, np.ndarray)}
                continue
            out = {key: batch[key] for key in ("video", "images")}
            if ids is not None:
                count, images = batch["images"].shape[:2]
                out["tokens"], mask = ids(batch["caption"])
                flat, image_mask = ids([caption for row in batch["image_captions"] for caption in row])
                out["image_tokens"] = rearrange(flat, "(b m) l -> b m l", b=count, m=images)
                if mask is not None and image_mask is not None:
                    out["token_mask"] = mask
                    out["image_token_mask"] = rearrange(image_mask, "(b m) l -> b m l", b=count, m=images)
            yield out
    finally:
        raw.close()

"""Aspect-ratio buckets: every batch has one size, and nothing is distorted."""

import collections
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavie_jax.data import buckets, shards, video_files
from lavie_jax.data.buckets import nearest, parse_sizes
from lavie_jax.data.build import make_source
from lavie_jax.data.config import DataConfig
from lavie_jax.data.pipeline import Examples
from lavie_jax.errors import UserError
from tests import videos
from tests.batches import take

ROOT = Path(__file__).parents[1]
WIDE, TALL, SQUARE = (16, 24), (24, 16), (20, 20)
SIZES = (WIDE, TALL, SQUARE)
# Sizes of 30 clips: two thirds are wide, a fifth are tall, the rest are square.
SHAPES = [(32, 48)] * 10 + [(36, 56)] * 10 + [(48, 32)] * 6 + [(40, 40)] * 4


def ramp(height, width, frames=5):
    """Returns frames whose values rise from left to right and from top to bottom: they show cropping and distortion."""
    rows, columns = np.linspace(0, 250, height), np.linspace(0, 250, width)
    one = np.stack(np.broadcast_arrays(rows[:, None], columns[None, :], 128.0), axis=-1)
    return np.repeat(one[None], frames, axis=0).astype(np.uint8)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Returns {kind: path} of the clips in each kind of source, and {"pictures": path} of images of the same shapes."""
    root = tmp_path_factory.mktemp("stores")
    rows, pictures = [], []
    for i, (height, width) in enumerate(SHAPES):
        path = videos.encode(root / f"folder-{i:02d}.mp4", ramp(height, width), 8, crf="4")
        (root / "folder").mkdir(exist_ok=True)
        path.rename(root / "folder" / path.name)
        (root / "folder" / f"{path.stem}.txt").write_text(f"clip {i} is {height}x{width}")
        content = (root / "folder" / path.name).read_bytes()
        rows.append({"video": content, "caption": f"clip {i} is {height}x{width}", "height": height, "width": width})
        file = io.BytesIO()
        Image.fromarray(ramp(height, width, 1)[0]).save(file, "png")
        pictures.append({"image": file.getvalue(), "caption": f"picture of {height}x{width}"})
    shards.write_shards(rows, root / "shards", shard_records=20)
    shards.write_shards(rows, root / "listed", shard_records=20)
    with (root / "listed/clips.jsonl").open("w") as file:
        for i, (height, width) in enumerate(SHAPES):
            record = {"shard": f"clips-{i // 20:05d}.array_record", "index": i % 20}
            file.write(json.dumps({**record, "height": height, "width": width}) + "\n")
    shards.write_shards(pictures, root / "pictures")
    return {"video_folder": root / "folder", "array_record": root / "shards", "listed": root / "listed",
            "pictures": root / "pictures"}  # fmt: skip


def config_of(stores, kind="array_record", **change):
    source = "array_record" if kind == "listed" else kind
    common = {"source": source, "path": str(stores[kind]), "frames": 3, "fps": 8.0, "images": 1, "caption_drop": 0.0}
    return DataConfig(**{**common, "height": 16, "width": 24, "buckets": SIZES, **change})


def size_of(batch):
    return batch["video"].shape[2:4]


# ---- choice of the bucket ----


@pytest.mark.parametrize(
    "size, bucket",
    [
        ((720, 1280), (320, 512)),
        ((1280, 720), (512, 320)),
        ((500, 480), (416, 416)),
        ((240, 320), (320, 416)),
        ((1, 1000), (320, 512)),
    ],
)
def test_a_clip_goes_to_the_bucket_that_keeps_most_of_it(size, bucket):
    sizes = ((320, 512), (320, 416), (416, 416), (512, 320))
    assert sizes[nearest(size, sizes)] == bucket


def test_among_buckets_of_one_aspect_ratio_a_clip_goes_to_the_largest_that_it_fills():
    sizes = ((320, 512), (160, 256), (640, 1024))
    assert [sizes[nearest(size, sizes)] for size in ((200, 320), (320, 512), (500, 800), (700, 1120), (90, 144))] == [
        (160, 256), (320, 512), (320, 512), (640, 1024), (160, 256),
    ]  # fmt: skip


def test_sizes_are_parsed():
    assert parse_sizes("320x512,512x320") == ((320, 512), (512, 320))
    for wrong in ("", "320", "320x", "axb", "1x2x3", "320x512,"):
        with pytest.raises(UserError, match="sizes are HEIGHTxWIDTH"):
            parse_sizes(wrong)


# ---- batches ----


@pytest.mark.parametrize("kind", ["video_folder", "array_record", "listed"])
def test_all_clips_and_images_of_a_batch_belong_to_one_bucket(stores, kind, monkeypatch):
    if kind == "listed":  # curation's list has all sizes, so that no clip is opened
        monkeypatch.setattr(buckets, "_measured", None)
    source = make_source(config_of(stores, kind), batch_size=2)
    examples = Examples(config_of(stores, kind), source)
    seen = collections.Counter()
    for step in range(20):
        rows = [examples[2 * step + row] for row in range(2)]
        (size,) = {row["video"].shape[1:3] for row in rows}
        assert {row["images"].shape[1:3] for row in rows} == {size}
        shapes = [tuple(map(int, row["caption"].split()[-1].split("x"))) for row in rows]
        assert {SIZES[nearest(shape, SIZES)] for shape in shapes} == {size}
        seen[size] += 1
    assert set(seen) == set(SIZES) and seen[WIDE] > seen[TALL] >= seen[SQUARE]


def test_every_clip_of_every_bucket_is_shown_once_per_epoch(stores):
    config = config_of(stores, images=0)
    source = make_source(config, batch_size=2)
    for bucket in source.sources:
        captions = [bucket.video(i, np.random.default_rng(i)).caption for i in range(len(bucket))]
        assert len(set(captions)) == len(bucket)
    train = shards.ShardRecords(config.path, medium="video", split="train")
    assert len(source) == len(train)


def test_each_bucket_has_its_share_of_the_steps(stores):
    source = make_source(config_of(stores), batch_size=2)
    steps = collections.Counter(source.of(2 * step)[2] for step in range(10 * len(source)))
    assert steps == {size: 10 * len(one) for size, one in zip(source.sizes, source.sources)}


def test_nothing_is_distorted(stores):
    """The scale is the same for both sides, and only one of them is cropped."""
    config = config_of(stores, images=0, split="val")
    examples = Examples(config, make_source(config, batch_size=1))
    for i in range(12):
        example = examples[i]
        height, width = map(int, example["caption"].split()[-1].split("x"))
        frame = example["video"][0].astype(float)
        down, across = np.diff(frame[..., 0], axis=0)[2:-2].mean(), np.diff(frame[..., 1], axis=1)[:, 2:-2].mean()
        zoom = max(frame.shape[0] / height, frame.shape[1] / width)
        assert down == pytest.approx(250 / (height - 1) / zoom, rel=0.06)
        assert across == pytest.approx(250 / (width - 1) / zoom, rel=0.06)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # grain's own
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.heavy)])  # test_pipeline.py has workers
def test_buckets_do_not_depend_on_processes_workers_or_the_first_step(workers, stores):
    config = config_of(stores, image_path=str(stores["pictures"]))
    whole = take(8, config, batch_size=2)
    assert len({size_of(batch) for batch in whole}) > 1
    for a, b in zip(take(5, config, batch_size=2, start_step=3, workers=workers), whole[3:]):
        assert all(np.array_equal(a[key], b[key]) for key in b)
    last = take(8, config, batch_size=2, rows=[len(whole[0]["video"]) - 1])
    for batch, share in zip(whole, last):
        for key in batch:
            np.testing.assert_array_equal(share[key], batch[key][-1:], err_msg=key)


def test_moving_shapes_are_rendered_in_every_size():
    config = DataConfig(frames=2, height=16, width=24, images=1, buckets=SIZES)
    sizes = [size_of(batch) for batch in take(6, config, batch_size=2)]
    assert collections.Counter(sizes) == dict.fromkeys(SIZES, 2)


def test_rotated_clips_and_images_have_their_displayed_size(tmp_path):
    upright = videos.encode(tmp_path / "a.mp4", ramp(32, 48), 8)
    assert video_files.shown_size(upright) == (32, 48)
    assert video_files.shown_size(videos.turned(upright.read_bytes())) == (48, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp(32, 48, 1)[0]).save(tmp_path / "a.jpg", exif=exif)
    record = buckets.Record("a.jpg", "a", tmp_path / "a.jpg")
    assert buckets._shown_size(record, "image") == (48, 32)


# ---- refusals ----


@pytest.mark.parametrize(
    "change, batch_size, message",
    [
        ({"buckets": (WIDE, WIDE)}, 2, "each once"),
        ({"buckets": (WIDE, (0, 16))}, 2, "each once"),
        (
            {"buckets": (TALL, SQUARE)},
            2,
            "buckets must include the size .* height x width = 16x24; given 24x16",
        ),
        ({"full_height": 32, "full_width": 48}, 2, "buckets are sizes of whole frames"),
        ({"source": "mixture", "videos": ("moving_shapes",), "path": None}, 2, "buckets need one source"),
        ({}, 8, "the bucket 24x16 has . clips for training, fewer than a batch of 8: remove it"),
    ],
)
def test_buckets_that_cannot_be_used_are_refused(stores, change, batch_size, message):
    with pytest.raises(UserError, match=message):
        take(1, config_of(stores, **change), batch_size=batch_size)


def test_a_bucket_with_clips_and_no_images_is_refused(stores, tmp_path):
    file = io.BytesIO()
    Image.fromarray(ramp(32, 48, 1)[0]).save(file, "png")
    rows = [{"image": file.getvalue(), "caption": f"wide {i}"} for i in range(9)]
    shards.write_shards(rows, tmp_path / "wide")
    with pytest.raises(UserError, match="the bucket 24x16 has clips but no image whose shape is nearest to it"):
        take(1, config_of(stores, image_path=str(tmp_path / "wide")), batch_size=2)


def test_a_bucket_without_clips_is_left_out(stores):
    config = dataclasses.replace(config_of(stores), buckets=(*SIZES, (8, 64)))
    assert make_source(config, batch_size=2).sizes == SIZES


# ---- training ----


@pytest.mark.heavy
def test_a_run_compiles_and_logs_a_program_for_each_bucket(tmp_path):
    """Runs train.py on Moving Shapes in two sizes; the losses of both are finite."""
    line = [sys.executable, "train.py", "--config", "configs/moving_shapes/vae.py:tiny", "--workdir", tmp_path,
            "--config.data.buckets=((32,32),(16,32))", "--config.data.frames=2", "--config.held_out_batches=2",
            "--config.steps=4", "--config.log_every=1", "--config.held_out_every=2"]  # fmt: skip
    done = subprocess.run(line, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    logged = re.findall(r"step (\d) compiles program (\d) of 2: .*video \(8, 2, (\d+), (\d+), 3\)", done.stderr)
    assert [row[:2] for row in logged] == [("1", "1"), ("2", "2")] and {row[2:] for row in logged} == {
        ("32", "32"), ("16", "32"),
    }  # fmt: skip
    assert "buckets of split train: 32x32 50.0%, 16x32 50.0%; a program is compiled for each" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line.get("loss", line.get("held_out/reconstruction"))) for line in lines)

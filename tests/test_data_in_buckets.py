"""Training data in buckets, against fsspec's file system in memory."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavie_jax import remote
from lavie_jax.data import downloads, shards, sources
from lavie_jax.data.build import make_source
from lavie_jax.data.config import DataConfig
from lavie_jax.data.latents import open_set
from lavie_jax.data.video_files import ClipWindow
from lavie_jax.errors import UserError
from tests.test_remote import bucket as bucket
from tests.test_remote import upload


@pytest.fixture(autouse=True)
def no_earlier_copies():
    downloads.local_data.cache_clear()
    open_set.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures as shards in the folder `size`, below the list that has their source videos, and as files."""
    root = tmp_path_factory.mktemp("data")
    for i in range(6):
        file = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(file, "png")
        (root / "files" / "deep").mkdir(parents=True, exist_ok=True)
        (root / "files" / "deep" / f"{i}.png").write_bytes(file.getvalue())
        (root / "files" / "deep" / f"{i}.txt").write_text(f"picture {i}")
    (root / "files" / "table.csv").write_text("path,caption\ndeep/0.png,the first\ndeep/5.png,the last\n")
    rows = [{"image": (root / "files" / "deep" / f"{i}.png").read_bytes(), "caption": f"picture {i}"} for i in range(6)]
    paths = shards.write_shards(rows, root / "set" / "size", shard_records=4)
    listed = [(path.relative_to(root / "set").as_posix(), i) for path, n in zip(paths, (4, 2)) for i in range(n)]
    lines = [
        json.dumps({"shard": shard, "index": i, "source": f"video {n // 2}"}) for n, (shard, i) in enumerate(listed)
    ]
    (root / "set" / shards.LIST).write_text("\n".join(lines))
    return root


def captions(kind, path, split="train"):
    window = ClipWindow(frames=1, fps=8)
    records = sources.open_records(kind, str(path), medium="image", split=split, window=window, val_fraction=0.4)
    return [records[i].caption for i in range(len(records))]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("array_record", "set"),
        ("array_record", "set/size"),
        ("array_record", "set/size/clips-*.array_record"),
        ("array_record", "set/size/clips-00001.array_record"),
        ("video_folder", "files"),
        ("video_folder", "files/table.csv"),
    ],
)
def test_data_in_a_bucket_are_those_on_disk(kind, path, folder, bucket):
    upload(bucket, folder, "gs://lavie/data")
    for split in ("train", "val"):
        assert captions(kind, f"gs://lavie/data/{path}", split) == captions(kind, folder / path, split)


def test_only_what_is_needed_is_copied_and_only_once(folder, bucket):
    upload(bucket, folder / "set", "s3://lavie/set")
    upload(bucket, folder / "files", "s3://lavie/set/other")
    first = captions("array_record", "s3://lavie/set/size/clips-00001.array_record")
    names = [name.removeprefix("s3://lavie/set/") for name in bucket.got]
    assert sorted(names) == [shards.LIST, "size/clips-00001.array_record"]
    bucket.got.clear()
    downloads.local_data.cache_clear()  # another process
    assert captions("array_record", "s3://lavie/set/size/clips-00001.array_record") == first and not bucket.got


def test_a_run_reads_its_parts_from_buckets(folder, bucket):
    upload(bucket, folder / "set", "gs://lavie/set")
    common = {"frames": 0, "images": 1, "height": 16, "width": 16, "hold_out": False, "caption_drop": 0.0}
    one = DataConfig(source="array_record", image_path="gs://lavie/set", **common)
    item = make_source(one).image(0, np.random.default_rng(0))
    local = make_source(DataConfig(source="array_record", image_path=str(folder / "set"), **common))
    assert item.caption == local.image(0, np.random.default_rng(0)).caption
    with pytest.raises(UserError, match=r"no finished set of latents in '.*remote.*': manifest.json is missing"):
        open_set("gs://lavie/set")


def test_what_cannot_be_copied_is_one_line(folder, bucket, monkeypatch):
    upload(bucket, folder / "files", "gs://lavie/files")
    for path, why in (
        ("gs://lavie/nothing", "gs://lavie/nothing does not exist, or contains no files"),
        ("gs://lavie/files/*.tar", r"gs://lavie/files/\*.tar does not exist, or contains no files"),
    ):
        with pytest.raises(UserError, match=why):
            captions("webdataset", path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(UserError, match=r"gs://lavie/files: 0.0 GB have to be copied, but .* has 0.0 GB free: set XDG"):
        captions("video_folder", "gs://lavie/files")


def test_a_file_that_arrives_short_is_not_kept(folder, bucket, monkeypatch):
    upload(bucket, folder / "files", "gs://lavie/files")

    def short(rpath, lpath, **kwargs):
        Path(lpath).write_bytes(b"x")

    monkeypatch.setattr(bucket, "get_file", short)
    with pytest.raises(UserError, match="was changed while it was downloaded: start again"):
        captions("video_folder", "gs://lavie/files")
    assert not list(remote.Store.open("gs://lavie/files").folder.rglob("*.png"))

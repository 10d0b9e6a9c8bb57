"""Data as users have it: links, hidden copies, uncommon endings, tables of other programs, concatenated tars."""

import io
import json
import multiprocessing
import os
import pickle
import resource
import signal
import tarfile

import numpy as np
import pytest
from PIL import Image
from test_sources import add

from lavie_jax.curation.inputs import find_videos
from lavie_jax.data import npz_files, pipeline, records, shards, sources, tar_index, tar_members, tars, video_files
from lavie_jax.data.buckets import Buckets
from lavie_jax.data.config import DataConfig
from lavie_jax.data.video_files import ClipWindow
from lavie_jax.errors import UserError
from lavie_jax.text_files import read_json
from tests import videos


def gray(value=100, frames=8):
    return np.full((frames, 32, 32, 3), value, np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Returns the bytes of an mp4 of one second."""
    return videos.encode(tmp_path_factory.mktemp("clip") / "a.mp4", gray(), 8).read_bytes()


def put(folder, name, content, caption="a gray square"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return path


def opened(kind, path, medium="video", split="train", val_fraction=0.0):
    window = ClipWindow(frames=4, fps=8)
    return sources.open_records(kind, str(path), medium=medium, split=split, window=window, val_fraction=val_fraction)


def captions(found):
    return sorted(found[i].caption for i in range(len(found)))


# ---- folders ----


def test_linked_folders_are_followed_once_and_cycles_end(clip, tmp_path):
    put(tmp_path / "elsewhere", "deep/b.mp4", clip, "b")
    data = tmp_path / "data"
    put(data, "sub/a.mp4", clip, "a")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (data / "sub" / "up").symlink_to(data)
    (data / "circle.mp4").symlink_to("circle.mp4")
    assert captions(opened("video_folder", data)) == ["a", "b"]
    names = [video.name for video in find_videos(data, None)]
    assert names == ["again/b.mp4", "sub/a.mp4"]


def test_hidden_copies_are_left_out_with_a_count(clip, tmp_path, caplog):
    put(tmp_path, "a.mp4", clip)
    for name in (".ipynb_checkpoints/a-checkpoint.mp4", "._a.mp4", "__MACOSX/a.mp4", ".Trash/deep/a.MP4"):
        put(tmp_path, name, clip)
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    assert len(opened("video_folder", tmp_path)) == 1
    assert "4 of 6 are hidden copies" in caplog.text and "._a.mp4" in caplog.text
    assert "1 of 6 are links to a file that does not exist" in caplog.text


def test_files_of_every_ending_are_read_or_counted(clip, tmp_path, caplog):
    import av

    put(tmp_path, "1.m4v", clip)
    put(tmp_path, "2.MOV", clip)
    (tmp_path / "2.txt").rename(tmp_path / "2.TXT")
    for name, codec, container_format in (
        ("3.ts", "libx264", "mpegts"),
        ("4.wmv", "wmv2", "asf"),
        ("5.flv", "flv", "flv"),
    ):
        with av.open(str(tmp_path / name), "w", format=container_format) as container:
            stream = container.add_stream(codec, rate=25)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv420p"
            for frame in gray(frames=40):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        (tmp_path / name).with_suffix(".txt").write_text("a gray square")
    put(tmp_path, "7.rmvb", clip)
    found = opened("video_folder", tmp_path)
    assert sorted(path.name for path, _ in found.rows) == ["1.m4v", "2.MOV", "3.ts", "4.wmv", "5.flv"]
    assert "1 of 5 files do not seek (.ts)" in caplog.text and "3.ts" in caplog.text
    assert "1 of 6 end in .rmvb, which is not read" in caplog.text


def test_images_with_uncommon_endings_are_read(tmp_path):
    for name in ("a.BMP", "b.tif", "c.JPEG"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    assert captions(opened("video_folder", tmp_path, "image")) == ["a.BMP", "b.tif", "c.JPEG"]


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfa gray square\r\n", "a gray square".encode("utf-16")])
def test_captions_with_a_byte_order_mark_are_read(clip, tmp_path, text):
    put(tmp_path, "a.mp4", clip, text)
    assert captions(opened("video_folder", tmp_path)) == ["a gray square"]
    assert find_videos(tmp_path, None)[0].captions[0].text == "a gray square"


def test_the_caption_of_the_json_is_used_where_the_text_is_empty(clip, tmp_path):
    put(tmp_path, "a.mp4", clip, b"\xef\xbb\xbf \n")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"caption": "of the JSON"}')
    assert captions(opened("video_folder", tmp_path)) == ["of the JSON"]


def test_a_config_with_a_byte_order_mark_is_json(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"stage": "base"}')
    assert read_json(tmp_path / "config.json") == {"stage": "base"}


# ---- tables ----

WORDS = {"a": "one, red", "b": '"Hello" she said', "c": "three; green", "d": 'five " wide'}


def quoted(text, delimiter):
    return '"' + text.replace('"', '""') + '"' if delimiter in text or '"' in text else text


def lines_of(delimiter, quote=True):
    rows = [["file", "caption"], *([f"{name}.mp4", text] for name, text in WORDS.items())]
    return "\n".join(delimiter.join(quoted(cell, delimiter) if quote else cell for cell in row) for row in rows) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", lines_of(",").encode()),
        ("t.csv", lines_of(";").replace("\n", "\r\n").encode("utf-8-sig")),
        ("t.csv", lines_of("\t", quote=False).encode()),
        ("t.tsv", lines_of("\t", quote=False).encode("utf-16")),
        ("t.TSV", lines_of("\t").encode()),
        ("t.tsv", lines_of(",").encode()),
        ("t.csv", ("sep=;\n\n" + lines_of(";").replace("\n", "\n;\n\n") + ";;;\n").encode()),
        ("t.csv", lines_of("|").replace("file|caption", " File | CAPTION ||").encode()),
        ("t.csv", lines_of(",").replace(".mp4", ".MP4").encode()),
        ("t.csv", lines_of(",").replace("a.mp4", r"sub\..\a.mp4").encode()),
    ],
    ids=str,
)
def test_tables_of_other_programs_keep_every_row_and_its_caption(clip, tmp_path, name, content):
    for stem in WORDS:
        put(tmp_path, f"{stem}.mp4", clip, None)
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_bytes(content)
    found = opened("video_folder", tmp_path / name)
    assert {path.stem: caption for path, caption in found.rows} == WORDS


def test_a_table_whose_quotes_merge_rows_is_refused(clip, tmp_path):
    (tmp_path / "t.csv").write_text('path,caption\na.mp4,"big\nb.mp4,red\nc.mp4,small"\n')
    with pytest.raises(UserError, match="a quote before line 4 is not closed, so that rows are merged"):
        opened("video_folder", tmp_path / "t.csv")


@pytest.mark.parametrize("ending", ["MP4", "mp4", "MKV"])
def test_webvids_clips_may_have_any_ending_in_any_case(clip, tmp_path, ending):
    put(tmp_path / "videos", f"p/10.{ending}", clip, None)
    (tmp_path / "t.csv").write_text("videoid,contentUrl,duration,page_dir,name\n10,x,y,p,a clip\n")
    assert captions(opened("video_folder", tmp_path / "t.csv")) == ["a clip"]


# ---- tars ----


def write_tar(path, names, clip, caption=lambda name: name.encode()):
    with tarfile.open(path, "w") as tar:
        for name in names:
            add(tar, f"{name}.mp4", clip)
            add(tar, f"{name}.txt", caption(name))
    return path


def test_concatenated_tars_keep_all_their_pairs(clip, tmp_path):
    one, two = (write_tar(tmp_path / name, names, clip) for name, names in (("a.tar", "01234"), ("b.tar", "56789")))
    (tmp_path / "concatenated").mkdir()
    (tmp_path / "concatenated" / "c.tar").write_bytes(one.read_bytes() + two.read_bytes() + one.read_bytes())
    found = opened("webdataset", tmp_path / "concatenated")
    assert captions(found) == sorted("0123456789" + "01234") and found[7].content == clip
    (tmp_path / "concatenated" / "c.tar").write_bytes(one.read_bytes() + b"not a tar" * 100)
    with pytest.raises(UserError, match="cannot read the tar .*c.tar"):
        opened("webdataset", tmp_path / "concatenated")


def test_a_pair_split_across_concatenated_tars_is_found(clip, tmp_path):
    for name, member, content in (("a", "0.mp4", clip), ("b", "0.txt", b"divided")):
        with tarfile.open(tmp_path / name, "w") as tar:
            add(tar, member, content)
    (tmp_path / "c.tar").write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    assert captions(opened("webdataset", tmp_path)) == ["divided"]


def test_hidden_members_and_tars_are_left_out_with_a_count(clip, tmp_path, caplog):
    write_tar(tmp_path / "A.TAR", ["0", ".ipynb_checkpoints/0", "__MACOSX/._0"], clip)
    (tmp_path / "._A.tar").write_bytes(b"of a Mac")
    found = opened("webdataset", tmp_path)
    assert captions(found) == ["0"]
    assert "2 records that are hidden copies" in caplog.text and "1 of 2 are hidden copies" in caplog.text


def test_the_index_is_written_once_and_reused_until_the_tars_change(clip, tmp_path, monkeypatch):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [f"{name}{i}" for i in range(3)], clip)
    walked = []
    walk = tars._walk
    monkeypatch.setattr(tars, "_walk", lambda path, medium: (walked.append(path.name), walk(path, medium))[1])
    first = opened("webdataset", tmp_path)
    assert sorted(walked) == ["a.tar", "b.tar"] and captions(first) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    walked.clear()
    again = opened("webdataset", tmp_path)
    assert not walked and captions(again) == captions(first)
    write_tar(tmp_path / "aa.tar", ["aa0"], clip)  # its name sorts between the others
    write_tar(tmp_path / "b.tar", ["b9"], clip)
    assert captions(opened("webdataset", tmp_path)) == ["a0", "a1", "a2", "aa0", "b9"]
    assert sorted(walked) == ["aa.tar", "b.tar"]
    (index,) = tmp_path.glob(".lavie_jax_index*")
    for damage in (b"", index.read_bytes()[:-30], index.read_bytes()[:200]):
        index.write_bytes(damage)
        assert captions(opened("webdataset", tmp_path)) == ["a0", "a1", "a2", "aa0", "b9"]
    assert captions(pickle.loads(pickle.dumps(opened("webdataset", tmp_path)))) == ["a0", "a1", "a2", "aa0", "b9"]
    assert [path.name for path in tmp_path.glob(".*")] == [index.name]  # no temporary file is left


def test_a_tar_that_changed_after_the_start_is_refused(clip, tmp_path):
    path = write_tar(tmp_path / "a.tar", "01", clip)
    found = opened("webdataset", tmp_path)
    path.write_bytes(bytes(512) + path.read_bytes()[:-512])
    with pytest.raises(UserError, match="was changed after the start"):
        found[1]


def test_the_index_of_a_read_only_folder_is_in_the_cache(clip, tmp_path, monkeypatch, caplog):
    write_tar(tmp_path / "a.tar", "01", clip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write = tar_index._write

    def read_only(file, index):
        if file.parent == tmp_path:
            raise PermissionError
        write(file, index)

    monkeypatch.setattr(tar_index, "_write", read_only)
    assert captions(opened("webdataset", tmp_path / "*.tar")) == ["0", "1"]
    assert len(list((tmp_path / "cache" / "lavie_jax" / "tars").iterdir())) == 1
    monkeypatch.setattr(tar_index, "_cache", lambda *_: [])  # a user without a home folder
    write_tar(tmp_path / "b.tar", "2", clip)
    assert captions(opened("webdataset", tmp_path / "*.tar")) == ["0", "1", "2"]
    assert "cannot be written" in caplog.text


# ---- shards ----


def test_more_shards_than_the_limit_of_open_files_are_read(tmp_path):
    rows = ({"video": bytes([i % 256, i // 256]), "caption": f"clip {i}"} for i in range(300))
    shards.write_shards(rows, tmp_path, shard_records=1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = len(os.listdir("/proc/self/fd")) + 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        found, again = opened("array_record", tmp_path), opened("array_record", tmp_path / "*")
        order = np.random.default_rng(0).permutation(300)
        assert [found[int(i)].caption for i in order] == [f"clip {i}" for i in order]
        assert [again[int(i)].caption for i in order] == [f"clip {i}" for i in order]
        assert len(os.listdir("/proc/self/fd")) < free - 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def write_curated(folder, scenes):
    """Writes shards and the list that curation adds; `scenes` are the source videos of the clips."""
    shards.write_shards([{"video": b"x", "caption": f"clip {i}"} for i in range(len(scenes))], folder, shard_records=10)
    rows = [
        {"shard": f"clips-{i // 10:05d}.array_record", "index": i % 10, "source": source}
        for i, source in enumerate(scenes)
    ]
    (folder / shards.LIST).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_scenes_of_one_video_are_in_one_split(tmp_path, caplog):
    scenes = [f"video {i // 4}.mp4" for i in range(80)]
    write_curated(tmp_path / "many", scenes)
    found = {s: opened("array_record", tmp_path / "many", split=s, val_fraction=0.2) for s in ("train", "val")}
    of_split = {s: {scenes[i] for i in found[s].indices} for s in found}
    assert not of_split["train"] & of_split["val"] and len(of_split["train"] | of_split["val"]) == 20
    assert len(found["train"]) + len(found["val"]) == 80 and 4 <= len(found["val"]) < 40
    write_curated(tmp_path / "one", ["film.mp4"] * 40)
    for split in ("train", "val"):
        assert 0 < len(opened("array_record", tmp_path / "one", split=split, val_fraction=0.2)) < 40
    assert "are scenes of one video" in caplog.text


# ---- splits ----


@pytest.mark.parametrize("kind", ["video_folder", "webdataset", "array_record", "tfds"])
def test_a_single_clip_is_both_trained_on_and_held_out(clip, tmp_path, kind, caplog):
    put(tmp_path / "video_folder", "a.mp4", clip)
    (tmp_path / "webdataset").mkdir()
    write_tar(tmp_path / "webdataset" / "a.tar", "0", clip)
    shards.write_shards([{"video": clip, "caption": "alone"}], tmp_path / "array_record")
    path = tmp_path / kind
    if kind == "tfds":
        path = shards.write_tfds(tmp_path / "array_record", tmp_path / "tfds")
    for split in ("train", "val"):
        config = DataConfig(source=kind, path=str(path), frames=4, height=16, width=16, images=0, split=split)
        stream = pipeline.batches(pipeline.open_examples(config, batch_size=1), None)
        assert next(stream)["video"].shape == (1, 4, 16, 16, 3)
        stream.close()
    assert "the only record is trained on and held out" in caplog.text


def test_both_splits_have_a_record_whatever_the_hashes():
    names = [name for i in range(2000) if records.name_hash(name := f"{i}") < 0.05 * 2**64][:2]
    train, val = (records.of_split(names, split, 0.05) for split in ("train", "val"))
    assert len(train) == len(val) == 1 and train[0] != val[0]


# ---- images as clips, and held-out batches of buckets ----


class Images:
    """A source that records the requested images."""

    def __init__(self, count):
        self.count, self.requested = count, []

    def __len__(self):
        return self.count

    def video(self, index, rng):
        raise AssertionError

    def image(self, index, rng, *, margin=0):
        self.requested.append(index)
        return sources.Item(np.zeros((16 + margin, 16 + margin, 3), np.uint8), "an image")


def test_the_image_that_becomes_a_clip_is_not_among_the_images_of_its_example():
    config = DataConfig(frames=2, images=2, handheld=1.0, height=16, width=16)
    examples = pipeline.Examples(config, source := Images(100), batch=4)
    for i in range(8):
        examples[i]
    assert sorted(source.requested) == list(range(24))  # each image once
    assert max(source.requested[:12]) < 12  # a mixture assigns these to the first step


def test_held_out_batches_cover_every_bucket_and_are_weighted_by_share():
    from lavie_jax.data.buckets import make_buckets

    parts = [((16, 16 * (i + 1)), Images(count)) for i, count in enumerate((97, 2, 1))]
    buckets = make_buckets(parts, batch=2, unique=False, seed=0)
    assert isinstance(buckets, Buckets)
    shown = [buckets.of(2 * step)[2] for step in range(4)]
    weights = buckets.weights(4)
    for (size, _), share in zip(parts, (0.97, 0.02, 0.01)):
        assert sum(w for s, w in zip(shown, weights) if s == size) == pytest.approx(share)
    examples = pipeline.Examples(DataConfig(split="val"), buckets, 2)
    assert len(examples.held_out_weights(1)) == 3 and sum(examples.held_out_weights(1)) == pytest.approx(1)


# ---- workers ----


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # grain's own
def test_a_killed_worker_costs_no_batch(caplog):
    config = DataConfig(frames=2, height=16, width=16, images=0, seed=3)
    plain = pipeline.batches(pipeline.open_examples(config, batch_size=2), None)
    expected = [next(plain)["video"] for _ in range(12)]
    plain.close()
    stream = pipeline.batches(pipeline.open_examples(config, batch_size=2), None, workers=1)
    got = [next(stream)["video"]]
    for child in multiprocessing.active_children():
        if "grain" in child.name:
            os.kill(child.pid, signal.SIGKILL)
    got += [next(stream)["video"] for _ in range(11)]
    stream.close()
    np.testing.assert_array_equal(got, expected)
    assert "a data worker was killed" in caplog.text


def test_workers_that_are_killed_repeatedly_are_not_restarted(monkeypatch, caplog):
    def die(*_):
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")
        yield

    monkeypatch.setattr(pipeline, "_start_workers", die)
    config = DataConfig(frames=2, height=16, width=16, images=0)
    stream = pipeline.batches(pipeline.open_examples(config, batch_size=2), None, workers=2)
    assert next(stream)["video"].shape == (2, 2, 16, 16, 3)
    stream.close()
    assert "were killed 3 times in a row: from step 0 on, none is used" in caplog.text


def test_shared_memory_that_is_too_small_is_refused_with_the_required_size(monkeypatch):
    config = DataConfig(frames=16, height=320, width=512, images=4)
    examples = pipeline.open_examples(config, batch_size=8)
    stat = os.statvfs_result((4096, 4096, 16384, 16384, 16384, 0, 0, 0, 0, 255))  # 64 MiB, docker's default
    monkeypatch.setattr(os, "statvfs", lambda path: stat)
    with pytest.raises(UserError, match="/dev/shm has 64 MiB free, and 4 data workers need 1200 MiB: .*shm-size=1200m"):
        pipeline.batches(examples, None, workers=4)


# ---- .npz as input ----


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"frames": gray(), "rate": 8}, "has the arrays frames, rate; it needs `video`, uint8 .T, H, W, 3."),
        ({"video": gray().astype(np.float32), "fps": 8}, "`video` in .* is float32 .8, 32, 32, 3.; it needs"),
        ({"video": gray(), "fps": 0}, "`fps` in .* is 0; it needs"),
        ({"video": gray(), "fps": "25"}, "`fps` in .* is 25; it needs"),
        ({"video": gray(), "fps": [8, 8]}, "`fps` in .* is .8, 8.; it needs"),
    ],
)
def test_an_npz_that_is_not_a_clip_is_refused_with_what_it_needs(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        video_files.read_clip(tmp_path / "a.npz")


def test_an_npz_may_omit_the_rate_and_must_fit_into_memory(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", video=gray())
    frames, fps = video_files.read_clip(tmp_path / "a.npz")
    assert fps == npz_files.FPS == 8 and (frames == gray()).all()
    with pytest.raises(UserError, match="does not fit into memory"):
        video_files.read_clip(tmp_path / "a.npz", max_bytes=1000)
    np.save(tmp_path / "b.npz", gray())
    (tmp_path / "b.npz.npy").rename(tmp_path / "b.npz")
    with pytest.raises(UserError, match="one array, not an .npz"):
        video_files.read_clip(tmp_path / "b.npz")


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_members_of_a_tar_are_those_that_tarfile_finds(tmp_path, tar_format):
    names = ["0.mp4", "a/b/1.txt", "x" * 90 + "/2.mp4", "empty.txt", "last.json"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["ä.mp4", "y" * 120 + ".txt", "z" * 300 + "/3.mp4"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        tar.addfile(tarfile.TarInfo("folder/"), None)
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = (0 if "empty" in name else 700 * i + 1), 1e9 + 0.5  # fractional, as webdataset's
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        info = tarfile.TarInfo("link.mp4")
        info.type, info.linkname = tarfile.SYMTYPE, "0.mp4"
        if tar_format == tarfile.GNU_FORMAT:  # other formats are parsed without tarfile
            tar.addfile(info)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    with path.open("rb") as file:
        assert [[tuple(m) for m in archive] for archive in tar_members.archives(file)] == [expected]
        if tar_format != tarfile.GNU_FORMAT:
            assert [tuple(m) for m in tar_members._plain(file, 0)[0]] == expected


@pytest.mark.parametrize(("ending", "codec", "form"), [("ts", "libx264", "mpegts"), ("mpg", "mpeg2video", "mpeg")])
def test_windows_of_files_without_an_index_show_the_right_frames(tmp_path, ending, codec, form):
    import av

    path = tmp_path / f"a.{ending}"
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 64, 64, "yuv420p", 12
        for i in range(100):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 2 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for start in (0, 7, 31, 50, 96):
        frames = video_files.read_window(path, ClipWindow(frames=4, fps=25), place=(start + 0.01) / 96)
        shown = (frames.mean((1, 2, 3)) - 20) / 2
        np.testing.assert_allclose(shown, np.arange(start, start + 4), atol=1.6)

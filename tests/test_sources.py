"""Sources on disk: folders, tables, tars, ArrayRecord shards and TFDS, read from real files, intact and damaged."""

import csv
import dataclasses
import io
import json
import os
import shutil
import struct
import tarfile
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from lavie_jax.data import folders, moving_shapes, pipeline, shards, sources, tars, video_files
from lavie_jax.data.build import make_source
from lavie_jax.data.config import DataConfig
from lavie_jax.data.records import Record, Records
from lavie_jax.data.video_files import ClipWindow, VideoInfo
from lavie_jax.errors import UserError
from tests import videos
from tests.batches import take

RATES = (8, 12, 25, Fraction(30000, 1001), 30, 24)
SIZES = ((32, 48), (48, 32), (33, 47), (64, 64), (32, 48), (40, 56))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Returns (path, caption) of six clips of two seconds, with several rates and sizes, and a gray level each."""
    root, result = tmp_path_factory.mktemp("clips"), []
    for i, (rate, (height, width)) in enumerate(zip(RATES, SIZES)):
        frames = np.full((round(2 * rate), height, width, 3), 40 * i + 20, np.uint8)
        result.append(
            (videos.encode(root / f"clip{i}.mp4", frames, rate, options={"movflags": "faststart"}), f"clip {i}")
        )
    return result


def picture(i):
    file = io.BytesIO()
    Image.fromarray(np.full((30, 50, 3), 40 * i + 20, np.uint8)).save(file, "png")
    return file.getvalue()


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def stores(clips, tmp_path_factory):
    """Stores the six clips and six images in every kind of source: {kind: (path of clips, path of images)}."""
    root = tmp_path_factory.mktemp("stores")
    for name in ("folder", "pictures", "tar", "picture_tar"):
        (root / name).mkdir()
    for i, (path, caption) in enumerate(clips):
        (root / "folder" / path.name).write_bytes(path.read_bytes())
        (root / "folder" / f"{path.stem}.txt").write_text(caption)
        (root / "pictures" / f"{i}.png").write_bytes(picture(i))
        (root / "pictures" / f"{i}.txt").write_text(f"picture {i}")
    for shard in range(2):
        with tarfile.open(root / "tar" / f"{shard:05d}.tar", "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                add(tar, f"{i:09d}.mp4", clips[i][0].read_bytes())
                add(tar, f"{i:09d}.json", json.dumps({"caption": clips[i][1], "status": "success"}).encode())
        with tarfile.open(root / "picture_tar" / f"{shard:05d}.tar", "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                add(tar, f"{i:09d}.json", b'{"caption": "not this one"}')
                add(tar, f"{i:09d}.txt", f"picture {i}".encode())
                add(tar, f"{i:09d}.png", picture(i))
    rows = [{"video": path.read_bytes(), "caption": caption, "aesthetic": 5.0} for path, caption in clips]
    shards.write_shards(rows, root / "shards", shard_records=4)
    rows = [{"image": picture(i), "caption": f"picture {i}"} for i in range(6)]
    shards.write_shards(rows, root / "picture_shards", name="pictures", shard_records=4)
    return {
        "video_folder": (root / "folder", root / "pictures"),
        "webdataset": (root / "tar", root / "picture_tar"),
        "array_record": (root / "shards", root / "picture_shards"),
        "tfds": (
            shards.write_tfds(root / "shards", root / "tfds", files=2),
            shards.write_tfds(root / "picture_shards", root / "picture_tfds", medium="image"),
        ),
    }


def config_of(kind, stores, **change):
    path, image_path = map(str, stores[kind])
    common = {"source": kind, "path": path, "image_path": image_path, "frames": 4, "height": 16, "width": 16}
    return DataConfig(**{**common, "images": 1, "caption_drop": 0.0, **change})


def records_of(kind, path, medium="video", split="train", val_fraction=0.0):
    window = ClipWindow(frames=4, fps=8)
    return sources.open_records(kind, str(path), medium=medium, split=split, window=window, val_fraction=val_fraction)


def gray_of(pixels):
    """Returns the number of a clip or image from its gray level."""
    return round((float(pixels.mean()) - 20) / 40)


# ---- every kind ----


@pytest.mark.parametrize("kind", sources.KINDS)
def test_every_kind_yields_each_clip_once_per_epoch_with_its_own_caption(kind, stores):
    result = records_of(kind, stores[kind][0])
    assert isinstance(result, Records) and len(result) == 6
    assert len(records_of(kind, stores[kind][1], "image")) == 6
    source = make_source(config_of(kind, stores))
    assert isinstance(source, sources.Source)
    epochs = []
    for i in range(2 * len(source)):
        video, image = source.video(i, np.random.default_rng(i)), source.image(i, np.random.default_rng(i))
        assert video.pixels.shape == (4, 16, 16, 3) and image.pixels.shape == (16, 16, 3)
        assert video.caption == f"clip {gray_of(video.pixels)}" and not video.skipped
        assert image.caption == f"picture {gray_of(image.pixels)}"
        epochs.append(video.caption)
    first, second = epochs[: len(source)], epochs[len(source) :]
    assert sorted(first) == sorted(second) and len(set(first)) == len(source) == 5  # the sixth is held out


@pytest.mark.parametrize("kind", sources.KINDS)
def test_the_splits_share_no_record(kind, stores):
    captions = []
    for split in ("train", "val"):
        result = records_of(kind, stores[kind][0], split=split, val_fraction=0.4)
        captions.append({result[i].caption for i in range(len(result))})
    assert not captions[0] & captions[1] and len(captions[0] | captions[1]) == 6


@pytest.mark.parametrize("kind", sources.KINDS)
def test_a_batch_larger_than_the_number_of_clips_is_refused(kind, stores):
    with pytest.raises(UserError, match="batch of 6 needs as many clips; .* has 5 for training"):
        pipeline.open_examples(config_of(kind, stores), batch_size=6)


def test_a_part_of_a_mixture_with_fewer_clips_than_its_share_of_a_batch_is_refused(stores):
    parts = (f"video_folder:{stores['video_folder'][0]}", "moving_shapes")
    config = DataConfig(
        source="mixture", videos=parts, frames=2, images=0, height=16, width=16,
        video_weights=((0, (1, 9)), (5, (1, 1))),
    )  # fmt: skip
    with pytest.raises(UserError, match="of 12, of which 6 come from here, .* 'video_folder:.* has 5 for training"):
        pipeline.open_examples(config, batch_size=12)
    pipeline.open_examples(config, batch_size=10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # grain's own
def test_shards_give_the_same_batches_with_workers_and_processes(stores):
    """All kinds are in one mixture, so that the workers receive every reader but are started only once."""
    kinds = list(sources.KINDS)
    config = DataConfig(
        source="mixture", videos=tuple(f"{kind}:{stores[kind][0]}" for kind in kinds),
        image_parts=tuple(f"{kind}:{stores[kind][1]}" for kind in kinds), frames=2, images=1, height=16, width=16,
        video_weights=((0, (1,) * len(kinds)), (2, (0, *(1,) * (len(kinds) - 2), 2))),
    )  # fmt: skip
    whole = take(5, config)
    again = take(3, config, start_step=2, workers=1)
    halves = [take(5, config, rows=rows) for rows in (range(2), range(2, 4))]
    for step, batch in enumerate(whole):
        for key in ("video", "images"):
            if step >= 2:
                np.testing.assert_array_equal(again[step - 2][key], batch[key])
            np.testing.assert_array_equal(np.concatenate([half[step][key] for half in halves]), batch[key])


def test_images_alone_need_no_clips(stores):
    config = config_of("webdataset", stores, path=None, frames=0, images=2)
    (batch,) = take(1, config)
    assert batch["video"].shape == (4, 0, 16, 16, 3) and batch["images"].shape == (4, 2, 16, 16, 3)


def test_clips_and_images_may_be_of_different_kinds(stores):
    config = config_of("array_record", stores, image_source="webdataset", image_path=str(stores["webdataset"][1]))
    source = make_source(config)
    assert isinstance(source.clips, shards.ShardRecords) and isinstance(source.images, tars.TarRecords)


# ---- frame times ----


def test_a_window_takes_frames_by_rate_or_by_stride(tmp_path):
    ramp = np.broadcast_to(np.linspace(20, 235, 24).astype(np.uint8)[:, None, None, None], (24, 32, 32, 3))
    for rate in (12, 24):
        path = video_files.save_video(ramp, tmp_path / f"{rate}.mp4", fps=rate)
        numbers = {}
        for window in (ClipWindow(frames=3, fps=6), ClipWindow(frames=3), ClipWindow(frames=3, stride=5)):
            frames = video_files.read_window(path.read_bytes(), window, place=1.0)
            numbers[str(window)] = np.abs(frames.mean((1, 2, 3))[:, None] - ramp.mean((1, 2, 3))).argmin(1).tolist()
        step = rate // 6
        assert numbers == {
            "3 frames at 6 fps": [23 - 2 * step, 23 - step, 23],
            "3 frames at their own rate": [21, 22, 23],
            "3 frames at their own rate, 5 apart": [13, 18, 23],
        }


def test_a_window_of_a_variable_rate_video_has_the_frames_on_screen_at_its_times(tmp_path):
    import av

    times = [0, 1, 2, 6, 7, 12, 13]  # in twelfths of a second
    with av.open(str(tmp_path / "vfr.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "10"})
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 30 * i + 20, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 12)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    window = ClipWindow(frames=3, fps=3)
    frames = video_files.read_window(tmp_path / "vfr.mp4", window, place=0.0)
    grays = np.round((frames.mean((1, 2, 3)) - 20) / 30).astype(int).tolist()
    assert grays == [0, 2, 4]  # at 0, 4/12 and 8/12 s


def test_the_room_of_a_window():
    assert ClipWindow(frames=5, fps=4).room(VideoInfo(17, 8)) == pytest.approx(1.0)
    assert ClipWindow(frames=17).room(VideoInfo(17, 29.97)) == 0.0
    assert ClipWindow(frames=18).room(VideoInfo(17, 29.97)) < 0


# ---- damaged files ----


@pytest.fixture(scope="module")
def damaged(clips, tmp_path_factory):
    """Returns {name: bytes} of files that are not clips of at least 4 frames."""
    whole = clips[3][0].read_bytes()
    few = video_files.save_video(np.zeros((2, 32, 32, 3), np.uint8), tmp_path_factory.mktemp("few") / "a.mp4", fps=8)
    return {
        "truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no video", "picture": picture(0),
        "short": few.read_bytes(),
    }  # fmt: skip


def test_damaged_files_of_a_folder_are_left_out_and_reported(clips, damaged, tmp_path, caplog):
    for name, content in {**damaged, "good": clips[0][0].read_bytes(), "silent": clips[0][0].read_bytes()}.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        (tmp_path / f"{name}.txt").write_bytes(b"caf\xe9" if name == "silent" else b"a clip")
    result = records_of("video_folder", tmp_path)
    names = {path.stem for path, _ in result.rows}
    assert names <= {"good", "truncated"} and "good" in names  # its header is intact
    assert "1 of 7 have a caption that is not UTF-8" in caplog.text and "silent.txt" in caplog.text
    assert "1 of 7 are shorter than 4 frames at 8 fps" in caplog.text and "short.mp4" in caplog.text
    assert "of 7 cannot be read" in caplog.text and "empty.mp4" in caplog.text and "picture.mp4" in caplog.text
    with pytest.raises(UserError, match="is an image, not a video"):
        video_files.video_info(tmp_path / "picture.mp4")


def test_damaged_records_of_a_shard_are_skipped_deterministically(clips, damaged, tmp_path, caplog):
    rows = [{"video": path.read_bytes(), "caption": caption} for path, caption in clips]
    rows += [{"video": content, "caption": name} for name, content in damaged.items()]
    rows += [{"video": rows[0]["video"], "caption": " "}]
    shards.write_shards(rows, tmp_path / "shards")
    config = DataConfig(
        source="array_record", path=str(tmp_path / "shards"), frames=4, height=16, width=16, caption_drop=0.0
    )
    examples = pipeline.Examples(config, make_source(config))
    first = [examples[i] for i in range(11)]
    assert {row["caption"] for row in first} <= {caption for _, caption in clips}
    skipped = {skip for row in first for skip in row["skipped"]}
    assert len(skipped) >= 5 and all("clips-00000.array_record[" in record for record, _ in skipped)
    again = [examples[i] for i in (3, 7)]
    for row, number in zip(again, (3, 7)):
        np.testing.assert_array_equal(row["video"], first[number]["video"])
        assert row["skipped"] == first[number]["skipped"]
    take(3, config)
    assert "skipped record 1: " in caplog.text
    with pytest.raises(UserError, match="3 records were skipped, more than data.max_unreadable allows"):
        take(5, dataclasses.replace(config, max_unreadable=2))


def test_a_shard_with_only_damaged_records_stops_the_run(damaged, tmp_path):
    shards.write_shards([{"video": damaged["text"], "caption": "x"}] * 9, tmp_path)
    config = DataConfig(source="array_record", path=str(tmp_path), frames=4, height=16, width=16)
    with pytest.raises(UserError, match="8 records in a row cannot be read; the last: .*clips-00000.array_record"):
        take(1, config)


# ---- tables ----


def table_of(tmp_path, clips, rows):
    for path, _ in clips:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path / "captions.csv"


def test_csv_and_jsonl_tables_list_files_and_captions(clips, tmp_path, caplog):
    rows = [{"path": path.name, "caption": f'"{caption}", gray\nall over'} for path, caption in clips]
    rows += [{"path": "gone.mp4", "caption": "gone"}, {"path": clips[0][0].name, "caption": ""}]
    table = table_of(tmp_path, clips, rows)
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    expected = {(path.name, f'"{caption}", gray all over') for path, caption in clips}
    for path in (table, tmp_path / "captions.jsonl"):
        result = records_of("video_folder", path)
        assert {(file.name, caption) for file, caption in result.rows} == expected
    assert "1 of 8 name no file that exists" in caplog.text and "captions.jsonl line 7" in caplog.text
    assert "1 of 8 have no caption" in caplog.text


def test_webvids_csv_is_read_unchanged(clips, tmp_path):
    for i, (path, _) in enumerate(clips):
        target = tmp_path / "videos" / f"00{i % 2}_00{i}" / f"10{i}.mp4"
        target.parent.mkdir(parents=True)
        target.write_bytes(path.read_bytes())
    lines = [f"10{i},https://x/{i}.mp4,PT00H00M02S,00{i % 2}_00{i},Clip {i}" for i in range(6)]
    (tmp_path / "webvid.csv").write_text("\n".join(["videoid,contentUrl,duration,page_dir,name", *lines]))
    result = records_of("video_folder", tmp_path / "webvid.csv")
    assert {(file.stem, caption) for file, caption in result.rows} == {(f"10{i}", f"Clip {i}") for i in range(6)}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"clip,words\nx.mp4,hello\n", "has the columns clip, words; it needs a file, one of path"),
        ("a.csv", b"path,caption\nx.mp4,caf\xe9\n", "a.csv is not UTF-8"),
        ("a.csv", b"path,caption\nx.mp4,one,two\n", "line 2 has more fields than the 2 columns"),
        ("a.csv", b'path,caption\nx.mp4,"cut', "after line 1 is not CSV"),
        ("a.csv", b"path,caption\n", "has no rows"),
        ("a.jsonl", b'{"path": "x.mp4", "caption": "y"}\n{"path":', "line 2 is not JSON"),
        ("a.jsonl", b'["x.mp4", "y"]\n', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"path": "x.mp4", "caption": "y"}\n', "of 1 videos 1 name no file that exists"),
    ],
)
def test_an_unusable_table_is_refused_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        folders.open_folder(tmp_path / name, medium="video", split="train")


# ---- tars ----


def test_incomplete_pairs_in_a_tar_are_counted_and_captions_stay_with_their_clips(clips, tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.txt", b"a caption without a clip")
        for i in (1, 2):
            add(tar, f"{i}.mp4", clips[i][0].read_bytes())
        add(tar, "2.txt", b"clip 2")
        add(tar, "part/1.txt", b"of another folder")
    result = records_of("webdataset", tmp_path)
    assert [(result[i].caption, result[i].content) for i in range(len(result))] == [
        ("clip 2", clips[2][0].read_bytes())
    ]
    assert result[0].name == f"{tmp_path / 'a.tar'}/2.mp4"
    assert "2 records without a video" in caplog.text and "1 records without a caption" in caplog.text


@pytest.mark.parametrize("keep", [0, 700, 5000, -1024, -10240])
def test_a_truncated_tar_is_refused_by_name(stores, tmp_path, keep):
    whole = (stores["webdataset"][0] / "00000.tar").read_bytes()
    end = whole.rstrip(b"\0")
    content = whole[:keep] if keep >= 0 else end[: keep + 1024]
    (tmp_path / "cut.tar").write_bytes(content)
    with pytest.raises(UserError, match="cannot read the tar '.*cut.tar'"):
        records_of("webdataset", tmp_path)


def test_bad_captions_in_a_tar_are_found_when_it_is_opened(clips, tmp_path, caplog):
    content = clips[0][0].read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, text in enumerate((b"caf\xe9", b"  ", b"good")):
            add(tar, f"{i}.mp4", content)
            add(tar, f"{i}.txt", text)
        add(tar, "3.mp4", content)
        add(tar, "3.json", b"{")
        for i, text, fields in ((4, b"\n", b'{"caption": "of the JSON"}'), (5, b"\xef\xbb\xbf", b'{"caption": " "}')):
            add(tar, f"{i}.json", fields)
            add(tar, f"{i}.mp4", content)
            add(tar, f"{i}.txt", text)
        add(tar, "6.mp4", content)
        add(tar, "6.json", b"[" * 100_000)
        add(tar, "7.mp4", content)
        add(tar, "7.txt", b"\xef\xbb\xbfwith a mark")
    for _ in range(2):  # from the tar, then from its index
        caplog.clear()
        found = records_of("webdataset", tmp_path)
        assert sorted(found[i].caption for i in range(len(found))) == ["good", "of the JSON", "with a mark"]
        assert "1 records that have a caption that is not UTF-8 are left out: 'a.tar/0'" in caplog.text
        assert "2 records that have no caption are left out: 'a.tar/1'" in caplog.text
        assert "2 records that have a .json that is not JSON are left out: 'a.tar/3'" in caplog.text
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        add(tar, "2.webm", content)
    with pytest.raises(UserError, match="two videos named '2'"):
        records_of("webdataset", tmp_path)


# ---- shards ----


def test_truncated_shards_and_shards_of_different_schemas_are_refused(clips, stores, tmp_path):
    whole = next(stores["array_record"][0].iterdir()).read_bytes()
    for keep in (0, 100, len(whole) - 500, 65536):
        (tmp_path / "cut.array_record").write_bytes(whole[:keep])
        with pytest.raises(UserError, match="the shard '.*cut.array_record' is truncated or damaged"):
            records_of("array_record", tmp_path)
    os.remove(tmp_path / "cut.array_record")
    content = clips[0][0].read_bytes()
    shards.write_shards([{"video": content, "caption": "x"}], tmp_path, name="a")
    shards.write_shards([{"video": content, "caption": "x", "score": 1.0}], tmp_path, name="b")
    with pytest.raises(UserError, match="different fields: .*a-00000.* caption, video, those of .*b-00000.* score"):
        records_of("array_record", tmp_path)
    with pytest.raises(UserError, match="have the fields caption, video; they need image and caption"):
        records_of("array_record", tmp_path / "a-*", medium="image")
    with pytest.raises(UserError, match="has shards named 'a' already"):
        shards.write_shards([{"video": content, "caption": "x"}], tmp_path, name="a")


@pytest.mark.parametrize(
    "kind, message",
    [
        ("array_record", "no .array_record file at"),
        ("webdataset", "no .tar file at"),
        ("tfds", "dataset_info.json is missing"),
        ("video_folder", "no folder"),
        ("web_dataset", "did you mean 'webdataset'"),
    ],
)
def test_paths_without_data_are_refused(tmp_path, kind, message):
    with pytest.raises(UserError, match=message):
        records_of(kind, tmp_path / "nothing")


def test_tfds_data_sets_have_the_declared_fields_and_splits(stores):
    with pytest.raises(UserError, match="have caption, video; they need image and caption"):
        records_of("tfds", stores["tfds"][0], medium="image")
    result = records_of("tfds", stores["tfds"][0])
    assert {result[i].caption for i in range(6)} == {f"clip {i}" for i in range(6)}


def test_a_damaged_record_of_a_tfds_data_set_is_an_error_that_training_can_skip(stores, tmp_path):
    folder = shutil.copytree(stores["tfds"][0], tmp_path / "damaged")
    result = records_of("tfds", folder)

    class Damaged:
        def __getitem__(self, index):
            raise ValueError("checksum")

    result.records = Damaged()
    with pytest.raises(UserError, match=r"cannot read .*damaged\[0\]: checksum"):
        result[0]
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the TFDS data set"):
        records_of("tfds", folder)


def test_a_row_of_a_table_may_have_a_clip_and_an_image(clips, tmp_path):
    shutil.copy(clips[0][0], tmp_path / "a.mp4")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "both.csv").write_text("video,image,caption\na.mp4,a.png,both\n")
    for medium, name in (("video", "a.mp4"), ("image", "a.png")):
        ((file, caption),) = records_of("video_folder", tmp_path / "both.csv", medium=medium).rows
        assert (file.name, caption) == (name, "both")


def test_an_image_with_malformed_exif_data_is_refused_by_the_reader(tmp_path):
    tags = struct.pack("<HHI4s", 0x111, 2, 4, b"abc") + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)  # text, not a number
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "odd.jpg", exif=exif)
    with pytest.raises(UserError, match="cannot read the image"):
        sources.read_image(Record("odd.jpg", "a caption", tmp_path / "odd.jpg"))


def test_a_tar_without_pairs_is_refused_with_the_reason(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "clip.v1.mp4", b"content")
    with pytest.raises(UserError, match="no video with a caption in"):
        records_of("webdataset", tmp_path)


def test_a_clip_read_from_a_shard_differs_only_by_compression(tmp_path):
    clip = moving_shapes.clip("train", 1, height=64, width=96).pixels
    content = video_files.save_video(clip, tmp_path / "a.mp4", fps=8).read_bytes()
    shards.write_shards([{"video": content, "caption": "x"}] * 2, tmp_path)
    config = DataConfig(source="array_record", path=str(tmp_path), frames=16, height=64, width=96)
    video = make_source(config).video(0, np.random.default_rng(0))
    assert np.abs(video.pixels.astype(int) - clip).mean() < 4

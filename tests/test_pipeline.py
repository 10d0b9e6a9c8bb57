"""Batches do not depend on processes or workers and resume at any step; transforms; the small tokenizer."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image

from lavie_jax.data import moving_shapes, pipeline, sources, tokens, transforms, video_files
from lavie_jax.data.build import make_source
from lavie_jax.data.config import DataConfig
from lavie_jax.data.folders import open_folder
from lavie_jax.data.pipeline import Examples
from lavie_jax.data.video_files import ClipWindow
from lavie_jax.errors import UserError
from lavie_jax.stages.clips import pixels_to_float
from tests.batches import take

SMALL = DataConfig(frames=3, height=16, width=24, images=2, seed=5)
CAPTION = "a small red circle moving up left over a blue background"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return tokens.save_small_tokenizer(tmp_path_factory.mktemp("tokenizer"), moving_shapes.vocabulary())


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return tokens.load_tokenizer(tokenizer_folder)


def assert_same(one, other):
    assert [list(batch) for batch in one] == [list(batch) for batch in other]
    for a, b in zip(one, other):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# ---- batches ----


def test_a_batch_has_the_shapes_types_and_ranges_that_training_reads(tokenizer):
    (batch,) = take(1, SMALL, tokenizer=tokenizer)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "video": ((4, 3, 16, 24, 3), "uint8"),
        "images": ((4, 2, 16, 24, 3), "uint8"),
        "tokens": ((4, 16), "int32"),
        "image_tokens": ((4, 2, 16), "int32"),
    }
    assert batch["video"].min() < batch["video"].max()


def test_video_image_and_caption_belong_together(tokenizer):
    config = dataclasses.replace(SMALL, caption_drop=0.0, detail_drop=0.0)
    (batch,) = take(1, config, tokenizer)
    source = make_source(config)
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels, caption, *_ = source.video(i, rng)
        np.testing.assert_array_equal(batch["video"][i], pixels)
        np.testing.assert_array_equal(batch["tokens"][i], tokens.tokenize(tokenizer, [caption])[0])
        for j in range(2):
            pixels, caption, *_ = source.image(2 * i + j, rng)
            np.testing.assert_array_equal(batch["images"][i, j], pixels)
            np.testing.assert_array_equal(batch["image_tokens"][i, j], tokens.tokenize(tokenizer, [caption])[0])


def test_a_resumed_stream_continues_at_the_same_step(tokenizer):
    whole = take(5, SMALL, tokenizer=tokenizer)
    assert_same(take(2, SMALL, tokenizer=tokenizer, start_step=3), whole[3:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # grain's own
def test_worker_processes_give_the_same_batches_as_none(tokenizer):
    whole = take(4, SMALL, tokenizer=tokenizer)
    assert_same(take(3, SMALL, tokenizer=tokenizer, start_step=1, workers=2), whole[1:])
    examples = pipeline.open_examples(SMALL, batch_size=4)
    with contextlib.closing(pipeline.batches(examples, tokenizer, rows=[1, 3], workers=1)) as stream:
        mine = [next(stream)]
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)  # Ctrl-C reaches them too, and the run continues until it has saved
        mine += [next(stream) for _ in whole[1:]]
    assert_same(mine, [{key: rows[[1, 3]] for key, rows in batch.items()} for batch in whole])


def test_each_process_gets_its_rows_of_the_batch(tokenizer):
    whole = take(3, SMALL, tokenizer=tokenizer)
    for mine in ([0, 3], [1, 2], [2]):
        for batch, share in zip(whole, take(3, SMALL, tokenizer=tokenizer, rows=mine)):
            for key in batch:
                np.testing.assert_array_equal(share[key], batch[key][mine], err_msg=key)


def test_the_data_depends_on_the_seed_and_the_split():
    first = take(1, SMALL)[0]["video"]
    for other in ({"seed": 6}, {"split": "val"}):
        assert not np.array_equal(first, take(1, dataclasses.replace(SMALL, **other))[0]["video"])


def test_captions_are_dropped_at_the_given_rate_and_replaced_by_the_null_caption(tokenizer):
    config = DataConfig(frames=1, height=8, width=8, images=1, caption_drop=0.25, null_caption="red")
    null = tokens.tokenize(tokenizer, ["red"])[0]
    (batch,) = take(1, config, tokenizer, batch_size=200)
    dropped = {key: (batch[key].reshape(-1, 16) == null).all(-1) for key in ("tokens", "image_tokens")}
    for key, rows in dropped.items():
        assert 0.19 < rows.mean() < 0.31, key
    assert not np.array_equal(dropped["tokens"], dropped["image_tokens"])  # dropped independently


def test_a_batch_may_have_only_images_or_only_videos(tokenizer):
    (images,) = take(1, dataclasses.replace(SMALL, frames=0), tokenizer)
    assert images["video"].shape == (4, 0, 16, 24, 3) and images["images"].shape == (4, 2, 16, 24, 3)
    (videos,) = take(1, dataclasses.replace(SMALL, images=0), tokenizer)
    assert videos["images"].shape == (4, 0, 16, 24, 3) and videos["image_tokens"].shape == (4, 0, 16)


def test_grain_is_not_imported_without_workers(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)  # importing it raises ImportError
    assert take(1, SMALL)[0]["video"].shape[0] == 4
    with pytest.raises(UserError, match="set workers=0"):
        take(1, SMALL, workers=1)


def test_an_error_in_the_background_thread_is_raised_by_the_stream(monkeypatch):
    def broken(self, index, rng):
        raise OSError("disk gone")

    monkeypatch.setattr(sources.MovingShapes, "video", broken)
    with pytest.raises(OSError, match="disk gone"):
        take(1, SMALL)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source": "moving_shape"}, "did you mean 'moving_shapes'"),
        ({"split": "tran", "images": 0}, "did you mean 'train'"),
        ({"split": "held_out"}, "has no images"),
        ({"frames": 0, "images": 0}, "frames or images"),
        ({"frames": -1}, "frames or images"),
        ({"height": 0}, "at least 1"),
        ({"fps": 0.0}, "fps must be above 0"),
        ({"fps": None}, "set fps"),
        ({"seed": -1}, "seed' must be at least 0"),
        ({"caption_drop": 1.5}, "caption_drop' must be from 0 to 1"),
        ({"handheld": -0.1}, "handheld' must be from 0 to 1"),
        ({"full_height": 8, "full_width": 64}, "patches of 16x24 do not fit into frames of 8x64"),
        ({"slowest_fps": 9.0}, "slowest_fps must be above 0 and at most fps; given 9.0 and 8.0"),
        ({"source": "video_folder", "path": ".", "slowest_fps": 1.0}, "slowest_fps is for Moving Shapes"),
        ({"source": "video_folder", "path": ".", "images_from_clips": 0.5}, "images_from_clips is for Moving Shapes"),
        ({"images_from_clips": 2.0}, "'data.images_from_clips' must be from 0 to 1, not 2.0"),
        ({"path": "clips"}, "Moving Shapes is generated, so that 'clips' is not read: set data.source"),
        ({"image_source": "webdataset", "image_path": "pictures"}, "'pictures' is not read"),
        ({"source": "video_folder"}, "needs a path"),
        ({"source": "video_folder", "path": ".", "image_source": "webdataset"}, "image_source = 'webdataset' is the"),
        ({"source": "video_folder", "path": "/nowhere/at/all"}, "no folder"),
    ],
)
def test_wrong_settings_are_refused_before_any_batch(change, message):
    with pytest.raises(UserError, match=message):
        pipeline.open_examples(dataclasses.replace(SMALL, **change), batch_size=4)


# ---- a folder of videos ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight clips of 9 frames at 8 fps with captions, and unrelated files, as in real folders."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(8):
        clip = moving_shapes.clip("train", i, frames=9, fps=8, height=32, width=48)
        path = video_files.save_video(clip.pixels, root / f"part{i % 2}" / f"clip {i}.mp4", fps=8)
        path.with_suffix(".txt").write_text(f"clip {i}\n")
    video_files.save_video(clip.pixels, root / "no caption.mp4", fps=8)
    video_files.save_video(clip.pixels[:2], root / "short.mp4", fps=8)
    (root / "short.txt").write_text("too short")
    (root / "broken.mp4").write_bytes(b"no video")
    (root / "broken.txt").write_text("broken")
    return root


def config_of(folder, **change):
    return DataConfig(**{"source": "video_folder", "path": str(folder), "frames": 4, "fps": 8.0, "height": 16,
                         "width": 16, "images": 1, **change})  # fmt: skip


def source_of(folder, *, split="train", val_fraction=0.0, height=16, width=16):
    window = ClipWindow(frames=4, fps=8)
    clips = sources.open_records(
        "video_folder", str(folder), medium="video", split=split, window=window, val_fraction=val_fraction
    )
    return sources.RecordSource(clips=clips, window=window, height=height, width=width, random_crop=split == "train")


def test_a_video_folder_yields_every_clip_once_per_epoch_in_a_new_order(folder):
    source = source_of(folder)
    captions = [source.video(i, np.random.default_rng(i))[1] for i in range(16)]
    assert sorted(captions[:8]) == sorted(captions[8:]) == [f"clip {i}" for i in range(8)]
    assert captions[:8] != captions[8:]


def test_a_window_of_a_video_contains_consecutive_frames(folder):
    source = source_of(folder, height=32, width=48)
    starts = set()
    for i in range(24):
        frames, caption, *_ = source.video(i, np.random.default_rng(i))
        whole = video_files.read_video(next(folder.rglob(f"{caption}.mp4")))
        (start,) = [s for s in range(6) if np.array_equal(whole[s : s + 4], frames)]
        starts.add(start)
    assert len(starts) > 2


def test_a_file_damaged_after_the_start_is_skipped_and_a_lost_folder_is_an_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    source = source_of(tmp_path / "copy")
    damaged, *others = sorted((tmp_path / "copy").rglob("clip *.mp4"))
    damaged.write_bytes(b"gone")
    items = [source.video(i, np.random.default_rng(i)) for i in range(8)]
    assert {item.caption for item in items} == {path.stem for path in others}
    assert any(str(damaged) == skip.record for item in items for skip in item.skipped)
    for path in others:
        path.unlink()
    with pytest.raises(UserError, match="records in a row cannot be read"):
        source.video(0, np.random.default_rng(0))


def test_splits_of_a_video_folder_share_no_clip(folder):
    train = source_of(folder, val_fraction=0.5)
    val = source_of(folder, split="val", val_fraction=0.5)
    captions = [{caption for _, caption in source.clips.rows} for source in (train, val)]
    assert not captions[0] & captions[1] and len(captions[0] | captions[1]) == 8
    assert len(source_of(folder, split="val", val_fraction=1e-9)) == 1
    (held_out,) = take(1, config_of(folder, split="val"), batch_size=16)  # a batch of 16 from fewer clips
    assert held_out["video"].shape[0] == 16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # grain's own
@pytest.mark.heavy  # test_sources.py has shards with a worker, and the test above Moving Shapes
def test_batches_of_a_video_folder_are_the_same_with_workers(folder, tokenizer):
    config = config_of(folder, caption_drop=0.5)
    assert_same(take(2, config, tokenizer), take(2, config, tokenizer, workers=1))


def test_images_come_from_the_folder_of_images(folder, tmp_path):
    """Held-out images are not in the training split."""
    for name in "ab":
        Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("red all over")
    (batch,) = take(1, config_of(folder, image_path=str(tmp_path)))
    np.testing.assert_allclose(batch["images"], np.broadcast_to([255, 0, 0], batch["images"].shape))
    splits = [open_folder(tmp_path, medium="image", split=split) for split in ("train", "val")]
    assert sorted(path.name for pictures in splits for path, _ in pictures.rows) == ["a.png", "b.png"]
    assert [len(pictures) for pictures in splits] == [1, 1]


@pytest.mark.parametrize(
    "change, batch_size, message",
    [
        ({"frames": 60}, 2, "no video for split .* are shorter than 60 frames at 8 fps"),
        ({}, 100, "a batch of 100 needs as many clips"),
        ({"split": "held_out"}, 2, "splits train and val"),
    ],
)
def test_an_unusable_video_folder_is_refused_before_any_batch(folder, change, batch_size, message):
    with pytest.raises(UserError, match=message):
        pipeline.open_examples(config_of(folder, **change), batch_size=batch_size)


def test_a_folder_without_captions_is_refused_with_the_reason(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="of 1 videos 1 have no caption .clip.mp4 needs clip.txt"):
        pipeline.open_examples(config_of(tmp_path), batch_size=1)


def test_an_images_folder_without_captions_is_refused(folder, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="no image .* of 1 images 1 have no caption"):
        pipeline.open_examples(config_of(folder, image_path=str(tmp_path), images=1), batch_size=1)


def test_an_unused_folder_of_images_is_not_opened(folder, tmp_path):
    examples = pipeline.open_examples(config_of(folder, image_path=str(tmp_path / "none"), images=0), batch_size=1)
    assert len(examples.source) == 7 and examples[0]["images"].shape[0] == 0  # one of 8 clips is held out


# ---- transforms ----


def test_pixels_become_the_same_floats_on_devices_as_on_the_host():
    pixels = np.arange(256, dtype=np.uint8)
    for convert in (pixels_to_float, jax.jit(pixels_to_float)):
        np.testing.assert_array_equal(convert(jnp.asarray(pixels)), transforms.to_float(pixels))
    floats = jnp.linspace(-1, 1, 5)
    assert pixels_to_float(floats) is floats


def test_pixels_survive_conversion_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    floats = transforms.to_float(pixels)
    assert floats[0] == -1 and floats[-1] == 1
    np.testing.assert_array_equal(transforms.to_uint8(floats), pixels)
    np.testing.assert_array_equal(transforms.to_uint8(np.float32([-3, 0, 7])), np.uint8([0, 128, 255]))


@pytest.mark.parametrize("shape", [(20, 40), (40, 20), (8, 8), (12, 30)])
def test_resize_crop_keeps_the_aspect_ratio_and_crops_all_frames_alike(shape):
    ramp = np.broadcast_to(np.linspace(0, 255, shape[1])[None, None, :, None], (2, *shape, 3)).astype(np.uint8)
    for rng in (None, np.random.default_rng(1)):
        out = transforms.resize_crop(ramp, height=10, width=15, rng=rng)
        assert out.shape == (2, 10, 15, 3)
        np.testing.assert_array_equal(out[0], out[1])
    assert abs(float(transforms.resize_crop(ramp, height=10, width=15, rng=None).mean()) - 127.5) < 8


# ---- tokens ----


def by_transformers(folder):
    return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def test_every_word_of_moving_shapes_is_one_token(tokenizer_folder):
    tokenizer = by_transformers(tokenizer_folder)
    ids = {word: tokenizer(word).input_ids for word in moving_shapes.vocabulary()}
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert all(len(row) == 3 and row[0] == start and row[2] == end for row in ids.values())
    assert len({row[1] for row in ids.values()}) == len(ids)
    assert len(tokenizer) < 256 and max(tokenizer.get_vocab().values()) == end == len(tokenizer) - 1


def test_tokens_are_those_of_transformers(tokenizer, tokenizer_folder):
    theirs = by_transformers(tokenizer_folder)
    assert isinstance(tokenizer, tokens.CLIPWords) and len(tokenizer) == len(theirs)
    texts = ["", CAPTION, "  A SMALL red circle,\nmoving up left over a blue background! ", f"{CAPTION} and {CAPTION}"]
    np.testing.assert_array_equal(tokens.tokenize(tokenizer, texts), tokens.tokenize(theirs, texts))
    assert [tokens.lost_text(tokenizer, text) for text in texts] == [tokens.lost_text(theirs, text) for text in texts]


def test_tokens_of_a_caption(tokenizer, tokenizer_folder):
    (row,) = tokens.tokenize(tokenizer, [CAPTION])
    assert row.shape == (16,) and row.dtype == np.int32
    theirs = by_transformers(tokenizer_folder)
    names = [name.removesuffix("</w>") for name in theirs.convert_ids_to_tokens(row)]
    assert names == ["<|startoftext|>", *CAPTION.split(), *["<|endoftext|>"] * 4]
    (shouted,) = tokens.tokenize(tokenizer, ["  A SMALL red circle,\nmoving up left over a blue background! "])
    np.testing.assert_array_equal(row, shouted)
    assert (tokens.tokenize(tokenizer, [""])[0][1:] == theirs.eos_token_id).all()


def test_text_beyond_the_context_is_truncated_and_reported(tokenizer):
    twice = f"{CAPTION} and {CAPTION}"
    row = tokens.tokenize(tokenizer, [twice])[0]
    end = len(tokenizer) - 1
    assert row[-1] == end and end not in row[:-1]
    assert tokens.lost_text(tokenizer, CAPTION) == ""
    assert tokens.lost_text(tokenizer, twice) == "circle moving up left over a blue background"


def test_unknown_words_are_reported_and_left_out(tokenizer):
    text = "a fluffy red circle, fluffy as 2 clouds, moving left."
    assert tokens.unknown_words(tokenizer, text) == ["fluffy", "as", "2", "clouds"]
    assert tokens.unknown_words(tokenizer, CAPTION) == []
    assert tokens.known_words(tokenizer) == moving_shapes.vocabulary()
    known, mixed = tokens.tokenize(tokenizer, ["a red circle moving left", text])
    np.testing.assert_array_equal(known, mixed)


def test_a_tokenizer_saved_by_transformers_still_has_its_list_of_words(tokenizer, tokenizer_folder, tmp_path):
    by_transformers(tokenizer_folder).save_pretrained(tmp_path)
    again = tokens.load_tokenizer(tmp_path)
    assert tokens.known_words(again) == moving_shapes.vocabulary()
    assert tokens.context_length(again) == 16
    np.testing.assert_array_equal(tokens.tokenize(again, [CAPTION]), tokens.tokenize(tokenizer, [CAPTION]))


def test_a_large_tokenizer_accepts_all_words_and_has_a_context_of_77(tokenizer, tmp_path):
    folder = tokens.save_small_tokenizer(tmp_path, ["red"])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["words"], config["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    large = tokens.load_tokenizer(folder)
    assert tokens.known_words(large) is None and tokens.unknown_words(large, "quux") == []
    assert tokens.tokenize(large, ["a quux"]).shape == (1, 77)


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match="no vocab.json and no merges.txt"):
        tokens.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        tokens.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="letters a to z"):
        tokens.save_small_tokenizer(tmp_path, ["red", "Grün"])


# ---- patches, images under a moving camera, frame rates ----


def test_a_patch_is_cut_from_the_whole_frame():
    whole = DataConfig(frames=3, height=48, width=64, images=1, seed=1)
    patch = dataclasses.replace(whole, height=16, width=24, full_height=48, full_width=64)
    frames, cut = (Examples(config, make_source(config))[5] for config in (whole, patch))
    for name, shape in (("video", (3, 16, 24, 3)), ("images", (1, 16, 24, 3))):
        assert cut[name].shape == shape
        positions = np.lib.stride_tricks.sliding_window_view(frames[name], shape)
        assert (positions == cut[name]).all((-4, -3, -2, -1)).any()  # one position for all frames, no scaling


def test_an_image_under_a_moving_camera_moves_as_a_whole_and_smoothly():
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    clip = transforms.handheld(image, frames=24, height=32, width=32, fps=8, rng=np.random.default_rng(1))
    windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32, 3))[:, :, 0]
    positions = np.array([np.argwhere((windows == frame).all((2, 3, 4)))[0] for frame in clip])
    assert len(np.unique(positions, axis=0)) > 5 and np.abs(np.diff(positions, axis=0)).max() <= 4


def test_handheld_is_the_share_of_clips_made_from_images():
    config = DataConfig(frames=4, height=16, width=16, handheld=0.25, caption_drop=0)
    examples = Examples(config, make_source(config))
    captions = [examples[i]["caption"] for i in range(400)]
    of_images = [text for text in captions if " moving " not in text and " standing " not in text]
    assert 70 < len(of_images) < 130 and examples[0]["video"].shape == (4, 16, 16, 3)


def test_images_from_clips_is_the_share_of_images_that_are_frames_of_clips():
    config = DataConfig(frames=0, images=2, height=16, width=16, images_from_clips=0.25, caption_drop=0)
    examples = Examples(config, make_source(config))
    captions = [text for i in range(200) for text in examples[i]["image_captions"]]
    moving = [text for text in captions if " moving " in text or " standing " in text]
    assert 70 < len(moving) < 130 and examples[0]["images"].shape == (2, 16, 16, 3)
    none = dataclasses.replace(config, images_from_clips=0.0)  # all other images are unchanged
    before = {text for i in range(200) for text in Examples(none, make_source(none))[i]["image_captions"]}
    assert set(captions) - set(moving) <= before


def test_each_clip_has_its_own_frame_rate():
    config = DataConfig(frames=2, fps=32.0, slowest_fps=4.0, height=64, width=64, caption_drop=0)
    slowest = dataclasses.replace(config, fps=4.0, slowest_fps=0)

    def change(config):
        """Returns the mean difference between the two frames of each clip."""
        examples = Examples(config, make_source(config))
        return [np.abs(np.diff(examples[i]["video"].astype(int), axis=0)).mean() for i in range(40)]

    shares = [a / b for a, b in zip(change(config), change(slowest)) if b > 0]
    assert min(shares) < 0.4 and max(shares) > 0.7 and np.std(shares) > 0.1


def test_patches_and_images_of_video_files(folder):
    config = config_of(folder, frames=3, height=8, width=8, full_height=12, full_width=16, handheld=0.5)
    examples = Examples(config, make_source(config))
    assert all(examples[i]["video"].shape == (3, 8, 8, 3) for i in range(6))

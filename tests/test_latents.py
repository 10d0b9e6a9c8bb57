"""Sets of latents: curation writes them for clips and images, and training reads them instead of pixels."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from lavie_jax import weights
from lavie_jax.curation import __main__ as command
from lavie_jax.curation import latent_encoder
from lavie_jax.curation import pipeline as curation
from lavie_jax.curation.job import LatentJob
from lavie_jax.data import latents, pipeline, shards, tokens, transforms, video_files
from lavie_jax.data.build import make_source
from lavie_jax.data.config import DataConfig
from lavie_jax.data.tokens import load_tokenizer
from lavie_jax.errors import UserError
from lavie_jax.models.clip_text import CLIPText
from lavie_jax.models.vae import VAE
from lavie_jax.training import build, options
from lavie_jax.training.state import make_state
from lavie_jax.training.step import make_update
from tests import videos
from tests.batches import take
from tests.test_stage_training import small_config
from tests.tiny import make_base, make_stage

ROOT = Path(__file__).parents[1]
CLIPS, SECONDS, RATE = 8, 1.5, 16
WORDS = ("a red circle moving left", "a blue square moving right", "a blue circle", "red circle square")
LENIENT = ("--min-height", "32", "--min-words", "0", "--min-motion", "0", "--max-overlay", "1", "--max-text", "1",
           "--workers", "1", "--duplicate-bits", "-1", "--min-frames", "2")  # fmt: skip


def curate(*words):
    """Runs the curation without its report, which would take longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curation.report, "write", lambda *args: None)
        command.main([*map(str, words), *LENIENT])


@pytest.fixture(scope="module", autouse=True)
def few_frames_at_a_time():
    """Limits each of the 8 devices to 3 frames at a time, so that a clip of about 24 frames is one call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_encoder, "MAX_FRAMES", 3)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("weights") / "base")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Writes videos of 32x48 at 16 fps. They have twice the sides that the tiny weights sample: no crop is random."""
    folder = tmp_path_factory.mktemp("films")
    for i in range(CLIPS):
        land = videos.pan(200 + i, round(SECONDS * RATE) + i % 3, height=32, width=48)
        videos.encode(folder / f"{i}.mp4", land, RATE)
        (folder / f"{i}.txt").write_text(WORDS[i % len(WORDS)])
    return folder


@pytest.fixture(scope="module")
def clips(films, tmp_path_factory):
    """Curates `films` to encoded clips."""
    out = tmp_path_factory.mktemp("clips") / "out"
    curate("--input", films, "--out", out, "--shard-clips", "3")
    return out


@pytest.fixture(scope="module")
def latent_set(films, base, tmp_path_factory):
    """Curates `films` to latents."""
    out = tmp_path_factory.mktemp("latents") / "out"
    words = ["--latents", str(base), "--latent-fps", "16", "--shard-clips", "3"]
    command.main(["--input", str(films), "--out", str(out), *words, *LENIENT])
    return out


@pytest.fixture(scope="module")
def image_sets(base, tmp_path_factory):
    """Returns shards of images, and the set of latents of these images and of an unreadable one."""
    root = tmp_path_factory.mktemp("stills")
    records = []
    for i in range(9):
        Image.fromarray(videos.pan(300 + i, 1, height=32, width=48)[0]).save(root / "a.png")
        records.append({"image": (root / "a.png").read_bytes(), "caption": WORDS[i % len(WORDS)]})
    shards.write_shards(records, root / "pictures")
    records.insert(4, {"image": b"not an image", "caption": "a blue square"})
    shards.write_shards(records, root / "mixed")
    command.main(["--images", f"array_record:{root / 'mixed'}", "--out", str(root / "out"), "--latents", str(base)])
    listed = [json.loads(line) for line in (root / "out/clips.jsonl").read_text().splitlines()]
    (shard,) = (root / "pictures").glob("*.array_record")
    rows = [{"shard": shard.name, "index": i, "source": row["source"]} for i, row in enumerate(listed)]
    (root / "pictures/clips.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))  # the same split
    return root / "pictures", root / "out"


def records_of(out):
    result = latents.open_set(str(out))
    return [record for size in result.sizes for record in latents.LatentRecords(result, size, split="train",
                                                                               val_fraction=0.0)]  # fmt: skip


def digests_of(out):
    paths = [p for p in out.rglob("*") if p.suffix in (".array_record", ".jsonl", ".json", ".npy")]
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def config_of(base, **data):
    """Returns the tiny config of a stage, with the networks of the weights in `base`."""
    config, result = small_config(data.pop("stage", "base"), base), weights.load_folder(base, params=False)
    config.unet.update({k: v for k, v in result.unet.config.to_dict().items() if k in config.unet})
    with config.unlocked():
        config.data.height, config.data.width, config.data.fps = 16, 24, 16.0
        if "slowest_fps" in config.data:
            config.data.slowest_fps = 0.0
        config.data.update(data)
    config.loss.held_out_timesteps = (500,)
    return config


# ---- contents of a set ----


def test_a_record_is_the_frozen_models_output_for_its_clip(latent_set, clips, base):
    result = weights.load_folder(base)
    vae, text = VAE(result.vae.config), CLIPText(result.text_encoder.config)
    tokenizer = load_tokenizer(result.tokenizer_dir)
    originals = shards.ShardRecords(clips, medium="video", val_fraction=0.0)
    encode = jax.jit(lambda x: vae.apply({"params": result.vae.params}, x, method="encode"))
    encode_text = jax.jit(lambda ids: text.apply({"params": result.text_encoder.params}, ids))
    records = records_of(latent_set)
    assert len(records) == len(originals) == CLIPS
    for i in (0, 3):  # equally long, so that encoding compiles once
        record = records[i]
        frames, _ = video_files.read_clip(_written(originals[i].content, clips.parent))
        small = transforms.resize_crop(frames, height=16, width=24, rng=None)
        mean, logvar = encode(transforms.to_float(small))
        wanted = np.concatenate([mean, np.exp(0.5 * logvar)], axis=-1)
        assert record.latents.dtype == np.float16 and record.caption == originals[i].caption
        np.testing.assert_allclose(record.latents, wanted, rtol=2**-10, atol=2e-5)
        hidden = encode_text(tokens.tokenize(tokenizer, [record.caption]))[0]
        np.testing.assert_allclose(record.text, hidden, rtol=2**-10, atol=2e-5)


def _written(content, folder):
    (folder / "clip.mp4").write_bytes(content)
    return folder / "clip.mp4"


def test_the_manifest_records_the_models_and_the_hashes_of_the_files(latent_set, base):
    manifest = json.loads((latent_set / "manifest.json").read_text())
    assert set(manifest["files"]) == set(digests_of(latent_set)) - {"manifest.json"}
    for name, sha in digests_of(latent_set).items():
        assert name == "manifest.json" or manifest["files"][name]["sha256"] == sha
    entry = manifest["latents"]
    assert (entry["medium"], entry["fps"], entry["null_caption"]) == ("video", 16.0, "")
    assert entry["sizes"] == [[[16, 24], CLIPS]] and entry["made_from"] == str(base)
    assert {len(sha) for sha in entry["weights"].values()} == {64} and len(entry["weights"]) == 3
    rows = [json.loads(line) for line in (latent_set / "clips.jsonl").read_text().splitlines()]
    for row, record in zip(rows, records_of(latent_set), strict=True):
        assert row["sha256"] == hashlib.sha256(record.latents.tobytes()).hexdigest()
        assert row["caption"] == record.caption and row["shard"].startswith("16x24/clips-0000")
    assert (latent_set / "report/samples.png").stat().st_size > 1000


def test_a_long_clip_is_encoded_in_parts_that_fit_together(latent_set, clips, base, monkeypatch, tmp_path):
    monkeypatch.setattr(latent_encoder, "MAX_FRAMES", 1)
    encoder = latent_encoder.LatentEncoder(LatentJob(weights=str(base), fps=10.0))
    content = shards.ShardRecords(clips, medium="video", val_fraction=0.0)[0].content
    path = _written(content, tmp_path)
    parts = list(encoder.parts_of_clip(path, (16, 24)))
    whole = video_files.read_video(path, fps=10.0, frames=sum(map(len, parts)))
    assert len(parts) > 1
    np.testing.assert_array_equal(np.concatenate(parts), transforms.resize_crop(whole, height=16, width=24, rng=None))


def test_each_clip_goes_to_the_size_nearest_its_shape(base, tmp_path):
    (tmp_path / "in").mkdir()
    for i, (height, width) in enumerate(((32, 48), (48, 32), (48, 34), (64, 98))):
        videos.encode(tmp_path / f"in/{i}.mp4", videos.pan(400 + i, 6, height=height, width=width), RATE)
        (tmp_path / f"in/{i}.txt").write_text("a blue circle")
    words = ("--latents", base, "--latent-sizes", "16x24,24x16", "--latent-fps", "4")
    curate("--input", tmp_path / "in", "--out", tmp_path / "out", *words)
    result = latents.open_set(str(tmp_path / "out"))
    assert result.sizes == {(16, 24): 2, (24, 16): 2} and result.fps == 4
    shapes = [record.latents.shape for record in records_of(tmp_path / "out")]
    assert shapes == [(2, 4, 6, 8), (2, 4, 6, 8), (2, 6, 4, 8), (2, 6, 4, 8)]


def test_images_are_clips_of_one_frame_and_unreadable_ones_are_listed(image_sets):
    result = latents.open_set(str(image_sets[1]))
    assert result.medium == "image" and result.sizes == {(16, 24): 9}
    assert {record.latents.shape for record in records_of(image_sets[1])} == {(1, 4, 6, 8)}
    (lost,) = [json.loads(line) for line in (image_sets[1] / "dropped.jsonl").read_text().splitlines()]
    assert lost["reason"] == "unreadable" and "[4]" in lost["detail"]


# ---- interrupted and resumed ----


def test_a_stopped_run_keeps_complete_shards_and_resumes_exactly(films, latent_set, base, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ("--input", films, "--out", out, "--latents", base, "--latent-fps", "16", "--shard-clips", "3")
    seen, real = set(), latent_encoder.LatentEncoder.latents

    def stopping(self, frames, name):
        seen.add(name)
        if len(seen) == 5:  # in the second shard
            raise KeyboardInterrupt
        return real(self, frames, name)

    with monkeypatch.context() as patch:
        patch.setattr(latent_encoder.LatentEncoder, "latents", stopping)
        with pytest.raises(KeyboardInterrupt):
            curate(*words)
    assert [p.name for p in out.glob("16x24/*")] == ["clips-00000.array_record"]
    assert not (out / "manifest.json").exists()
    (out / "16x24/.123-clips-00001.array_record").write_bytes(b"half")  # as left by a kill within a shard
    (out / "16x24/clips-00007.array_record").write_bytes(b"of more videos")
    encoded = set()
    monkeypatch.setattr(
        latent_encoder.LatentEncoder,
        "latents",
        lambda self, frames, name: encoded.add(name) or real(self, frames, name),
    )
    curate(*words)
    assert len(encoded) == CLIPS - 3 and digests_of(out) == digests_of(latent_set)
    assert sorted(p.name for p in (out / "16x24").iterdir()) == [f"clips-0000{i}.array_record" for i in range(3)]


# ---- training ----

STEPS = 2


def trained(config, path, learn):
    """Returns the losses of a few steps, the change of the parameters, and the shapes of the held-out losses."""
    task, tokenizer = build.make_task(config, jnp.float32, path)
    tx = optax.sgd(0.1)  # Adam would amplify small differences
    state = make_state(jax.tree.map(jnp.asarray, task.start), task, tx)

    def look(state, frozen, batch, rng):
        loss, parts = task.loss(state["params"], frozen, batch, rng)
        return state, {"loss": loss, **parts}

    update = jax.jit(make_update(task, tx, ema_decay=0.9) if learn else look)
    data, ids, losses = build.data_config(config), load_tokenizer(tokenizer), []
    frozen = {} if data.source == "latents" else task.frozen  # training on latents needs no frozen models
    with contextlib.closing(pipeline.batches(pipeline.open_examples(data, batch_size=4), ids)) as rows:
        for _, batch in zip(range(STEPS), rows):
            state, result = update(state, frozen, batch, jax.random.key(0))
            losses.append(result)
    with contextlib.closing(
        pipeline.batches(pipeline.open_examples(build.held_out_data(data), batch_size=4), ids)
    ) as rows:
        held_out = jax.eval_shape(task.held_out, state["ema"], frozen, next(rows), jax.random.key(0))
    moved = jax.tree.map(lambda new, old: np.asarray(new) - old, state["params"], task.start)
    return jax.device_get(losses), np.concatenate([x.ravel() for x in jax.tree.leaves(moved)]), held_out


@pytest.mark.heavy
@pytest.mark.parametrize("stage, learn", [("base", False), ("base", True), ("interpolation", True)])
def test_training_on_latents_equals_training_on_the_pixels_of_the_same_clips(
    stage, learn, films, clips, latent_set, image_sets, base, tmp_path
):
    """With the same windows, images and dropped captions, losses and updates are the same.

    The base has images beside its clips, interpolation frames of the clips.
    """
    if stage == "interpolation":
        base, latent_set = make_stage(tmp_path / "weights", "interpolation"), tmp_path / "out"
        words = ("--latents", base, "--latent-fps", "16", "--shard-clips", "3")
        curate("--input", films, "--out", latent_set, *words)
    common = {"stage": stage, "frames": {"base": 3, "interpolation": 5}[stage], "images": 2, "caption_drop": 0.4}
    pixels, encoded = (
        config_of(base, source=kind, path=str(path), image_path=str(pictures) if stage == "base" else None, **common)
        for kind, path, pictures in (("array_record", clips, image_sets[0]), ("latents", latent_set, image_sets[1]))
    )
    for config in (pixels, encoded):
        config.inflate = False  # the weights are the stage's own
    wanted, moved, shapes = trained(pixels, tmp_path, learn)
    result, moved_by_latents, latent_shapes = trained(encoded, tmp_path, learn)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), result, wanted)
    assert np.linalg.norm(moved_by_latents - moved) <= 5e-3 * np.linalg.norm(moved) and moved.any() == learn
    same = jax.tree.map(lambda a, b: np.isclose(a, b, rtol=2e-4), wanted[0], wanted[1])
    assert not all(jax.tree.leaves(same))  # the measure distinguishes batches
    assert latent_shapes == shapes


def stream(path, **change):
    common = {"source": "latents", "path": path and str(path), "frames": 4, "fps": 16.0, "height": 16, "width": 24}
    return DataConfig(**{**common, **change})


def test_nothing_is_held_out_on_request(latent_set):
    """As of clips."""
    held_out, trained = (stream(latent_set, hold_out=False, split=split) for split in ("val", "train"))
    assert len(make_source(held_out)) == len(make_source(trained)) > len(make_source(stream(latent_set)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # grain's own
def test_latents_do_not_depend_on_workers_processes_or_the_first_step(latent_set):
    config = stream(latent_set, images=1)
    whole = take(4, config)
    shapes = {key: (value.shape, value.dtype.name) for key, value in whole[0].items()}
    assert shapes == {
        "video_latents": ((4, 4, 4, 6, 8), "float32"),
        "text": ((4, 8, 16), "float32"),
        "image_latents": ((4, 1, 4, 6, 8), "float32"),
        "image_text": ((4, 1, 8, 16), "float32"),
    }
    jax.tree.map(np.testing.assert_array_equal, take(2, config, start_step=2), whole[2:])
    jax.tree.map(np.testing.assert_array_equal, take(2, config, start_step=2, workers=1), whole[2:])
    for batch, share in zip(whole, take(4, config, rows=[1, 2])):
        jax.tree.map(lambda mine, rows: np.testing.assert_array_equal(mine, rows[1:3]), share, batch)


def test_a_dropped_caption_becomes_the_encoded_null_caption(latent_set):
    null = latents.open_set(str(latent_set)).null_text.astype(np.float32)
    (batch,) = take(1, stream(latent_set, caption_drop=1.0))
    np.testing.assert_array_equal(batch["text"], np.broadcast_to(null, batch["text"].shape))
    (batch,) = take(1, stream(latent_set, caption_drop=0.0))
    assert not (batch["text"] == null).all((1, 2)).any()


# ---- refusals ----


def test_weights_other_than_the_ones_that_encoded_a_set_are_refused(latent_set, base, tmp_path):
    """The check compares parameters, not paths."""
    shared = tmp_path / "elsewhere"
    result = weights.load_folder(base)
    given = {
        "stage": "base",
        "sampling": result.sampling,
        "tokenizer": result.tokenizer_dir,
        "schedule": result.schedule,
    }
    parts = {name: (getattr(result, name).config, getattr(result, name).params)
             for name in ("unet", "vae", "text_encoder")}  # fmt: skip
    weights.save_folder(shared, **parts, **given)
    config = config_of(base, source="latents", path=str(latent_set), image_path=None)
    config.init_from = str(shared)
    build.make_task(config, jnp.float32, tmp_path)
    for part in ("vae", "text_encoder"):
        moved = jax.tree.map(np.array, getattr(result, part).params)
        jax.tree.leaves(moved)[0].flat[0] += 1e-6
        folder = tmp_path / part
        weights.save_folder(folder, **{**parts, part: (getattr(result, part).config, moved)}, **given)
        config.init_from = str(folder)
        with pytest.raises(UserError, match=f"made by another {part.replace('_', ' ')} than this run's.*Train with"):
            build.make_task(config, jnp.float32, tmp_path)


def test_train_refuses_latents_of_another_vae_in_one_line_with_exit_code_2(latent_set, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command_line = [
        sys.executable, "train.py", "--config", "configs/moving_shapes/base.py:tiny", "--workdir", str(tmp_path / "w"),
        "--config.init_from=lavie_jax/assets/base", "--config.vae_from=", "--config.train_text_encoder=False",
        "--config.data.source=latents", f"--config.data.path={latent_set}", "--config.data.height=16",
        "--config.data.width=24", "--config.data.fps=16",
    ]  # fmt: skip
    own = options.load("configs/moving_shapes/base.py:cpu")  # the networks of the shipped model
    for group in ("unet", "text_encoder", "vae"):
        command_line += [f"--config.{group}.{name}={value}" for name, value in own[group].items()]
    done = subprocess.run(command_line, cwd=ROOT, text=True, capture_output=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "made by another vae than this run's" in lines[0], done.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"path": None}, "needs a path"),
        ({"path": "nowhere"}, "no finished set of latents in 'nowhere'"),
        ({"path": "CLIPS"}, "contains encoded clips, not latents: use data.source=array_record"),
        ({"path": "IMAGES"}, "contains latents of images: pass it as data.image_path"),
        ({"image_source": "array_record", "image_path": "CLIPS", "images": 1}, "must all be latents, or none"),
        ({"handheld": 0.5}, "handheld needs pixels"),
        ({"full_height": 32, "full_width": 48}, "full_height needs pixels"),
        ({"image_path": "IMAGES", "images": 1, "image_captions": ("a",)}, "image_captions is for folders of images"),
        ({"height": 32}, "has latents of 16x24; the config sets 32x24"),
        ({"fps": 24.0}, "data.fps = 24: .* has latents at 16 fps"),
        ({"null_caption": "None"}, "null caption is '', not 'None'"),
        ({"frames": 60}, "records in a row cannot be read"),
    ],
)
def test_settings_that_need_pixels_are_refused(change, message, latent_set, clips, image_sets):
    names = {"CLIPS": clips, "IMAGES": image_sets[1]}
    change = {key: str(names[value]) if value in names else value for key, value in change.items()}
    with pytest.raises(UserError, match=message):
        take(1, stream(latent_set, **change) if "path" not in change else stream(change.pop("path"), **change))


@pytest.mark.parametrize(
    "stage, message",
    [
        ("base", "were encoded by a frozen text encoder"),
        ("vsr", "stage 'vsr' is trained on pixels"),
        ("vae", "a VAE is trained on pixels"),
    ],
)
def test_runs_that_need_pixels_or_tokens_are_refused(stage, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = options.load(f"configs/moving_shapes/{stage}.py:tiny")
    config.data.source, config.data.path = "latents", str(tmp_path)
    with pytest.raises(UserError, match=message):
        build.make_task(config, jnp.float32, tmp_path)


def test_an_incomplete_set_is_refused(latent_set, tmp_path):
    for name, message in (("16x24/clips-00001.array_record", "truncated or changed"), ("null_text.npy", "is missing")):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(latent_set, copy)
        if "truncated" in message:
            (copy / name).write_bytes((copy / name).read_bytes()[:-10])
        else:
            (copy / name).unlink()
        with pytest.raises(UserError, match=message):
            latents.open_set(str(copy))


@pytest.mark.parametrize(
    "words, message",
    [
        (("--latents", "nowhere"), "weights folder nowhere does not exist"),
        (("--latents", "VSR"), "stage 'vsr' is trained on pixels"),
        (("--latents", "BASE", "--latent-sizes", "16x25"), "multiples of the VAE's factor 4"),
        (("--latents", "BASE", "--latent-sizes", "16"), "sizes are HEIGHTxWIDTH, such as"),
        (("--latents", "BASE", "--latent-fps", "0"), "--latent-fps must be above 0"),
        (("--latent-sizes", "16x24"), "need --latents"),
        (("--images", "array_record:x"), "give either --input, a folder of videos, or --images"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(words, message, films, base, tmp_path, capsys):
    vsr = tmp_path / "vsr"
    if "VSR" in words:
        make_stage(vsr, "vsr")
    words = [{"BASE": str(base), "VSR": str(vsr)}.get(word, word) for word in words]
    with pytest.raises(SystemExit) as stopped:
        command.main(["--input", str(films), "--out", str(tmp_path / "out"), *LENIENT, *words])
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("error: ") and message in line and not out
    assert not (tmp_path / "out").exists()

"""The stage cache on disk: frames are exact, complete or absent, and of one request."""

import gc
import weakref

import numpy as np
import pytest

from lavie_jax.errors import UserError
from lavie_jax.samples.stage_cache import StageCache

FRAMES = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), np.uint8)


def cache(tmp_path, keep=True, **record) -> StageCache:
    records = {"base": {"seed": 0}, "vsr": {"seed": 0, **record}}
    return StageCache(tmp_path / "stages" / "0000-a-0", records, keep=keep)


def test_frames_are_exact_and_memory_holds_one_piece(tmp_path):
    held = []

    def pieces():
        for i in range(0, 7, 2):
            piece = FRAMES[i : i + 2].copy()
            held.append(weakref.ref(piece))
            yield piece
            del piece
            gc.collect()
            assert sum(ref() is not None for ref in held) <= 1

    this = cache(tmp_path)
    assert this.get("vsr") is None
    stored = this.put("vsr", FRAMES.shape, pieces())
    assert isinstance(stored, np.memmap)
    np.testing.assert_array_equal(stored, FRAMES)
    np.testing.assert_array_equal(np.load(tmp_path / "stages" / "0000-a-0" / "vsr.npy"), FRAMES)


def test_a_cache_older_than_a_setting_has_its_default(tmp_path):
    def cache(**settings):
        record = {"stages": ["base", "vsr"], "seed": 0, "vsr": {"steps": 3, **settings}}
        return StageCache(tmp_path / "stages" / "0000-a-0", {"vsr": record}, keep=True)

    cache().put("vsr", FRAMES.shape, [FRAMES])
    common = {"spacing": None, "prompt_suffix": "", "negative_prompt": "",
              "guidance_low": 0, "guidance_high": None, "guidance_every": 1,
              "cache_every": 1, "cache_depth": 1}  # fmt: skip
    everything = {
        **common,
        "noise_level": 50,
        "windows": "blended",
        "window_frames": 8,
        "overlap_frames": 2,
        "tile": None,
    }
    base = {**common, "guidance_rescale": 0.0, "free_init": 0}
    now = cache(**everything, guidance_rescale=0.0)
    now.records["vsr"] |= base
    now.check()
    now.records["vsr"]["vsr"]["guidance_rescale"] = 0.5
    with pytest.raises(UserError, match="was made with vsr"):
        now.check()


def test_half_written_frames_leave_no_file(tmp_path):
    def pieces():
        yield FRAMES[:2]
        raise KeyboardInterrupt

    this = cache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        this.put("vsr", FRAMES.shape, pieces())
    assert [path.name for path in this.folder.iterdir()] == ["vsr.json"]


def test_a_state_can_be_loaded_until_its_stage_is_finished(tmp_path):
    this, state = cache(tmp_path), {"x": np.arange(6, dtype=np.float32), "x0": np.ones(3, np.float32)}
    assert this.load_state("vsr") is None
    this.save_state("vsr", 5, state)
    step, result = cache(tmp_path).load_state("vsr")
    assert step == 5 and set(result) == {"x", "x0"}
    np.testing.assert_array_equal(result["x"], state["x"])
    path = this.folder / "vsr.state.npz"
    for length in (50, 0):
        path.write_bytes(path.read_bytes()[:length])
        assert this.load_state("vsr") is None, "a damaged state counts as absent"
    this.put("vsr", FRAMES.shape, [FRAMES])
    assert not path.exists()


def test_a_cache_of_another_request_is_refused_by_field(tmp_path):
    cache(tmp_path).save_state("vsr", 1, {"x": np.ones(1)})
    cache(tmp_path).check()
    with pytest.raises(UserError, match="vsr.json was made with steps = null, not 3 as requested now"):
        cache(tmp_path, steps=3).check()
    (cache(tmp_path).folder / "vsr.json").write_text("[]")
    with pytest.raises(UserError, match="does not record how"):
        cache(tmp_path).check()


def test_overwriting_discards_all_but_unfinished_work_of_the_same_request(tmp_path):
    this = cache(tmp_path)
    this.put("base", FRAMES.shape, [FRAMES])
    this.prepare_overwrite()
    assert this.get("base") is not None
    cache(tmp_path, steps=3).save_state("vsr", 1, {"x": np.ones(1)})
    this.prepare_overwrite()
    assert not this.folder.exists()
    this.put("vsr", FRAMES.shape, [FRAMES])
    this.prepare_overwrite()
    assert not this.folder.parent.exists()


def test_a_cache_that_is_not_kept_is_removed_when_the_sample_is_finished(tmp_path):
    for keep in (True, False):
        this = cache(tmp_path, keep=keep)
        this.put("base", FRAMES.shape, [FRAMES])
        this.clear()
        assert this.folder.parent.exists() == keep

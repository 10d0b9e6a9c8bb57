"""Arrays with a frame rate: what keeps it, how they are saved."""

import pickle

import numpy as np
import pytest

from lavie_jax.data.video_files import read_clip
from lavie_jax.errors import UserError
from lavie_jax.samples.videos import Videos


@pytest.fixture
def videos():
    return Videos.of(np.random.default_rng(0).integers(0, 256, (2, 3, 8, 6, 3), np.uint8), 12.0)


def test_one_of_them_keeps_the_frame_rate_and_computations_are_plain_arrays(videos):
    assert videos.fps == videos[1].fps == videos[:1].fps == pickle.loads(pickle.dumps(videos)).fps == 12
    assert type(videos / 2) is np.ndarray and type(videos.max()) is np.uint8
    assert np.array_equal(pickle.loads(pickle.dumps(videos)), videos)


@pytest.mark.parametrize("index", [1, slice(1, 2)], ids=["frames", "batch of one"])
def test_one_video_is_saved_with_its_frame_rate(index, videos, tmp_path):
    path = videos[index].save(tmp_path / "clip.npz")
    frames, fps = read_clip(path, max_bytes=1e9, warn=print)
    assert fps == 12 and np.array_equal(frames, videos[1])
    assert read_clip(videos[1].save(tmp_path / "b.npz", fps=5), max_bytes=1e9, warn=print)[1] == 5


def test_what_cannot_be_saved_is_refused(videos, tmp_path):
    with pytest.raises(UserError, match="one video, not an array of shape .2, 3, 8, 6, 3.: videos.0."):
        videos.save(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="frame rate is unknown"):
        Videos.of(videos[0], None).save(tmp_path / "a.mp4")
    for format in ("mp4", "gif", "npz"):
        with pytest.raises(UserError, match="fps must be above 0; given 0"):
            videos[0].save(tmp_path / f"a.{format}", fps=0)
    assert not list(tmp_path.iterdir())

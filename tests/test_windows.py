"""Windows cover a clip, overlap as much as they should, and their weights sum to one."""

import numpy as np
import pytest

from lavie_jax.stages import STAGES
from lavie_jax.stages.settings import InterpolationSettings, VSRSettings
from lavie_jax.stages.windows import cut, grid, overlapping, whole

INTERPOLATION, VSR = STAGES["interpolation"], STAGES["vsr"]
SETTINGS = dict(height=16, width=16, frames=1, fps=8, sampler="ddim", steps=3, guidance=1.0)


@pytest.mark.parametrize(
    ("length", "size", "overlap"), [(61, 8, 2), (9, 8, 2), (8, 8, 2), (3, 8, 2), (61, 8, 7), (500, 384, 96), (20, 8, 0)]
)
def test_weights_sum_to_one_and_neighbours_overlap_enough(length, size, overlap):
    spans = overlapping(length, size, overlap)
    total = np.zeros(length)
    for span in spans:
        assert span.stop - span.start == min(size, length) and (span.weight > 0).all()
        total[span.start : span.stop] += span.weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert spans[0].start == 0 and spans[-1].stop == length
    for left, right in zip(spans, spans[1:]):
        assert left.stop - right.start >= overlap
    assert len(spans) == max(1, 1 + -(-(length - size) // (size - overlap)))  # no more than needed


def test_a_windows_weight_falls_towards_the_next_one():
    left, right = overlapping(13, 8, 3)
    assert (left.weight[:5] == 1).all() and (np.diff(left.weight[4:]) < 0).all()
    np.testing.assert_allclose(left.weight[5:], right.weight[:3][::-1])


def test_a_grid_of_boxes_covers_a_clip_once():
    windows = grid(overlapping(11, 4, 1), overlapping(7, 4, 2), whole(5))
    total = np.zeros((11, 7, 5, 1))
    for window in windows:
        assert window.weight.shape == (*window.shape, 1) == (4, 4, 5, 1)
        total[window.box] += window.weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_official_windows_are_chunks_of_8_and_the_rest():
    settings = VSRSettings(**SETTINGS, windows="official", tile=0)
    bounds = [(w.spans[0].start, w.spans[0].stop) for w in VSR.windows((61, 4, 4, 4), settings)]
    assert bounds == [*((8 * i, 8 * i + 8) for i in range(7)), (56, 61)]
    assert all((span.weight == 1).all() for span in cut(61, 8))


def test_frames_are_tiled_on_request():
    whole_frames = VSR.windows((8, 320, 512, 4), VSRSettings(**SETTINGS, tile=0))
    assert [w.shape for w in whole_frames] == [(8, 320, 512)]
    tiles = VSR.windows((8, 320, 512, 4), VSRSettings(**SETTINGS, tile=256))
    assert {w.shape for w in tiles} == {(8, 256, 256)} and len(tiles) == 2 * 3


@pytest.mark.parametrize("keys", [2, 16, 17, 24, 40, 100])
def test_interpolation_windows_hold_16_key_frames_and_share_4(keys):
    frames = 4 * (keys - 1) + 1
    windows = INTERPOLATION.windows((frames, 4, 4, 4), InterpolationSettings(**SETTINGS))
    spans = [w.spans[0] for w in windows]
    assert {s.stop - s.start for s in spans} == {min(frames, 61)} and {s.start % 4 for s in spans} == {0}
    assert len(spans) == 1 or min(a.stop - b.start for a, b in zip(spans, spans[1:])) >= 13  # 4 key frames
    assert spans[0].start == 0 and spans[-1].stop == frames

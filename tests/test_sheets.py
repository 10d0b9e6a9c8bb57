"""Contact sheets: the moments that they show, and rows of a cascade that can be compared."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from lavie_jax.samples import sheets
from lavie_jax.samples.sheets import ContactSheets, compared, moments


def noise(frames, height, width):
    return np.random.default_rng(frames).integers(0, 200, (frames, height, width, 3), np.uint8)


def enlarged(video, zoom):
    return video.repeat(zoom, 1).repeat(zoom, 2)


@pytest.mark.parametrize("keys", [2, 3, 4, 16, 17, 30])
def test_moments_are_key_frames_and_frames_between_them(keys):
    times = moments([keys, 4 * (keys - 1) + 1, 4 * (keys - 1) + 1])
    assert times[0] == 0 and times[-1] == 1 and times == sorted(set(times)) and 3 <= len(times) <= 7
    on_keys = [(time * (keys - 1)).denominator == 1 for time in times]
    assert on_keys == [True, False] * (len(times) // 2) + [True]
    assert all((time * 4 * (keys - 1)).denominator == 1 for time in times), "the interpolated clip has them all"


def test_clips_of_one_length_are_shown_from_the_first_frame_to_the_last():
    assert moments([16, 16]) == [Fraction(i, 15) for i in (0, 2, 5, 8, 10, 12, 15)]
    assert moments([3, 3]) == [0, Fraction(1, 2), 1]
    assert moments([1, 1]) == [0]


def test_rows_show_the_same_moments_at_the_same_size():
    base, smooth, large = noise(4, 16, 24), noise(13, 16, 24), noise(13, 64, 96)
    (first, caption), (second, _), (third, last) = compared({"base": base, "interpolation": smooth, "vsr": large})
    np.testing.assert_array_equal(first[::2], enlarged(base, 4))
    assert (first[1::2] == sheets.EMPTY).all()
    np.testing.assert_array_equal(second, enlarged(smooth[::2], 4))
    np.testing.assert_array_equal(third, large[::2])
    assert caption == "base: 4 frames of 16x24, shown 4 times as large; empty where it has no frame"
    assert last == "vsr: 13 frames of 64x96"


@pytest.mark.parametrize("height, width", [(320, 512), (165, 201), (16, 300)])
def test_of_large_upscaled_frames_every_row_shows_the_same_middle(height, width):
    base = noise(2, height, width)
    (small, caption), (large, _) = compared({"base": base, "vsr": enlarged(base, 4)})
    np.testing.assert_array_equal(small, large)
    assert large.shape == (2, min(512, 4 * height), min(512, 4 * width), 3)
    assert f"the middle {min(128, height)}x{min(128, width)}, shown 4 times" in caption


def test_large_frames_that_were_not_upscaled_are_shown_smaller():
    rows = compared({"base": noise(2, 320, 512), "interpolation": noise(5, 320, 512)})
    assert [frames.shape for frames, _ in rows] == [(3, 160, 256, 3)] * 2


def test_a_sheet_is_written_when_it_is_full_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ContactSheets, "ROWS", 3)
    pages = ContactSheets(tmp_path)
    for clips in ({"base": noise(4, 16, 24), "vsr": noise(4, 64, 96)},) * 2 + ({"base": noise(20, 16, 24)},):
        pages.add(clips, "a red circle")
    pages.flush()
    pages.flush()
    assert {path.name for path in tmp_path.iterdir()} == {"contact-sheet.png", "contact-sheet-2.png"}
    with Image.open(tmp_path / "contact-sheet.png") as full, Image.open(tmp_path / "contact-sheet-2.png") as one:
        # four rows with a line each, and the prompt's line above the first row of both samples
        assert full.height == 4 * (128 + 8 + 20) + 2 * 20 + 4
        assert one.height == 96 + 8 + 20 + 4, "one clip is shown under its prompt alone"

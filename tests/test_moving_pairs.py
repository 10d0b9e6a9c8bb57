"""Moving Shapes with two objects: captions, pixels, and detectors that find swapped attributes."""

import dataclasses
import json

import numpy as np
import pytest

from lavie_jax.data import moving_pairs
from lavie_jax.data.build import make_source
from lavie_jax.data.config import DataConfig
from lavie_jax.errors import UserError
from lavie_jax.evaluation import pairs
from lavie_jax.evaluation.pair_detectors import detect_pair, outcome


def swapped(objects, *names):
    """Returns the objects with these attributes exchanged."""
    first, second = objects
    return (
        dataclasses.replace(first, **{name: getattr(second, name) for name in names}),
        dataclasses.replace(second, **{name: getattr(first, name) for name in names}),
    )


def rendered(objects, index):
    return moving_pairs.render(objects, ("video", "val", index), frames=16, fps=8.0, height=64, width=64)


def test_captions_name_both_objects_with_their_motions():
    sample = moving_pairs.clip("val", 3)
    a, b = sample.objects
    assert a.shape != b.shape and len({a.colour, b.colour, a.background}) == 3 and a.background == b.background
    words = sample.caption.split(" over ")[0].split(" and ")
    assert [a.shape in words[0], b.shape in words[1], a.colour in words[0], b.colour in words[1]] == [True] * 4
    image = moving_pairs.image("train", 0)
    assert image.pixels.shape == (64, 64, 3) and "moving" not in image.caption and " and " in image.caption
    captions = [moving_pairs.clip("train", i, frames=1, height=8, width=8, drop=0.3).caption for i in range(40)]
    assert {word for text in captions for word in text.split()} <= set(moving_pairs.vocabulary())
    assert 0 < sum(" over " not in text for text in captions) < 40
    assert max(len(text.split()) for text in captions) + 2 <= moving_pairs.CAPTION_LENGTH
    with pytest.raises(UserError, match="no split 'held_out' of two objects.*train, val"):
        moving_pairs.clip("held_out", 0)


def test_clips_depend_on_their_index_alone():
    one = moving_pairs.clip("train", 5)
    np.testing.assert_array_equal(one.pixels, moving_pairs.clip("train", 5).pixels)
    assert one.caption != moving_pairs.clip("train", 6).caption != moving_pairs.clip("val", 6).caption
    wide = moving_pairs.clip("train", 5, height=32, width=48)
    assert wide.pixels.shape == (16, 32, 48, 3) and wide.caption == one.caption


def test_the_source_shows_two_objects_as_an_option():
    source = make_source(DataConfig(objects=2, images=1, frames=4, images_from_clips=0.5))
    rng = np.random.default_rng(0)
    assert " and " in source.video(0, rng).caption
    assert all(" and " in source.image(i, rng).caption for i in range(4))
    assert " and " not in make_source(DataConfig(frames=4)).video(0, rng).caption
    with pytest.raises(UserError, match="data.objects.*from 1 to 2"):
        make_source(DataConfig(objects=3))
    with pytest.raises(UserError, match="objects is for Moving Shapes, not for video_folder"):
        make_source(DataConfig(objects=2, source="video_folder", path="clips"))


def test_detectors_find_the_attributes_of_true_clips_and_swaps():
    samples = [moving_pairs.clip("val", i) for i in range(16)]
    true = [outcome(detect_pair(one.pixels), one.objects) for one in samples]
    table = pairs.score(true)
    assert table["all"]["accuracy"] >= 0.93 and table["swapped"]["accuracy"] == 0
    images = [moving_pairs.image("val", i) for i in range(16)]
    table = pairs.score([outcome(detect_pair(one.pixels[None]), one.objects) for one in images])
    assert table["all"]["accuracy"] >= 0.93 and "motions" not in table
    for names, rows in (
        (("colour",), {"colours": True, "shapes": True, "bound": False, "swapped": True, "motions": True}),
        (("shape", "motion"), {"colours": True, "shapes": True, "bound": False, "swapped": True, "motions": True}),
        (("motion",), {"bound": True, "swapped": False, "motions": False}),
    ):
        found = {name: [] for name in rows}
        for i, one in enumerate(samples[:8]):
            if one.objects[0].motion == one.objects[1].motion:
                continue
            result = outcome(detect_pair(rendered(swapped(one.objects, *names), i)), one.objects)
            for name in rows:
                found[name].append(result is not None and result[name])
        assert all(np.mean(values) == (1 if rows[name] else 0) for name, values in found.items()), (names, found)


def test_positions_are_measured_and_one_object_is_not_two():
    sample = moving_pairs.clip("val", 1)
    left, right = detect_pair(sample.pixels)
    assert left.first[0] <= right.first[0] and 0 < left.first[1] < 1
    alone = sample.pixels.copy()
    alone[:] = alone[:, :1, :1]
    assert detect_pair(alone) == () and outcome((), sample.objects) is None
    table = pairs.score([None, None])
    assert table["two objects"]["accuracy"] == 0 and "swapped of right" not in table


def test_the_command_measures_true_clips(tmp_path, capsys):
    pairs.main(["--truth", "--images", "--samples", "8", "--json", str(tmp_path / "truth.json")])
    assert "| swapped | 8 | 0.0" in capsys.readouterr().out
    assert json.loads((tmp_path / "truth.json").read_text())["table"]["bound"]["accuracy"] > 0.8
    with pytest.raises(SystemExit) as exit:
        pairs.main(["--samples", "8"])
    assert exit.value.code == 2
    assert "give --weights" in capsys.readouterr().err

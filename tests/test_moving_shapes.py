"""Moving Shapes: the content of an index, its caption, and the combinations that the splits keep separate."""

import collections
import itertools

import numpy as np
import pytest

from lavie_jax.data import moving_shapes as world
from lavie_jax.errors import UserError


def attributes(shape="circle", colour="red", size="small", background="blue", motion="right"):
    return world.Attributes(shape, colour, size, background, motion)


def area(pixels, background):
    """Returns the number of covered pixels of a frame; antialiased pixels count as fractions."""
    distance = np.linalg.norm(pixels.astype(float) - world.RGB[background], axis=-1)
    return (distance / distance.max()).sum()


def test_a_clip_is_a_pure_function_of_its_arguments():
    again = [world.clip("train", 7, height=48, width=64) for _ in range(2)]
    assert again[0].caption == again[1].caption
    np.testing.assert_array_equal(again[0].pixels, again[1].pixels)
    assert again[0].pixels.shape == (16, 48, 64, 3) and again[0].pixels.dtype == np.uint8
    others = {world.clip("train", i).pixels.tobytes() for i in range(50)}
    assert len(others) == 50
    assert world.clip("val", 7).pixels.tobytes() not in others


def test_the_same_index_shows_the_same_motion_at_another_frame_rate():
    slow = world.clip("train", 3, frames=16, fps=8).pixels
    fast = world.clip("train", 3, frames=61, fps=32).pixels
    np.testing.assert_array_equal(slow, fast[::4])


def test_the_same_index_shows_the_same_image_at_another_resolution():
    large = world.clip("train", 5, height=128, width=192).pixels.astype(float)
    small = world.clip("train", 5, height=64, width=96).pixels.astype(float)
    shrunk = large.reshape(16, 64, 2, 96, 2, 3).mean((2, 4))
    assert np.abs(shrunk - small).max() < 64  # of 255, at antialiased edges
    assert np.abs(shrunk - small).mean() < 0.5


@pytest.mark.parametrize("size", world.SIZES)
def test_all_shapes_of_a_size_have_the_same_area(size):
    wanted = np.pi * (world.SIZES[size] * 128) ** 2
    for shape in (*world.VIDEO_SHAPES, *world.IMAGE_SHAPES):
        frame = world.render(
            attributes(shape, size=size, motion="still"), 0.5, 0.5, frames=1, fps=8, height=128, width=128
        )
        assert area(frame[0], "blue") == pytest.approx(wanted, rel=0.01), shape


@pytest.mark.parametrize("height, width", [(128, 128), (100, 180), (160, 100)])
def test_the_whole_shape_stays_inside_and_moves_as_the_caption_says(height, width):
    for shape, size, motion in itertools.product(world.VIDEO_SHAPES, world.SIZES, world.MOTIONS):
        a = attributes(shape, size=size, motion=motion)
        for u, v in [(0, 0), (1, 1)]:
            clip = world.render(a, u, v, frames=4 if motion == "still" else 16, fps=8, height=height, width=width)
            edge = [clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]]
            assert all((part == world.RGB["blue"]).all() for part in edge), (a, u, v)
        moved = centre(clip[-1]) - centre(clip[0])
        direction = np.array(world.MOTIONS[motion]) * min(height, width)
        if motion == "still":
            np.testing.assert_array_equal(clip, np.repeat(clip[:1], 4, axis=0))
        else:
            along = moved @ direction / (direction @ direction)
            assert 0.34 < along < 0.43, a
            assert np.linalg.norm(moved - along * direction) < 0.5, a


def centre(frame):
    weight = np.linalg.norm(frame.astype(float) - world.RGB["blue"], axis=-1)
    rows, columns = np.indices(weight.shape)
    return np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()


def test_the_speed_is_constant():
    clip = world.render(attributes(motion="right"), 0, 0.5, frames=16, fps=8, height=64, width=64)
    steps = np.diff([centre(frame)[0] for frame in clip])
    np.testing.assert_allclose(steps, steps.mean(), atol=0.15)


def test_a_clip_too_long_for_the_frame_slows_down_to_stay_inside():
    clip = world.render(attributes(motion="left"), 0.5, 0.5, frames=100, fps=8, height=128, width=128)
    assert (clip[:, :, 0] == world.RGB["blue"]).all()
    assert centre(clip[0])[0] - centre(clip[-1])[0] > 0.6 * 128


def test_edges_are_antialiased_and_colours_exact():
    clip = world.render(attributes("triangle"), 0.5, 0.5, frames=1, fps=8, height=64, width=64)
    colours = {tuple(colour) for colour in clip.reshape(-1, 3).tolist()}
    assert {world.RGB["red"], world.RGB["blue"]} <= colours
    assert len(colours) > 10


def test_positions_are_uniform_where_the_shape_stays_inside():
    starts = []
    for i in range(2000):
        sample = world.image("train", i, height=32, width=32)
        a = sample.attributes
        if (a.shape, a.size) == ("circle", "small"):
            weight = np.linalg.norm(sample.pixels.astype(float) - world.RGB[a.background], axis=-1)
            rows, columns = np.indices(weight.shape) + 0.5
            starts.append([(weight * columns).sum() / weight.sum(), (weight * rows).sum() / weight.sum()])
    starts = np.array(starts) / 32
    low = world.SIZES["small"] + world.MARGIN
    quantiles = np.quantile(starts, [0.02, 0.25, 0.5, 0.75, 0.98], axis=0)
    expected = low + (1 - 2 * low) * np.array([0.02, 0.25, 0.5, 0.75, 0.98])
    np.testing.assert_allclose(quantiles, expected[:, None] * np.ones(2), atol=0.12)


def test_one_in_eight_combinations_is_held_out_and_every_pair_is_seen_in_training():
    seen, held_out = set(world.combinations("train")), set(world.combinations("held_out"))
    assert len(seen) + len(held_out) == 6 * 8 * 9 and not seen & held_out
    assert len(held_out) * 8 == 6 * 8 * 9
    assert world.combinations("val") == world.combinations("train")
    for i, j in itertools.combinations(range(3), 2):
        assert {(t[i], t[j]) for t in held_out} <= {(t[i], t[j]) for t in seen}


def test_clips_come_from_their_split_and_are_spread_over_it():
    for split in world.SPLITS:
        drawn = collections.Counter()
        for i in range(1000):
            a = world.clip(split, i, height=8, width=8, frames=1).attributes
            drawn[(a.shape, a.colour, a.motion)] += 1
            assert a.colour != a.background
        assert set(drawn) <= set(world.combinations(split))
        assert len(drawn) > 0.6 * min(len(set(world.combinations(split))), 1000)


def test_image_only_concepts_appear_only_in_images_and_in_their_own_split():
    concepts = {*world.IMAGE_SHAPES, *world.IMAGE_COLOURS}
    for split in ("train", "val", "held_out"):
        assert not any(concepts & set(triple) for triple in world.combinations(split))
    assert all(concepts & set(triple) for triple in world.combinations("image_only"))
    images = [world.image("train", i, height=8, width=8).attributes for i in range(300)]
    assert {a.shape for a in images} == {*world.VIDEO_SHAPES, *world.IMAGE_SHAPES}
    assert {a.colour for a in images} == {*world.VIDEO_COLOURS, *world.IMAGE_COLOURS}
    assert all(a.motion is None for a in images)


@pytest.mark.parametrize(
    "given, words",
    [
        (attributes(motion="left"), "a small red circle moving left over a blue background"),
        (attributes("star", "green", "large", "black", "up left"),
         "a large green star moving up left over a black background"),
        (attributes(motion="still"), "a small red circle standing still over a blue background"),
        (attributes(motion=None), "a small red circle over a blue background"),
    ],
)  # fmt: skip
def test_captions(given, words):
    assert world.caption(given) == words


def test_captions_may_omit_size_and_background():
    a = attributes(colour="orange", motion="left")
    assert world.caption(a, size=False, background=False) == "an orange circle moving left"
    captions = [world.clip("train", i, height=8, width=8, frames=1, drop=0.1).caption for i in range(2000)]
    without_size = sum("small" not in c and "large" not in c for c in captions) / 2000
    without_background = sum("over" not in c for c in captions) / 2000
    assert 0.07 < without_size < 0.13 and 0.07 < without_background < 0.13
    assert all("over" in world.clip("val", i, height=8, width=8).caption for i in range(100))


def test_the_vocabulary_is_that_of_the_captions():
    captions = [world.clip(s, i, height=8, width=8, frames=1, drop=0.3).caption
                for s in world.SPLITS for i in range(400)]  # fmt: skip
    assert {word for caption in captions for word in caption.split()} == set(world.vocabulary())


def test_colours_are_far_apart():
    for one, other in itertools.combinations(world.RGB.values(), 2):
        assert np.linalg.norm(np.subtract(one, other)) >= 100


@pytest.mark.parametrize(
    "arguments",
    [("trian", 0, {}), ("train", 0, {"frames": 0}), ("train", 0, {"fps": 0}), ("train", 0, {"height": -4})],
)
def test_wrong_arguments_are_refused(arguments):
    split, index, sizes = arguments
    with pytest.raises(UserError, match=r"unknown split 'trian'; did you mean 'train'|at least 1"):
        world.clip(split, index, **sizes)


def test_there_are_no_images_of_the_held_out_split():
    with pytest.raises(UserError, match="no images"):
        world.image("held_out", 0)

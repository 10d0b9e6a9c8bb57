"""Mixtures: shares of parts in each batch, which change with the step; every part is used completely."""

import collections
import dataclasses

import numpy as np
import pytest

from lavie_jax.data import pipeline
from lavie_jax.data.build import make_source
from lavie_jax.data.config import DataConfig, mixture_weights
from lavie_jax.data.mixture import Mixture, Order
from lavie_jax.data.records import Record
from lavie_jax.data.sources import Item, first_readable
from lavie_jax.errors import UserError
from lavie_jax.training import build
from tests.batches import take

CURRICULUM = ((0, (1, 0, 0)), (10, (2, 1, 1)), (30, (0, 0.25, 0.75)))


def parts_of(order, first, last):
    return collections.Counter(order(i)[0] for i in range(first, last))


def test_each_phase_has_its_shares():
    order = Order(CURRICULUM, batch=8, seed=0)
    assert parts_of(order, 0, 80) == {0: 80}
    assert parts_of(order, 80, 240) == {0: 80, 1: 40, 2: 40}
    assert parts_of(order, 240, 400) == {1: 40, 2: 120}
    for step in range(10, 30):  # not only over the phase: in every batch
        assert parts_of(order, 8 * step, 8 * step + 8) == {0: 4, 1: 2, 2: 2}


@pytest.mark.parametrize("weights", [((0, (1.0,)),), ((0, (0.7, 0.2, 0.1)),), ((0, (1, 3)), (3, (5, 1))), CURRICULUM])
def test_each_part_is_counted_without_gaps(weights):
    """A gap or a repetition would mean that clips are shown never or twice."""
    order = Order(weights, batch=8, seed=1)
    numbers = collections.defaultdict(list)
    for i in range(8 * 50):
        part, number = order(i)
        numbers[part].append(number)
    assert all(sorted(result) == list(range(len(result))) for result in numbers.values())


def test_each_of_two_processes_gets_both_parts():
    order = Order(((0, (1, 1)),), batch=8, seed=0)
    assert all(len({order(i)[0] for i in range(p, 80, 2)}) == 2 for p in range(2))


class Listed:
    """Records that remember how often they were read."""

    def __init__(self, count):
        self.times = np.zeros(count, int)

    def __len__(self):
        return len(self.times)

    def __getitem__(self, index):
        self.times[index] += 1
        return Record(str(index), "a caption", b"")

    def video(self, index, rng):
        def read(record):
            return Item(np.zeros((1, 2, 2, 3), np.uint8), record.caption)

        return first_readable(self, index, read, kind="video", seed=3)

    def image(self, index, rng, *, margin=0):
        raise AssertionError("batches without images need none")


def test_many_hosts_read_every_record_once_an_epoch_and_equal_shares():
    parts, hosts, batch = tuple(map(Listed, (256, 512, 768))), 16, 64
    order = Order(((0, (1, 2, 3)),), batch, seed=0)
    config = DataConfig(frames=1, images=0, height=2, width=2, fps=8.0)
    examples = pipeline.Examples(config, Mixture(parts, parts, order, order), batch)
    shares = []
    for rows in np.array_split(np.arange(batch), hosts):
        before = sum(part.times.sum() for part in parts)
        local = pipeline._LocalExamples(examples, rows.tolist())
        for i in range(1536 // batch * len(rows)):
            local[i]
        shares.append(sum(part.times.sum() for part in parts) - before)
    assert all((part.times == 1).all() for part in parts)
    assert max(shares) <= 1.02 * 1536 / hosts


def config_of(**change):
    common = {"source": "mixture", "videos": ("moving_shapes", "moving_shapes"), "frames": 2, "images": 1,
              "height": 8, "width": 8}  # fmt: skip
    return DataConfig(**{**common, **change})


def test_the_logged_weights_are_those_of_the_step():
    weights = ((0, (1, 0)), (5, (1, 3)))
    config = config_of(videos=("video_folder:a", "webdataset:b"), image_parts=("webdataset:c",), video_weights=weights)
    names = "videos/video_folder:a", "videos/webdataset:b", "images/webdataset:c"
    assert mixture_weights(config, 4) == dict(zip(names, (1, 0, 1)))
    assert mixture_weights(config, 5)["videos/webdataset:b"] == 0.75
    assert mixture_weights(DataConfig(), 5) == {}


@dataclasses.dataclass(frozen=True)
class Gray:
    """A source whose pixels contain its number and the requested index."""

    value: int

    def __len__(self):
        return 100

    def video(self, index, rng):
        return pipeline.Item(np.full((2, 8, 8, 3), self.value, np.uint8), str(index))

    def image(self, index, rng, *, margin=0):
        return pipeline.Item(np.full((8, 8, 3), self.value, np.uint8), str(index))


def test_the_parts_of_clips_and_images_change_at_the_same_step():
    """Also with several images per example."""
    batch, images = 4, 3
    orders = [Order(((0, (1, 0)), (2, (0, 1))), batch=n, seed=0) for n in (batch, batch * images)]
    source = Mixture((Gray(1), Gray(2)), (Gray(3), Gray(4)), *orders)
    examples = pipeline.Examples(config_of(images=images, caption_drop=0.0), source)
    for i in range(4 * batch):
        late = i >= 2 * batch
        assert set(examples[i]["video"].ravel()) == {2 if late else 1}
        assert set(examples[i]["images"].ravel()) == {4 if late else 3}
    captions = [text for i in range(2 * batch, 4 * batch) for text in examples[i]["image_captions"]]
    assert sorted(map(int, captions)) == list(range(2 * batch * images))


def test_a_change_of_the_mixture_is_logged_and_a_resumed_run_is_the_same(caplog):
    config = config_of(video_weights=((0, (1, 0)), (2, (1, 1))), image_parts=("moving_shapes",))
    whole, resumed = take(5, config), take(2, config, start_step=3)
    for one, other in zip(whole[3:], resumed):
        np.testing.assert_array_equal(one["video"], other["video"])
        np.testing.assert_array_equal(one["images"], other["images"])
    assert "data from step 0: " in caplog.text and "from step 2: " in caplog.text and "from step 3: " in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"videos": ()}, "a mixture needs data.videos"),
        ({"videos": ("video_foldr:x",)}, "did you mean 'video_folder'"),
        ({"videos": ("webdataset",)}, "webdataset needs a path"),
        ({"video_weights": ((0, (1,)),)}, r"data.video_weights is \(\(0, \(2 weights\)\).*given \[1.0\]"),
        ({"video_weights": ((5, (1, 1)),)}, r"with increasing steps from 0; given the steps \[5\]"),
        ({"video_weights": ((0, (1, 1)), (9, (1, 1)), (3, (1, 1)))}, r"given the steps \[0, 9, 3\]"),
        ({"video_weights": ((0, (0, 0)),)}, "not all 0"),
        ({"video_weights": ((0, (-1, 2)),)}, "none negative"),
        ({"image_weights": ((0, (1, 1)),)}, "data.image_weights are those of data.image_parts, which is empty"),
        ({"image_parts": ("moving_shapes",), "image_captions": ("a",)}, "Moving Shapes has captions of its own"),
        ({"source": "moving_shapes"}, "are for source='mixture'"),
    ],
)
def test_invalid_mixtures_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        make_source(config_of(**change))


def test_the_held_out_loss_is_measured_on_the_final_mixture():
    config = config_of(video_weights=((0, (1, 0)), (5, (1, 3))))
    held_out = build.held_out_data(config)
    assert held_out.video_weights == ((0, (1, 3)),) and held_out.image_weights == ()

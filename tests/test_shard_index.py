"""The index of shards gives what reading the shards gives, and is ignored when it does not describe them."""

import json

import numpy as np
import pytest

from lavie_jax.data import shard_index, shard_readers, shards
from lavie_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Twelve shards of five records, four of each video, as the curation writes them."""
    records = [{"video": bytes([i]), "caption": f"clip {i}"} for i in range(60)]
    paths = shards.write_shards(records, tmp_path, shard_records=5)
    rows = [
        {"shard": paths[i // 5].name, "index": i % 5, "source": f"{i // 4}.mp4", "height": 90 + i, "width": 160}
        for i in range(60)
    ]
    (tmp_path / shards.LIST).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def opened(folder):
    """Returns what training asks of a set."""
    both = [shards.ShardRecords(folder, medium="video", split=split) for split in ("train", "val")]
    return [(r.indices.tolist(), r.listed_sizes(), [r[i].caption for i in (0, len(r) - 1)]) for r in both]


def test_an_index_gives_the_same_splits_sizes_and_records_without_opening_shards(folder, monkeypatch):
    expected = opened(folder)
    part = shards.ShardRecords(str(folder / "clips-0000[13]*"), medium="video", val_fraction=0.3)
    assert not (folder / shard_index.NAME).exists()  # few shards
    shards.store_index(folder, "video")
    assert opened(folder) == expected
    with monkeypatch.context() as patch:
        patch.setattr(shard_readers, "_open", None)
        assert len(shards.ShardRecords(folder, medium="video")) == len(expected[0][0])
        again = shards.ShardRecords(str(folder / "clips-0000[13]*"), medium="video", val_fraction=0.3)
    assert np.array_equal(again.indices, part.indices) and again.listed_sizes() == part.listed_sizes()
    with pytest.raises(UserError, match="they need latents and caption"):
        shards.ShardRecords(folder, medium="latents")


def test_an_index_of_other_shards_or_damaged_is_ignored(folder):
    shards.store_index(folder, "video")
    (folder / "clips-00003.array_record").unlink()
    shards.write_shard([{"video": b"new", "caption": "another"}], folder / "clips-00003.array_record")
    assert shards.ShardRecords(folder, medium="video", val_fraction=0.0).starts[-1] == 56
    for content in (b"half", b""):
        (folder / shard_index.NAME).write_bytes(content)
        assert shards.ShardRecords(folder, medium="video", val_fraction=0.0).starts[-1] == 56


def test_a_set_of_many_shards_stores_its_index_when_it_is_opened(folder, monkeypatch):
    monkeypatch.setattr(shards, "MANY", 12)
    expected = opened(folder)
    assert (folder / shard_index.NAME).exists() and opened(folder) == expected

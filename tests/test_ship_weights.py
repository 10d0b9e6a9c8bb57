"""A shipped model is complete, in half precision, without duplicate parts, and not too large."""

import jax
import numpy as np
import pytest
from tiny import make_stage

from lavie_jax.errors import UserError
from lavie_jax.weights import load_folder
from tools import ship_weights


@pytest.mark.parametrize("stage", ["base", "prediction", "interpolation", "vsr"])
def test_a_stage_is_shipped_in_half_precision(tmp_path, stage):
    trained, shared, shipped = make_stage(tmp_path / "trained", stage), tmp_path / "shared", tmp_path / "assets" / stage
    ship_weights.main([str(trained), str(shared)])
    ship_weights.main([str(trained), str(shipped), "--share", str(shared)])
    source, copy = load_folder(trained), load_folder(shipped)
    assert copy.schedule == source.schedule and copy.low_res_schedule == source.low_res_schedule
    assert copy.sampling == source.sampling
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(source, part).params, getattr(copy, part).params
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float16), b), ours, theirs)
    assert not (shipped / "vae").exists() and (shared / "vae").exists()


def test_a_model_above_the_limit_is_refused(tmp_path, monkeypatch):
    trained = make_stage(tmp_path / "trained", "base")
    monkeypatch.setitem(ship_weights.LIMITS, "base", 0)
    with pytest.raises(UserError, match="the limit of stage base is 0 MiB"):
        ship_weights.main([str(trained), str(tmp_path / "assets")])
    assert not (tmp_path / "assets").exists()

"""What is shipped is the model in half precision, whole, once, and not too large."""

import jax
import numpy as np
import pytest
from tiny import make_stage

from lavie_jax.errors import UserError
from lavie_jax.weights import load_folder
from tools import ship_weights


@pytest.mark.parametrize("stage", ["base", "interpolation", "vsr"])
def test_a_stage_is_shipped_in_half_precision(tmp_path, stage):
    made, shared, shipped = make_stage(tmp_path / "made", stage), tmp_path / "shared", tmp_path / "assets" / stage
    ship_weights.main([str(made), str(shared)])
    ship_weights.main([str(made), str(shipped), "--share", str(shared)])
    source, copy = load_folder(made), load_folder(shipped)
    assert copy.schedule == source.schedule and copy.low_res_schedule == source.low_res_schedule
    assert copy.sampling == source.sampling
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(source, part).params, getattr(copy, part).params
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float16), b), ours, theirs)
    assert not (shipped / "vae").exists() and (shared / "vae").exists()


def test_too_large_a_model_is_refused(tmp_path, monkeypatch):
    made = make_stage(tmp_path / "made", "base")
    monkeypatch.setitem(ship_weights.LIMITS, "base", 0)
    with pytest.raises(UserError, match="at most 0 may be shipped of stage base"):
        ship_weights.main([str(made), str(tmp_path / "assets")])
    assert not (tmp_path / "assets").exists()

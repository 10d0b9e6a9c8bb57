"""The lines that report what a resumed run changes."""

import json

import pytest

from lavie_jax.training import changes
from lavie_jax.training.config import defaults


def config(**fields):
    values = defaults("base") | {"steps": 1000, "batch": 16}
    values["optimizer"] = values["optimizer"] | {"learning_rate": 1e-4, "decay": "constant", "warmup": 0}
    for name, value in fields.items():
        group, _, leaf = name.rpartition("__")
        if group:
            values[group] = values[group] | {leaf: value}
        else:
            values[leaf] = value
    return json.loads(json.dumps(values))


def test_an_equal_config_and_harmless_fields_are_not_reported():
    assert changes.describe(500, config(), config(), updates=500) is None
    harmless = config(workers=8, mesh__fsdp=4, checkpoint_every=7, init_from="elsewhere", sampling__steps=3)
    assert changes.describe(500, config(), harmless, updates=500) is None


def test_a_changed_learning_rate_is_reported_with_the_previous_one():
    line = changes.describe(500, config(), config(optimizer__learning_rate=4e-3), updates=500)
    assert line == (
        "resuming at step 500 with another config: optimizer.learning_rate = 0.004 (was 0.0001). "
        "The learning rate of the next update is 0.004 instead of 0.0001."
    )


def test_another_number_of_steps_stretches_the_schedule():
    cosine = {"optimizer__decay": "cosine", "optimizer__warmup": 10}
    line = changes.describe(900, config(**cosine), config(**cosine, steps=2000), updates=900)
    assert "steps = 2000 (was 1000). The learning rate of the next update is 5.83e-05 instead of 2.5e-06" in line
    line = changes.describe(900, config(), config(steps=2000), updates=900)
    assert line == "resuming at step 900 with another config: steps = 2000 (was 1000)."


@pytest.mark.parametrize(("batch", "what"), [(8, "4000 of them come again"), (32, "the next 8000 are left out")])
def test_another_batch_moves_the_position_in_the_data(batch, what):
    line = changes.describe(500, config(), config(batch=batch), updates=500)
    assert line == (
        f"resuming at step 500 with another config: batch = {batch} (was 16). The position in the data is counted in "
        f"steps: 8000 examples were seen, and {what}."
    )


def test_long_values_are_shortened_and_fields_of_no_record_are_passed_over():
    old, new = config(data__path="a" * 200), config(data__path="b" * 200)
    line = changes.describe(5, old, new, updates=5)
    assert "..." in line and len(line) < 300
    del old["batch"]
    assert "batch" not in changes.describe(5, old, new, updates=5)


def test_harmless_fields_exist():
    assert set(changes.HARMLESS) <= set(defaults("base"))

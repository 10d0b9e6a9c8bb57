"""A run that is killed at any moment, also inside a save, comes out as if nothing had happened."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "tools" / "crash_test.py"


def test_three_kills_change_nothing(tmp_path):
    spec = importlib.util.spec_from_file_location("crash_test", SCRIPT)
    crash_test = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(crash_test)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = crash_test.finish(crash_test.start(whole, 60), whole)
    assert crash_test.survive(parts, ["training", "save", "training"], steps=60, seed=0) == wanted
    assert crash_test.losses(parts) == crash_test.losses(whole) and len(crash_test.losses(whole)) == 60

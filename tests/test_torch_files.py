"""Pickles: nothing in them is executed, and foreign objects are inert."""

import argparse
import collections
import os
import shelve
from pathlib import Path

import numpy as np
import pytest
from checkpoints import import_base, make_base, make_sd, refused

from lavie_jax.weights import folder_hash

torch = pytest.importorskip("torch")
sd = pytest.fixture(make_sd, scope="module")
base = pytest.fixture(make_base, scope="module")


class Callback:
    def __init__(self):
        self.best = torch.ones(2)


class Settings(dict):
    """Like the AttributeDict that trainers save: a subclass of dict."""


def test_foreign_objects_are_inert(base, sd, tmp_path):
    checkpoint = {
        "ema": torch.load(base[0], weights_only=True)["ema"],
        "args": argparse.Namespace(lr=1e-4, path=Path("x")),
        "loss": np.float64(0.5),
        "rng": np.arange(3),
        "callbacks": {Callback: Callback()},
        "settings": Settings(a=Settings(b=1)),
        "default": collections.defaultdict(list, {"a": [1]}),
        "queue": collections.deque([1, 2]),
        "set": {1, 2},
    }
    for name, zipped in (("new.pt", True), ("legacy.pt", False)):
        torch.save(checkpoint, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert import_base(tmp_path / name, sd, tmp_path / f"out-{name}") == 0
        assert folder_hash(tmp_path / f"out-{name}") == folder_hash(base[1])


class Calls:
    """Unpickles by calling a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, exec, eval, open])
def test_hostile_pickles_are_refused(function, zipped, base, sd, tmp_path, capsys):
    marker = tmp_path / "ran"
    argument = {os.system: f"touch {marker}", open: str(marker)}.get(function, f"open({str(marker)!r}, 'w')")
    tensors = torch.load(base[0], weights_only=True)["ema"]
    call = Calls(function, argument, "w") if function is open else Calls(function, argument)
    torch.save({"ema": tensors, "x": call}, tmp_path / "hostile.pt", _use_new_zipfile_serialization=zipped)
    message = refused(capsys, tmp_path / "out", import_base(tmp_path / "hostile.pt", sd, tmp_path / "out"))
    assert function.__name__ in message and "refused" in message
    assert not marker.exists()


def test_unknown_functions_are_never_called(base, sd, tmp_path):
    """Even those that are not on a list of harmful ones."""
    tensors = torch.load(base[0], weights_only=True)["ema"]
    torch.save({"ema": tensors, "x": Calls(shelve.open, str(tmp_path / "ran"))}, tmp_path / "odd.pt")
    assert import_base(tmp_path / "odd.pt", sd, tmp_path / "out") == 0
    assert not list(tmp_path.glob("ran*"))

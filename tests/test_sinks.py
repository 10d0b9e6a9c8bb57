"""Where metrics go: functions, Weights & Biases, failures, wrong names. Event files are in test_checkpoint.py."""

import json
import subprocess
import sys
import types

import pytest
from PIL import Image

from lavie_jax.errors import UserError
from lavie_jax.training import metrics, sinks


@pytest.fixture
def user(monkeypatch):
    """An importable module with a function that keeps what it gets, and one that fails."""
    module, module.got = types.ModuleType("user_metrics"), []
    module.keep = lambda step, values: module.got.append((step, values))
    module.fail = lambda step, values: 1 / 0
    monkeypatch.setitem(sys.modules, "user_metrics", module)
    return module


def test_a_function_gets_steps_and_values_and_a_failing_sink_stops_nothing(user, tmp_path, monkeypatch):
    errors = []
    monkeypatch.setattr(sinks.logging, "error", lambda text, *args: errors.append(text % args))
    others = sinks.Sinks(("user_metrics:fail,user_metrics:keep",), tmp_path, step=0, config={})
    writer = metrics.Metrics(tmp_path, step=0, sinks=others)
    writer.write(5, {"loss": 0.5})
    writer.picture(5, "samples", tmp_path / "none.png")
    writer.close()
    assert user.got == [(5, {"loss": 0.5})]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 5, "loss": 0.5}
    assert len(errors) == 1 and "user_metrics:fail (ZeroDivisionError: division by zero)" in errors[0]


def test_a_sink_that_cannot_be_opened_is_left_out(tmp_path, monkeypatch):
    errors = []
    monkeypatch.setattr(sinks.logging, "error", lambda text, *args: errors.append(text % args))
    monkeypatch.setattr(sinks, "EventFiles", lambda *_, **__: 1 / 0)
    others = sinks.Sinks(("tensorboard",), tmp_path, step=0, config={})
    others.scalars(1, {"loss": 1.0})
    assert len(errors) == 1 and "tensorboard" in errors[0]


@pytest.mark.parametrize(
    "name, message",
    [
        ("tensorbord", "metrics: unknown 'tensorbord'; did you mean 'tensorboard'"),
        ("user_metrics:other", "user_metrics:other cannot be imported .AttributeError"),
        ("no_such_module:f", "no_such_module:f cannot be imported .ModuleNotFoundError"),
        ("user_metrics:got", "is not a function that takes"),
    ],
)
def test_wrong_names_are_refused_before_training(name, message, user):
    with pytest.raises(UserError, match=message):
        sinks.names((name,))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb, or remove it from metrics"):
        sinks.names(("wandb",))


@pytest.mark.heavy  # the package starts a process of its own
def test_weights_and_biases_gets_the_run_without_a_network(tmp_path):
    pytest.importorskip("wandb")
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    program = """
import sys
from pathlib import Path
from lavie_jax.training import sinks
workdir = Path(sys.argv[1])
others = sinks.Sinks(("wandb",), workdir, step=0, config={"stage": "base", "prompts": ("a", "b")})
others.scalars(10, {"loss": 0.5})
others.picture(10, "samples", workdir / "a.png")
others.close()
"""
    path = ":".join(sys.path)
    env = {"WANDB_MODE": "offline", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": path}
    for _ in range(2):  # the second resumes the first
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=env)
        assert done.returncode == 0 and "Training continues" not in done.stderr, done.stderr
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    run_id = json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    assert len(runs) == 2 and all(run.name.endswith(run_id) and list(run.glob("*.wandb")) for run in runs)

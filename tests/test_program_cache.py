"""Compiled programs on disk: found by later processes, and never a reason for a wrong result or an error."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax import parallel, program_cache
from lavie_jax.program_cache import cached


@dataclasses.dataclass(frozen=True)
class Power:
    exponent: int
    dtype: object = jnp.float32


@pytest.fixture
def folder(tmp_path):
    program_cache.keep_programs(tmp_path)
    yield tmp_path
    program_cache.keep_programs(None)


def make(traced: list, wrong: int = 0):
    """Returns a function as a new process has it. `wrong` changes its body, but nothing that its programs depend on."""

    @cached
    @functools.partial(jax.jit, static_argnames=("power", "mesh"))
    def f(tree, i, *, power, mesh=None):
        traced.append(power)
        return {"sum": tree["x"].astype(power.dtype) ** power.exponent + i + wrong, "none": None}

    return f


X = {"x": np.arange(8, dtype=np.float32)}


def test_a_later_process_loads_the_program_without_tracing(folder):
    first, later = [], []
    power = Power(2)
    make(first)(X, 1, power=power)
    out = make(later, wrong=5)(X, 2, power=power)
    np.testing.assert_array_equal(out["sum"], X["x"] ** 2 + 2)
    assert out["none"] is None and (first, later) == ([power], [])
    assert [path.suffix for path in folder.iterdir()] == [program_cache.SUFFIX]


def test_programs_of_other_shapes_arguments_devices_or_code_are_not_used(folder, monkeypatch):
    mesh = parallel.make_mesh()
    for count, (x, static) in enumerate(
        [
            (X, {"power": Power(2)}),
            ({"x": X["x"][:4]}, {"power": Power(2)}),
            ({"x": X["x"].astype(int)}, {"power": Power(2)}),
            (X, {"power": Power(3)}),
            (X, {"power": Power(2, jnp.bfloat16)}),
            (X, {"power": Power(2), "mesh": mesh}),
            (parallel.put(X, parallel.batch_sharding(mesh)), {"power": Power(2), "mesh": mesh}),
            (parallel.put(X, parallel.replicated(mesh)), {"power": Power(2), "mesh": mesh}),
        ],
        start=1,
    ):
        traced = []
        np.testing.assert_allclose(make(traced)(x, 0, **static)["sum"], x["x"] ** static["power"].exponent, rtol=1e-2)
        assert len(traced) == 1 and len(list(folder.iterdir())) == count
    monkeypatch.setattr(program_cache, "_constant_surroundings", lambda: ("another version",))
    make(traced)(X, 0, power=Power(2))
    assert len(traced) == 2


def damaged(path, how):
    content = path.read_bytes()
    if how == "renamed":
        path.rename(path.with_name("0" * 64 + program_cache.SUFFIX))
        return
    path.write_bytes({"truncated": content[:-10], "empty": b"", "changed": content[:-1] + b"?"}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "changed", "renamed"])
def test_damaged_programs_are_compiled_again(how, folder):
    make([])(X, 1, power=Power(2))
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    damaged(path, how)
    if how == "renamed":  # to the name of another program
        other = make([])
        other(X, 1, power=Power(3))
        (third,) = set(folder.iterdir()) - {path.with_name("0" * 64 + program_cache.SUFFIX)}
        third.write_bytes(whole)
        traced = []
        assert make(traced)(X, 1, power=Power(3))["sum"][2] == 9 and traced
        return
    traced = []
    assert make(traced)(X, 1, power=Power(2))["sum"][2] == 5 and traced
    assert path.stat().st_size == len(whole)


def test_a_program_that_loads_and_cannot_run_is_compiled_again(folder, monkeypatch):
    def broken(*args):
        raise RuntimeError("another machine's")

    make([])(X, 1, power=Power(2))
    monkeypatch.setattr(program_cache, "_load", lambda path, devices: broken)
    traced, f = [], None
    f = make(traced)
    assert f(X, 1, power=Power(2))["sum"][2] == 5 and traced and not list(folder.iterdir())
    assert f(X, 3, power=Power(2))["sum"][2] == 7
    with pytest.raises(KeyError, match="x"):  # an error of the function itself is its own
        make([])({"y": X["x"]}, 1, power=Power(2))


def test_what_cannot_be_described_or_stored_is_compiled_as_by_jit(folder, monkeypatch):
    traced = []
    unknown = dataclasses.make_dataclass("Unknown", ["exponent", "dtype", "f"], frozen=True)(2, jnp.float32, len)
    assert make(traced)(X, 1, power=unknown)["sum"][2] == 5 and not list(folder.iterdir())
    monkeypatch.setattr(program_cache, "serialize", lambda program: 1 / 0)
    assert make(traced)(X, 1, power=Power(2))["sum"][2] == 5 and not list(folder.iterdir())
    program_cache.keep_programs(folder / "nowhere")
    monkeypatch.undo()
    assert make(traced)(X, 1, power=Power(2))["sum"][2] == 5 and len(traced) == 3

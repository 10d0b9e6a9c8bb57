"""Golden cases of the original models: the tiny ones are reproduced, and wrong outputs are detected.

`make parity-full` runs the full-size ones.
"""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from lavie_jax.parity.__main__ import main
from lavie_jax.parity.cases import read_case
from lavie_jax.parity.judge import judge
from lavie_jax.parity.kinds import RUN
from lavie_jax.weights.diffusers_configs import vae_config
from lavie_jax.weights.expected import expected_shapes
from lavie_jax.weights.names import to_torch

GOLDEN = Path(__file__).parent / "golden"
QUICK = sorted(path.stem for path in GOLDEN.glob("*.json") if not path.stem.endswith("_full"))
HEAVY = ("base_unet_tiny_odd", "interpolation_sample_tiny", "vsr_sample_tiny")  # their networks are in other cases


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.heavy] * (n in HEAVY)) for n in QUICK])
def test_golden_case(name):
    result = judge(read_case(GOLDEN / f"{name}.json"))
    assert not result.problem, result
    assert result.bound == (1e-4 if "_sample_" in name else 1e-5)


def test_every_kind_has_a_golden_case():
    kinds = {json.loads(path.read_text())["kind"] for path in GOLDEN.glob("*.json")}
    assert kinds == set(RUN)
    assert len(QUICK) == 14


MODEL = {
    "block_out_channels": [8],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "norm_num_groups": 4,
    "latent_channels": 3,
}


@pytest.fixture(scope="module")
def small_vae(tmp_path_factory):
    """A case made here: a small VAE with another salt, and outputs of the code under test."""
    parent = tmp_path_factory.mktemp("parity")
    shapes = expected_shapes(vae_config(MODEL)).items()
    named = (to_torch("vae", path, np.empty(shape), "old") for path, shape in shapes)
    manifest = {name: list(array.shape) for name, array in named}
    (parent / "manifests").mkdir()
    (parent / "manifests/small.json").write_text(json.dumps(manifest))
    folder = parent / "cases"
    folder.mkdir()
    write(folder, salt="pepper", outputs={name: np.zeros(1) for name in ("mean", "logvar", "decoded")})
    write(folder, outputs=RUN["vae"](read_case(folder / "small.json")))
    return parent


@pytest.fixture(scope="module")
def run_once():
    """Runs VAEs, each only once: most tests change something else."""
    run, known = RUN["vae"], {}

    def outputs_of(case):
        key = json.dumps([case.name, case.salt, case.model, case.inputs, case.parameters])
        if key not in known:
            known[key] = run(case)
        return known[key]

    return outputs_of


@pytest.fixture
def case(small_vae, tmp_path, run_once, monkeypatch):
    """A copy of that case's folder, which tests may change."""
    monkeypatch.setitem(RUN, "vae", run_once)
    shutil.copytree(small_vae, tmp_path, dirs_exist_ok=True)
    return tmp_path / "cases"


def write(folder, *, salt=None, outputs=None, **changes):
    """(Re)writes the case: new outputs, another salt, or other fields of its JSON."""
    path = folder / "small.json"
    fields = {
        "case": "small", "kind": "vae", "model": MODEL, "parameters": "manifests/small.json",
        "inputs": {"image": [1, 3, 6, 8], "image_scale": 0.5, "latent": [1, 3, 3, 2]},
    }  # fmt: skip
    if path.exists():
        fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | changes | ({} if salt is None else {"salt": salt})))
    if outputs is not None:
        np.savez(folder / "small.npz", **outputs)


def test_a_case_with_another_salt_and_config(case, capsys):
    assert main([str(case)]) == 0
    line = capsys.readouterr().out
    assert line.startswith("small ") and line.endswith("ok\n")
    write(case, salt="sugar")
    assert main([str(case), "--case", "sm*"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("output, change", [("mean", 2e-5), ("decoded", 2e-5), ("logvar", np.nan)])
def test_a_perturbed_output_fails(case, capsys, output, change):
    outputs = dict(np.load(case / "small.npz"))
    outputs[output] = outputs[output] * (1 + change)
    write(case, outputs=outputs)
    assert main([str(case)]) == 1
    assert f"FAIL: {output} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"kind": "vea"}, "unknown kind 'vea'; did you mean 'vae'"),
        ({"model": MODEL | {"act_fn": "relu"}}, "act_fn"),
        ({"model": MODEL | {"latent_channels": 5}}, "parameters do not fit"),
        ({"inputs": {"image": [1, 3, 8, 8], "image_scale": 0.5, "latent": [1, 3, 3, 2]}}, "has shape"),
    ],
)
def test_a_case_that_cannot_run_fails_with_the_reason(case, capsys, changes, reason):
    write(case, **changes)
    assert main([str(case)]) == 1
    line = capsys.readouterr().out
    assert "FAIL" in line and reason in line and line.count("\n") == 1


def test_outputs_with_unknown_names_fail(case, capsys):
    write(case, outputs=dict(np.load(case / "small.npz")) | {"median": np.ones(3)})
    assert main([str(case)]) == 1
    assert "median" in capsys.readouterr().out


def damage_json(folder):
    (folder / "small.json").write_text('{"case": ')


def damage_npz(folder):
    path = folder / "small.npz"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    "damage, named",
    [
        (damage_json, "small.json"),
        (damage_npz, "small.npz"),
        (lambda folder: (folder / "small.npz").unlink(), "small.npz"),
        (lambda folder: (folder / "small.json").write_text("[]"), "object"),
        (lambda folder: write(folder, kind=None), "kind"),
        (lambda folder: write(folder, inputs={"image": [1, 3, 6, 8]}), "latent"),
        (lambda folder: write(folder, inputs={"image": [1, -3, 6, 8], "latent": [1]}), "image"),
        (lambda folder: write(folder, parameters="manifests/absent.json"), "absent.json"),
        (lambda folder: write(folder, parameters={"conv_in.weight": "big"}), "conv_in.weight"),
        (lambda folder: write(folder, outputs={"mean": np.zeros(1)}), "logvar"),
    ],
)
def test_a_malformed_case_is_refused_in_one_line(case, capsys, damage, named):
    damage(case)
    assert main([str(case)]) == 2
    streams = capsys.readouterr()
    assert not streams.out
    assert streams.err.startswith("error: ") and named in streams.err and streams.err.count("\n") == 1


def test_no_matching_case_is_an_error(case, capsys):
    assert main([str(case), "--case", "large*"]) == 2
    assert main([str(case / "absent")]) == 2
    assert capsys.readouterr().err.count("no case matches") == 2
    assert main([]) == 2
    assert capsys.readouterr().err == "error: the following arguments are required: DIR; see --help\n"


def test_the_formula(case):
    small = read_case(case / "small.json")

    def normal(text, *shape):
        return np.random.RandomState(zlib.crc32(("pepper" + text).encode())).standard_normal(shape)

    close = dict(rtol=1e-6)
    np.testing.assert_allclose(small.input("image"), 0.5 * normal("small/image", 1, 3, 6, 8), **close)
    np.testing.assert_allclose(small.input("latent"), normal("small/latent", 1, 3, 3, 2), **close)
    for name, wanted in {
        "a.bias": 0.05 * normal("a.bias", 4),
        "norm.weight": 1 + 0.1 * normal("norm.weight", 4),
        "conv.weight": normal("conv.weight", 8, 2, 3, 3) / np.sqrt(18),
        "class_embedding.weight": 0.5 * normal("class_embedding.weight", 5, 6),
        "time_embedding.linear_1.weight": normal("time_embedding.linear_1.weight", 8, 4) / 2,
        "b.relative_attention_bias.weight": 0.5 * normal("b.relative_attention_bias.weight", 32, 2),
    }.items():
        np.testing.assert_allclose(small.parameter(name, list(wanted.shape)), wanted, **close)

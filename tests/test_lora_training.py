"""Training an adapter: what it changes, and its files, which sampling, merging and exporting read back as trained."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from PIL import Image

import convert_torch
from benchmarks import personalise
from lavie_jax.cascade.personal import Personal
from lavie_jax.data.build import make_source
from lavie_jax.data.config import DataConfig
from lavie_jax.errors import UserError
from lavie_jax.training import build, initial, lora, optimizer, options
from lavie_jax.weights import load_folder
from lavie_jax.weights.lora import read_lora
from lavie_jax.weights.lora_files import export_lora
from lavie_jax.weights.safetensors_io import read_safetensors, write_safetensors

ROOT = Path(__file__).parents[1]
EVERY = lora.LoraConfig(rank=3, alpha=1.5, targets=tuple(lora.TARGETS))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_folder(tiny.make_base(tmp_path_factory.mktemp("lora-training") / "base"))


@pytest.fixture(scope="module")
def trained(base):
    """Parameters with an adapter whose factors are all random."""
    adapter = lora.start(base.unet.params, EVERY, seed=0)
    rng = np.random.default_rng(1)
    adapter = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), adapter)
    return {"unet": base.unet.params, "lora": adapter}


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "weights"
    lora.export(path, trained, EVERY)
    return path


def flat(params):
    return flatten_dict(params, sep="/")


def test_only_spatial_layers_are_changed(base):
    attention, every = (set(lora.layers(base.unet.params, c)) for c in (lora.LoraConfig(), EVERY))
    assert len(attention) == 2 * 4 and all("/attn1/to_" in path or "/attn2/to_" in path for path in attention)
    assert attention < every and not any("temporal" in path for path in every)
    kinds = ("resnets_0/conv1", "proj_in", "ff/net_0/proj", "ff/net_2")
    assert all(any(path.endswith(kind) for path in every) for kind in kinds)


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(base):
    params = {"unet": base.unet.params, "lora": lora.start(base.unet.params, EVERY, seed=0)}
    jax.tree.map(np.testing.assert_array_equal, lora.with_lora(params, EVERY), base.unet.params)
    learned, frozen = optimizer.split(params, regime="lora", images_only=True)
    assert set(learned) == {"lora"} and set(frozen) == {"unet"}
    again, other = (lora.start(base.unet.params, EVERY, seed=seed) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, again, params["lora"])
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(again)))


def test_the_export_is_what_the_loss_saw(base, trained, folder):
    """With alpha, for linear layers and convolutions; the file has the factors alone."""
    wanted = flat(lora.with_lora(trained, EVERY))
    after = flat(Personal.read([folder]).apply({"base": base})[0]["base"].unet.params)
    for path, value in flat(base.unet.params).items():
        np.testing.assert_allclose(after[path], wanted[path], rtol=1e-5, atol=1e-6, err_msg=path)
        changed = path.removesuffix("/kernel") in lora.layers(base.unet.params, EVERY)
        assert (np.abs(np.asarray(wanted[path]) - value).max() > 1e-3) == changed
    (file,) = folder.iterdir()
    tensors, header = read_safetensors(file)
    assert sum(t.nbytes for t in tensors.values()) == sum(x.nbytes for x in jax.tree.leaves(trained["lora"]))
    assert json.loads(header["lora_adapter_metadata"])["unet.lora_alpha"] == 1.5


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_exports_under_other_names(names, base, folder, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    assert convert_torch.main(["export-lora", "--lora", str(folder), "--names", names, "--out", str(out)]) == 0
    before, after = (Personal.read([file]).apply({"base": base})[0]["base"].unet.params for file in (folder, out))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    keys = list(read_safetensors(out)[0])
    assert all(key.startswith("lora_unet_" if names == "kohya" else "unet.") for key in keys)
    assert convert_torch.main(["export-lora", "--lora", str(folder), "--names", names, "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("names, prefix", [("kohya", "lora_te_text_model_"), ("diffusers", "text_encoder.text_model.")])
def test_the_text_encoders_layers_of_peft_are_exported_as_such(names, prefix, tmp_path):
    """Keys of PEFT name no part; a module without dots is not yet one of kohya's."""
    ones = {"lora_A": np.ones((2, 16), np.float32), "lora_B": np.ones((16, 2), np.float32)}
    modules = ("encoder.layers.0.mlp.fc1", "conv_in")
    file, out = tmp_path / "adapter_model.safetensors", tmp_path / "x.safetensors"
    tensors = {f"base_model.model.{module}.{role}.weight": x for module in modules for role, x in ones.items()}
    write_safetensors(file, tensors, {})
    assert export_lora(read_lora(file), out, names=names) == 2
    keys = {key.partition(".lora")[0] for key in read_safetensors(out)[0] if not key.endswith("alpha")}
    text, unet = sorted(keys, key=lambda key: "conv_in" in key)
    assert text.replace("_", ".") == f"{prefix}encoder.layers.0.mlp.fc1".replace("_", ".") and text.startswith(prefix)
    assert unet == {"kohya": "lora_unet_conv_in", "diffusers": "unet.conv_in"}[names]


def test_merging_into_a_weights_folder(base, folder, tmp_path, capsys):
    """Equals sampling with the LoRA, bit for bit; other tensors keep their bytes, metadata and presets stay."""
    out = tmp_path / "merged"
    config = json.loads((base.path / "config.json").read_text())
    (base.path / "config.json").write_text(json.dumps(config | {"presets": {"fast": {"steps": 2}}}))
    arguments = ["merge-lora", "--weights", str(base.path), "--lora", f"{folder}:0.5", "--out", str(out)]
    assert convert_torch.main(arguments) == 0
    wanted = Personal.read([(folder, 0.5)]).apply({"base": base})[0]["base"]
    merged = load_folder(out, stage="base")
    jax.tree.map(np.testing.assert_array_equal, merged.unet.params, wanted.unet.params)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (base.path / part).iterdir():
            assert (out / part / file.name).read_bytes() == file.read_bytes()
    (old, facts), (new, kept) = (read_safetensors(p / "unet" / "model.safetensors") for p in (base.path, out))
    assert facts == kept and list(old) == list(new) and merged.sampling == base.sampling
    assert merged.presets == {"fast": {"steps": 2}}
    changed = {name for name in old if old[name].read().tobytes() != new[name].read().tobytes()}
    assert len(changed) == len(lora.layers(base.unet.params, EVERY))
    assert convert_torch.main(arguments) == 2 and "already exists" in capsys.readouterr().err
    wrong = [*arguments[:3], "--lora", str(tmp_path / "none.safetensors"), "--out", str(tmp_path / "new")]
    assert convert_torch.main(wrong) == 2 and not (tmp_path / "new").exists()


def test_training_starts_from_the_base_and_its_task_holds_the_adapter_alone(base, tmp_path):
    config = options.load(str(ROOT / "configs/moving_shapes/lora.py:cpu"))
    for name, value in (("init_from", str(base.path)), ("lora.rank", "2"), ("data.image_path", str(tmp_path))):
        options.override(config, name, value)
    for part, fields in (("unet", tiny.UNET), ("text_encoder", tiny.TEXT), ("vae", tiny.VAE_CONFIG)):
        for name, value in dataclasses.asdict(fields).items():
            if name in config[part]:
                config[part][name] = value
    config.schedule.update(dataclasses.asdict(base.schedule))
    build.check_stage(config)
    init = initial.load(config, build.make_models(config, jnp.float32, 1.0), tmp_path)
    task = build.stage_task(config, np.float32, init)
    learned, _ = task.split(task.start)
    assert set(learned) == {"lora"} and task.exported(learned, {}) is learned
    jax.tree.map(np.testing.assert_array_equal, task.start["unet"], base.unet.params)
    task.export(tmp_path / "weights", learned, {})
    task.export(tmp_path / "weights", learned, {})  # in place of the last one
    assert len(Personal.read([tmp_path / "weights"]).loras[0][0].modules) == len(
        lora.layers(base.unet.params, lora.of_config(config))
    )


def test_pictures_without_captions_get_the_subjects(tmp_path):
    """Each part of a mixture has a caption of its own, and no picture is held out."""
    for name, count in (("subject", 3), ("class", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (20, 10), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "subject/0.txt").write_text("a caption of its own")
    fields = {"frames": 0, "images": 1, "height": 8, "width": 8, "hold_out": False}
    parts = tuple(f"video_folder:{tmp_path / name}" for name in ("subject", "class"))
    rng = np.random.default_rng(0)
    mixed = DataConfig(source="mixture", image_parts=parts, image_captions=("sks", "cat"), **fields)
    captions = {make_source(mixed).image(i, rng).caption for i in range(12)}
    assert captions == {"a caption of its own", "sks", "cat"}
    one = DataConfig(source="video_folder", image_path=str(tmp_path / "subject"), image_captions=("sks",), **fields)
    for config in (one, dataclasses.replace(one, split="val")):
        source = make_source(config)
        assert len(source) == 3 and {source.image(i, rng).caption for i in range(3)} == {"a caption of its own", "sks"}
    left_out = dataclasses.replace(one, image_captions=(), hold_out=True)
    with pytest.raises(UserError, match="no image"):
        make_source(dataclasses.replace(left_out, image_path=str(tmp_path / "class")))
    with pytest.raises(UserError, match="kind video_folder"):
        make_source(dataclasses.replace(one, source="webdataset"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["pictures", "--count", "0"], "--count must be at least 1"),
        (["pictures"], "out exists: give another --out"),
        (["measure"], "measured.json exists"),
        (["measured"], "invalid choice"),
        (["measure", "--out", "new", "--lora", "nowhere"], "nowhere does not exist"),
        (["table", "--out", "new"], "no measurement is complete"),
    ],
)
def test_the_measurement_refuses_wrong_arguments_in_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(personalise, "add_subjects", lambda: None)  # for the whole process
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "measured.json").write_text("[]")
    with pytest.raises(SystemExit) as stopped:
        personalise.main([words[0], "--out", "out", *words[1:]])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "measured.json"]


@pytest.mark.heavy
def test_tiny_trains_resumes_and_refuses_an_empty_folder(tmp_path):
    command = [sys.executable, "train.py", "--config", "configs/lora.py:tiny", "--config.steps=2",
               "--config.checkpoint_every=1"]  # fmt: skip
    digests = []
    for words in (["--workdir", "a"], ["--workdir", "b", "--config.steps=1"], ["--workdir", "b"]):
        words[1] = str(tmp_path / words[1])
        done = subprocess.run([*command, *words], cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.splitlines()[-1])
    assert digests[0] == digests[2] != digests[1]
    (file,) = (tmp_path / "a" / "weights").iterdir()
    assert any(t.read().any() for name, t in read_safetensors(file)[0].items() if "lora_B" in name)

    (tmp_path / "empty").mkdir()
    words = ["--config", "configs/moving_shapes/lora.py:cpu", f"--config.data.image_path={tmp_path}/empty"]
    done = subprocess.run(
        [sys.executable, "train.py", *words, "--workdir", str(tmp_path / "c")], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 2 and "no image with a caption" in done.stderr and not (tmp_path / "c").exists()

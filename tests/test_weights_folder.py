"""The weights folder, its files, and the names in them. No torch."""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny import make_base

import lavie_jax
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.disk import new_folder, recover_folder
from lavie_jax.errors import UserError
from lavie_jax.models import registry
from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAEConfig
from lavie_jax.stages import STAGES
from lavie_jax.weights import folder, folder_hash, load_folder, load_part, save_folder
from lavie_jax.weights.diffusers_configs import inflated_config, unet_config
from lavie_jax.weights.expected import compare, expected_shapes
from lavie_jax.weights.names import dialect_of, from_torch, is_buffer, to_torch
from lavie_jax.weights.safetensors_io import DTYPES, read_safetensors, write_safetensors

MANIFESTS = Path(__file__).parent / "manifests"
SD = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}
X4 = {
    "in_channels": 7, "block_out_channels": [256, 512, 512, 1024], "cross_attention_dim": 1024,
    "num_class_embeds": 1000,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3, "use_linear_projection": True,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"], "only_cross_attention": [True, True, True, False],
}  # fmt: skip
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77}
RELEASED = {
    "lavie_base": unet_config(SD, STAGES["base"]),
    "lavie_interpolation": unet_config(SD | {"in_channels": 8}, STAGES["interpolation"]),
    "lavie_vsr": inflated_config(unet_config(X4), STAGES["vsr"].unet_fields),
    "sd14_unet": unet_config(SD),
    "x4_unet": unet_config(X4),
    "sd14_vae": VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2),
    "x4_vae": VAEConfig(block_out_channels=(128, 256, 512), layers_per_block=2, scaling_factor=0.08333),
    "sd14_text": CLIPTextConfig(
        **TEXT, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    "x4_text": CLIPTextConfig(
        **TEXT,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
    ),
}


def part_of(config):
    return {UNetConfig: "unet", VAEConfig: "vae", CLIPTextConfig: "text_encoder"}[type(config)]


# ---- names


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_name_maps_there_and_back(name):
    """The nine checkpoints also have exactly our models' parameters and shapes."""
    manifest, config = json.loads((MANIFESTS / f"{name}.json").read_text()), RELEASED[name]
    part = part_of(config)
    dialect = dialect_of(part, manifest)
    shapes = {}
    for torch_name, shape in manifest.items():
        path, ours = from_torch(part, torch_name, np.broadcast_to(np.float32(0), shape))
        back, theirs = to_torch(part, path, ours, dialect)
        assert back == torch_name and list(theirs.shape) == shape
        assert path not in shapes
        shapes[path] = ours.shape
    assert compare(name, config, shapes) == []
    buffers = [path for path in shapes if is_buffer(path)]
    assert len(shapes) - len(buffers) == len(expected_shapes(config))
    assert bool(buffers) == (name in ("lavie_base", "lavie_vsr", "sd14_text", "x4_text"))


def test_a_new_scaling_factor_of_a_vae_does_not_retrace():
    """In training, the scaling factor of the VAE changes at every checkpoint."""
    config = RELEASED["sd14_vae"]
    expected_shapes(config)
    traced = registry._traced_params.cache_info().misses
    assert expected_shapes(dataclasses.replace(config, scaling_factor=0.3)) == expected_shapes(config)
    assert registry._traced_params.cache_info().misses == traced


EXAMPLES = [  # part, PyTorch's name, its shape, our path, which of its axes ours are
    ("unet", "down_blocks.0.attentions.1.proj_in.weight", (2, 3, 1, 1),
     "down_blocks_0/attentions_1/proj_in/kernel", (2, 3, 1, 0)),
    ("unet", "mid_temporal_block.resblocks_3d_t.conv1.weight", (2, 3, 5, 1, 1),
     "mid_temporal_block/resblocks_3d_t/conv1/kernel", (2, 3, 4, 1, 0)),
    ("unet", "time_embedding.linear_1.weight", (2, 3), "time_embedding/linear_1/kernel", (1, 0)),
    ("unet", "a.blocks.0.ff.net.0.proj.weight", (2, 3), "a/blocks_0/ff/net_0/proj/kernel", (1, 0)),
    ("unet", "a.attn_temp.to_out.0.bias", (2,), "a/attn_temporal/to_out_0/bias", (0,)),
    ("unet", "class_embedding.weight", (2, 3), "class_embedding/embedding", (0, 1)),
    ("text_encoder", "text_model.final_layer_norm.weight", (2,), "final_layer_norm/scale", (0,)),
    ("vae", "decoder.mid_block.attentions.0.proj_attn.weight", (2, 3),
     "decoder/mid_block/attentions_0/to_out_0/kernel", (1, 0)),
]  # fmt: skip


@pytest.mark.parametrize("part, name, shape, path, axes", EXAMPLES)
def test_names_and_axes(part, name, shape, path, axes):
    array = np.arange(np.prod(shape)).reshape(shape)
    result, ours = from_torch(part, name, array)
    assert result == path
    np.testing.assert_array_equal(ours, array.transpose(axes))


def test_old_convolutions_of_the_vae_become_linear():
    array = np.arange(6).reshape(2, 3, 1, 1)
    path, ours = from_torch("vae", "encoder.mid_block.attentions.0.to_q.weight", array)
    assert path == "encoder/mid_block/attentions_0/to_q/kernel"
    np.testing.assert_array_equal(ours, array[:, :, 0, 0].T)


# ---- safetensors


def test_safetensors_agree_with_the_reference_implementation(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {
        f"{name}{order}": (rng.standard_normal((3, 4, 5)) * 50).astype(dtype).transpose(order)
        for name, dtype in DTYPES.items()
        for order in ((0, 1, 2), (2, 0, 1))  # a view that is not contiguous
    } | {"scalar": np.float32(3), "empty": np.zeros((0, 2), np.int8)}
    write_safetensors(tmp_path / "ours.safetensors", arrays, {"key": "value"})
    theirs = reference.load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)
        assert theirs[name].dtype == array.dtype
    reference.save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, tmp_path / "theirs.safetensors")
    for file, metadata in (("ours", {"key": "value"}), ("theirs", {})):
        tensors, result = read_safetensors(tmp_path / f"{file}.safetensors")
        assert result == metadata and tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(tensors[name].read(), array)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_never_written(dtype, value, tmp_path):
    array = np.full(3, np.finfo(np.float16).max, dtype)  # large, but finite
    write_safetensors(tmp_path / "large.safetensors", {"x": array}, {})
    array[1] = value
    with pytest.raises(UserError, match="x has NaN or Inf"):
        write_safetensors(tmp_path / "nan.safetensors", {"x": array}, {})


# ---- folders


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("weights") / "base")


@pytest.fixture
def copy(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "copy"))


def as_given(folder, **changes):
    """Arguments of `save_folder` that write a loaded folder again."""
    w = load_folder(folder)
    parts = {name: (part.config, part.params) for name in ("unet", "vae", "text_encoder") if (part := getattr(w, name))}
    return {
        "stage": w.stage,
        "sampling": w.sampling,
        **parts,
        "tokenizer": w.tokenizer_dir,
        "schedule": w.schedule,
    } | changes


def test_a_saved_folder_loads_unchanged(base, tmp_path):
    schedule = Schedule(kind="scaled_linear", beta_end=0.012, prediction="v_prediction")
    dtypes = iter([np.float16, ml_dtypes.bfloat16, np.float32])
    given = as_given(base, schedule=schedule, sampling={"height": 8, "fps": 8})
    for name in ("unet", "vae", "text_encoder"):
        config, params = given[name]
        dtype = next(dtypes)
        given[name] = config, jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), params)
    save_folder(tmp_path / "again", **given)
    back = load_folder(tmp_path / "again", stage="base")
    assert back.schedule == schedule and back.sampling == {"height": 8, "fps": 8} and back.low_res_schedule is None
    for name in ("unet", "vae", "text_encoder"):
        part, (config, params) = getattr(back, name), given[name]
        assert part.config == config
        result, saved = flatten_dict(part.params), flatten_dict(params)
        assert result.keys() == saved.keys()
        assert all(result[k].dtype == saved[k].dtype and np.array_equal(result[k], saved[k]) for k in saved)
    cast = load_part(tmp_path / "again", "unet", dtype=ml_dtypes.bfloat16)
    assert {a.dtype for a in jax.tree.leaves(cast.params)} == {np.dtype(ml_dtypes.bfloat16)}


def test_a_vae_alone(base, tmp_path):
    vae = load_part(base, "vae")
    save_folder(tmp_path / "vae", stage="vae", vae=(vae.config, vae.params))
    back = load_folder(tmp_path / "vae", stage="vae")
    assert back.unet is None and back.schedule is None and back.vae.config == vae.config


def test_the_hash_follows_the_content(base, copy, tmp_path):
    assert folder_hash(copy) == folder_hash(base)
    given = as_given(base)
    save_folder(tmp_path / "shared", **given, share=base)
    assert not (tmp_path / "shared/vae").exists()  # referred to, not repeated
    assert folder_hash(tmp_path / "shared") == folder_hash(base)
    assert load_folder(tmp_path / "shared").text_encoder.config == given["text_encoder"][0]
    for hidden in (".DS_Store", "unet/._model.safetensors", "vae/.nfs0001", "tokenizer/.git/config"):
        (copy / hidden).parent.mkdir(exist_ok=True)
        (copy / hidden).write_text("x")
    assert folder_hash(copy) == folder_hash(base)
    save_folder(tmp_path / "exported", **as_given(copy))
    assert not list((tmp_path / "exported").rglob(".*"))
    file = copy / "unet/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert folder_hash(copy) != folder_hash(base)
    save_folder(tmp_path / "other", **(given | {"sampling": {"steps": 7}}))
    assert folder_hash(tmp_path / "other") != folder_hash(base)


@pytest.mark.parametrize(
    "part, message", [("text_encoder", "width is 8, but its UNet's is 16"), ("vae", "channels is 3")]
)
def test_parts_of_different_models_are_refused(part, message, base, tmp_path):
    config = {
        "text_encoder": CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1),
        "vae": VAEConfig(latent_channels=3, block_out_channels=(8,), norm_num_groups=8),
    }[part]
    zeros = {path: np.zeros(shape, np.float32) for path, shape in expected_shapes(config).items()}
    save_folder(tmp_path / "w", **as_given(base, **{part: (config, unflatten_dict(zeros, sep="/"))}))
    with pytest.raises(UserError, match=message):
        load_folder(tmp_path / "w")


def test_a_folder_does_not_name_parts_that_it_replaces(base, tmp_path):
    save_folder(tmp_path / "w", **as_given(base))
    save_folder(tmp_path / "w", **as_given(tmp_path / "w"), share=tmp_path / "w", overwrite=True)
    assert folder_hash(tmp_path / "w") == folder_hash(base)


def test_a_folder_without_its_parameters(base, copy):
    edit_unet(copy, lambda t: t["conv_in.bias"].fill(np.nan))
    one, two = load_folder(base), load_folder(copy, params=False)
    assert two.unet.config == one.unet.config and two.schedule == one.schedule and two.unet.params == {}
    edit_unet(copy, lambda t: t.pop("conv_in.bias"))
    with pytest.raises(UserError, match="missing conv_in.bias"):
        load_folder(copy, params=False)


def test_a_part_with_a_matching_fingerprint_is_not_compared_again(copy, monkeypatch):
    """The fingerprint in its config.json depends on the version, the config and the names and shapes of the tensors."""
    compared = []

    def compare(what, config, given):
        compared.append(type(config))
        return []

    monkeypatch.setattr(folder, "compare", compare)
    load_folder(copy, params=False)
    assert compared == []
    edit_json(copy / "unet/config.json", norm_eps=0.5)
    edit_json(copy / "vae/config.json", fits=None)
    load_folder(copy, params=False)
    assert compared == [UNetConfig, VAEConfig]
    monkeypatch.setattr(lavie_jax, "__version__", "next")
    load_folder(copy, params=False)
    assert compared[2:] == [UNetConfig, VAEConfig, CLIPTextConfig]


def test_overwriting_is_explicit_and_atomic(base, tmp_path):
    given = as_given(base)
    save_folder(tmp_path / "w", **given)
    before = folder_hash(tmp_path / "w")
    with pytest.raises(UserError, match="already exists"):
        save_folder(tmp_path / "w", **given)
    config, params = given["unet"]
    flat = flatten_dict(params, sep="/")
    broken = flat | {"conv_in/bias": np.full_like(flat["conv_in/bias"], np.nan)}
    with pytest.raises(UserError, match="NaN"):
        save_folder(tmp_path / "w", **(given | {"unet": (config, unflatten_dict(broken, sep="/"))}), overwrite=True)
    assert folder_hash(tmp_path / "w") == before  # a failure leaves the old folder
    save_folder(tmp_path / "w", **(given | {"sampling": {"steps": 9}}), overwrite=True)
    assert load_folder(tmp_path / "w").sampling == {"steps": 9}
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_parameters_that_do_not_fit_are_not_written(base, tmp_path):
    given = as_given(base)
    config, params = given["vae"]
    flat = flatten_dict(params, sep="/")
    del flat["quant_conv/bias"]
    flat["more/bias"] = np.zeros(2, np.float32)
    with pytest.raises(UserError, match="missing quant_conv.bias") as error:
        save_folder(tmp_path / "w", **(given | {"vae": (config, flat)}))
    assert "unexpected more.bias" in str(error.value)
    assert not list(tmp_path.iterdir())


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_unet(folder, change):
    tensors = {name: t.read().copy() for name, t in read_safetensors(folder / "unet/model.safetensors")[0].items()}
    change(tensors)
    with open(folder / "unet/model.safetensors", "wb") as file:  # save_folder refuses NaN
        import safetensors.numpy

        file.write(safetensors.numpy.save(tensors))


def cut(folder):
    file = folder / "vae/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BROKEN = {
    "does not exist": shutil.rmtree,
    "has no config.json": lambda f: (f / "config.json").unlink(),
    "cannot be read as JSON": lambda f: (f / "config.json").write_text("{"),
    "must contain a JSON object": lambda f: (f / "config.json").write_text("[]"),
    "convert_torch.py import": lambda f: edit_json(f / "config.json", stage=None),
    "format version 99": lambda f: edit_json(f / "config.json", format_version=99),
    "unknown stage 'bass'; did you mean 'base'": lambda f: edit_json(f / "config.json", stage="bass"),
    "unknown stage ['base']": lambda f: edit_json(f / "config.json", stage=["base"]),
    "parts in its config.json": lambda f: edit_json(f / "config.json", parts=["vae"]),
    "no sampling defaults": lambda f: edit_json(f / "config.json", sampling=None),
    "'interpolation', but 'base' is needed": lambda f: edit_json(f / "config.json", stage="interpolation"),
    "tokenizer is missing": lambda f: shutil.rmtree(f / "tokenizer"),
    "model.safetensors is missing": lambda f: (f / "unet/model.safetensors").unlink(),
    "scheduler_config.json cannot be read": lambda f: (f / "scheduler/scheduler_config.json").unlink(),
    "no field 'latent_chanels'": lambda f: edit_json(f / "vae/config.json", latent_chanels=4),
    "is truncated": cut,
    "conv_in.bias has NaN": lambda f: edit_unet(f, lambda t: t["conv_in.bias"].fill(np.nan)),
    "missing conv_in.bias": lambda f: edit_unet(f, lambda t: t.pop("conv_in.bias")),
    "unexpected more.bias": lambda f: edit_unet(f, lambda t: t.update({"more.bias": np.zeros(3)})),
    "has shape": lambda f: edit_unet(f, lambda t: t.update({"conv_in.bias": np.zeros(3)})),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_folders_are_refused_in_one_line(message, copy):
    BROKEN[message](copy)
    with pytest.raises(UserError) as error:
        load_folder(copy, stage="base")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_error_for_a_cascade_lists_its_stages(base):
    with pytest.raises(UserError, match="It contains base; give"):
        load_folder(base.parent)


def test_loading_needs_no_torch(base, tmp_path):
    """Nor does converting .safetensors."""
    code = """if True:
        import sys
        class NoTorch:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, NoTorch())
        import convert_torch
        sys.exit(convert_torch.main(["export", "--weights", sys.argv[1], "--out", sys.argv[2]]))
    """
    for name, code_expected in (("unet.safetensors", 0), ("unet.pt", 2)):
        command = [sys.executable, "-c", code, str(base), str(tmp_path / name)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == code_expected, done.stderr
    assert "PyTorch is needed" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "conv_in.weight" in read_safetensors(tmp_path / "unet.safetensors")[0]


def test_recovery_removes_partial_folders_and_restores_a_moved_one(base, tmp_path):
    weights = tmp_path / "weights"
    shutil.copytree(base, tmp_path / ".weights.old-7")
    (tmp_path / ".weights.writing-7").mkdir()
    recover_folder(weights)
    assert [p.name for p in tmp_path.iterdir()] == ["weights"] and folder_hash(weights) == folder_hash(base)
    (tmp_path / ".weights.old-8").mkdir()  # killed before it was removed
    recover_folder(weights)
    assert [p.name for p in tmp_path.iterdir()] == ["weights"] and folder_hash(weights) == folder_hash(base)


def write_twice(path):
    for text in ("first", "second"):
        with new_folder(path) as folder:
            (folder / "file").write_text(text)
    return (path / "file").read_text()


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    target, link = tmp_path / "disk" / "large", tmp_path / "weights"
    target.mkdir(parents=True)
    link.symlink_to(target)
    (target.parent / ".large.writing-7").mkdir()
    recover_folder(link)
    assert write_twice(link) == "second" and link.readlink() == target
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["disk", "file", "large", "weights"]


def test_leftovers_of_a_killed_process_with_this_number_are_replaced(tmp_path):
    """In a container, a command has the same number every time."""
    for kind in ("writing", "old"):
        (tmp_path / f".weights.{kind}-{platform.node()}-{os.getpid()}" / "unet").mkdir(parents=True)
    assert write_twice(tmp_path / "weights") == "second" and [p.name for p in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("layers_per_block", [2, 2, 2, 2], "must be of type int"),
        ("layers_per_block", 0, "must be at least 1"),
        ("attention_head_dim", None, "must be of type int"),
        ("attention_head_dim", 0, "the level's 0 heads"),
    ],
)
def test_impossible_values_in_a_diffusers_config_are_refused(name, value, message):
    with pytest.raises(UserError, match=message):
        unet_config(SD | {name: value})

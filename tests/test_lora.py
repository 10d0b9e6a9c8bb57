"""LoRA files of every form: merged as PyTorch's layers would compute them, with every key applied or named."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from lavie_jax.cascade.personal import Personal, parse_embedding
from lavie_jax.errors import UserError
from lavie_jax.weights import load_folder
from lavie_jax.weights.lora import check_scale, merge_array, parse_lora, read_lora
from lavie_jax.weights.lora_deltas import ModuleDelta
from lavie_jax.weights.lora_keys import module_table
from lavie_jax.weights.names import from_torch, to_torch
from lavie_jax.weights.safetensors_io import as_tensor, write_safetensors

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LINEAR, CONV, POINT = f"{BLOCK}.attn1.to_q", "mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in"
TEXT = "encoder.layers.0.self_attn.q_proj"
RANK = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny.make_base(tmp_path_factory.mktemp("lora") / "base")
    return load_folder(folder)


@pytest.fixture(scope="module")
def original(base):
    """The model's weights under PyTorch's names, in float64."""
    return by_torch_name(base)


def by_torch_name(weights):
    named = {}
    for part in ("unet", "text_encoder"):
        for path, array in flatten_dict(getattr(weights, part).params, sep="/").items():
            name, array = to_torch(part, path, array)
            named[name] = np.asarray(array, np.float64)
    return named


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def factors(weight, seed=0, rank=RANK):
    """A random (down, up) for a weight: the latter of a convolution has kernels of size 1."""
    down = normal(seed, rank, *weight.shape[1:])
    return down, normal(seed + 1, weight.shape[0], rank, *(1,) * (weight.ndim - 2))


def product(down, up):
    return (up.reshape(len(up), -1).astype(np.float64) @ down.reshape(len(down), -1)).reshape(len(up), *down.shape[1:])


def save(path, tensors, metadata=None):
    write_safetensors(path, tensors, metadata or {})
    return path


def merged(base, *loras):
    weights, notes = Personal.read(loras).apply({"base": base})
    assert not notes
    return by_torch_name(weights["base"])


def check(base, original, loras, expected):
    """Only the modules in `expected` change, and to these weights."""
    after = merged(base, *loras)
    for name, before in original.items():
        module = name.removesuffix(".weight")
        wanted = expected[module] if module in expected else before
        np.testing.assert_allclose(after[name], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(), err_msg=name)
        assert module not in expected or np.abs(wanted - before).max() > 1e-3


def weight(original, module):
    return original[f"{module}.weight"]


def kohya(module):
    prefix = "lora_te_text_model_" if module.startswith("encoder") else "lora_unet_"
    return prefix + module.replace(".", "_")


MODULES = (LINEAR, f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.0.proj", POINT, CONV, TEXT, "encoder.layers.0.mlp.fc1")


def test_kohya_files_with_mixed_ranks_and_alphas(base, original, tmp_path):
    """alpha absent or 0 is the rank; float16, bfloat16 and int64 alphas are numbers as any other."""
    alphas = [2.0, 0.0, None, np.float16(1.5), ml_dtypes.bfloat16(0.5), np.int64(1), 6.0]
    tensors, expected = {}, {}
    for i, (module, alpha) in enumerate(zip(MODULES, alphas)):
        rank = 1 + i
        down, up = factors(weight(original, module), 10 * i, rank)
        tensors |= {f"{kohya(module)}.lora_down.weight": down, f"{kohya(module)}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{kohya(module)}.alpha"] = np.asarray(alpha)
        scale = float(alpha) / rank if alpha else 1.0
        expected[module] = weight(original, module) + 0.8 * scale * product(down, up)
    file = save(tmp_path / "kohya.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    check(base, original, [(file, 0.8)], expected)


def test_kohya_files_as_pickles(base, original, tmp_path):
    torch = pytest.importorskip("torch")
    down, up = factors(weight(original, LINEAR))
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.float32(1.0)}
    tensors = {f"{kohya(LINEAR)}.{role}": torch.tensor(value).to(torch.bfloat16) for role, value in tensors.items()}
    torch.save(tensors, tmp_path / "lora.pt")
    down, up = (np.asarray(x.astype(ml_dtypes.bfloat16), np.float32) for x in (down, up))
    check(base, original, [tmp_path / "lora.pt"], {LINEAR: weight(original, LINEAR) + product(down, up) / RANK})


TEXT_Q = "text_encoder.text_model.encoder.layers.0.self_attn"
DIFFUSERS = {
    "old processors": (f"unet.{BLOCK}.attn1.processor.to_q_lora.{{}}.weight", f"{TEXT_Q}.to_q_lora.{{}}.weight"),
    "oldest": (f"{BLOCK}.attn1.processor.to_q_lora.{{}}.weight", f"{TEXT_Q}.to_q_lora.{{}}.weight"),
    "newer": (f"unet.{BLOCK}.attn1.to_q.lora.{{}}.weight", f"{TEXT_Q}.q_proj.lora_linear_layer.{{}}.weight"),
    "mixed": (f"unet.{BLOCK}.attn1.to_q.lora.{{}}.weight", f"{TEXT_Q}.q_proj.lora_{{AB}}.weight"),
    "peft": (f"base_model.model.{BLOCK}.attn1.to_q.lora_{{AB}}.default.weight",
             "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_{AB}.weight"),
    "peft with prefix": (f"base_model.model.unet.{BLOCK}.attn1.to_q.lora_{{AB}}.weight",
                         "base_model.model.text_encoder.encoder.layers.0.self_attn.q_proj.lora_{AB}.weight"),
}  # fmt: skip


@pytest.mark.parametrize("form", DIFFUSERS)
def test_names_of_diffusers_and_peft(form, base, original, tmp_path):
    tensors, expected = {}, {}
    for seed, (module, key) in enumerate(zip((LINEAR, TEXT), DIFFUSERS[form])):
        down, up = factors(weight(original, module), seed)
        tensors |= {key.format("down", AB="A"): down, key.format("up", AB="B"): up}
        expected[module] = weight(original, module) + product(down, up)
    check(base, original, [save(tmp_path / "x.safetensors", tensors)], expected)


def test_to_out_of_old_processors(base, original, tmp_path):
    module = f"{BLOCK}.attn2.to_out.0"
    down, up = factors(weight(original, module))
    key = f"{BLOCK}.attn2.processor.to_out_lora."
    file = save(tmp_path / "x.safetensors", {f"{key}down.weight": down, f"{key}up.weight": up})
    check(base, original, [file], {module: weight(original, module) + product(down, up)})


@pytest.mark.parametrize("place", ["folder", "header"])
def test_the_configuration_of_peft(place, base, original, tmp_path):
    """Its patterns set alpha by module; `use_rslora` divides by sqrt(r)."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "use_rslora": True,
              "alpha_pattern": {"attn1.to_q": 2}, "rank_pattern": {"attn1.to_q": 5}}  # fmt: skip
    tensors, expected = {}, {}
    for module, rank, alpha in ((LINEAR, 5, 2), (CONV, RANK, 8)):
        down, up = factors(weight(original, module), rank, rank)
        tensors |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
        expected[module] = weight(original, module) + alpha / rank**0.5 * product(down, up)
    if place == "folder":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save(tmp_path / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in tensors.items()})
        check(base, original, [tmp_path], expected)
    else:
        header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
        check(base, original, [save(tmp_path / "x.safetensors", tensors, header)], expected)


def test_adapters_that_are_not_relative_to_the_base_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"})
    )
    save(tmp_path / "adapter_model.safetensors", {f"base_model.model.{key}": x for key, x in GOOD_PEFT.items()})
    with pytest.raises(UserError, match="init_lora_weights=pissa_niter_4"):
        read_lora(tmp_path)


def test_locon_equals_its_layers_in_torch(base, original, tmp_path):
    """With and without `lora_mid`: the merged convolution gives what the original's layers give one after the other."""
    torch = pytest.importorskip("torch")
    conv = torch.nn.functional.conv2d
    shape = weight(original, CONV).shape
    x = torch.tensor(normal(9, 1, shape[1], 6, 6), dtype=torch.float64)
    w = torch.tensor(weight(original, CONV))
    plain = [normal(1, RANK, shape[1], 3, 3), None, normal(2, shape[0], RANK, 1, 1)]
    tucker = [normal(3, RANK, shape[1], 1, 1), normal(4, RANK, RANK, 3, 3), normal(5, shape[0], RANK, 1, 1)]
    for i, layers in enumerate((plain, tucker)):
        roles = dict(zip(("lora_down.weight", "lora_mid.weight", "lora_up.weight"), layers))
        tensors = {f"{kohya(CONV)}.{role}": value for role, value in roles.items() if value is not None}
        file = save(tmp_path / f"{i}.safetensors", tensors | {f"{kohya(CONV)}.alpha": np.float32(1)})
        y = x
        for layer in layers:
            if layer is not None:
                y = conv(y, torch.tensor(layer, dtype=torch.float64), padding=layer.shape[-1] // 2)
        wanted = conv(x, w, padding=1) + 0.5 * y / RANK
        after = torch.tensor(weight(merged(base, (file, 0.5)), CONV))
        torch.testing.assert_close(conv(x, after, padding=1), wanted, rtol=1e-5, atol=1e-4)


def lycoris(original, algorithm):
    """Random tensors of an algorithm, and the delta by its formula in float64."""
    rng = np.random.default_rng(5)
    module = CONV if "conv" in algorithm else LINEAR
    out, flat = weight(original, module).shape[0], np.prod(weight(original, module).shape[1:])
    new = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    if algorithm == "LoHa tucker conv":
        inputs = weight(original, module).shape[1]
        t = {f"hada_t{n}": new(RANK, RANK, 3, 3) for n in (1, 2)}
        w = {f"hada_w{n}_{ab}": new(RANK, size) for n in (1, 2) for ab, size in (("a", out), ("b", inputs))}
        delta = np.prod([np.einsum("ijkl,jr,ip->prkl", t[f"hada_t{n}"].astype(float), w[f"hada_w{n}_b"],
                                   w[f"hada_w{n}_a"]) for n in (1, 2)], axis=0) / RANK  # fmt: skip
        return module, t | w, delta
    if algorithm.startswith("LoHa"):
        w = {f"hada_w{n}_{ab}": new(*s) for n in (1, 2) for ab, s in (("a", (out, RANK)), ("b", (RANK, flat)))}
        delta = np.prod([w[f"hada_w{n}_a"].astype(float) @ w[f"hada_w{n}_b"] for n in (1, 2)], axis=0) / RANK
        return module, w, delta
    w1 = {"lokr_w1": new(4, 2)}
    if algorithm == "LoKr conv":
        w2 = {"lokr_w2": new(out // 4, weight(original, module).shape[1] // 2, 3, 3)}
        delta = np.concatenate([np.concatenate([a * w2["lokr_w2"].astype(float) for a in row], axis=1)
                                for row in w1["lokr_w1"]])  # fmt: skip
        return module, w1 | w2, delta
    w2 = {"lokr_w2_a": new(out // 4, RANK), "lokr_w2_b": new(RANK, flat // 2)}
    return module, w1 | w2, np.kron(w1["lokr_w1"], w2["lokr_w2_a"].astype(float) @ w2["lokr_w2_b"]) / RANK


@pytest.mark.parametrize(
    "algorithm", ["LoHa", "LoHa conv", "LoHa tucker conv", "LoKr", "LoKr factored conv", "LoKr conv"]
)
def test_lycoris(algorithm, base, original, tmp_path):
    module, tensors, delta = lycoris(original, algorithm)
    tensors |= {"alpha": np.float32(1)}
    file = save(tmp_path / "x.safetensors", {f"{kohya(module)}.{role}": value for role, value in tensors.items()})
    wanted = weight(original, module) + 0.5 * delta.reshape(weight(original, module).shape)
    check(base, original, [(file, 0.5)], {module: wanted})


@pytest.mark.parametrize("form", ["peft", "peft conv", "per output", "per input"])
def test_dora(form, base, original, tmp_path):
    """m V / |V| with V = W + delta; the strength scales the difference from W."""
    module = CONV if "conv" in form else LINEAR
    w = weight(original, module)
    down, up = factors(w)
    v = w + product(down, up)
    axis = 1 if form == "per input" else 0
    norm = np.sqrt((v**2).sum(axis=tuple(i for i in range(v.ndim) if i != axis), keepdims=True))
    m = 1 + np.abs(normal(3, v.shape[axis]))
    wanted = w + 0.7 * (m.reshape(norm.shape) * v / norm - w)
    if form.startswith("peft"):  # which saves (1, outputs, 1, 1) for convolutions
        key, stored = f"base_model.model.{module}.", m[None, :, None, None] if "conv" in form else m
        tensors = {f"{key}lora_A.weight": down, f"{key}lora_B.weight": up, f"{key}lora_magnitude_vector": stored}
    else:
        key, stored = f"{kohya(module)}.", m.reshape(norm.shape)
        tensors = {f"{key}lora_down.weight": down, f"{key}lora_up.weight": up, f"{key}dora_scale": stored}
    check(base, original, [(save(tmp_path / "x.safetensors", tensors), 0.7)], {module: wanted})


def test_several_files_add_up(base, original, tmp_path):
    expected, files = weight(original, LINEAR), []
    for i, scale in enumerate((0.5, -1.25)):
        down, up = factors(weight(original, LINEAR), 5 * i)
        tensors = {f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}
        files.append((save(tmp_path / f"{i}.safetensors", tensors), scale))
        expected = expected + scale * product(down, up)
    check(base, original, files, {LINEAR: expected})


def test_a_scale_of_zero_and_the_dtype_on_disk_are_kept():
    half = normal(0, 4, 5).astype(np.float16)
    down, up = factors(half.T)
    tensors = {"down": as_tensor(down), "up": as_tensor(up)}
    change = ModuleDelta(file=None, keys={"down": "a", "up": "b"}, tensors=tensors)
    assert merge_array(half, [(change, 0.0)]).tobytes() == half.tobytes()
    wanted = (half.astype(np.float32) + product(down, up).T.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(merge_array(half, [(change, 1.0)]), wanted)


def pair(module, inputs=16, outputs=16):
    return {f"{module}.lora_down.weight": np.ones((2, inputs), np.float32),
            f"{module}.lora_up.weight": np.ones((outputs, 2), np.float32)}  # fmt: skip


GOOD = pair(kohya(LINEAR))
GOOD_PEFT = {f"{LINEAR}.lora_A.weight": np.ones((2, 16)), f"{LINEAR}.lora_B.weight": np.ones((16, 2))}
ONE = np.ones((2, 2), np.float32)
REFUSED = {
    "XL text": (pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "Stable Diffusion XL"),
    "XL unet": (pair("lora_unet_input_blocks_4_1_proj_in"), "Stable Diffusion XL"),
    "XL in diffusers' names": (GOOD | pair(f"unet.{BLOCK[:-1]}1.attn1.to_q"), "Stable Diffusion XL"),
    "SD 2": (pair(kohya(f"{BLOCK}.attn2.to_k"), inputs=1024), "Stable Diffusion 2"),
    "flux": (pair("lora_unet_double_blocks_0_img_attn_proj"), "Flux"),
    "motion": (pair("down_blocks.0.motion_modules.0.temporal_transformer.proj_in"), "motion LoRA"),
    "IA3": ({f"{kohya(LINEAR)}.weight": ONE, f"{kohya(LINEAR)}.on_input": ONE}, "IA3"),
    "OFT": ({f"{kohya(LINEAR)}.oft_blocks": ONE}, "OFT"),
    "GLoRA": ({f"{kohya(LINEAR)}.{n}.weight": ONE for n in ("a1", "a2", "b1", "b2")}, "GLoRA"),
    "full": ({f"{kohya(LINEAR)}.diff": ONE}, "full weights"),
    "lokr t2": ({f"{kohya(CONV)}.lokr_w1": ONE, f"{kohya(CONV)}.lokr_t2": ONE}, "lokr_t2"),
    "bundle": (GOOD | {"bundle_emb.cat.string_to_param.*": ONE}, "bundle_emb"),
    "scalar": (GOOD | {f"{kohya(LINEAR)}.scalar": np.float32(1)}, "scalar"),
    "inversion": ({"<cat>": ONE}, "--embedding"),
    "unknown module": (GOOD | pair("lora_unet_mid_block_attentions_7_proj_in"), "attentions_7_proj_in.lora_down"),
    "unknown key": (GOOD | {"something.else": ONE}, "something.else"),
    "no up": ({k: v for k, v in GOOD.items() if "down" in k}, "lora_down.weight has no counterpart"),
    "alpha alone": (GOOD | {f"{kohya(TEXT)}.alpha": np.float32(1)}, "self_attn_q_proj.alpha has no counterpart"),
    "another size": (pair(kohya(LINEAR), inputs=320, outputs=320), "320 x 320, but here it is 16 x 16"),
    "rank 0": ({f"{kohya(LINEAR)}.lora_down.weight": np.ones((0, 16), np.float32),
                f"{kohya(LINEAR)}.lora_up.weight": np.ones((16, 0), np.float32)}, "its rank is 0"),
    "twice": (GOOD | {f"unet.{LINEAR}.lora_A.weight": ONE, f"unet.{LINEAR}.lora_B.weight": ONE}, "twice"),
    "ranks differ": (GOOD | {f"{kohya(LINEAR)}.lora_up.weight": np.ones((16, 3), np.float32)}, "ranks"),
    "NaN": (GOOD | {f"{kohya(LINEAR)}.lora_up.weight": np.full((16, 2), np.nan, np.float32)}, "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused_by_name(case, base, tmp_path):
    tensors, words = REFUSED[case]
    path = tmp_path / "x.safetensors"
    if case == "NaN":
        write_safetensors(path, {k: np.nan_to_num(v) for k, v in tensors.items()}, {})
        raw = bytearray(path.read_bytes())
        raw[-4:] = np.float32(np.nan).tobytes()
        path.write_bytes(raw)
    else:
        save(path, tensors)
    with pytest.raises(UserError, match="(?s).*") as error:
        Personal.read([path]).apply({"base": base})
    assert words in str(error.value) and "x.safetensors" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("header", [{"ss_v2": "True"}, {"ss_base_model_version": "sdxl_base_v1-0"}])
def test_the_header_names_another_model(header, tmp_path):
    with pytest.raises(UserError, match="in its header"):
        read_lora(save(tmp_path / "x.safetensors", GOOD, header))


def test_arguments(tmp_path, monkeypatch):
    """A scale is what parses as a number after the last colon; colons of file names and drives stay."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style:2").write_text("")
    assert parse_lora("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert parse_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_lora(r"C:\loras\a.safetensors") == (r"C:\loras\a.safetensors", 1.0)
    assert parse_lora(r"C:\loras\a.safetensors:-1e-1") == (r"C:\loras\a.safetensors", -0.1)
    assert parse_lora("a:b.safetensors") == ("a:b.safetensors", 1.0)
    assert parse_lora("style:2") == ("style:2", 1.0)
    assert parse_embedding("cat.pt:<cat>") == ("cat.pt", "<cat>")
    assert parse_embedding(r"C:\cat.pt") == (r"C:\cat.pt", None)
    assert parse_embedding(r"C:\cat.pt:<cat>") == (r"C:\cat.pt", "<cat>")
    assert check_scale("a.safetensors", np.float32(0.5)) == 0.5
    with pytest.raises(UserError, match="finite"):
        Personal.read([("a.safetensors", float("nan"))])
    with pytest.raises(UserError, match="lists of files"):
        Personal.read(("a.safetensors", 0.5))


def test_later_stages(tmp_path, base):
    """conv_in is left out where a stage has more input channels; super-resolution is not touched, and said so."""
    stages = {s: load_folder(tiny.make_stage(tmp_path / s, s)) for s in ("interpolation", "vsr")}
    down, up = normal(0, 2, 4, 3, 3), normal(1, 16, 2, 1, 1)
    tensors = GOOD | {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}
    personal = Personal.read([save(tmp_path / "x.safetensors", tensors)])
    after, notes = personal.apply({"base": base, **stages})
    assert len(notes) == 2 and "vsr" in notes[0] and "conv_in" in notes[1]
    assert after["vsr"] is stages["vsr"]
    changed = {s: by_torch_name(after[s]) for s in ("base", "interpolation")}
    before = {"base": by_torch_name(base), "interpolation": by_torch_name(stages["interpolation"])}
    for stage, names in (("base", {"conv_in.weight", f"{LINEAR}.weight"}), ("interpolation", {f"{LINEAR}.weight"})):
        assert {n for n, x in changed[stage].items() if (x != before[stage][n]).any()} == names
    with pytest.raises(UserError, match="do not fit the stage vsr"):
        personal.apply({"vsr": stages["vsr"]})
    conv = {key: value for key, value in tensors.items() if "conv_in" in key}
    only_base = Personal.read([save(tmp_path / "conv_in.safetensors", conv)])
    after, notes = only_base.apply({"base": base, "interpolation": stages["interpolation"]})
    assert len(notes) == 1 and notes[0].startswith("not applied to interpolation")
    with pytest.raises(UserError, match="changes nothing in this model"):
        only_base.apply({"interpolation": stages["interpolation"]})


def test_names_of_full_size_models():
    """Plain kohya files have 192 modules of the UNet and 72 of CLIP ViT-L/14, LoCon 86 in resnets and samplers."""
    for stage in ("lavie_base", "lavie_interpolation"):
        unet = module_table("unet", manifest("unet", stage))
        plain = [n for n in unet if "." not in n and re.search("attn[12]_|_ff_|proj_(in|out)$", n)]
        locon = [n for n in unet if re.search("^(down|up|mid).*_(conv|conv1|conv2|time_emb_proj|conv_shortcut)$", n)]
        assert (len(plain), len(locon)) == (192, 86)
    shapes = manifest("text_encoder", "sd14_text")
    assert len([n for n in module_table("text_encoder", shapes) if re.match("text_model_.*(mlp|self_attn)", n)]) == 72


def manifest(part, name):
    """{our path: shape} of a released model."""
    names = json.loads((Path(__file__).parent / f"manifests/{name}.json").read_text())
    pairs = (from_torch(part, n, np.broadcast_to(np.float32(0), shape)) for n, shape in names.items() if len(shape) < 5)
    return {path: array.shape for path, array in pairs}

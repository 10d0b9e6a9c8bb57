"""Longer clips by FreeNoise, and prompts that change over time."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lavie_jax
import sample
from lavie_jax import parallel
from lavie_jax.cascade.denoising import Clip, _texts
from lavie_jax.cascade.model import StageModel
from lavie_jax.cascade.prompts import stage_prompts
from lavie_jax.cascade.running import Request
from lavie_jax.diffusion.free_noise import noise_sources, shuffles
from lavie_jax.errors import UserError
from lavie_jax.models.attention import attention
from lavie_jax.models.layers import Frames
from lavie_jax.models.registry import abstract_params
from lavie_jax.models.temporal_windows import AttentionWindows, attend_in_windows
from lavie_jax.models.transformer import Attention, Setting, TransformerBlock
from lavie_jax.models.unet import UNet
from lavie_jax.parity.cases import read_case
from lavie_jax.samples.outputs import make_request
from lavie_jax.samples.prompts import Prompt, check_prompts_at, parse_prompts_at, read_prompts
from lavie_jax.stages import STAGES
from lavie_jax.stages.conditioning import Prompts, travel_weights
from lavie_jax.stages.settings import BaseSettings, PredictionSettings
from lavie_jax.stages.windows import grid, overlapping, whole

GOLDEN = Path(__file__).parent / "golden"
BASE = STAGES["base"]


# ---- windows of the temporal attention ----


def test_windows_start_every_stride_and_the_last_one_ends_with_the_clip():
    assert AttentionWindows().starts(24).tolist() == [0, 4, 8]
    assert AttentionWindows().starts(26).tolist() == [0, 4, 8, 10]
    assert AttentionWindows().starts(16).tolist() == [0]
    with pytest.raises(ValueError, match="shorter than a window"):
        AttentionWindows().starts(15)
    with pytest.raises(ValueError, match="stride"):
        AttentionWindows(4, 5)


@pytest.mark.parametrize("windows, triangle", [((6, 2), [1, 2, 3, 3, 2, 1]), ((5, 3), [1, 2, 3, 2, 1])], ids=str)
def test_a_frames_weights_are_its_places_in_its_windows_normalised(windows, triangle):
    windows, length = AttentionWindows(*windows), 15
    raw = np.zeros((len(windows.starts(length)), length))
    for row, start in zip(raw, windows.starts(length)):
        row[start : start + windows.size] = triangle
    wanted = raw / raw.sum(0)
    for row, start, weights in zip(wanted, windows.starts(length), windows.weights(length)):
        np.testing.assert_allclose(weights, row[start : start + windows.size], rtol=1e-6)


@pytest.mark.parametrize("kernel", ["xla", "dot_product", "blockwise"])
def test_attention_in_windows_is_the_average_of_attention_in_each(kernel):
    windows, rng = AttentionWindows(4, 3), np.random.default_rng(0)
    q, k, v = jnp.asarray(rng.normal(size=(3, 2, 9, 2, 4)), jnp.float32)
    bias = None if kernel == "blockwise" else jnp.asarray(rng.normal(size=(1, 2, 4, 4)), jnp.float32)
    attend = functools.partial(attention, bias=bias, kernel=kernel)
    expected = np.zeros(q.shape, np.float32)
    for start, weights in zip((0, 3, 5), windows.weights(9)):
        part = slice(start, start + 4)
        expected[:, part] += weights[:, None, None] * np.asarray(attend(q[:, part], k[:, part], v[:, part]))
    np.testing.assert_allclose(attend_in_windows(attend, q, k, v, windows), expected, atol=1e-5)


def test_a_clip_of_one_window_is_the_base_models_own_program():
    def program(frames, windows):
        setting = Setting(tiny.UNET, Frames(frames, 0), jnp.float32, "auto", windows=windows)
        layer = Attention(setting, heads=2, temporal=True)
        return str(jax.make_jaxpr(layer.init_with_output)(jax.random.key(0), jnp.zeros((3, frames, 8))))

    assert program(4, AttentionWindows(4, 1)) == program(4, None)
    assert program(5, AttentionWindows(4, 1)) != program(5, None)


# ---- rescheduled noise ----


class Model(StageModel):
    """The noise of the base stage, without networks."""

    def __init__(self):
        self.stage, self.weights = BASE, None


def settings(**changes) -> BaseSettings:
    values = {**BASE.sampling, "frames": 64, "long": "free_noise", "long_window": 16, "sampler": "ddim", **changes}
    return BaseSettings.make({}, values)


def noise(seed: int, frames: int, part: range | None = None, **changes) -> np.ndarray:
    made = settings(frames=frames, **changes)
    shape = (frames, 2, 3, 4)
    return np.asarray(BASE.noise(Model(), made, seed, 0, part or range(frames), shape))


def test_the_noise_of_the_golden_case_is_exact():
    case = read_case(GOLDEN / "freenoise_sample_tiny.json")
    sources = noise_sources(case.settings["window"], case.settings["shuffles"])
    np.testing.assert_array_equal(case.input("init")[:, :, sources], case.stored["noise"])


def test_every_block_is_a_shuffle_of_the_one_a_window_earlier():
    rng = np.random.default_rng(0)
    blocks = shuffles(39, 16, rng.normal(size=(6, 4)))
    for start, block in zip(range(16, 39, 4), blocks):
        assert sorted(block) == list(range(start - 16, min(start + 4, 39) - 16))
    assert [len(block) for block in blocks] == [4, 4, 4, 4, 4, 3]
    sources = noise_sources(16, blocks)
    assert sorted(sources[16:32]) == list(range(16)) and sources[:16].tolist() == list(range(16))
    assert sources[32:39].tolist() == [sources[frame] for frame in np.concatenate(blocks[4:])]


def test_the_order_depends_on_the_seed_alone_and_is_that_of_all_channels():
    first, other = noise(3, 38), noise(4, 38)
    np.testing.assert_array_equal(first, noise(3, 38))
    np.testing.assert_array_equal(first[20:30], noise(3, 38, range(20, 30)))
    np.testing.assert_array_equal(first[:16], noise(3, 16, long=None, long_window=None))  # the base's of this seed

    def order(video):
        return [int(np.flatnonzero((video[:16] == frame).all((1, 2, 3)))[0]) for frame in video]

    assert order(first) != order(other)
    assert sorted(order(first)[16:32]) == list(range(16))
    np.testing.assert_array_equal(first[:16], noise(3, 16))


# ---- settings ----


def resolve(trained=16, temporal="before_ff", defaults=(), **given) -> BaseSettings:
    weights = SimpleNamespace(
        sampling={**BASE.sampling, "frames": trained, **dict(defaults)},
        unet=SimpleNamespace(config=dataclasses.replace(tiny.UNET, temporal_attention=temporal)),
        vae=SimpleNamespace(config=SimpleNamespace(factor=8)),
        low_res_schedule=None,
    )
    return BASE.resolve(weights, given, None)


def test_free_noise_has_the_models_window_and_a_sampler_without_noise():
    assert (resolve().long, resolve().long_window, BASE.attention_windows(resolve())) == (None, None, None)
    made = resolve(frames=64, long="free_noise")
    assert (made.sampler, made.long_window) == ("ddim", 16)
    assert BASE.attention_windows(made) == AttentionWindows(16, 4)
    assert resolve(frames=64, long="free_noise", sampler="unipc").sampler == "unipc"
    assert resolve(frames=64, long="free_noise", defaults={"sampler": "euler"}).sampler == "euler"
    assert BASE.attention_windows(resolve(frames=9, long="free_noise", long_window=6)) == AttentionWindows(6, 1)
    assert resolve(frames=16, long="free_noise").frames == 16


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"frames": 1}, "at least one window, 16 frames, not 1"),
        ({"frames": 15}, "at least one window, 16 frames, not 15"),
        ({"frames": 64, "long_window": 17}, "long_window: 17 frames are more .* use at most 16"),
        ({"frames": 64, "long_window": 1}, "long_window must be at least 2"),
        ({"frames": 64, "sampler": "ddpm"}, "without fresh noise .* such as ddim, not ddpm"),
        ({"frames": 64, "defaults": {"sampler": "lcm"}}, "without fresh noise .* such as ddim, not lcm"),
        ({"frames": 64, "long": "freenoise"}, "did you mean 'free_noise'"),
        ({"frames": 64, "trained": 1}, "this one makes images"),
        ({"frames": 64, "temporal": "none"}, "this one makes images"),
        ({"long": None, "long_window": 8}, "long_window .* long"),
    ],
)
def test_what_free_noise_cannot_do_is_refused(given, reason):
    with pytest.raises(UserError, match=reason):
        resolve(**{"long": "free_noise", **given})


# ---- prompts over time ----


def test_the_text_changes_linearly_between_its_frames_at_any_rate():
    np.testing.assert_allclose(travel_weights([1, 3], 5, 5), [[1, 0], [1, 0], [0.5, 0.5], [0, 1], [0, 1]])
    slower = travel_weights([1, 3], 5, 17)  # as interpolation makes of 5 frames
    np.testing.assert_allclose(slower[::4], travel_weights([1, 3], 5, 5))
    np.testing.assert_allclose(slower[7], [0.625, 0.375], rtol=1e-6)


def test_mixed_prompts_have_the_tokens_of_those_that_take_part():
    hidden = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    both = Prompts(hidden, np.array([[True, False, False], [True, True, False]]))
    mixed = both.mixed(np.array([[1, 0], [0.25, 0.75]], np.float32))
    np.testing.assert_array_equal(mixed.hidden, [hidden[0], 0.25 * hidden[0] + 0.75 * hidden[1]])
    np.testing.assert_array_equal(mixed.mask, [[True, False, False], [True, True, False]])


def test_windows_get_the_texts_of_their_frames_beside_clips_with_one():
    text, weights = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32), travel_weights([0, 9], 10, 10)
    common = {"null_text": Prompts(text[0]), "shape": (10, 1, 1, 4), "noise": lambda stream, frames: None}
    plain = Clip(text=lambda window: Prompts(text[1]), **common)
    travel = Clip(text=lambda window: Prompts(text).mixed(weights[window.box[0]]), **common)
    last = grid(overlapping(10, 4, 1), whole(1), whole(1))[-1]
    assert _texts([(plain, last)])[0][0].hidden.shape == (3, 5)
    (one, null), (several, _) = _texts([(plain, last), (travel, last)])
    np.testing.assert_array_equal(one.hidden, np.stack([text[1]] * 4))
    np.testing.assert_array_equal(null.hidden, np.stack([text[0]] * 4))
    np.testing.assert_allclose(several.hidden[-1], text[1])
    np.testing.assert_allclose(several.hidden[0], text[0] / 3 + 2 * text[1] / 3, rtol=1e-5)


def test_the_network_takes_a_text_for_each_frame_in_all_its_parts():
    config = dataclasses.replace(
        tiny.UNETS["vsr"], motion_embedding=True, caption_modulation=True, low_res_skip=True, up_temporal_idx=(0,)
    )
    params, inputs = {"params": abstract_params(config)}, (jnp.zeros((2, 4, 4, 6, 7)), jnp.zeros(2, jnp.int32))
    apply = functools.partial(UNet(config).apply, noise_level=jnp.zeros(2, jnp.int32))
    masked = functools.partial(apply, text_mask=jnp.ones((2, 4, 5), bool))
    assert jax.eval_shape(masked, params, *inputs, jnp.zeros((2, 4, 5, 16))).shape == (2, 4, 4, 6, 4)
    with pytest.raises(ValueError, match="4 frames, but text for 3"):
        jax.eval_shape(apply, params, *inputs, jnp.zeros((2, 3, 5, 16)))


def test_a_frames_text_is_seen_by_it_and_equal_texts_are_one():
    config = dataclasses.replace(tiny.UNET, motion_embedding=True)
    block = TransformerBlock(Setting(config, Frames(4, 0), jnp.float32, "auto"), level=0, only_text=False)
    rng = np.random.default_rng(0)
    x, text = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 4, 2, 3, 16), (1, 1, 5, 16)))
    params = jax.jit(block.init)(jax.random.key(0), x, text)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # some start at zero
    each, apply = jnp.repeat(text, 4, axis=1), jax.jit(block.apply)
    same = apply(params, x, each)
    np.testing.assert_allclose(same, apply(params, x, text), atol=2e-5)
    other = each.at[:, 2].set(rng.normal(size=(5, 16)))
    change = np.abs(apply(params, x, other) - same).max((0, 2, 3, 4))
    assert change.argmax() == 2 and change[2] > 0


def test_prompts_over_time_are_read_and_stored():
    assert parse_prompts_at("0: a red: circle|32 :a  blue circle ") == {0: "a red: circle", 32: "a blue circle"}
    at = {0: "a", 3: "b"}
    assert check_prompts_at({np.int64(0): "a", 3: "b"}) == at
    request = make_request("0: a | 3: b", 7, {"base": settings()}, {"base": "hash"}, prompts_at=at)
    stored = Request.stored(json.loads(json.dumps(request)))
    assert stored == Request.make(None, at, 4, seed=7, negative_prompt="")
    assert "prompts_at" not in make_request("a", 7, {"base": settings()}, {"base": "hash"})


@pytest.mark.parametrize(
    "text, reason",
    [
        ("a red circle", "'a red circle' is not FRAME: PROMPT"),
        ("0: a | b: c", "'b: c' is not FRAME: PROMPT"),
        ("0: a |", "'' is not FRAME: PROMPT"),
        ("-1: a", "is not FRAME: PROMPT"),
        ("0: a | 4: ", "the prompt of frame 4 is empty"),
        ("8: a | 4: b", "frames must ascend, but 4 follows 8"),
        ("4: a | 4: b", "frame 4 is given twice"),
        ("", "is not FRAME: PROMPT"),
    ],
)
def test_malformed_prompts_over_time_are_refused(text, reason, tmp_path, capsys):
    assert sample.main(["--prompts-at", text, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: prompts-at: ") and reason in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_segments_have_prompts_of_their_own():
    size = {"height": 16, "width": 16, "fps": 8, "sampler": "ddim", "steps": 2, "guidance": 4.0}
    stages = {"prediction": PredictionSettings(frames=4, **size)}
    with pytest.raises(UserError, match="prompts-at cannot be given to prediction, which makes segments"):
        stage_prompts(stages, "0: a | 2: b", {0: "a", 2: "b"})


@pytest.mark.parametrize("at", [{}, {0: ""}, {0.5: "a"}, {True: "a"}, {-1: "a"}, {3: "a", 0: "b"}, {0: 1}, "0: a"])
def test_a_mapping_that_is_not_prompts_over_time_is_refused(at):
    with pytest.raises(UserError, match="prompts_at"):
        check_prompts_at(at)


def test_prompt_files_may_have_prompts_over_time(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,prompts_at,seed\na circle,,1\n,0: a | 2: b,\n")
    one, two = read_prompts(path)
    assert one == Prompt(text="a circle", seed=1)
    assert two == Prompt(text="0: a | 2: b", at={0: "a", 2: "b"})
    path.write_text("prompt,prompts_at\na circle,0: a\n")
    with pytest.raises(UserError, match="line 2: give a text as either prompt or prompts_at"):
        read_prompts(path)
    (lines := tmp_path / "prompts.jsonl").write_text('{"prompts_at": {"0": "a"}}')
    with pytest.raises(UserError, match='line 1: prompts_at is a text, "0: a red circle'):
        read_prompts(lines)
    path.write_text("prompts_at\n3: a | 1: b\n")
    with pytest.raises(UserError, match="line 2, prompts_at: frames must ascend"):
        read_prompts(path)


# ---- from the command line ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("weights") / "base")


def test_sample_py_makes_a_long_clip_of_two_prompts_as_python_does(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parallel, "local_devices", lambda: jax.devices()[:1])  # `heavy` tests take several

    def run(*args):
        return sample.main([*args, "--weights", str(folder), "--out", str(tmp_path / "out")])

    text, long = "0: a red circle | 4: a blue square", ("--frames", "6", "--long", "free_noise", "--format", "npz")
    assert run("--prompts-at", text, "--steps", "2", *long, "--no-contact-sheet") == 0
    stem = "0000-0-a-red-circle-4-a-blue-square-0"
    with np.load(tmp_path / f"out/{stem}.npz") as arrays:
        video = arrays["video"]
    request = json.loads((tmp_path / f"out/{stem}.json").read_text())["request"]
    assert request["prompt"] == text and request["prompts_at"] == {"0": "a red circle", "4": "a blue square"}
    assert (request["long"], request["long_window"], request["frames"]) == ("free_noise", 4, 6)
    pipe, options = lavie_jax.load(folder), {"frames": 6, "long": "free_noise", "steps": 2}
    np.testing.assert_array_equal(pipe(prompts_at={0: "a red circle", 4: "a blue square"}, **options)[0], video)
    capsys.readouterr()
    assert run("--prompts-at", text, "--steps", "2", *long, "--no-contact-sheet") == 0
    assert "1 of 1 samples exist" in capsys.readouterr().out
    for at, reason in (({0: "a", 6: "b"}, "frame 6 is beyond the clip, whose frames are 0 to 5"), (None, "either")):
        with pytest.raises(UserError, match=reason):
            pipe(prompts_at=at, **options)
    with pytest.raises(UserError, match="either a prompt or prompts_at"):
        pipe("a", prompts_at={0: "a"}, **options)


@pytest.mark.parametrize(
    "args, reason",
    [
        (("--prompts-at", "0: a | 6: b", "--frames", "6"), "prompts-at: frame 6 is beyond the clip"),
        (("--prompt", "a", "--frames", "1", "--long", "free_noise"), "at least one window, 4 frames, not 1"),
        (("--prompt", "a", "--frames", "8", "--long", "free_noise", "--long-window", "5"), "use at most 4"),
        (("--prompt", "a", "--stages", "vsr", "--input", "x.mp4", "--long", "free_noise"), "long is given for base"),
    ],
)
def test_impossible_requests_end_in_one_line(folder, tmp_path, capsys, args, reason):
    assert sample.main([*args, "--weights", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
def test_long_clips_are_the_same_on_any_devices(folder):
    def video(count, **how):
        pipe = lavie_jax.load(folder, devices=jax.devices()[:count], **how)
        at = {0: "a red circle", 4: "a blue square"}
        return pipe(prompts_at=at, frames=6, long="free_noise", steps=2)[0].astype(int)

    alone = video(1)
    assert np.abs(video(2, fsdp=2) - alone).max() <= 1
    assert np.abs(video(4) - alone).max() <= 1

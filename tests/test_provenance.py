"""Samples' files state that they are generated and by what, and can be made again from it."""

import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tiny
from PIL import Image

import lavie_jax
import sample
from lavie_jax.data.embedded import Metadata, read_metadata
from lavie_jax.data.video_files import read_video, save_as
from lavie_jax.disk import process_name
from lavie_jax.errors import UserError
from lavie_jax.samples import again
from lavie_jax.samples.outputs import Output, make_request
from lavie_jax.samples.provenance import GENERATED, GENERATED_SOURCE, describe, read_request
from lavie_jax.stages import base, vsr
from lavie_jax.stages.settings import BaseSettings, VSRSettings

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
REQUEST = {"prompt": 'a <b>"ü"</b> & 猫', "seed": 3, "stages": ["base"], "weights_sha256": "0" * 600}


@pytest.mark.parametrize("format", ["mp4", "gif", "png"])
def test_files_contain_the_request_and_the_same_pixels(format, tmp_path):
    paths = {
        name: save_as(FRAMES, tmp_path / name, format, fps=8, metadata=metadata)
        for name, metadata in (("described", describe(REQUEST)), ("marked", GENERATED), ("bare", None))
    }
    assert read_request(paths["described"]) == REQUEST
    if format != "gif":
        assert read_metadata(paths["described"]).title == REQUEST["prompt"]
    assert GENERATED_SOURCE in read_metadata(paths["marked"]).xmp and read_metadata(paths["bare"]) is None
    for name in ("marked", "bare"):
        with pytest.raises(UserError, match="does not contain how it was made"):
            read_request(paths[name])
    pages = {name: sorted(path.iterdir()) if path.is_dir() else [path] for name, path in paths.items()}
    assert not any(b"prompt" in page.read_bytes() or b"&amp;" in page.read_bytes() for page in pages["marked"])
    if format == "png":
        shown = {n: [np.asarray(Image.open(page)) for page in of_name] for n, of_name in pages.items()}
    else:
        shown = {name: read_video(path) for name, path in paths.items()}
    np.testing.assert_array_equal(shown["described"], shown["bare"])
    np.testing.assert_array_equal(shown["marked"], shown["bare"])


def test_the_packet_is_xml_with_the_field_of_iptc():
    from xml.etree import ElementTree

    described = describe(REQUEST | {"prompt": "a\x00b\n<c>\uffff"})
    root = ElementTree.fromstring(described.xmp)
    names = {element.tag: element.text for element in root.iter()}
    assert names["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"] == GENERATED_SOURCE
    assert names["{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"] == described.title == "ab\n<c>"


def test_videos_of_the_python_interface_are_marked(tmp_path):
    path = lavie_jax.save_video(FRAMES, tmp_path / "a.mp4", fps=8)
    assert read_metadata(path) == GENERATED


def test_a_sample_without_its_request_is_still_marked(tmp_path):
    settings = BaseSettings.make(base.STAGE.sampling, {"frames": 5, "height": 32, "width": 48})
    request = make_request("a secret", 0, {"base": settings}, {"base": "0" * 64})
    (path,) = Output(folder=tmp_path, index=0, formats=("mp4",), request=request, describe=False).write(
        FRAMES, ("mp4",), {}
    )
    assert read_metadata(path) == GENERATED and b"secret" not in path.read_bytes()


def test_a_folder_of_a_killed_process_of_this_number_does_not_stop_a_sample(tmp_path):
    settings = BaseSettings.make(base.STAGE.sampling, {"frames": 5, "height": 32, "width": 48})
    request = make_request("a circle", 0, {"base": settings}, {"base": "0" * 64})
    output = Output(folder=tmp_path, index=0, formats=("png",), request=request)
    (tmp_path / f".{process_name()}-{output.stem}").mkdir()
    (path,) = output.write(FRAMES, ("png",), {})
    assert len(list(path.glob("*.png"))) == 5 and not list(tmp_path.glob(".*"))


def test_the_options_of_a_request_lead_to_its_settings():
    given = {"steps": 3, "guidance": 2.5, "negative_prompt": "-blue, = 'x'", "height": 32, "long_window": 8}
    settings = {
        "base": BaseSettings.make(base.STAGE.sampling, given),
        "vsr": VSRSettings.make(vsr.STAGE.sampling, {"steps": 2, "fps": 8}),
    }
    request = make_request("-1 red | circle", 7, settings, {"base": "0" * 64, "vsr": "1" * 64})
    args = sample.parse_args(again.options_of(request))
    (prompt,) = sample.read_requests(args)
    assert (prompt.text, args.seed, args.stages) == ("-1 red | circle", 7, ("base", "vsr"))
    for stage, own in settings.items():
        given = args.given[stage]
        assert given["steps"] == own.steps and {**own.to_dict(), **given} == own.to_dict()
    assert args.given["base"]["negative_prompt"] == "-blue, = 'x'"
    assert "long_window" not in args.given["base"]  # which sample.py refuses without --long
    args = sample.parse_args(again.options_of(request | {"prompts_at": {"0": "a red", "8": "a blue"}}))
    (prompt,) = sample.read_requests(args)
    assert dict(prompt.at) == {0: "a red", 8: "a blue"}


@pytest.mark.heavy
def test_a_sample_is_made_again_from_its_file(tmp_path, capsys):
    weights = tiny.make_base(tmp_path / "weights")

    def run(*options):
        return sample.main([*options, f"--weights={weights}"])

    first = [
        "--prompt",
        "-1 red circle",
        "--seed",
        "7",
        "--fps",
        "5",
        "--negative-prompt",
        "blue",
        "--no-contact-sheet",
    ]
    assert run(*first, "--out", str(tmp_path / "first"), "--format", "gif") == 0
    (file,) = (tmp_path / "first").glob("*.gif")
    file = file.rename(tmp_path / "shared.gif")  # without its JSON
    options, sidecar = again.prepare(file, tmp_path / "second", [])
    assert run(*options) == 0
    assert file.read_bytes() == sidecar.with_suffix(".gif").read_bytes()
    stored = json.loads(sidecar.read_text())
    assert stored["request"] == read_request(file) and stored["made_with"]

    # Other weights are refused before anything is sampled.
    request = read_request(file) | {"weights_sha256": "1" * 64}
    save_as(FRAMES, tmp_path / "other", "gif", fps=8, metadata=describe(request))
    capsys.readouterr()
    assert run(*again.prepare(tmp_path / "other.gif", tmp_path / "third", [])[0]) == 2
    assert "weights_sha256" in capsys.readouterr().err and not list((tmp_path / "third").glob("*.gif"))


def test_what_cannot_be_made_again_is_refused(tmp_path, monkeypatch, capsys):
    def refused(name, *options):
        with pytest.raises(SystemExit) as stopped:
            again.main([str(tmp_path / name), "--out", str(tmp_path / "out"), *options])
        assert stopped.value.code == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "a.json").write_text("{}")
    request = {**REQUEST, "input_sha256": "0" * 64}
    (tmp_path / "b.json").write_text(json.dumps({"request": request}))
    (tmp_path / "c.json").write_text(json.dumps({"request": REQUEST | {"stages": ["later"]}}))
    (tmp_path / "d.JSON").write_text(json.dumps({"request": REQUEST | {"stages": ["base", "vsr"]}}))
    for name, damage in (("i", {"seed": "../x"}), ("j", {"prompt": "a\0"}), ("k", {"sampler": "\ud800"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"request": REQUEST | damage}))
    Image.new("L", (8, 8)).save(tmp_path / "e.png", pnginfo=describe(REQUEST).png_chunks())
    picture = (tmp_path / "e.png").read_bytes()
    header = b"IHDR" + (40_000).to_bytes(4) * 2 + picture[24:29]
    (tmp_path / "f.png").write_bytes(picture[:12] + header + zlib.crc32(header).to_bytes(4) + picture[33:])
    (tmp_path / "g.mp4").write_bytes((1).to_bytes(4) + b"free")
    nested = Metadata(xmp="x", comment="[" * 100_000)
    Image.new("L", (8, 8)).save(tmp_path / "h.png", pnginfo=nested.png_chunks())
    assert "does not exist" in refused("none.mp4")
    assert "cannot be read" in refused("text.mp4")
    assert "does not contain how it was made" in refused("a.json")
    assert "give them with --input" in refused("b.json")
    assert "known are base" in refused("c.json")
    assert "lacks the settings of vsr" in refused("d.JSON")
    assert "too many pixels" in refused("f.png") and "cannot be read" in refused("g.mp4")
    assert "cannot be read" in refused("h.png") and "seed must be" in refused("i.json")
    assert "NUL" in refused("j.json") and "not valid Unicode" in refused("k.json")
    for option in ("--seed=4", "--steps", "--prompt=b", "--overwrite"):
        assert f"{option.split('=')[0]}: the sample is made again as" in refused("e.png", option)
    commands = []
    monkeypatch.setattr(
        subprocess, "run", lambda command: commands.append(command) or subprocess.CompletedProcess(command, 2)
    )
    with pytest.raises(SystemExit):
        again.main([str(tmp_path / "b.json"), "--out", str(tmp_path / "out"), "--input", "clip.mp4"])
    assert commands[0][:2] == [sys.executable, str(again.SCRIPT)] and commands[0][-2:] == ["--input", "clip.mp4"]
    assert not list((tmp_path / "out").iterdir())

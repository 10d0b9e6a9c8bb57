"""The planner: counts, reports and refusals. Tests that compile for a TPU need libtpu."""

import importlib.util
import json
import os
import re
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lavie_jax import flops, parallel
from lavie_jax.errors import UserError
from lavie_jax.flops import count_flops
from lavie_jax.models.attention import attention, rotary_embedding
from lavie_jax.models.layers import Frames
from lavie_jax.models.transformer import Setting, TransformerBlock
from lavie_jax.planner import __main__ as command
from lavie_jax.planner import chips, memory_plan, report, tables
from lavie_jax.planner.chips import bound
from lavie_jax.planner.hlo import collectives
from lavie_jax.planner.measure import bytes_needed, compiled, planned, trace
from lavie_jax.planner.programs import Program, bytes_per_chip, placed
from lavie_jax.planner.sampling import program_names, sampling_program, sampling_programs
from lavie_jax.planner.subprocess import measure_in_subprocess
from lavie_jax.planner.training import abstract_batch, abstract_init, held_out_program, training_program
from lavie_jax.stages import STAGES
from lavie_jax.training import build, options
from lavie_jax.training.state import abstract_params
from lavie_jax.training.step import step_flops

ROOT = Path(__file__).parents[1]
GIB = 2**30


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


# ---- FLOPs ----


def counted(f, *shapes) -> float:
    return count_flops(jax.make_jaxpr(f)(*(jnp.zeros(shape) for shape in shapes)))


def test_a_matrix_product_and_a_convolution():
    assert counted(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert counted(convolve, (2, 8, 8, 4), (3, 3, 4, 6)) == 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)


@pytest.mark.heavy
def test_flops_of_a_step_do_not_depend_on_remat(tmp_path):
    """They are nearly three times those of the forward pass: gradients of inputs and of parameters."""
    counts = {}
    for remat in ("none", "block"):
        config = options.load("configs/moving_shapes/base.py:tiny")
        config.remat, config.cpu_devices = remat, 0
        task = build.stage_task(config, jnp.float32, abstract_init(config))
        params = abstract_params(task)
        batch, mesh = abstract_batch(config, 1), parallel.make_mesh(devices=jax.devices()[:1])
        counts[remat] = step_flops(task, params, task.frozen, batch, mesh)
        forward = count_flops(jax.make_jaxpr(task.loss)(params, task.frozen, batch, jax.random.key(0)))
    assert counts["none"] == counts["block"] and 2.2 * forward < counts["none"] < 3 * forward


def test_the_peak_is_configured_or_looked_up():
    mesh = parallel.make_mesh(data=2, fsdp=4)
    assert flops.peak_flops(mesh, 0.5) == 8 * 0.5e12 and flops.peak_flops(mesh, 0.0) == 0
    assert set(flops.KINDS.values()) == set(flops.PEAKS) == set(chips.CHIPS)


def test_products_that_only_move_data_are_not_counted(monkeypatch):
    """On TPUs a product swaps rotary pairs, in forward and backward passes and under rematerialisation."""
    monkeypatch.setattr("lavie_jax.models.attention.platform", lambda: "tpu")
    rotated = lambda x: rotary_embedding(x, 2, 8).sum()  # noqa: E731
    x = jnp.zeros((1, 4, 32))
    assert "dot_general" in str(jax.make_jaxpr(jax.grad(rotated))(x))
    for f in (rotated, jax.grad(rotated), jax.grad(jax.checkpoint(rotated))):
        assert counted(f, x.shape) == 0


def test_loops_count_every_iteration_and_branches_once():
    def loop(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    assert counted(loop, (2, 4), (4, 4)) == 5 * 2 * 2 * 4 * 4
    assert counted(jax.checkpoint(loop), (2, 4), (4, 4)) == 5 * 2 * 2 * 4 * 4

    def branches(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    assert counted(branches, (2, 4), (4, 4)) == 2 * 2 * 4 * 4


def test_custom_kernels_count_like_plain_attention():
    """A custom kernel's work is counted on all devices."""
    shape = (4, 256, 2, 64)
    mesh = parallel.make_mesh(data=4, tensor=2)
    with jax.set_mesh(mesh):
        flash = counted(lambda x: attention(x, x, x, kernel="flash"), shape)
    assert flash == counted(lambda x: attention(x, x, x, kernel="xla"), shape) == 2 * 2 * 4 * 2 * 256 * 256 * 64


# ---- collectives ----

HLO = """\
HloModule jit_step

%more (a: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%a, %limit), direction=LT
}

%all-reduce-scatter.1 (input: bf16[64,64]) -> bf16[16,64] {
  %sum.1 = bf16[64,64]{1,0} all-reduce(%input), channel_id=6, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = bf16[16,64]{1,0} dynamic-slice(%sum.1, %i, %j), dynamic_slice_sizes={16,64}
}

%fused (p: bf16[16,64]) -> bf16[64,64] {
  ROOT %gathered.1 = bf16[64,64]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=9, dimensions={0}
}

%body (a: s32[]) -> s32[] {
  %begun = (bf16[16,64], bf16[64,64]{1,0}) all-gather-start(%p), channel_id=9, dimensions={0}
  %fusion.1 = bf16[64,64]{1,0} fusion(%p), kind=kOutput, calls=%fused
  %fusion.2 = bf16[16,64]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = s32[] add(%a, %one)
}

%unused (p: f32[8]) -> f32[8] {
  ROOT %never = f32[8]{0} all-reduce(%p), channel_id=11, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = s32[] while(%zero), condition=%more, body=%body, metadata={op_name="jit(step)/while"}
  %known = s32[] while(%zero), condition=%other, body=%none, backend_config={"known_trip_count":{"n":"3"}}
  %loss = f32[]{:T(128)} all-reduce(%x), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  %rows = f32[2,8]{1,0} reduce-scatter(%y), channel_id=8, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
  ROOT %x = f32[8]{0} copy(%x)
}
"""


def test_collectives_in_loops_and_with_several_names_are_counted():
    whole = 64 * 64 * 2
    assert collectives(HLO) == {
        "all-gather": {"count": 6, "bytes": 6 * whole},
        "all-reduce": {"count": 1, "bytes": 4},
        "reduce-scatter": {"count": 7, "bytes": 6 * whole + 4 * 2 * 8 * 4},
    }
    assert collectives("") == {}


def test_a_compiled_row_and_a_planned_row_agree(tmp_path):
    """A program on 8 CPU devices, with one all-reduce, compiled completely and read from the compiler's plan."""
    mesh = parallel.make_mesh()
    rows = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    whole = jax.ShapeDtypeStruct((32, 4), jnp.float32)
    whole, rows = placed(whole, parallel.replicated(mesh)), placed(rows, parallel.batch_sharding(mesh))

    def step(w, x):
        return w + 1, jnp.tanh(jnp.sort(x @ w)).sum()

    lowered, row = trace(
        Program(
            name="step", function=jax.jit(step, donate_argnums=0), mesh=mesh, arguments=(whole, rows),
            held={"parameters": whole},
        )
    )  # fmt: skip
    assert row["flops"] == 2 * 16 * 32 * 4 / 8
    assert row["held"] == {"parameters": 32 * 4 * 4}
    full = compiled(row, lowered, dump=str(tmp_path))
    assert memory_plan.read(tmp_path) is None  # the CPU compiler does not write the last file
    (tmp_path / memory_plan.NEXT).touch()
    early = planned(row, memory_plan.read(tmp_path), 0.0)
    assert early.pop("seconds").keys() == {"trace", "plan"} and full.pop("seconds").keys() == {"trace", "compile"}
    assert full["needs"] - early["needs"] == full["code"]
    for one in (full, early):
        assert one["fits"] and one["arguments"] == 32 * 4 * 4 + 2 * 32 * 4
        assert one["donated"] == 32 * 4 * 4 and one["outputs"] > one["donated"]
        assert one["collectives"]["all-reduce"]["count"] == 1
    assert {name: full[name] for name in early if name != "needs"} == {k: v for k, v in early.items() if k != "needs"}


def test_both_formats_of_the_plan_are_read():
    """jax 0.12 adds page numbers."""
    lines = (
        "size 512, {}parameter 0, shape |f32[32,4]| at ShapeIndex {{}}, maybe-live-out:",
        "size 256, {}parameter 1, shape |f32[2,32]| at ShapeIndex {{}}:",
        "size 16, {}output shape is |(f32[32,4], f32[])|, maybe-live-out:",
        "size 8, {}thread-local:",
        "size 4, {}constant:",
        "size 1024, {}color 1, preallocated-temp:",
        "size 64, {}preallocated-temp:",
        "size 32, {}maybe-live-out:",
    )
    for page in ("", "page 0, "):
        text = "BufferAssignment:\n" + "".join(
            f"allocation {i}: {line.format(page)}\n value: <1 p @0> (size=512,offset=0): f32[32,4]\n"
            for i, line in enumerate(lines)
        )
        assert memory_plan.allocations(text) == {"arguments": 768, "outputs": 560, "donated": 512, "temporary": 64}


# ---- rows ----


def row(**changes):
    return {
        "kind": "training", "config": "configs/base.py", "changed": {}, "topology": "v5e:4x4", "slices": 1,
        "per_chip_batch": 1, "remat": "block", "program": "training step", "note": "16 x 20 frames", "chips": 16,
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
        "held": {"parameters": GIB, "optimizer": 2 * GIB, "ema": GIB, "frozen": 0, "batch": 0}, "beside": 0,
        "flops": 197e12, "versions": {"jax": "0.10.2", "libtpu": "0.0.42.1"}, "fits": True, "arguments": 4 * GIB,
        "outputs": 4 * GIB, "donated": 4 * GIB, "temporary": 6 * GIB, "code": 0, "needs": 10 * GIB,
        "compiler_flops": 1e12, "compiler_traffic": 81.9e9, "seconds": {"trace": 1.0, "compile": 2.0},
        "collectives": {"all-gather": {"count": 3, "bytes": 10**9}, "all-reduce": {"count": 1, "bytes": 10**9}},
    } | changes  # fmt: skip


def without_code(row):
    """Returns the row of a program whose compilation ended at the memory plan."""
    late = ("code", "compiler_flops", "compiler_traffic")
    return {k: v for k, v in row.items() if k not in late} | {"seconds": {"trace": 1.0, "plan": 2.0}}


def test_the_bound_is_the_largest_of_three():
    usual = bound(row(), chips.CHIPS["v5e"])
    assert usual == pytest.approx((1.0, 0.1, 3e9 / 200e9))
    assert (usual.seconds, usual.reason) == (usual.arithmetic, "arithmetic")
    slow = bound(row(flops=0.0, compiler_traffic=0.0), chips.CHIPS["v5e"])
    assert slow.memory == pytest.approx((8 + 2 * 6) * GIB / 819e9)  # even if the compiler reports less
    assert slow.reason == "memory"
    early = bound(without_code(row()), chips.CHIPS["v5e"])
    assert early == pytest.approx((1.0, 20 * GIB / 819e9, 3e9 / 200e9))


def test_a_report_states_whether_a_program_fits_and_by_how_much():
    text = report.lines(row())
    assert "16 x v5e (data 1, fsdp 16, tensor 1)" in text and "total 10.00 of 15.75 GiB: fits, 5.75 GiB left" in text
    assert "3 all-gather 0.93 GiB" in text and "estimate, roofline bound: at least 1000.0 ms (arithmetic" in text
    early = report.lines(without_code(row()))
    assert "temporary 6.00\n" in early and "5.75 GiB left, without the size of the code" in early
    full = row(fits=False, needs=20 * GIB)
    for name in ("arguments", "outputs", "temporary", "collectives", "compiler_flops"):
        full.pop(name)
    assert "does not fit, by 4.25 GiB" in report.lines(full)
    assert not report.fits(row(beside=6 * GIB))  # the other models stay on the chip
    assert "does not fit into 15.75" in report.lines(full | {"needs": None})


def test_the_compilers_out_of_memory_message_is_parsed():
    text = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: it wants (19.69G) exceeds available HBM (15.75G)"
    assert bytes_needed(text) == int(19.69 * GIB)
    assert bytes_needed("Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm.") == int(512.5 * 2**20)
    assert bytes_needed("something else") is None


def test_rows_are_added_replaced_and_written_as_tables(tmp_path):
    path = tmp_path / "planner.json"
    report.append(path, row())
    report.append(path, row(per_chip_batch=2, fits=False, needs=None))
    report.append(path, row(needs=11 * GIB))
    guided = {"kind": "base", "program": "guided step", "remat": "none"}
    report.append(path, row(**guided, topology="v5e:1x1", chips=1, program_flops=16e12))
    report.append(path, row(**guided, topology="v5e:2x4", chips=8, per_chip_batch=1 / 8, program_flops=2e12))
    report.append(path, without_code(row(topology="v6e:4x4")))
    assert [r["needs"] for r in report.read(path)] == [None, 11 * GIB, 10 * GIB, 10 * GIB, 10 * GIB]
    command.main(["--tables", str(path)])
    training, sampling = ((tmp_path / name).read_text() for name in ("planner.md", "memory.md"))
    assert "| 1.00 | 2.00 | 1.00 | 0.00 | 6.00 | 0.00 | 11.00 | 15.75 | yes |" in training
    assert "| 6.00 |  | 10.00 | 31.24 | yes |" in training and "|  | 2 s |" in training and "| 2 s |  |" in training
    assert "| ? | 15.75 | **no** |" in training
    assert "| base | guided step |" in sampling and "| vsr |" not in sampling
    assert "| base | v5e:2x4 | 2.00 | 1/8.00 |" in sampling
    for page in (training, sampling):
        widths = {line.count("|") for line in re.findall(r"(?:^\|.*\n?)+", page, re.M)[0].splitlines()}
        assert len(widths) == 1


def test_the_pages_in_docs_are_up_to_date(tmp_path):
    (tmp_path / "planner.json").write_text((ROOT / "docs/planner.json").read_text())
    for path in tables.write_tables(tmp_path / "planner.json"):
        assert path.read_text() == (ROOT / "docs" / path.name).read_text()


def test_the_search_compiles_at_most_four_times():
    tried = []

    def run(block, none, full=0):
        tried.clear()

        def fits(rows, remat):
            tried.append((rows, remat))
            return rows <= {"block": block, "none": none, "full": full}[remat]

        return command.search(fits, 1)

    assert run(8, 8) == (4, "none") and tried == [(1, "block"), (2, "block"), (4, "block"), (4, "none")]
    assert run(2, 1) == (2, "block") and len(tried) == 4
    assert run(0, 0) is None and tried == [(1, "block"), (1, "full")]
    assert run(0, 0, full=1) == (1, "full")


# ---- programs ----


@pytest.mark.heavy  # the next test plans a small config, and test_parallel.py how parameters are split
def test_the_training_program_has_the_shapes_of_its_config():
    config = options.load("configs/base.py")
    program = training_program(config, jax.devices(), 2)
    assert program.mesh.shape == {"data": 1, "fsdp": 8, "tensor": 1}
    state, _, batch = program.arguments
    assert batch["video"].shape == (16, 16, 320, 512, 3)
    parameters, moments = (bytes_per_chip(state[name]) for name in ("params", "opt_state"))
    assert 909.1e6 * 4 / 8 < parameters < 1.01 * 909.1e6 * 4 / 8  # all but norms and biases are split
    assert moments == pytest.approx(2 * parameters, rel=1e-3)
    assert {x.dtype for x in jax.tree.leaves(program.arguments[1])} == {jnp.dtype("bfloat16")}


def test_held_out_batches_and_losses_are_planned():
    """The batches stay on the devices during training, and the state does while held-out losses are computed."""
    config = options.load("configs/base.py:tiny")
    config.held_out_batches, config.accumulate = 3, 2
    step, held_out = (make(config, jax.devices(), 2) for make in (training_program, held_out_program))
    assert len(step.beside) == 3 and step.beside[0] == step.arguments[2]
    state, batch = step.arguments[0], bytes_per_chip(step.arguments[2])
    beside = sum(bytes_per_chip(state[name]) for name in ("params", "opt_state")) + 2 * batch
    assert bytes_per_chip(held_out.beside) == beside
    assert held_out.trace().out_info["video_loss"].shape == ()
    assert bytes_per_chip(held_out.arguments) > bytes_per_chip(held_out.arguments[-1]) > 0  # the last is a random key


@pytest.mark.parametrize(
    "stage", ["base", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("prediction", "interpolation", "vsr"))]
)
def test_the_sampling_programs_have_the_shapes_of_their_stage(stage):
    step, *others = sampling_programs(options.load(f"configs/{stage}.py"), stage, jax.devices()[:1])
    assert (step.name, *(p.name for p in others)) == program_names(STAGES[stage])
    sides = {"interpolation": (61, 40, 64), "vsr": (8, 320, 512)}.get(stage, (16, 40, 64))
    assert step.arguments[1].shape == (1, *sides, 4)
    assert step.static["sequential_guidance"] == (stage in ("interpolation", "vsr"))
    frames = (1, 320, 512, 4) if stage == "vsr" else (4, 40, 64, 4)
    assert others[0].arguments[1].shape == frames


# ---- refusals ----

BASE = ["--config", "configs/base.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        ([*BASE, "--topology", "v5:4x4"], "did you mean 'v5p'? Allowed: v4, v5e, v5p, v6e"),
        ([*BASE, "--topology", "v5e:4x4x4"], "v5e has 2 axes, such as v5e:1x1"),
        ([*BASE, "--topology", "v5p:4x0x4"], "v5p has 3 axes"),
        ([*BASE, "--per-chip-batch", "0"], "--per-chip-batch: must be at least 1"),
        ([*BASE, "--per-chip-batch", "two"], "invalid int value: 'two'"),
        ([*BASE, "--search", "--sample", "base"], "--search is for training"),
        ([*BASE, "--program", "VAE decode"], "--program goes with --sample"),
        ([*BASE, "--config.batsh=3"], "did you mean 'batch'"),
        ([*BASE, "extra"], "unexpected argument 'extra'"),
        (["--config", "configs/nothing.py"], "does not exist"),
        (["--tables", "nowhere.json"], "no such file"),
        ([*BASE, "--json", "README.md"], "is not a result of this command"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1


def test_without_libtpu_the_error_has_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else object())
    with pytest.raises(UserError, match=r"pip install -e '.\[tpu\]'"):
        chips.devices("v5e:1x1")


def test_a_mesh_or_a_batch_that_does_not_fit_is_refused():
    config = options.load("configs/base.py")
    config.mesh.fsdp = 3
    with pytest.raises(UserError, match="does not fit 8 devices"):
        training_program(config, jax.devices(), 1)
    config.mesh.fsdp, config.accumulate = 8, 3
    with pytest.raises(UserError, match="choose a multiple of 24"):
        training_program(config, jax.devices(), 1)
    with pytest.raises(UserError, match="cascade's stages"):
        training_program(options.load("configs/moving_shapes/vae.py"), jax.devices(), 1)
    with pytest.raises(UserError, match="use configs/vsr.py"):
        sampling_programs(options.load("configs/base.py"), "vsr", jax.devices())


# ---- with libtpu, which `make test` installs next to the environment (tools/libtpu_for_tests.py) ----

# Bytes of one v5e chip without the code, planned by jax 0.10.2 and libtpu 0.0.42.1; tests fail if they grow by a tenth.
COMMITTED = {"tiny decode": 1_622_016, "tiny step": 19_184_640, "block": 2_723_685_376}


@pytest.fixture
def libtpu(monkeypatch):
    """Lets subprocesses find libtpu, and compile with default settings."""
    folder = Path(sys.prefix) / "libtpu-for-tests"
    if folder.is_dir():
        monkeypatch.syspath_prepend(folder)
    elif importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: make test does it")
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)


def test_meshes_of_tpu_topologies(libtpu):
    assert len(chips.devices("v4:2x2x4")) == 16  # one per chip
    two_slices = chips.devices("v5e:4x4", 2)
    mesh = parallel.make_mesh(data=2, fsdp=-1, devices=two_slices)
    assert mesh.shape == {"data": 2, "fsdp": 16, "tensor": 1}
    assert [{d.slice_index for d in half.flat} for half in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match="multiple of the slices"):
        parallel.make_mesh(data=1, fsdp=-1, devices=two_slices)
    with pytest.raises(UserError, match="product of whole axes"):
        parallel.make_mesh(data=2, fsdp=4, tensor=2, devices=chips.devices("v6e:4x4"))
    with pytest.raises(UserError, match="libtpu does not support topology"):
        chips.devices("v5e:3x5")


def tiny_decode(devices):
    return sampling_program(options.load("configs/base.py:tiny"), "base", "VAE decode", devices)


def tiny_step(devices):
    return training_program(options.load("configs/base.py:tiny"), devices, 1)


def block(devices):
    """Returns the gradient of a block of the base's outermost level, for 16 frames and 4 images of 40x64 latents."""
    config = build.make_models(options.load("configs/base.py"), jnp.bfloat16, 1.0).unet.config
    module = TransformerBlock(Setting(config, Frames(16, 4), jnp.bfloat16, "auto"), 0, False)
    mesh = parallel.make_mesh(devices=devices)
    x = jax.ShapeDtypeStruct((1, 20, 40, 64, 320), jnp.bfloat16)
    text = jax.ShapeDtypeStruct((1, 5, 77, 768), jnp.bfloat16)
    params = jax.eval_shape(module.init, jax.random.key(0), x, text)

    def loss(params, x, text):
        return jnp.square(module.apply(params, x, text)).mean()

    arguments = tuple(placed(tree, parallel.batch_sharding(mesh)) for tree in (x, text))
    params = placed(params, parallel.replicated(mesh))
    return Program(
        name="block", function=jax.jit(jax.grad(loss, argnums=(0, 1))), arguments=(params, *arguments), mesh=mesh,
        context=True, held={},
    )  # fmt: skip


@pytest.mark.parametrize(
    "make", [tiny_decode, *(pytest.param(make, marks=pytest.mark.heavy) for make in (tiny_step, block))], ids=COMMITTED
)
def test_memory_does_not_grow(make, request, libtpu):
    """Stops at the memory plan: generating the machine code of the block takes a minute."""
    row = measure_in_subprocess(make, "v5e:1x1", code=False)
    assert json.dumps(row) and "code" not in row
    assert row["needs"] == pytest.approx(COMMITTED[request.node.callspec.id], rel=0.1)


def products(devices):
    mesh = parallel.make_mesh(devices=devices)
    x = placed(jax.ShapeDtypeStruct((4096, 4096), jnp.float32), parallel.replicated(mesh))
    function = jax.jit(lambda x: jnp.sort(x @ x) @ jnp.cumsum(x @ x.T, axis=0))
    return Program(name="products", function=function, arguments=(x,), mesh=mesh, held={})


@pytest.mark.heavy  # test_a_compiled_row_and_a_planned_row_agree compares the two on a CPU
def test_a_compiled_program_needs_as_much_memory_as_was_planned(libtpu):
    early, full = (measure_in_subprocess(products, "v5e:1x1", code=code) for code in (False, True))
    assert full["temporary"] > 2**26 and full["needs"] - full["code"] == pytest.approx(early["needs"], abs=2**21)
    assert full["code"] > 0 and full["compiler_flops"] >= 3 * 2 * 4096**3


def refused(devices):
    raise UserError("not with these devices")


def failing(devices):
    raise ValueError("something is wrong")


def killed(devices):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.heavy
def test_errors_of_the_compiling_subprocess_are_raised(libtpu, capfd):
    with pytest.raises(UserError, match="not with these devices"):
        measure_in_subprocess(refused, "v5e:1x1", code=False)
    with pytest.raises(UserError, match="too little memory"):
        measure_in_subprocess(killed, "v5e:1x1", code=False)
    with pytest.raises(RuntimeError, match="exit status 1"):
        measure_in_subprocess(failing, "v5e:1x1", code=False)
    assert "something is wrong" in capfd.readouterr().err

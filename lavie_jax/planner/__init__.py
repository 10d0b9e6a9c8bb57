"""Plans TPU runs: compiles the real programs without a TPU, and reports whether they fit and what bounds their speed.

    python -m lavie_jax.planner --config configs/base.py --topology v5e:4x4 --per-chip-batch 1 --json docs/planner.json
    python -m lavie_jax.planner --config configs/vsr.py --topology v5e:1x1 --sample vsr
    python -m lavie_jax.planner --config configs/base.py --topology v5e:2x4 --sample base    # one clip on 8 chips
    python -m lavie_jax.planner --tables docs/planner.json    # writes docs/planner.md and docs/memory.md

    chips.py                     topologies, specifications of chips, the roofline bound of a row
    programs.py                  a jitted function and the shapes of its arguments
    training.py, sampling.py     the programs of train.py and of cascade/
    measure.py, memory_plan.py   a program -> a row: bytes, FLOPs, collectives; memory before code is generated
    subprocess.py                the same in a process that can be killed
    hlo.py                       collectives and FLOPs of a compiled program (`lavie_jax/flops.py` counts them before)
    report.py, tables.py         rows -> JSON and terminal; the tables in docs/

Compiling needs libtpu (`pip install -e '.[tpu]'`), but no TPU. Bytes are those of the compiler's own plan, which hold
on a chip; times are estimates.
"""

"""What the configs share: the fields of every run, with their defaults. Not a config itself."""

from ml_collections import ConfigDict

from lavie_jax.training.options import check_mode

__all__ = ["check_mode", "clips", "moving_shapes", "training"]


def training() -> ConfigDict:
    """The fields that every config has. `stage`, models, `data`, `loss`, `steps` and `batch` come on top."""
    config = ConfigDict()
    config.seed = 0
    config.accumulate = 1  # parts that a batch is worked off in
    config.dtype = "auto"  # of the computation: bfloat16 on accelerators, float32 on CPU
    # For memory: "block" recomputes each block in the backward pass, "full" each layer again; "offload" keeps what goes
    # from layer to layer on the host, and recomputes the rest once
    config.remat = "none"
    config.attention_kernel = "auto"
    config.regime = "joint"  # "joint", "video_only", "temporal_only" (paper, appendix D), "motion_only"
    config.ema_decay = 0.9999
    config.skip_limit = 10  # steps in a row with a loss or gradients that are not finite, after which the run stops
    config.optimizer = ConfigDict(
        {
            "kind": "adamw",  # or "muon"
            "learning_rate": 1e-4,
            "warmup": 1000,
            "decay": "constant",
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 0.01,
            "clip": 1.0,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: the devices that are left
    config.cpu_devices = 0  # split a CPU into this many devices: 2 are faster than 1 on 2 cores
    config.distributed = False  # True on pods: all hosts train together
    config.workers = 0  # processes that prepare data, by grain; 0 is a thread

    config.peak_tflops = 0.0  # of a device, for the utilisation that is logged; 0: known for TPUs, else none is logged

    config.log_every = 50
    config.held_out_every = 500
    config.held_out_batches = 4
    config.checkpoint_every = 500  # also writes the weights folder
    config.keep_checkpoints = 2  # the newest
    config.keep_best = 1  # those with the lowest held-out loss, however old
    config.keep_every = 0  # checkpoints at multiples of this step are kept for ever; 0 = none
    config.sample_every = 500  # a multiple of checkpoint_every
    config.prompts = ()  # of the sample grids; none = no grids
    config.tensorboard = False  # metrics.jsonl is always written
    return config


def moving_shapes() -> ConfigDict:
    """The embedded world: 64x64 pixels, 16 frames at 8 fps."""
    return _data(
        source="moving_shapes", path=None, image_path=None, frames=16, images=4, height=64, width=64, fps=8.0,
        detail_drop=0.1,
    )  # fmt: skip


def clips() -> ConfigDict:
    """Clips and images of one's own at the paper's size, 16 frames of 320x512 at 8 fps: docs/data.md."""
    return _data(
        source="video_folder", path="data/clips", image_path="data/images", frames=16, images=4, height=320, width=512,
        fps=8.0,
    )  # fmt: skip


def _data(**fields: object) -> ConfigDict:
    """The group `data`, whose fields `lavie_jax.data.config.DataConfig` explains."""
    return ConfigDict(
        {
            **fields,
            "buckets": (),  # ((height, width), ...), so that clips keep their shape; () = all of height x width
            "image_source": "",  # another kind than `source`
            "videos": (),  # of a mixture, source="mixture": ("KIND:PATH", ...)
            "stills": (),
            "video_weights": (),  # ((step, (weight of each part, ...)), ...)
            "still_weights": (),
            "stride": 1,  # with fps=None
            "caption_drop": 0.1,
            "max_unreadable": 1000,
            "seed": 0,
        }
    )

"""Writes report.html: statistics of the kept clips, after the paper's figures 8 and 9, and what was dropped and why.

Sample clips are read back from the shards, so the report shows what was actually written. Pictures of dropped scenes
come from the work folder, which is removed afterwards.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from lavie_jax.curation.assemble import LatentWriter
from lavie_jax.curation.inputs import Video
from lavie_jax.curation.output import CLIPS, DROPPED
from lavie_jax.curation.statistics import Statistics
from lavie_jax.curation.video import Segment
from lavie_jax.data import latents, shards, video_files
from lavie_jax.data.contact_sheet import contact_sheet
from lavie_jax.disk import new_file

PAGE, FIGURES = "report.html", "report"
SHEET_CLIPS, SHEET_FRAMES, SHEET_SIDE = 12, 5, 120
SHEET_COLUMNS = 4  # of the sheets of dropped scenes
_BAR = "#3a6ea5"


def write(
    out: Path,
    manifest: Mapping,
    statistics: Statistics,
    samples: Sequence[tuple[str, int]],
    work: Path,
    encoder: LatentWriter | None = None,
) -> None:
    """Writes `out/report.html` and its figures in `out/report/`.

    Args:
        samples: (shard, index) of the clips to show, see `sample_ranks`.
        work: the work folder with pictures of dropped scenes.
        encoder: needed for a set of latents.
    """
    folder = out / FIGURES
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.png"):  # left by an interrupted run
        stale.unlink()
    figures = []

    def at(name: str, title: str) -> tuple[Path, str]:
        figures.append((name, title))
        return folder / f"{name}.png", title

    plot(statistics, at)
    medium = "latents" if encoder else "video"
    records = (shards.ShardRecords(out / name, medium=medium, val_fraction=0.0).fields(i) for name, i in samples)
    videos, captions = zip(*(_latent_sample(*each, encoder) if encoder else _sample(*each) for each in records))
    contact_sheet(videos, captions, at("samples", "Sample clips")[0], columns=SHEET_FRAMES)
    pictures = {r: _picture_dropped(folder, r, statistics.pictures.get(r, ()), work) for r in statistics.reasons()}
    page = _page(manifest, statistics, figures, pictures)
    with new_file(out / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


def sample_ranks(clips: int) -> list[int]:
    """Returns which of a set's clips are shown, spread over all of them."""
    return np.unique(np.linspace(0, clips - 1, SHEET_CLIPS).round().astype(int)).tolist()


def plot(statistics: Statistics, at: Callable[[str, str], tuple[Path, str]]) -> None:
    """Plots the distributions of the kept clips and the reasons for dropping.

    Args:
        at: returns where to write the figure of a name and title, and the title.
    """
    _histogram(statistics.seconds, "seconds", *at("durations", "Clip durations"))
    _histogram(statistics.words, "words", *at("captions", "Caption lengths"), integers=True)
    _bars(statistics.sizes, "clips", *at("resolutions", "Resolutions, width x height"))
    if statistics.scores:
        _histogram(statistics.scores, "score", *at("aesthetic", "Aesthetic scores"))
    categories = {name or "(none)": number for name, number in statistics.categories.items()}
    if set(categories) != {"(none)"}:
        _bars(categories, "clips", *at("categories", "Categories"))
    if statistics.dropped:
        _bars(statistics.reasons(), "scenes or files", *at("dropped", "Reasons for dropping"))


# ---- figures ----


def _figure(height: float = 3.2):
    from matplotlib.figure import Figure  # extra `curation`

    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.subplots()


def _histogram(counts: Mapping[float, int], unit: str, path: Path, title: str, *, integers: bool = False) -> None:
    """Plots the distribution of a value over clips."""
    figure, axes = _figure()
    values, weights = (np.array(each) for each in zip(*sorted(counts.items())))
    low, high = values[0], values[-1]
    if integers:
        step = max(1, -(-int(high - low + 1) // 40))
        edges = np.arange(low, high + step + 1, step) - 0.5
    else:
        edges = np.linspace(low, high, 31) if high - low > 1e-6 else np.array([low - 0.5, low + 0.5])
    axes.hist(values, bins=edges, weights=weights, color=_BAR)
    above = np.cumsum(weights)
    middle = float(np.mean(values[np.searchsorted(above, [(above[-1] + 1) // 2, above[-1] // 2 + 1])]))
    axes.axvline(middle, color="black", linewidth=1, linestyle="--", label=f"median {middle:.3g}")
    axes.set(title=title, xlabel=unit, ylabel="clips")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.get_major_locator().set_params(integer=integers)
    axes.legend(loc="upper right")  # "best" warns when it is slow
    figure.savefig(path, dpi=100)


def _bars(counts: Mapping[str, int], unit: str, path: Path, title: str, *, most: int = 12) -> None:
    """Plots a bar per name, the most frequent on top. Names beyond the first `most` share one bar."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown, rest = ranked[:most], ranked[most:]
    if rest:
        shown.append((f"{len(rest)} more", sum(count for _, count in rest)))
    figure, axes = _figure(1 + 0.28 * len(shown))
    names, numbers = zip(*reversed(shown))
    labels = [name if len(name) <= 32 else f"{name[:31]}…" for name in names]
    bars = axes.barh(range(len(labels)), numbers, color=_BAR)
    axes.set_yticks(range(len(labels)), labels)
    axes.bar_label(bars, padding=3)
    axes.margins(x=0.1)
    axes.set(title=title, xlabel=unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=100)


Sample = tuple[np.ndarray, str]  # a few small frames of a clip, uint8 (T, H, W, 3), and its caption


def _sample(name: str, fields: Mapping) -> Sample:
    """Returns sample frames and the caption of a clip."""
    info = video_files.video_info(fields["video"], name=name)
    stride = max(1, (info.frames - 1) // (SHEET_FRAMES - 1))
    window = video_files.ClipWindow(frames=min(SHEET_FRAMES, info.frames), stride=stride)
    frames = video_files.read_window(fields["video"], window, place=0.0, name=name)
    return np.stack([_thumbnail(frame) for frame in frames]), fields["caption"]


def _latent_sample(name: str, fields: Mapping, encoder: LatentWriter) -> Sample:
    """Returns the same for latents, decoded by the VAE."""
    record = latents.unpack_record(name, fields)
    count = len(record.latents)
    # A constant number of frames, also for short clips, so that each size compiles once.
    shown = encoder.decode(record.latents[np.linspace(0, count - 1, SHEET_FRAMES).round().astype(int)])
    return np.stack([_thumbnail(frame) for frame in shown[: min(SHEET_FRAMES, count)]]), record.caption


def _picture_dropped(folder: Path, reason: str, chosen: Sequence[tuple[str, Video, Segment]], work: Path) -> str:
    """Writes a sheet of scenes dropped for a reason; returns its name, "" without pictures."""
    if not chosen:
        return ""
    frames, labels = [], []
    for _, video, segment in sorted(chosen, key=lambda each: (each[1].name, each[2].start)):
        if segment.picture:
            with Image.open(work / segment.picture) as image:
                frames.append(_thumbnail(np.asarray(image.convert("RGB"))))
        else:  # a near-duplicate, dropped after it was encoded
            frames.append(_thumbnail(next(video_files.each_frame(work / segment.file))))
        labels.append(f"{Path(video.name).name} {segment.start:.1f} s")
    name = f"dropped-{reason.replace(' ', '-')}"
    _grid(frames, labels, folder / f"{name}.png")
    return name


def _grid(frames: Sequence[UInt8[np.ndarray, "_h _w 3"]], labels: Sequence[str], path: Path) -> None:
    """Writes a sheet of frames in rows, each above its label."""
    columns, font = min(len(frames), SHEET_COLUMNS), ImageFont.load_default(size=12)
    width, height = (max(frame.shape[axis] for frame in frames) + 4 for axis in (1, 0))
    sheet = Image.new("RGB", (columns * width, -(-len(frames) // columns) * (height + 18)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (frame, label) in enumerate(zip(frames, labels)):
        x, y = i % columns * width, i // columns * (height + 18)
        sheet.paste(Image.fromarray(frame), (x, y))
        draw.text(
            (x, y + height - 2), label if len(label) <= width // 7 else f"…{label[1 - width // 7 :]}", "black", font
        )
    sheet.save(path)


def _thumbnail(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "sh sw 3"]:
    height, width = frame.shape[:2]
    zoom = SHEET_SIDE / min(height, width)
    size = (round(width * zoom), round(height * zoom))
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize(size, Image.Resampling.BILINEAR))


# ---- the page ----

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}"
    "img{max-width:100%}figure{display:inline-block;margin:.5em 0}"
)


def _page(
    manifest: Mapping, statistics: Statistics, figures: Sequence[tuple[str, str]], pictures: Mapping[str, str]
) -> str:
    reasons, longest = statistics.reasons(), statistics.longest[2]
    summary = {
        "Input videos": manifest["videos"],
        "Clips kept": manifest["clips"],
        "Hours kept": f"{manifest['hours']:.3f}",
        "Longest clip": f"{longest['frames'] / longest['fps']:.1f} s, {_example({**longest, 'detail': ''})}",
        "Scenes or files dropped": sum(reasons.values()),
    }
    rows = []
    for reason in reasons:
        examples = "<br>".join(html.escape(_example(row)) for _, row in statistics.examples[reason])
        if name := pictures[reason]:
            examples += f'<br><img src="{FIGURES}/{name}.png" alt="scenes dropped: {reason}">'
        rows.append(f"<tr><td>{reason}</td><td>{reasons[reason]}</td><td>{examples}</td></tr>")
    images = "\n".join(f'<figure><img src="{FIGURES}/{name}.png" alt="{title}"></figure>' for name, title in figures)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Curated clips</title><style>{_STYLE}</style></head><body>
<h1>Curated clips</h1>
<table>{"".join(f"<tr><th>{key}</th><td>{html.escape(str(value))}</td></tr>" for key, value in summary.items())}</table>
{images}
<h2>Dropped</h2>
<p>Each scene or file is counted under the first reason that applied. <a href="{DROPPED}">{DROPPED}</a> lists all that
were dropped, <a href="{CLIPS}">{CLIPS}</a> all clips that were kept.</p>
<table><tr><th>Reason</th><th>Count</th><th>Examples</th></tr>{"".join(rows)}</table>
<h2>Settings</h2>
<table>{"".join(_setting(key, value) for key, value in manifest["settings"].items())}</table>
</body></html>
"""


def _setting(key: str, value: object) -> str:
    return f"<tr><th>{key}</th><td>{html.escape(str(value))}</td></tr>"


def _example(row: Mapping) -> str:
    detail = f": {row['detail']}" if row["detail"] else ""
    times = f" {row['start']:.2f}-{row['end']:.2f} s" if row["end"] else ""  # an unreadable file has none
    return f"{row['source']}{times}{detail}"

"""Writes report.html: statistics of the kept clips, after the paper's figures 8 and 9, and what was dropped and why.

Clips are read back from the lists and shards, so the report shows what was actually written. Pictures of dropped scenes
come from the work folder, which is removed afterwards.
"""

import html
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from lavie_jax.curation.assemble import LatentWriter, Segments
from lavie_jax.curation.output import CLIPS, DROPPED
from lavie_jax.curation.video import REASONS
from lavie_jax.data import latents, shards, video_files

PAGE, FIGURES = "report.html", "report"
SHEET_CLIPS, SHEET_FRAMES, SHEET_SIDE = 12, 5, 120
SHEET_DROPPED, SHEET_COLUMNS = 12, 4  # scenes for each reason
_BAR = "#3a6ea5"


def write(
    out: Path, manifest: Mapping, dropped: Mapping[str, Segments], work: Path, encoder: LatentWriter | None = None
) -> None:
    """Writes `out/report.html` and its figures in `out/report/`.

    Args:
        dropped: the dropped segments of each reason.
        work: the work folder with their pictures.
        encoder: needed for a set of latents.
    """
    clips = _read_lines(out / CLIPS)
    folder = out / FIGURES
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.png"):  # left by an interrupted run
        stale.unlink()
    figures = []

    def at(name: str, title: str) -> tuple[Path, str]:
        figures.append((name, title))
        return folder / f"{name}.png", title

    _histogram([_seconds(row) for row in clips], "seconds", *at("durations", "Clip durations"))
    words = [len(row["caption"].split()) for row in clips]
    _histogram(words, "words", *at("captions", "Caption lengths"), integers=True)
    sizes = Counter(f"{row['width']}x{row['height']}" for row in clips)
    _bars(sizes, "clips", *at("resolutions", "Resolutions, width x height"))
    scores = [row["aesthetic"] for row in clips if row["aesthetic"] is not None]
    if scores:
        _histogram(scores, "score", *at("aesthetic", "Aesthetic scores"))
    categories = Counter(row["category"] or "(none)" for row in clips)
    if set(categories) != {"(none)"}:
        _bars(categories, "clips", *at("categories", "Categories"))
    if dropped:
        _bars(manifest["dropped"], "scenes or files", *at("dropped", "Reasons for dropping"))
    chosen = np.unique(np.linspace(0, len(clips) - 1, SHEET_CLIPS).round().astype(int)).tolist()
    samples = _latent_samples(out, chosen, encoder) if encoder else _samples(out, chosen)
    videos, captions = zip(*samples)
    video_files.contact_sheet(videos, captions, at("samples", "Sample clips")[0], columns=SHEET_FRAMES)
    pictures = {reason: _picture_dropped(folder, reason, each, work) for reason, each in dropped.items()}
    page = _page(manifest, _read_lines(out / DROPPED), figures, pictures, max(clips, key=_seconds))
    with video_files.finished(out / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _seconds(row: Mapping) -> float:
    return row["frames"] / row["fps"]


def _read_lines(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---- figures ----


def _figure(height: float = 3.2):
    from matplotlib.figure import Figure  # extra `curation`

    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.subplots()


def _histogram(values: Sequence[float], unit: str, path: Path, title: str, *, integers: bool = False) -> None:
    """Plots the distribution of a value over clips."""
    figure, axes = _figure()
    low, high = min(values), max(values)
    if integers:
        step = max(1, -(-int(high - low + 1) // 40))
        edges = np.arange(low, high + step + 1, step) - 0.5
    else:
        edges = np.linspace(low, high, 31) if high - low > 1e-6 else np.array([low - 0.5, low + 0.5])
    axes.hist(values, bins=edges, color=_BAR)
    middle = float(np.median(values))
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


def _samples(out: Path, chosen: Sequence[int]) -> Iterator[Sample]:
    """Yields sample frames and captions of the chosen clips."""
    records = shards.ShardRecords(out, medium="video", val_fraction=0.0)
    for record in (records[i] for i in chosen):
        info = video_files.video_info(record.content, name=record.name)
        stride = max(1, (info.frames - 1) // (SHEET_FRAMES - 1))
        window = video_files.ClipWindow(frames=min(SHEET_FRAMES, info.frames), stride=stride)
        frames = video_files.read_window(record.content, window, place=0.0, name=record.name)
        yield np.stack([_thumbnail(frame) for frame in frames]), record.caption


def _latent_samples(out: Path, chosen: Sequence[int], encoder: LatentWriter) -> Iterator[Sample]:
    """Yields the same for latents, decoded by the VAE."""
    records = shards.ShardRecords(out, medium="latents", val_fraction=0.0)
    for name, fields in (records.fields(i) for i in chosen):
        record = latents.unpack_record(name, fields)
        count = len(record.latents)
        # A constant number of frames, also for short clips, so that each size compiles once.
        shown = encoder.decode(record.latents[np.linspace(0, count - 1, SHEET_FRAMES).round().astype(int)])
        yield np.stack([_thumbnail(frame) for frame in shown[: min(SHEET_FRAMES, count)]]), record.caption


def _picture_dropped(folder: Path, reason: str, segments: Segments, work: Path) -> str:
    """Writes a sheet of scenes dropped for a reason, spread over all of them; returns its name, "" without pictures."""
    shown = [(video, segment) for video, segment in segments if segment.picture or segment.file]
    if not shown:
        return ""
    chosen = np.unique(np.linspace(0, len(shown) - 1, SHEET_DROPPED).round().astype(int))
    frames, labels = [], []
    for video, segment in (shown[i] for i in chosen):
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
_EXAMPLES = 3  # per reason


def _page(
    manifest: Mapping,
    dropped: Sequence[Mapping],
    figures: Sequence[tuple[str, str]],
    pictures: Mapping[str, str],
    longest: Mapping,
) -> str:
    reasons = manifest["dropped"]
    summary = {
        "Input videos": manifest["videos"],
        "Clips kept": manifest["clips"],
        "Hours kept": f"{manifest['hours']:.3f}",
        "Longest clip": f"{_seconds(longest):.1f} s, {_example({**longest, 'detail': ''})}",
        "Scenes or files dropped": sum(reasons.values()),
    }
    rows = []
    for reason in (r for r in REASONS if r in reasons):
        chosen = [row for row in dropped if row["reason"] == reason][:_EXAMPLES]
        examples = "<br>".join(html.escape(_example(row)) for row in chosen)
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

"""Measures the CPU time of each stage of the curation on a film, scaled to 1000 hours.

    python benchmarks/curation_stages.py bbb.mp4                 # parts spread over the film, at full size
    python benchmarks/curation_stages.py bbb.mp4 --max-height 256

Every third part of about a minute is worked on, in one process: reading the header ("probe"), decoding small frames and
finding cuts ("cut"), the filters ("filter"), decoding again and encoding the kept clips ("encode"). The lookup of
near-duplicates ("dedupe") is that of the last clip. CPU seconds of the process, all threads; other work on the machine
makes them larger, as cores share caches. Needs the extra curation.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from lavie_jax.curation import duplicates, scenes, video
from lavie_jax.curation.filters import Thresholds
from lavie_jax.curation.inputs import Caption, Video
from lavie_jax.data import video_files
from lavie_jax.errors import Parser, one_line_errors


def main() -> None:
    """Measures and prints a table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film", type=Path)
    parser.add_argument("--max-height", type=int, default=0)
    parser.add_argument("--every", type=int, default=3, help="work on every N-th part")
    args = parser.parse_args()
    want = Thresholds(min_height=0, max_height=args.max_height)
    film = Video(args.film, args.film.name, 0, (Caption("a scene of a film"),), "key")
    judge = video._Judge(film, want, None, None)
    used: Counter = Counter()

    def timed(stage: str, function, *arguments, **options):
        began = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            used[stage] += time.process_time() - began

    parts = timed("probe", video.parts_of, film)[:: args.every]
    info, size = video_files.video_info(args.film), video_files.shown_size(args.film)
    index, clips, frames = duplicates.HashIndex(want.duplicate_bits), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            found = scenes.find_scenes(args.film, threshold=want.cut, part=part.frames)
            while (scene := timed("cut", next, found, None)) is not None:
                frames += scene.last - scene.first
                segment, bars = timed("filter", judge.scene, scene, info.fps, size)
                if segment.reason:
                    continue
                clip = Path(folder) / "clip.mp4"
                timed("encode", video._write_clip, args.film, scene, segment, bars, clip, max_height=want.max_height)
                timed("dedupe", index.find_or_add, segment.perceptual_hash)
                clips += 1
    hours = frames / info.fps / 3600
    print(f"{args.film.name}: {size[1]}x{size[0]}, {hours * 3600:.0f} s in {len(parts)} parts, {clips} clips kept")
    for stage, seconds in (*used.items(), ("all", used.total())):
        print(f"{stage:8s} {seconds:8.2f} s of CPU, {seconds / 3600 / hours * 1000:8.1f} core-hours for 1000 hours")
    print(f"{hours / (used.total() / 3600):.2f} hours of film per core-hour")


if __name__ == "__main__":
    with one_line_errors():
        main()

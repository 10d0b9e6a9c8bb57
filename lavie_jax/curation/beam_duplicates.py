"""Near-duplicates among the clips of all workers of an Apache Beam pipeline, by the rule of `duplicates.py`.

The clips that are kept are found in rounds (Blelloch et al., arXiv 1202.3205): those without an earlier near-duplicate
are kept, those near one of them are dropped, and the rest, chains of near-duplicates, is settled in the next round.
What two rounds leave, a few clips of long chains, goes to one worker. Any number of rounds gives the same result.

Batches of fingerprints travel with the number of their group of videos as key. A worker holds a bucket of about `ROWS`
rows at a time, or, of a larger bucket, two blocks.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from lavie_jax.curation.duplicates import Fingerprints, HashIndex, are_near, part_keys

ROWS = 65536  # of a bucket, about
ROUNDS = 2
SCENES = 1 << 24  # of a video, at most; an id is video * SCENES + scene
VIDEOS = 16  # of a group
_SOURCE, _TARGET = 1, 2

Matches = tuple[np.ndarray, np.ndarray]  # ids of clips, and of the first source near each, int64


def group_of(ids: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Returns the group of each clip."""
    return ids // (SCENES * VIDEOS)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Fingerprints with a key of one part, and whether each may be a source, a target or both."""

    keys: UInt64[np.ndarray, " n"]
    roles: UInt8[np.ndarray, " n"]
    prints: Fingerprints


# ---- pure functions of batches ----


def split_by(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each label with the positions of its rows."""
    order = np.argsort(labels, kind="stable")
    values, starts = np.unique(labels[order], return_index=True)
    yield from zip(values.tolist(), np.split(order, starts[1:]))


def by_group(prints: Fingerprints) -> Iterator[tuple[int, Fingerprints]]:
    """Yields rows under the groups of their videos."""
    for group, chosen in split_by(group_of(prints.ids)):
        yield group, prints[chosen]


def _bucket(values: UInt64[np.ndarray, " n"], rows: int) -> Int64[np.ndarray, " n"]:
    """Returns a bucket for each value, so that buckets have `ROWS` of all `rows`, about."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(33)) % np.uint64(max(1, -(-rows // ROWS)))).astype(np.int64)


def scatter(prints: Fingerprints, rows: int, max_bits: int, role: int) -> Iterator[tuple[tuple[int, int], _Rows]]:
    """Yields the rows once for each of their parts, under (part, bucket)."""
    keys = part_keys(prints.bits, max_bits)
    for part in range(max_bits + 1):
        for bucket, chosen in split_by(_bucket(keys[:, part], rows)):
            own = prints[chosen]
            yield (part, bucket), _Rows(keys[chosen, part], np.full(len(own), role, np.uint8), own)


def first_sources(batches: Iterable[_Rows], max_bits: int) -> Iterator[Matches]:
    """Yields targets of a bucket, each with the first earlier source that has the same key and is near it."""
    for i, block in enumerate(_blocks(batches)):
        following = (other for j, other in enumerate(_blocks(batches)) if j > i)
        other = next(following, None)
        if other is None and i == 0:
            yield _compare([block], max_bits)
        while other is not None:
            yield _compare([block, other], max_bits)
            other = next(following, None)


def _blocks(batches: Iterable[_Rows]) -> Iterator[_Rows]:
    """Yields all rows in blocks of about 2 ROWS, which fit into memory."""
    waiting: list[_Rows] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(each.keys) for each in waiting) >= 2 * ROWS:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(batches: Sequence[_Rows]) -> _Rows:
    keys, roles = (np.concatenate([getattr(each, name) for each in batches]) for name in ("keys", "roles"))
    return _Rows(keys, roles, Fingerprints.concatenated([each.prints for each in batches]))


def _compare(blocks: Sequence[_Rows], max_bits: int) -> Matches:
    rows = _joined(blocks)
    order = np.lexsort((rows.prints.ids, rows.keys))
    keys, roles, prints = rows.keys[order], rows.roles[order], rows.prints[order]
    unmatched = np.iinfo(np.int64).max
    first = np.full(len(keys), unmatched)
    left = np.arange(len(keys))  # rows that have a row of the same key `step` further on
    for step in range(1, len(keys)):
        left = left[left + step < len(keys)]
        left = left[keys[left] == keys[left + step]]
        if not len(left):
            break
        a = left[(roles[left] & _SOURCE != 0) & (roles[left + step] & _TARGET != 0)]
        a = a[prints.ids[a] < prints.ids[a + step]]  # not a row that is both with itself
        near = are_near(prints.bits[a], prints.bits[a + step], prints.colours[a], prints.colours[a + step], max_bits)
        np.minimum.at(first, a[near] + step, prints.ids[a[near]])
    found = first < unmatched
    return prints.ids[found], first[found]


def least(matches: Iterable[Matches]) -> Matches:
    """Returns each clip once, with its first source."""
    pairs = [*matches]
    ids, sources = (np.concatenate([np.zeros(0, np.int64), *(pair[i] for pair in pairs)]) for i in (0, 1))
    order = np.lexsort((sources, ids))
    unique, where = np.unique(ids[order], return_index=True)
    return unique, sources[order][where]


def _exact_key(prints: Fingerprints, rows: int) -> Int64[np.ndarray, " n"]:
    folded = prints.bits[:, 0].copy()
    for word in (*prints.bits[:, 1:].T, *np.ascontiguousarray(prints.colours).view(np.uint64).T):
        folded = folded * np.uint64(0x100000001B3) + word
    return _bucket(folded, rows)


def first_of_equals(batches: Iterable[Fingerprints]) -> Iterator[tuple[str, Any]]:
    """Yields ("first", rows) of the first of equal fingerprints, and ("others", matches) of the rest with them."""
    first: dict[bytes, int] = {}
    for prints in batches:
        for each, row in zip(_contents(prints), prints.ids.tolist()):
            first[each] = min(row, first.get(each, row))
    for prints in batches:
        firsts = np.array([first[each] for each in _contents(prints)], np.int64)
        own = prints.ids == firsts
        if own.any():
            yield "first", prints[own]
        if not own.all():
            yield "others", (prints.ids[~own], firsts[~own])


def _contents(prints: Fingerprints) -> Iterator[bytes]:
    return (bits.tobytes() + colours.tobytes() for bits, colours in zip(prints.bits, prints.colours))


def settle_in_order(batches: Iterable[Fingerprints], max_bits: int) -> tuple[Fingerprints, Fingerprints, Matches]:
    """Returns the kept and the dropped rows, and for the latter the first kept one near each."""
    prints = Fingerprints.concatenated(batches)
    prints = prints[np.argsort(prints.ids)]
    index, kept, found = HashIndex(max_bits), [], []
    for i in range(len(prints)):
        position = index.find_or_add_row(prints[np.array([i])])
        found.append(-1 if position is None else kept[position])
        if position is None:
            kept.append(i)
    found = np.array(found, np.int64)
    dropped = found >= 0
    return prints[~dropped], prints[dropped], (prints.ids[dropped], prints.ids[found[dropped]])


# ---- the pipeline ----


def find_duplicates(batches: Any, max_bits: int) -> Any:
    """Returns the near-duplicates among batches of clips, a collection of (group, `Fingerprints`).

    Returns:
        A collection of (group, `Matches`): clips to drop, each with the first kept one near it.
    """
    import apache_beam as beam

    rows = batches | "count rows" >> beam.Map(lambda pair: len(pair[1])) | beam.CombineGlobally(sum)
    rows = beam.pvalue.AsSingleton(rows)
    equal = (
        batches
        | "scatter equals" >> beam.FlatMap(_scatter_equals, rows)
        | "group equals" >> beam.GroupByKey()
        | "first of equals" >> beam.FlatMap(lambda pair: first_of_equals(pair[1]))
    )
    first = equal | "firsts" >> beam.FlatMap(lambda pair: by_group(pair[1]) if pair[0] == "first" else ())
    others = equal | "others" >> beam.FlatMap(lambda pair: _by_source(pair[1]) if pair[0] == "others" else ())
    unsettled = first | "group firsts" >> beam.GroupByKey() | beam.MapTuple(_concatenated)
    found, dropped, late = [], [], []
    for number in range(ROUNDS):
        near = functools.partial(_first_neighbours, rows=rows, max_bits=max_bits)
        second = near(unsettled, unsettled, f"earlier {number}")
        roots, rest = _divide(unsettled, second, f"roots {number}")
        matches = near(roots, rest, f"near roots {number}")
        unsettled, settled = _divide(rest, matches, f"settled {number}")
        found, dropped, late = [*found, matches], [*dropped, settled], [*late, roots][-ROUNDS + 1 :]
    remaining = (
        unsettled
        | "remaining" >> beam.Map(lambda pair: (None, pair[1]))
        | "group remaining" >> beam.GroupByKey()
        | "settle in order" >> beam.Map(lambda pair: settle_in_order(pair[1], max_bits))
    )
    late.append(remaining | "kept last" >> beam.FlatMap(lambda each: by_group(each[0])))
    dropped.append(remaining | "dropped last" >> beam.FlatMap(lambda each: by_group(each[1])))
    found.append(remaining | "found last" >> beam.FlatMap(lambda each: _by_id(each[2])))
    # A clip that was dropped in the first round may be near an earlier one that was kept in a later round.
    kept_later, all_dropped = late | "kept later" >> beam.Flatten(), dropped | "dropped" >> beam.Flatten()
    found.append(near(kept_later, all_dropped, "near later"))
    matches = found | beam.Flatten() | "group matches" >> beam.GroupByKey() | beam.MapTuple(_least)
    of_others = (matches, others) | beam.CoGroupByKey() | "matches of others" >> beam.FlatMapTuple(_matches_of_others)
    return (matches, of_others) | "all matches" >> beam.Flatten()


def _first_neighbours(sources: Any, targets: Any, name: str, *, rows: Any, max_bits: int) -> Any:
    """Returns (group, matches) of the targets that have an earlier source near them."""
    import apache_beam as beam

    def scattered(prints: Any, role: int) -> Any:
        label = f"scatter {role} {name}"
        return prints | label >> beam.FlatMap(lambda pair, n: scatter(pair[1], n, max_bits, role), rows)

    if sources is targets:
        all_rows = scattered(sources, _SOURCE | _TARGET)
    else:
        all_rows = (scattered(sources, _SOURCE), scattered(targets, _TARGET)) | f"both {name}" >> beam.Flatten()
    return (
        all_rows
        | f"buckets {name}" >> beam.GroupByKey()
        | f"compare {name}" >> beam.FlatMap(lambda pair: first_sources(pair[1], max_bits))
        | f"by id {name}" >> beam.FlatMap(_by_id)
        | f"group {name}" >> beam.GroupByKey()
        | f"least {name}" >> beam.MapTuple(_least)
    )


def _divide(prints: Any, matches: Any, name: str) -> tuple[Any, Any]:
    """Returns the rows without a match, and those with one."""
    import apache_beam as beam

    joined = (prints, matches) | f"join {name}" >> beam.CoGroupByKey()
    without, matched = (functools.partial(_matched, each) for each in (False, True))
    return joined | f"no {name}" >> beam.FlatMapTuple(without), joined | name >> beam.FlatMapTuple(matched)


def _matched(matched: bool, group: int, values: tuple) -> Iterator[tuple[int, Fingerprints]]:
    """Yields the rows of a group that have a match, or those that have none."""
    own = Fingerprints.concatenated(values[0])
    rows = own[np.isin(own.ids, least(values[1])[0]) == matched]
    if len(rows):
        yield group, rows


def _scatter_equals(pair: tuple[int, Fingerprints], rows: int) -> Iterator[tuple[int, Fingerprints]]:
    prints = pair[1]
    for key, chosen in split_by(_exact_key(prints, rows)):
        yield key, prints[chosen]


def _concatenated(group: int, batches: Iterable[Fingerprints]) -> tuple[int, Fingerprints]:
    return group, Fingerprints.concatenated(batches)


def _least(group: int, matches: Iterable[Matches]) -> tuple[int, Matches]:
    return group, least(matches)


def _by_id(matches: Matches) -> Iterator[tuple[int, Matches]]:
    return _keyed(matches, group_of(matches[0]))


def _by_source(matches: Matches) -> Iterator[tuple[int, Matches]]:
    return _keyed(matches, group_of(matches[1]))


def _keyed(matches: Matches, groups: np.ndarray) -> Iterator[tuple[int, Matches]]:
    for group in np.unique(groups).tolist():
        chosen = groups == group
        yield group, (matches[0][chosen], matches[1][chosen])


def _matches_of_others(group: int, values: tuple) -> Iterator[tuple[int, Matches]]:
    """Yields matches of clips that equal an earlier one: that one if it is kept, else what it is near."""
    ids, sources = least(values[0])
    for others, firsts in values[1]:
        where = np.searchsorted(ids, firsts)
        dropped = np.zeros(len(firsts), bool)
        inside = where < len(ids)
        dropped[inside] = ids[where[inside]] == firsts[inside]
        of = firsts.copy()
        of[dropped] = sources[where[dropped]]
        yield from _by_id((others, of))

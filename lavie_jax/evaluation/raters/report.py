"""The report of a study: tables 3 and 4 with intervals, the raters' agreement, and who fails the controls."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lavie_jax import results
from lavie_jax.errors import UserError
from lavie_jax.evaluation.raters import statistics
from lavie_jax.evaluation.raters.answers import Answer
from lavie_jax.evaluation.raters.statistics import Estimate
from lavie_jax.evaluation.raters.study import LABELS, METRICS, NOT_SHOWN, PROBLEM, Study

KIND = "raters report"
PASS = 0.75  # the share of controls that a rater must get right
MUST_NOTICE = ("motion_smoothness", "motion_reasonableness")  # what a damaged video is not good at

Table = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class RaterSummary:
    """What a rater did.

    Attributes:
        answers: without controls and problems.
        controls, passed: answered controls, and those that were right.
        problems: questions whose videos did not play.
        first_side: share of pairs, without controls, in which the first video on the page was chosen.
        seconds: median time of an answer.
    """

    answers: int
    controls: int
    passed: int
    problems: int
    first_side: float
    seconds: float

    @property
    def fails(self) -> bool:
        """Whether too many controls are wrong. Without controls, nobody fails."""
        return self.controls > 0 and self.passed / self.controls < PASS


def make_report(study: Study, answers: Sequence[Answer], *, seed: int = 0) -> dict[str, Any]:
    """Returns the tables, without the raters who fail the controls, and everything that they are computed from.

    Raises:
        UserError: nobody has answered.
    """
    answers = [answer for answer in answers if answer.question in study.questions]
    if not answers:
        raise UserError("nobody has answered yet: start serve, and give raters the address")
    names = sorted({answer.rater for answer in answers})
    raters = {name: _summary(study, [answer for answer in answers if answer.rater == name]) for name in names}
    tables = {}
    for group, kept in (
        ("tables", [name for name in names if not raters[name].fails]),
        ("tables_with_failed_raters", names),
    ):
        votes = [a for a in answers if a.rater in kept and not _is_control(study, a) and PROBLEM not in a.answer]
        tables[group] = {
            "raters": len({answer.rater for answer in votes}),
            "preference": preference(study, votes, seed),
            "metrics": metrics(study, votes, seed),
        }
    return {
        "kind": KIND,
        "study": study.id,
        "title": study.design.title,
        "systems": list(study.systems),
        "raters": {name: {**dataclasses.asdict(row), "fails": row.fails} for name, row in raters.items()},
        "passing_share_of_controls": PASS,
        "interval": {"level": statistics.LEVEL, "resamples": statistics.RESAMPLES, "seed": seed},
        **tables,
    }


def _is_control(study: Study, answer: Answer) -> bool:
    return study.questions[answer.question].control


def _summary(study: Study, answers: Sequence[Answer]) -> RaterSummary:
    played = [answer for answer in answers if PROBLEM not in answer.answer]
    controls = [answer for answer in played if _is_control(study, answer)]
    own = [answer for answer in played if not _is_control(study, answer)]
    first = [answer.answer["better"] == answer.videos[0] for answer in own if "better" in answer.answer]
    return RaterSummary(
        answers=len(own),
        controls=len(controls),
        passed=sum(_is_right(study, answer) for answer in controls),
        problems=len(answers) - len(played),
        first_side=float(np.mean(first)) if first else math.nan,
        seconds=float(np.median([answer.seconds for answer in played])) if played else math.nan,
    )


def _is_right(study: Study, answer: Answer) -> bool:
    """Whether the intact video is better, or the damaged one is not good at MUST_NOTICE."""
    if "better" in answer.answer:
        return answer.answer["better"] == study.questions[answer.question].videos[0]
    return all(answer.answer[name] != "good" for name in MUST_NOTICE)


# ---- tables 3 and 4 ----


def preference(study: Study, votes: Sequence[Answer], seed: int) -> Table:
    """Table 3: for each two systems, the share of votes for the first. Items of the bootstrap are prompts."""
    table = {}
    for first, second in itertools.combinations(study.systems, 2):
        chosen = [
            (answer, study.videos[answer.answer["better"]].system == first)
            for answer in votes
            if "better" in answer.answer and {study.videos[v].system for v in answer.videos} == {first, second}
        ]
        if chosen:
            of_pair = [answer for answer, _ in chosen]
            hits = np.array([hit for _, hit in chosen])
            table[f"{first} > {second}"] = {
                "share": _share(study, of_pair, hits, seed),
                "votes": len(chosen),
                "alpha": _alpha(of_pair, (~hits).astype(int), "nominal", seed),
            }
    return table


def metrics(study: Study, votes: Sequence[Answer], seed: int) -> Table:
    """Table 4: the share of bad, normal and good among the votes, for each metric and system."""
    table = {}
    for metric in METRICS:
        labelled = [(a, a.answer[metric.name]) for a in votes if a.answer.get(metric.name) not in (None, NOT_SHOWN)]
        not_shown = sum(answer.answer.get(metric.name) == NOT_SHOWN for answer in votes)
        if not labelled and not not_shown:
            continue
        row: dict[str, Any] = {"title": metric.title, "not_shown": not_shown, "systems": {}}
        for system in study.systems:
            own = [(a, label) for a, label in labelled if study.videos[a.videos[0]].system == system]
            shares = {
                name: _share(study, [a for a, _ in own], np.array([label == name for _, label in own], bool), seed)
                for name in LABELS
            }
            row["systems"][system] = {"votes": len(own), **shares}
        values = np.array([LABELS.index(label) for _, label in labelled], int)
        row["alpha"] = _alpha([answer for answer, _ in labelled], values, "ordinal", seed)
        table[metric.name] = row
    return table


def _share(study: Study, votes: Sequence[Answer], hits: np.ndarray, seed: int) -> Estimate:
    rater = _indices([answer.rater for answer in votes])
    item = _indices([study.questions[answer.question].prompt for answer in votes])
    shape = (max(rater, default=-1) + 1, max(item, default=-1) + 1)
    counts, hit_counts = np.zeros(shape, int), np.zeros(shape, int)
    np.add.at(counts, (rater, item), 1)
    np.add.at(hit_counts, (rater, item), hits.astype(int))
    return statistics.share(counts, hit_counts, seed=seed)


def _alpha(votes: Sequence[Answer], values: np.ndarray, level: statistics.Level, seed: int) -> Estimate:
    rater, unit = _indices([answer.rater for answer in votes]), _indices([answer.question for answer in votes])
    ratings = np.full((max(rater, default=-1) + 1, max(unit, default=-1) + 1), -1)
    ratings[rater, unit] = values
    return statistics.alpha(ratings, level, seed=seed)


def _indices(names: Sequence[str]) -> list[int]:
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return [numbers[name] for name in names]


# ---- text ----


def as_json(report: Any) -> Any:
    """Returns a report whose estimates are objects, with null for what is not defined."""
    if isinstance(report, Estimate):
        return as_json(report._asdict())
    if isinstance(report, Mapping):
        return {name: as_json(value) for name, value in report.items()}
    return None if isinstance(report, float) and math.isnan(report) else report


def markdown(report: Mapping[str, Any]) -> str:
    """Returns a report as text with tables."""
    raters, tables = report["raters"], report["tables"]
    failing = [f"{name} ({row['passed']} of {row['controls']})" for name, row in raters.items() if row["fails"]]
    answers = sum(row["answers"] for row in raters.values())
    level = f"{report['interval']['level']:.0%}"
    lines = [f"{report['title']}: {len(raters)} raters, {answers} answers. {level} intervals over raters and prompts."]
    if failing:
        lines.append(f"Left out, because they got fewer than {PASS:.0%} of the controls right: {', '.join(failing)}.")
    if untested := [name for name, row in raters.items() if not row["controls"]]:
        lines.append(f"Answered no control: {', '.join(untested)}.")
    parts = [
        " ".join(lines),
        *_preference_text(tables["preference"]),
        *_metrics_text(tables["metrics"], report["systems"]),
    ]
    parts += ["Raters:", _raters_text(raters)]
    return "\n\n".join(parts)


def _preference_text(table: Table) -> list[str]:
    if not table:
        return []
    rows = [
        ["Video quality", *(_percent(cell["share"]) for cell in table.values())],
        ["Votes", *(str(cell["votes"]) for cell in table.values())],
        ["Krippendorff's alpha", *(_number(cell["alpha"]) for cell in table.values())],
    ]
    return ["Table 3: preference for overall video quality.", results.markdown(["Metric", *table], rows)]


def _metrics_text(table: Table, systems: Sequence[str]) -> list[str]:
    if not table:
        return []
    header = ["Metric", *(f"{system}: {label}" for system in systems for label in LABELS), "Alpha", "Votes"]
    rows = []
    for row in table.values():
        cells = [_number(row["systems"][system][label]) for system in systems for label in LABELS]
        count = sum(cell["votes"] for cell in row["systems"].values())
        note = f" (+ {row['not_shown']} not shown)" if row["not_shown"] else ""
        rows.append([row["title"], *cells, _number(row["alpha"]), f"{count}{note}"])
    return ["Table 4: shares of the votes for each label.", results.markdown(header, rows)]


def _raters_text(raters: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["Rater", "Answers", "Controls right", "First side chosen", "Seconds per answer", "Did not play"]
    rows = [
        [
            _cell(name),
            str(row["answers"]),
            f"{row['passed']} of {row['controls']}{', fails' if row['fails'] else ''}",
            "-" if math.isnan(row["first_side"]) else f"{row['first_side']:.0%}",
            "-" if math.isnan(row["seconds"]) else f"{row['seconds']:.1f}",
            str(row["problems"]),
        ]
        for name, row in raters.items()
    ]
    return results.markdown(header, rows)


def _cell(text: str) -> str:
    """A name in a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _percent(estimate: Estimate) -> str:
    return _text(estimate, lambda value: f"{100 * value:.1f}", " %")


def _number(estimate: Estimate) -> str:
    return _text(estimate, lambda value: f"{value:.2f}")


def _text(estimate: Estimate, shown: Callable[[float], str], unit: str = "") -> str:
    if math.isnan(estimate.value):
        return "-"
    interval = "" if math.isnan(estimate.low) else f" ({shown(estimate.low)} to {shown(estimate.high)})"
    return shown(estimate.value) + unit + interval

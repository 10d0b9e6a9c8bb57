"""How much of a job is done, and how long the rest takes.

The work of each stage is weighted by its estimated FLOPs. Its time is measured while it runs, without the first step,
which may include compilation. A stage that has not started yet is assumed to take as long per FLOP as in an earlier
job, or else as the stage that runs now.
"""

from collections.abc import Mapping


class TimeLeft:
    """Measures one job.

    Args:
        flops: {stage: estimated FLOPs}, in the order in which the stages run.
        rates: {stage: seconds per FLOP} of earlier jobs; updated.

    Attributes:
        share: how much of the job is done, from 0 to 1.
        seconds: estimate of the time left; None while there is nothing to estimate it from.
    """

    def __init__(self, flops: Mapping[str, float], rates: dict[str, float]):
        self.flops, self.rates = flops, rates
        self.share, self.seconds = 0.0, None
        self._stage: str | None = None
        self._first: tuple[int, float] | None = None  # steps and time from which the stage is measured
        self._start = 0

    def update(self, stage: str, done: int, total: int, now: float) -> None:
        """Takes note that `done` of `total` steps of a stage are finished at the time `now`, in seconds."""
        if stage != self._stage:
            self._stage, self._first, self._start = stage, None, done
        elif self._first is None:
            self._first = (done, now) if done > self._start else None
        elif done > self._first[0]:
            each = (now - self._first[1]) / (done - self._first[0])
            self.rates[stage] = each * total / self.flops[stage]
        names = list(self.flops)
        before, after = names[: names.index(stage)], names[names.index(stage) + 1 :]
        part = done / total if total else 1.0
        finished = sum(self.flops[name] for name in before) + part * self.flops[stage]
        self.share = finished / sum(self.flops.values())
        left = {stage: (1 - part) * self.flops[stage], **{name: self.flops[name] for name in after}}
        here = self.rates.get(stage)
        rates = {name: self.rates.get(name, here) for name in left}
        known = all(rate is not None for rate in rates.values())
        self.seconds = sum(left[name] * rates[name] for name in left) if known else None


def in_words(seconds: float | None) -> str:
    """Returns the time left in words, "" if it is not known: "about 2 min 10 s left"."""
    if seconds is None:
        return ""
    if seconds < 1:
        return "less than a second left"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"about {hours} h {minutes} min left"
    return f"about {minutes} min {rest} s left" if minutes else f"about {rest} s left"

"""What ``servecal compare`` found: two runs, two profiles, or two saved reports, A and B."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calibrate.errors import Comparison
from calibrate.estimates import Interval
from calibrate.gates import Judgement, worsening
from calibrate.profile_changes import Change, coefficient_changes, setting_changes
from calibrate.run_pairs import Pairing
from calibrate.saved_reports import SavedReport
from profiles.profile import LoadedProfile
from replay.trace import Trace


@dataclass(frozen=True)
class TraceDifference:
    """Two runs; differences are B's from A, relative to A."""

    a: Trace
    b: Trace
    pairing: Pairing
    judgement: Judgement | None = None


@dataclass(frozen=True)
class Replayed:
    """One trace replayed with both profiles.

    Parameters
    ----------
    measured : Trace
    between : TraceDifference
        The two predictions.
    errors : pair of Comparison
        Each prediction against what was measured.
    """

    measured: Trace
    between: TraceDifference
    errors: tuple[Comparison, Comparison]


@dataclass(frozen=True)
class ProfileDifference:
    """Two profiles, and what their differences do to one trace if that was asked for."""

    a: LoadedProfile
    b: LoadedProfile
    on: Replayed | None = None

    @property
    def coefficients(self) -> list[Change]:
        """Every coefficient of either."""
        return coefficient_changes(self.a.profile, self.b.profile)

    @property
    def settings(self) -> list[tuple[str, object, object]]:
        """Everything else that differs."""
        return setting_changes(self.a.profile, self.b.profile)

    @property
    def judgement(self) -> Judgement | None:
        """Of the two predictions."""
        return self.on.between.judgement if self.on else None

    @property
    def sentences(self) -> list[str]:
        """What moved, in words."""
        changes = self.coefficients
        moved = [one for one in changes if one.moved]
        held = sum(one.moved is False for one in changes)
        unsure = [one.name for one in changes if one.moved is None and one.a is not None and one.b is not None]
        said = [_moved(one) for one in moved]
        if held:
            said.append(f"{held} coefficients are where they were, as far as their intervals can tell")
        if not moved and any(one.difference for one in changes if one.moved is False) and self.on is None:
            said.append("one can stand in for another, so each alone is less sure than all together: see --on TRACE")
        if unsure:
            said.append(f"neither profile says how sure it is of {', '.join(unsure)}")
        alone = [one.name for one in changes if one.a is None or one.b is None]
        if alone:
            said.append(f"only one of the profiles has {', '.join(alone)}")
        vague = [one.name for one in moved if one.identified is False]
        if vague:
            said.append(f"the fits' data could not tell {', '.join(vague)} apart from others: prefer --on TRACE")
        kinds = [one.profile.accelerator.kind for one in (self.a, self.b)]
        if kinds[0] != kinds[1]:
            said.append(f"the accelerator models differ ({kinds[0]}, {kinds[1]}): equal names may mean other things")
        return said


def _moved(one: Change) -> str:
    low, high = one.difference_ci95
    return (
        f"{one.name} moved from {one.a:.4g} to {one.b:.4g} ({one.difference:+.4g}, 95 % interval "
        f"{low:+.4g} to {high:+.4g})"
    )


@dataclass(frozen=True)
class StatisticChange:
    """An error in both reports, and by how much its size grew; ``changed`` is None where the noise is not known."""

    metric: str
    statistic: str
    a: float
    b: float
    growth: float
    growth_ci95: Interval
    changed: bool | None


@dataclass(frozen=True)
class ReportDifference:
    """Two saved reports; an error that grew is worse."""

    a: SavedReport
    b: SavedReport
    judgement: Judgement | None = None

    @property
    def same_run(self) -> bool:
        """Whether both are about the same measured run."""
        return self.a.trace == self.b.trace

    @property
    def statistics(self) -> list[StatisticChange]:
        """Every statistic of either."""
        names = [*self.a.names, *(one for one in self.b.names if one not in self.a.names)]
        return [self._change(*one) for one in names]

    def _change(self, metric: str, statistic: str) -> StatisticChange:
        before, now = (one.estimate(metric, statistic) for one in (self.a, self.b))
        interval = worsening(before, now, same_run=self.same_run)
        changed = None if math.isnan(interval[0]) else not interval[0] <= 0 <= interval[1]
        growth = abs(now.value) - abs(before.value)
        return StatisticChange(metric, statistic, before.value, now.value, growth, interval, changed)

    @property
    def sentences(self) -> list[str]:
        """What to know of the two."""
        documents = (self.a.document, self.b.document)
        said = []
        if self.same_run:
            said.append("both are of the same measured run: its noise is common to them and cancels")
        else:
            said.append("the reports are of different measured runs: the noise of both counts")
        versions = [(one.trace.engine or {}).get("version") for one in documents]
        if versions[0] != versions[1]:
            said.append(f"the engine's version changed from {versions[0]} to {versions[1]}")
        if documents[0].trace.model != documents[1].trace.model:
            said.append(f"the model changed from {documents[0].trace.model} to {documents[1].trace.model}")
        if documents[0].anchor != documents[1].anchor:
            said.append(
                f"latencies count from {documents[0].anchor} in A and from {documents[1].anchor} in B: "
                "errors of the two mean different things"
            )
        return said


Difference = TraceDifference | ProfileDifference | ReportDifference

"""What can be fitted: one class for each way to learn, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from calibrate.fit import ProfileFit, Rows
from calibrate.regression import RegressionFit
from profiles.deployment import Deployment
from profiles.profile import Profile
from replay.trace import Trace


class Learner(Protocol):
    """Learns from measured runs how long iterations take, and gives deployments that know it."""

    @property
    def num_coefficients_(self) -> int:
        """Numbers that were learned."""

    def fit(self, runs: Sequence[tuple[Trace, Deployment, Rows | None]]) -> Any:
        """Learn from runs: each with its base deployment, and the rows whose stamps may be used."""

    def deployment(self, base: Deployment) -> Deployment:
        """Return the deployment with what was learned in force."""

    def written(self, profile: Profile, stem: str) -> tuple[Profile, dict[str, bytes]]:
        """Return the profile with what was learned, and the files that lie beside it, by name."""


LEARNERS: Mapping[str, Callable[[float | None], ProfileFit]] = {"regression": RegressionFit}
"""By accelerator kind; for all others the coefficients of their components are fitted."""


def learner_for(deployment: Deployment, strength: float | None = None) -> ProfileFit:
    """Return what fits profiles of that accelerator kind, not fitted yet."""
    return LEARNERS.get(deployment.loaded.profile.accelerator.kind, ProfileFit)(strength)

"""Where a replay leaves what its profile was fitted to.

A fitted profile says the range that its iterations covered: sequences and tokens of an iteration, contexts of decodes,
lengths of prompts. Outside of it a prediction is an extrapolation, so a replay says for which share of its requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simulator.engine import Iteration
from simulator.request import ServedRequest, Status

AXES: Mapping[str, str] = {
    "sequences": "served in batches of {} sequences than the fit has seen ({})",
    "tokens": "served in iterations of {} tokens than the fit has seen ({})",
    "context": "decoded at {} context than the fit has seen ({} tokens)",
    "prompt_tokens": "given {} prompts than the fit has seen ({} tokens)",
}
MORE: Mapping[str, tuple[str, str]] = {
    "sequences": ("more", "fewer"),
    "tokens": ("more", "fewer"),
    "context": ("longer", "shorter"),
    "prompt_tokens": ("longer", "shorter"),
}


class DomainWatch:
    """Counts the requests of a simulation that leave a domain; ``add`` observes its iterations.

    Parameters
    ----------
    domain : mapping
        ``[least, most]`` by axis (``AXES``); other keys are not watched.
    """

    def __init__(self, domain: Mapping[str, Any]) -> None:
        self.domain = {axis: (limits[0], limits[1]) for axis, limits in domain.items() if axis in AXES}
        self._seen: dict[str, list[int]] = {}
        self._below: dict[str, set[int]] = {axis: set() for axis in self.domain}
        self._above: dict[str, set[int]] = {axis: set() for axis in self.domain}

    def add(self, iteration: Iteration) -> None:
        """Mark the requests of an iteration that is larger or smaller than any fitted one."""
        step = iteration.step
        for axis, value in (("sequences", step.num_items), ("tokens", step.num_tokens)):
            for places in self._outside(axis, value, value):
                places.update(item.served.index for item in step.items)

    def _outside(self, axis: str, least: int, most: int) -> list[set[int]]:
        """Take note of values; return the sets that their requests belong to."""
        if axis not in self.domain:
            return []
        reached = self._seen.setdefault(axis, [least, most])
        reached[0], reached[1] = min(reached[0], least), max(reached[1], most)
        low, high = self.domain[axis]
        return [*([self._below[axis]] if least < low else []), *([self._above[axis]] if most > high else [])]

    def outside(self, served: list[ServedRequest]) -> dict[str, dict[str, Any]]:
        """By axis that was left: share of the requests above and below, the range fitted and the range reached."""
        there = [one for one in served if one.status is not Status.REJECTED]
        for one in there:
            prompt = one.num_prompt_tokens
            for places in self._outside("prompt_tokens", prompt, prompt):
                places.add(one.index)
            if one.num_tokens > prompt + 1:
                # The first token comes of the prompt; the last decode sees all but the last two.
                for places in self._outside("context", prompt, one.num_tokens - 2):
                    places.add(one.index)
        count = max(len(there), 1)
        return {
            axis: {
                "above": len(self._above[axis]) / count,
                "below": len(self._below[axis]) / count,
                "fitted": list(self.domain[axis]),
                "reached": self._seen[axis],
            }
            for axis in AXES
            if axis in self.domain and (self._above[axis] or self._below[axis])
        }


def outside_sentences(outside: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    """Say per axis which share of the requests left the domain."""
    said = []
    for axis, found in (outside or {}).items():
        for side, share in enumerate((found["above"], found["below"])):
            if share:
                shown = f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.2g} %"
                limit = f"{found['fitted'][1 - side]:,}"
                said.append(
                    f"outside the fit's domain: {shown} of the requests were "
                    + AXES[axis].format(MORE[axis][side], limit)
                    + f"; here up to {found['reached'][1]:,}" * (side == 0)
                    + f"; here down to {found['reached'][0]:,}" * (side == 1)
                )
    return said

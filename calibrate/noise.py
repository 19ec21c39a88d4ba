"""What runs of the same workload differ by: repeats, where there are any, else the block bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from calibrate.errors import Comparison
from calibrate.estimates import Compared, Figures, Repeated
from calibrate.run_pairs import pair
from profiles.errors import InputError
from replay.trace import Trace

BOOTSTRAP = "block bootstrap over arrival time within the one run (--repeat TRACE adds what runs differ by)"


def with_repeats(
    first: Compared, run: Trace, repeats: Sequence[Trace], again: Callable[[Trace], Comparison]
) -> tuple[Figures, str]:
    """Add what repeated runs say of the noise.

    Parameters
    ----------
    first : Compared
        The run that is judged, compared.
    run : Trace
        As measured.
    repeats : sequence of Trace
        Further runs of the same workload.
    again : callable
        Compares a repeat as ``first`` was compared.

    Returns
    -------
    figures : Figures
    sentence : str
        Where intervals come from.

    Raises
    ------
    InputError
        If a repeat has other requests, or is the run itself.
    """
    if not repeats:
        return first, BOOTSTRAP
    between = []
    for one in repeats:
        if one.digest() == run.digest():
            raise InputError(
                f"{one.name} is {run.name} itself: it says nothing of what runs differ by", field="--repeat"
            )
        pairing = pair(run, one)
        if not isinstance(pairing.compared, Comparison):
            raise InputError(f"{one.name} is no repeat of {run.name}: its requests differ", field="--repeat")
        between.append(Compared(pairing.compared))
    figures = Repeated(first, [Compared(again(one)) for one in repeats], between)
    count = len(repeats) + 1
    return figures, f"{count} runs of the same workload, and the block bootstrap within the first; the wider counts"

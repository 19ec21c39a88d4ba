"""What a stream does to tokens on their way to the client."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from replay.checks.evidence import Evidence, Ints
from replay.checks.finding import Finding
from replay.trace import Floats

TOGETHER = 0.1
"""Share of the median gap below which two chunks came together."""
SOME, MANY = 0.005, 0.1
"""Share of such gaps from which it is said, and from which percentiles of the ITL are doubted."""
EMPTY = 0.5
"""Share of requests whose second chunk comes with the first, from which the first is a habit of the protocol."""
FEWEST = 10


def _gaps(evidence: Evidence) -> tuple[Floats, Ints]:
    """All gaps between chunks of one request, and the row of each."""
    times, owner = evidence.chunks
    inside = owner[1:] == owner[:-1]
    return np.diff(times)[inside], owner[1:][inside]


def _usual(gaps: Floats) -> float:
    """The median of gaps that are any."""
    some = gaps[gaps > 0]
    return float(np.median(some)) if some.size else np.inf


def token_bursts(evidence: Evidence) -> Iterator[Finding]:
    """Chunks that came together: gaps below a tenth of the median one.

    An engine gives a request one token an iteration. Chunks that come together were held up on their way (a busy client
    loop, a proxy, TCP): their pooled gaps say nothing of iterations, and the gap before them is too long by as much. A
    server that sends several tokens a chunk leaves fewer chunks than tokens.
    """
    if not evidence.trace.has("token_times"):
        return
    gaps, owner = _gaps(evidence)
    if gaps.size >= FEWEST:
        # The first gap has a check of its own.
        later = np.concatenate([[False], owner[1:] == owner[:-1]])
        together = later & (gaps < TOGETHER * _usual(gaps))
        share = float(together.mean())
        if share >= SOME:
            yield evidence.found(
                "token_bursts",
                "warning" if share >= MANY else "info",
                f"{100 * share:.1f} % of the gaps between tokens are below a tenth of the median: chunks were held up "
                "and came together; low percentiles of the ITL, and single gaps, are the client's and not the engine's",
                np.unique(owner[together]),
                {"share": share, "zero_share": float((gaps == 0).mean())},
            )
    counts = evidence.chunk_counts
    several = evidence.ok & (counts > 0) & (counts < evidence.output)
    if several.any():
        share = float(several.sum() / evidence.ok.sum())
        yield evidence.found(
            "several_tokens_a_chunk",
            "warning" if share >= MANY else "info",
            f"{int(several.sum())} requests got fewer chunks than output tokens: several tokens came in one chunk (or "
            "lengths were re-tokenised); gaps between chunks are not gaps between tokens",
            several,
            {"share": share, "tokens_per_chunk": float(np.median(evidence.output[several] / counts[several]))},
        )


def empty_first_chunk(evidence: Evidence) -> Iterator[Finding]:
    """A first chunk without content: the second follows at once in most requests.

    Chat endpoints open a stream with a chunk that holds only the role. If it is counted as a token, the first gap is
    about 0 and there is one token too many.
    """
    if not evidence.trace.has("token_times"):
        return
    gaps, owner = _gaps(evidence)
    if not gaps.size:
        return
    opens = np.concatenate([[True], owner[1:] != owner[:-1]])
    together = gaps < TOGETHER * _usual(gaps)
    at_once = opens & together
    # Where other chunks come together as well, the first is none of a kind (``token_bursts``).
    later = float(together[~opens].mean()) if not opens.all() else 0.0
    if opens.sum() >= FEWEST and at_once.sum() > EMPTY * opens.sum() and later < MANY:
        yield evidence.found(
            "empty_first_chunk",
            "warning",
            f"in {int(at_once.sum())} of {int(opens.sum())} requests the second chunk came with the first: the first "
            "is most likely the role and no token; drop it, else lengths are one too long",
            owner[at_once],
            {"share": at_once.sum() / opens.sum()},
        )

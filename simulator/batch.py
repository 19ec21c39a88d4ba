"""One engine iteration as numbers: what an accelerator model is asked to price."""

from __future__ import annotations


class Batch:
    """The tokens that one iteration computes.

    A scheduled item is a *prefill chunk* if more than one token of it is scheduled, else a *decode* (a
    prompt's last chunk of one token costs what a decode costs).

    Parameters
    ----------
    prefills : list of (int, int)
        ``(query, context)`` per prefill chunk: tokens scheduled, and tokens computed before the step.
    decode_contexts : list of int
        Tokens computed before the step, one entry a decode.
    """

    __slots__ = ("decode_contexts", "prefills")

    def __init__(self, prefills: list[tuple[int, int]], decode_contexts: list[int]) -> None:
        self.prefills = prefills
        self.decode_contexts = decode_contexts

    @property
    def num_seqs(self) -> int:
        """Sequences with at least one token in the step."""
        return len(self.prefills) + len(self.decode_contexts)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return self.num_prefill_tokens + len(self.decode_contexts)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of all prefill chunks."""
        return sum(query for query, _ in self.prefills)

    @property
    def prefill_context(self) -> int:
        """Tokens computed before the step, over all prefill chunks."""
        return sum(context for _, context in self.prefills)

    @property
    def num_decodes(self) -> int:
        """Sequences that decode one token."""
        return len(self.decode_contexts)

    @property
    def decode_context(self) -> int:
        """Sum of the decodes' contexts, in tokens."""
        return sum(self.decode_contexts)

    def __repr__(self) -> str:
        return f"Batch(prefills={self.prefills}, decode_contexts={self.decode_contexts})"

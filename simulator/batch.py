"""One engine iteration as numbers: what an accelerator model is asked to price."""

from __future__ import annotations

from collections.abc import Sequence


class Decodes:
    """Sequences that decode one token in every step, as numbers relative to the steps' count.

    In step number ``n`` the sequence of offset ``o`` has a context of ``o + n`` tokens. Never changed once made.

    Parameters
    ----------
    offsets : list of int
    """

    __slots__ = ("longest", "offsets", "shortest", "total")

    def __init__(self, offsets: list[int]) -> None:
        self.offsets = offsets
        self.total = sum(offsets)
        self.longest = max(offsets, default=0)
        self.shortest = min(offsets, default=0)

    def __len__(self) -> int:
        return len(self.offsets)


NO_DECODES = Decodes([])


class Batch:
    """The tokens that one iteration computes.

    A scheduled item is a *prefill chunk* if more than one token of it is scheduled, else a *decode* (a
    prompt's last chunk of one token costs what a decode costs).

    Parameters
    ----------
    prefills : list of (int, int)
        ``(query, context)`` per prefill chunk: tokens scheduled, and tokens computed before the step.
    decode_contexts : sequence of int
        Tokens computed before the step, one entry a decode.
    decodes : Decodes, optional
        Further decodes, in step ``number``.
    number : int

    Attributes
    ----------
    num_seqs, num_tokens : int
        Sequences with at least one token in the step, and tokens computed in it.
    num_prefill_tokens, prefill_context : int
        Tokens of all prefill chunks, and tokens computed before the step over all of them.
    num_decodes, decode_context : int
        Sequences that decode one token, and the sum of their contexts in tokens.
    longest_context, shortest_context : int
        Of the decodes' contexts; 0 where there is none.
    """

    __slots__ = (
        "_contexts",
        "_further",
        "_number",
        "decode_context",
        "longest_context",
        "num_decodes",
        "num_prefill_tokens",
        "num_seqs",
        "num_tokens",
        "prefill_context",
        "prefills",
        "shortest_context",
    )

    def __init__(
        self,
        prefills: list[tuple[int, int]],
        decode_contexts: Sequence[int],
        decodes: Decodes = NO_DECODES,
        number: int = 0,
    ) -> None:
        self.prefills = prefills
        self._contexts = decode_contexts
        self._further, self._number = decodes, number
        further = len(decodes.offsets)
        self.num_decodes = further
        self.decode_context = decodes.total + number * further
        self.longest_context = self.shortest_context = 0
        if further:
            self.longest_context, self.shortest_context = decodes.longest + number, decodes.shortest + number
        if decode_contexts:
            longest, shortest = max(decode_contexts), min(decode_contexts)
            self.longest_context = max(self.longest_context, longest)
            self.shortest_context = min(self.shortest_context, shortest) if further else shortest
            self.num_decodes += len(decode_contexts)
            self.decode_context += sum(decode_contexts)
        self.num_prefill_tokens = self.prefill_context = 0
        for query, context in prefills:
            self.num_prefill_tokens += query
            self.prefill_context += context
        self.num_seqs = len(prefills) + self.num_decodes
        self.num_tokens = self.num_prefill_tokens + self.num_decodes

    @property
    def decode_contexts(self) -> list[int]:
        """Tokens computed before the step, one entry a decode, in no particular order."""
        if self._further is not NO_DECODES:
            number = self._number
            self._contexts = [*self._contexts, *(offset + number for offset in self._further.offsets)]
            self._further = NO_DECODES
        return list(self._contexts)

    def later(self, steps: int) -> Batch:
        """The batch in which every decode has so many more tokens of context."""
        contexts = [context + steps for context in self._contexts]
        return Batch(self.prefills, contexts, self._further, self._number + steps)

    def __repr__(self) -> str:
        return f"Batch(prefills={self.prefills}, decode_contexts={self.decode_contexts})"

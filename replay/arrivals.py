"""Which arrivals a replay uses: the measured ones, the workload's nominal ones, or ones drawn anew."""

from __future__ import annotations

from dataclasses import replace as dataclass_replace

from profiles.errors import InputError
from replay.clocks import Floats
from replay.draws import parse_draw
from replay.load_level import draw, level_of, with_scheme
from replay.trace import REQUEST_CLOCK, RUN_CLOCK, Trace, requests_table
from replay.workload import is_workload, redraw


def with_arrivals(trace: Trace, choice: str) -> Trace:
    """Return the trace with the arrivals that a replay shall use.

    Parameters
    ----------
    trace : Trace
    choice : str
        ``measured``, ``nominal``, or a draw such as ``poisson:rate=16,seed=0`` for a trace whose arrivals are
        unknown: its latencies then count from the drawn times. A load level without measured requests says itself how
        they are drawn, and does not need to be told.

    Raises
    ------
    InputError
        If the trace lacks the arrivals asked for.
    """
    if choice == "measured":
        if trace.clock == REQUEST_CLOCK and level_of(trace) is not None:
            return draw(trace, seed=0)
        if trace.clock == REQUEST_CLOCK:
            raise InputError(
                f"{trace.name} does not say when its requests were sent; --arrivals poisson:rate=R,seed=S draws "
                "them as the load generator did (its --request-rate and --seed)",
                field="--arrivals",
            )
        return trace
    if choice == "nominal":
        if not trace.has("nominal_arrival"):
            raise InputError(f"{trace.name} has no nominal arrivals (a workload file)", field="--arrivals")
        # Both sides count from the nominal instant: the workload's own clock is what is compared.
        return _moved(trace, trace.column("nominal_arrival"), "nominal: the workload's")
    drawn = parse_draw(choice)
    if trace.clock == RUN_CLOCK and is_workload(trace):
        return redraw(trace, choice)
    if trace.clock == RUN_CLOCK:
        raise InputError(
            f"{trace.name} has measured arrivals; drawing others would pair each request with another's load",
            field="--arrivals",
        )
    if level_of(trace) is not None:
        return with_scheme(trace, choice)
    return _moved(trace, drawn.arrivals(len(trace)), f"assumed: drawn, {choice}")


def _moved(trace: Trace, arrivals: Floats, origin: str) -> Trace:
    """Set the arrivals; stamps of a per-request clock move along."""
    columns = {name: trace.requests.column(name).combine_chunks() for name in trace.requests.column_names}
    columns["arrival"] = arrivals
    meta = {**trace.meta, "columns": {**trace.meta.get("columns", {}), "arrival": origin}}
    if trace.clock == REQUEST_CLOCK:
        for name in ("queued", "scheduled", "first_token", "last_token"):
            columns[name] = trace.column(name) + arrivals
        columns["token_times"] = [
            None if times is None else [time + sent for time in times]
            for times, sent in zip(trace.lists("token_times"), arrivals.tolist(), strict=True)
        ]
        meta["clock"] = {**meta["clock"], "kind": RUN_CLOCK}
        meta["notes"] = [*meta.get("notes", []), f"send times were not recorded; arrivals are drawn anew: {origin}"]
    return dataclass_replace(trace, requests=requests_table(columns, len(trace)), meta=meta, _columns={})

"""Prompts that repeat, and prompts that were computed faster than they can be."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc

from replay.checks.evidence import Evidence
from replay.checks.finding import Finding
from replay.trace import Floats
from simulator.model import ModelShape

FASTER = 0.98
"""Share of the datasheet's shortest time below which a run breaks it."""
FEWEST_HITS = 0.01


def repeated_prompts(evidence: Evidence) -> Iterator[Finding]:
    """Prompt blocks that an earlier request had too, by their chained hashes.

    A cycled data set makes a warm cache after its first round, and TTFTs that tell nothing of prefill. The replay knows
    the hashes and hits as the engine did; other tools, and other data, do not.
    """
    trace = evidence.trace
    if not trace.has("block_hashes"):
        return
    column = trace.requests.column("block_hashes").combine_chunks()
    hashes = pc.list_flatten(column).to_numpy(zero_copy_only=False)
    owner = np.asarray(pc.list_parent_indices(column), dtype=np.int64)
    if pc.count_distinct(pc.list_flatten(column)).as_py() == hashes.size:
        return
    # In order of arrival, whatever the order of the rows.
    rank = np.empty(len(trace), dtype=np.int64)
    rank[np.argsort(evidence.entered, kind="stable")] = np.arange(len(trace))
    order = np.lexsort((rank[owner], hashes))
    seen = np.zeros(hashes.size, dtype=bool)
    seen[order[1:]] = np.diff(hashes[order]) == 0
    blocks = np.bincount(owner, minlength=len(trace))
    hits = np.bincount(owner[seen], minlength=len(trace))
    whole = (blocks > 0) & (hits == blocks)
    if not hits.any():
        return
    share = float(hits.sum() / blocks.sum())
    yield evidence.found(
        "repeated_prompts",
        "info",
        f"{100 * share:.1f} % of the prompts' blocks stood in an earlier request, {int(whole.sum())} prompts wholly: "
        "with prefix caching they cost next to nothing, and the replay takes them from its cache too",
        hits > 0,
        {"blocks_share": share, "whole_prompts": float(whole.sum())},
    )


def matrix_parameters(model: ModelShape) -> int:
    """Parameters of the matrix products that a token goes through, embedding and output head left out."""
    experts = model.num_experts_per_tok * model.expert_parameters
    shared = model.mlp_matrices * model.hidden_size * model.shared_expert_intermediate_size
    return (
        model.num_hidden_layers * model.attention_parameters
        + model.num_dense_layers * model.dense_mlp_parameters
        + model.num_moe_layers * (experts + shared)
    )


def hidden_prefix_hits(evidence: Evidence) -> Iterator[Finding]:
    """First tokens that came sooner than the prompt's matrix products take at the device's peak rate.

    At least ``2 * parameters * prompt_tokens / (peak flop/s * devices)`` (two operations a parameter and token;
    attention left out). Sooner than that, part of the prompt came from the prefix cache, which a trace without
    prompt hashes or cached tokens does not tell; or the prompt's length, the model or the hardware are not the run's.
    """
    deployment, trace = evidence.deployment, evidence.trace
    if deployment is None or deployment.model is None or deployment.hardware is None:
        return
    if trace.batches is not None or trace.has("block_hashes"):
        return
    model, hardware = deployment.model, deployment.hardware
    fastest = max(hardware.flops(one) for one in (model.weight_dtype, model.attention_weight_dtype))
    rate = fastest * deployment.config.tensor_parallel_size / (2.0 * matrix_parameters(model))
    cached: Floats = np.nan_to_num(trace.column("cached_tokens"))
    begin = np.where(np.isnan(evidence.scheduled), trace.start, evidence.scheduled)
    needed = np.maximum(evidence.prompt - cached, 1) / rate
    quick = evidence.ok & (evidence.first - begin < FASTER * needed)
    # On arrivals that were drawn anew a first token can come at any time.
    if not evidence.arrivals_measured or quick.sum() <= FEWEST_HITS * evidence.ok.sum():
        return
    least = float((evidence.prompt - (evidence.first - begin) * rate)[quick].sum() / evidence.prompt[evidence.ok].sum())
    yield evidence.found(
        "hidden_prefix_hits",
        "warning",
        f"{int(quick.sum())} of {int(evidence.ok.sum())} requests got their first token sooner than {hardware.name} "
        f"can compute their prompts: at least {100 * least:.1f} % of all prompt tokens came from the prefix cache, "
        "which the trace does not tell (or lengths, model or hardware are not the run's); record prompt token ids or "
        "cached tokens",
        quick,
        {"least_cached_share": least},
    )

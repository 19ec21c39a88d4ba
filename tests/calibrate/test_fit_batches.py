"""Fitting to batches: equations from schedules, held-out parts, batches that cannot be."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from synthetic import workload

from calibrate.batches import predict_batches
from calibrate.errors import compare
from calibrate.fit import ProfileFit
from calibrate.holdout import hold_out, mean_errors, parts, score
from calibrate.space import CALL_UNITS, HOST_UNITS, FittedCoefficient, with_coefficients
from profiles.deployment import Facts, resolve
from profiles.errors import InputError
from profiles.profile import load_profile
from replay.run import replay
from replay.trace import BATCHES, Trace, requests_table

TRUTH = {
    "dense_compute": 1.8,
    "weight_traffic": 1.3,
    "prefill_attention": 2.5,
    "decode_attention": 1.4,
    "output_head": 1.0,
    "embedding": 1.0,
    "host_step": 0.9,
    "host_sequence": 3.0,
    "attention_grid": 2.0,
    "several_tokens": 2.0,
    "several_tiles": 4.0,
    "call": 3.0,
    "call_request": 2.0,
}


def deployment(seqs=8, profile="roofline:l4", model="llama-3.2-1b"):
    arguments = {
        "max_num_seqs": seqs,
        "max_num_batched_tokens": 8192,
        "max_model_len": 8192,
        "num_gpu_blocks": 4000,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
    }
    return resolve(load_profile(profile), Facts(model=model, version="0.19.0", arguments=arguments))


def learned(**values):
    return [FittedCoefficient(name, value, (0.0, 0.0), 0.0, True) for name, value in values.items()]


def batches(
    seqs, count=30, seed=0, noise=0.003, name="made", prompts=(5, 3000), outputs=(5, 200), columns=BATCHES.names
):
    """Batches of ``seqs`` requests that a simulation with the true coefficients timed."""
    random = np.random.default_rng([seed, seqs])
    sizes = np.full(count, seqs)
    total = int(sizes.sum())
    batch = np.repeat(np.arange(count), sizes)
    sent = Trace(
        requests_table(
            {
                "id": [f"{one}-{place}" for place, one in enumerate(batch)],
                "status": ["ok"] * total,
                "arrival": batch * 100.0,
                "prompt_tokens": np.exp(random.uniform(*np.log((5, 3000)), total)).astype(int),
                "output_tokens": random.integers(5, 200, total),
                "batch": batch,
            },
            total,
        ),
        {"name": f"{name}/bs{seqs}", "engine": {"name": "vllm"}, "clock": {"kind": "run"}},
        batches=pa.table(
            [pa.array(np.arange(count) * 100.0), *(pa.nulls(count, pa.float64()) for _ in BATCHES.names[1:])], BATCHES
        ),
    )
    base = deployment(seqs)
    predicted = replay(sent, with_coefficients(base, learned(**TRUTH))).predicted
    made = {one: predicted.of_batches(one) * (1 + noise * random.standard_normal(count)) for one in BATCHES.names[1:4]}
    table = {one: made[one] if one in made and one in columns else [None] * count for one in BATCHES.names[1:]}
    table = {"start": sent.of_batches("start"), **table}
    arrays = [pa.array(table[one.name], one.type, from_pandas=True) for one in BATCHES]
    return replace(sent, batches=pa.table(arrays, BATCHES)), base


def sizes(columns=("makespan",), **changes):
    return [(*batches(seqs, columns=columns, **changes), None) for seqs in (1, 2, 8, 32)]


def test_batches_and_a_server_share_their_coefficients():
    base = deployment(32)
    sent = workload(np.random.default_rng(5), 80, 4.0, (20, 2000), (10, 150), name="server")
    truth = with_coefficients(base, learned(**TRUTH))
    server = replace(replay(sent, truth).predicted, _columns={}).with_meta(name="server", warmed_up=True)
    fit = ProfileFit().fit([(server, base, None), *sizes()])
    alone = ProfileFit().fit([(server, base, None)])
    assert fit.equations_ > alone.equations_ + 60
    assert {"call", "several_tokens"} <= {one.name for one in fit.coefficients_} - {
        one.name for one in alone.coefficients_
    }
    errors = mean_errors(score([(server, base)], fit, [np.ones(len(server), dtype=bool)]))
    assert errors["e2e"]["mape"] < 0.01
    batch, own = batches(16, seed=9)
    errors = mean_errors(score([(batch, own)], fit, [np.ones(len(batch), dtype=bool)]))
    assert errors["makespan"]["mape"] < 0.01


def test_known_coefficients_are_recovered_from_makespans_alone():
    fit = ProfileFit().fit(sizes(noise=1e-4))
    values = {one.name: one.value for one in fit.coefficients_}
    for name, tolerance in {"prefill_attention": 0.05, "decode_attention": 0.05, "several_tokens": 0.1}.items():
        assert values[name] == pytest.approx(TRUTH[name], rel=tolerance), values
    assert values["attention_grid"] == pytest.approx(TRUTH["attention_grid"], rel=0.05)
    assert values["several_tiles"] == pytest.approx(TRUTH["several_tiles"], rel=0.1)
    assert fit.residual_ < 3e-4


def test_prompt_and_token_times_give_equations_of_their_own():
    fit = ProfileFit().fit(sizes(("prompt_seconds", "token_seconds"), noise=1e-4))
    assert fit.equations_ == 2 * 4 * 30
    values = {one.name: one.value for one in fit.coefficients_}
    assert values["decode_attention"] == pytest.approx(TRUTH["decode_attention"], rel=0.05)
    assert "call" not in values, "no equation holds the time of the whole call"


def test_prediction_by_sums_is_the_replays():
    trace, base = batches(8, count=5, noise=0.0)
    coefficients = learned(**TRUTH)
    by_sums = predict_batches(trace, with_coefficients(base, coefficients))
    replayed = replay(trace, with_coefficients(base, coefficients)).predicted
    for name in ("makespan", "prompt_seconds", "token_seconds"):
        assert by_sums.of_batches(name) == pytest.approx(replayed.of_batches(name), rel=1e-6)
    assert trace.of_batches("makespan") == pytest.approx(replayed.of_batches("makespan"))


def test_intervals_hold_the_truth():
    inside = total = 0
    for seed in range(8):
        for one in ProfileFit().fit(sizes(seed=seed, count=15)).coefficients_:
            if one.name in ("prefill_attention", "decode_attention", "host_sequence", "attention_grid"):
                inside += one.ci95[0] <= TRUTH[one.name] <= one.ci95[1]
                total += 1
    assert inside >= 0.85 * total, f"{inside} of {total}"


def test_a_pattern_leaves_traces_out_and_their_times_take_no_part():
    runs = [batches(seqs, name=name) for seqs in (1, 8, 32) for name in ("short", "other")]
    [part] = parts("trace:short/*", [trace for trace, _ in runs])
    assert [rows is None for rows in part.fitted] == [True, False] * 3

    def spoilt(trace):
        if not trace.name.startswith("short"):
            return trace
        values = {one: trace.of_batches(one) * (1.0 if one == "start" else 7.0) for one in BATCHES.names}
        arrays = [pa.array(values[one.name], one.type, from_pandas=True) for one in BATCHES]
        return replace(trace, batches=pa.table(arrays, BATCHES))

    [(fit, held)] = hold_out(runs, "trace:short/*", None)
    [(again, _)] = hold_out([(spoilt(trace), base) for trace, base in runs], "trace:short/*", None)
    assert fit.coefficients_ == again.coefficients_
    errors = mean_errors(held)
    assert errors["makespan"]["n"] == 90
    assert errors["makespan"]["mape"] < 0.01


@pytest.mark.parametrize("pattern", ["*", "nobody/*", "made/bs9"])
def test_a_pattern_that_leaves_out_all_or_none_is_refused(pattern):
    traces = [batches(seqs, count=3)[0] for seqs in (1, 2)]
    with pytest.raises(InputError, match="some, not all, of several traces: made/bs1, made/bs2"):
        parts(f"trace:{pattern}", traces)


def test_schemes_of_time_split_batches_whole():
    trace, _ = batches(4, count=10)
    [half] = parts("time:0.5", [trace])
    assert half.fitted[0].tolist() == [True] * 20 + [False] * 20
    folds = parts("kfold-time:5", [trace])
    for fold in folds:
        assert fold.scored[0].reshape(10, 4).all(axis=1).sum() == 2
    assert np.sum([fold.scored[0] for fold in folds], axis=0).tolist() == [1] * 40


def halved(trace, some):
    values = {one: trace.of_batches(one) for one in BATCHES.names}
    values["makespan"] = np.where(np.isin(np.arange(len(values["start"])), some), 0.01, values["makespan"])
    return replace(trace, batches=pa.table([pa.array(values[one.name], from_pandas=True) for one in BATCHES], BATCHES))


def test_batches_faster_than_the_datasheet_are_left_out_and_named():
    runs = sizes()
    spoilt = [(halved(trace, [4]), base, known) for trace, base, known in runs]
    fit = ProfileFit().fit(spoilt)
    assert fit.equations_ == 4 * 29
    assert sum("the first is batch 5) took less time than the datasheet allows" in one for one in fit.warnings_) == 4
    comparisons = score(
        [(trace, base) for trace, base, _ in spoilt], fit, [np.ones(len(t), bool) for t, _, _ in spoilt]
    )
    assert comparisons[3].coverage["excluded"]["impossible"] == 32
    assert mean_errors(comparisons)["makespan"]["n"] == 4 * 29
    with pytest.raises(InputError, match=r"10 of 30 batches.*check hardware, tensor_parallel_size and model"):
        ProfileFit().fit([(halved(runs[0][0], range(10)), runs[0][1], None)])


def test_large_step_terms_are_learned_from_batches_only_and_only_with_contrast():
    only_one = ProfileFit().fit([(*batches(1, count=60), None)])
    assert not {"several_tokens", "several_tiles"} & {one.name for one in only_one.coefficients_}
    # A base that has such a term keeps it.
    base = with_coefficients(deployment(1), learned(**TRUTH))
    kept = ProfileFit().fit([(batches(1, count=60)[0], base, None)])
    assert {one.name: one.value for one in kept.coefficients_}["several_tokens"] == pytest.approx(2.0, rel=1e-3)


def test_a_comparison_of_batches_has_errors_per_batch():
    trace, base = batches(8, count=6, noise=0.0)
    comparison = compare(trace, replay(trace, base).predicted)
    metrics = comparison.metrics
    assert set(metrics) == {"makespan", "prompt_time", "token_time"}
    assert metrics["makespan"].n == 6
    assert metrics["makespan"].bias < -0.1, "the datasheet is faster than the truth"
    assert comparison.unsupported["ttft"]
    spans = comparison.throughput["makespan"]
    assert spans["measured"] == pytest.approx(trace.of_batches("makespan").sum())


def as_csv(folder, trace, seqs):
    folder.mkdir(parents=True)
    prompts, outputs = trace.column("prompt_tokens"), trace.column("output_tokens")
    with (folder / "data.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["status", "batch_size", "input_lens", "output_lens", "batch_e2e_ms"])
        for rows, seconds in zip(trace.rows_of_batches(), trace.of_batches("makespan"), strict=True):
            lengths = [json.dumps([int(one[row]) for row in rows]) for one in (prompts, outputs)]
            writer.writerow(["OK", seqs, *lengths, 1e3 * seconds])


def test_the_command_fits_a_folder_and_the_report_uses_the_profile(tmp_path, servecal):
    for seqs in (1, 2, 8, 32):
        as_csv(tmp_path / "runs" / f"bs{seqs}", batches(seqs, count=20)[0], seqs)
    with (tmp_path / "runs" / "skipped.csv").open("w") as stream:
        stream.write('status,batch_size,input_lens,output_lens,batch_e2e_ms\nSKIPPED,4,"[9]","[9]",\n')
    arguments = {"max_num_batched_tokens": 8192, "max_model_len": 8192, "version": "0.19.0", "num_gpu_blocks": 4000}
    arguments |= {"enable_chunked_prefill": "false", "enable_prefix_caching": "false"}
    flags = [part for name, value in arguments.items() for part in ("--set", f"engine.{name}={value}")]
    flags += ["--model", "llama-3.2-1b"]
    scheme = ("--holdout", "trace:*/bs8/*", "-o", "p.yaml", "--format", "json")
    fitted = servecal("fit", "runs", "--base", "roofline:l4", *scheme, *flags)
    assert fitted.code == 0, fitted.err
    document = fitted.json
    assert [one["name"] for one in document["traces"]] == [f"runs/bs{seqs}/data" for seqs in (1, 2, 32, 8)]
    assert document["notes"] == ["left out, as no batch was served: runs/skipped"]
    assert document["in_sample"]["makespan"]["n"] == 80
    assert document["holdout"]["metrics"]["makespan"]["mape"] < 0.01
    profile = load_profile(str(tmp_path / "p.yaml")).profile
    assert profile.call.per_call == CALL_UNITS["call"]
    assert profile.host.per_empty_query == HOST_UNITS["attention_grid"]
    report = servecal("report", "runs/bs8/data.csv", "--profile", "p.yaml", "--format", "json", *flags)
    assert report.code == 0, report.err
    assert report.json["metrics"]["makespan"]["mape"] < 0.01
    text = servecal("report", "runs/bs8/data.csv", "--profile", "p.yaml", *flags)
    assert "Mean error per batch: makespan 0." in text.out
    shown = servecal("fit", "runs/bs8", "runs/bs1", "--base", "linear", "-o", "l.yaml", *flags)
    assert re.search(r"mean error per batch +makespan +n\n", shown.out), shown.out
    servecal("report", "runs/skipped.csv", "--profile", "p.yaml", *flags).refused("no request that can be replayed")
    servecal("fit", "runs/skipped.csv", "--base", "roofline:l4", "-o", "n.yaml", *flags).refused("has no batch")
    servecal("report", "runs/bs8/data.csv#x", "--profile", "p.yaml", *flags).refused("selects nothing")
    servecal("report", "runs", "--profile", "p.yaml", *flags).refused("runs")
    assert not (tmp_path / "n.yaml").exists()

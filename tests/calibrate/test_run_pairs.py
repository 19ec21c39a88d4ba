from __future__ import annotations

import numpy as np
import pytest

from calibrate.estimates import Compared
from calibrate.run_pairs import Unpaired, pair
from profiles.errors import InputError

COUNT = 40
PROMPTS = [100 + 3 * place for place in range(COUNT)]
TTFT = [0.1 + 0.001 * place for place in range(COUNT)]


@pytest.fixture
def run(make_trace):
    def make(factor=1.0, **fields):
        return make_trace([factor * one for one in TTFT], **{"prompt_tokens": PROMPTS, **fields})

    return make


def test_two_runs_are_paired_by_id_whatever_their_order(run, make_trace):
    back = list(range(COUNT))[::-1]
    ids = [str(place) for place in back]
    times = [float(place) for place in back]
    other = make_trace(
        [1.1 * TTFT[place] for place in back],
        ids=ids,
        arrival=times,
        prompt_tokens=[PROMPTS[place] for place in back],
    )
    found = pair(run(), other)
    assert (found.kind, found.notes) == ("id", ())
    assert found.compared.num_paired == COUNT
    assert found.compared.metrics["ttft"].bias == pytest.approx(0.1)


def test_runs_with_other_ids_are_paired_in_order_of_arrival(run):
    other = run(1.2, ids=[f"again-{place}" for place in range(COUNT)])
    found = pair(run(), other)
    assert found.kind == "order"
    assert "ids differ" in found.notes[0]
    assert found.compared.num_paired == COUNT
    assert found.compared.metrics["ttft"].bias == pytest.approx(0.2)


def test_the_cold_request_of_either_run_is_left_out_under_its_new_name(run):
    other = run(ids=[f"again-{place}" for place in range(COUNT)], meta={"cold_start": {"request": "again-3"}})
    found = pair(run(), other)
    assert found.kind == "order"
    assert found.compared.coverage["excluded"] == {"warmup": 1}
    assert "3" not in [found.compared.measured.ids[row] for row in found.compared.rows[0]]


def test_pairs_of_other_lengths_are_left_out_and_counted(run):
    outputs = [11] * COUNT
    outputs[5] = 12
    found = pair(run(), run(output_tokens=outputs))
    assert found.kind == "id"
    assert found.compared.coverage["excluded"] == {"other_lengths": 1}
    assert f"1 of {COUNT} requests have other lengths" in found.notes[0]


def test_equal_ids_of_other_requests_pair_nothing(run):
    """Ids that only count requests are equal in any two runs."""
    found = pair(run(), run(2.0, prompt_tokens=[one + 1 for one in PROMPTS]))
    assert found.kind == "none"
    assert isinstance(found.compared, Unpaired)
    assert "a difference may be the workload's" in found.notes[0]
    ttft = found.compared.metrics["ttft"]
    assert ttft.n == (COUNT, COUNT)
    assert ttft.percentiles["p50"].error == pytest.approx(1.0)
    # The ranges 0.1 to 0.139 and 0.2 to 0.278 do not touch.
    assert ttft.distance == 1.0
    estimate = found.compared.estimate("ttft", "mean")
    assert estimate.ci95[0] < 1.0 < estimate.ci95[1]
    for name in (("ttft", "mape"), ("throughput", "makespan")):
        assert "none is paired" in found.compared.estimate(*name).reason


def test_a_run_of_another_length_is_not_paired_by_order(run, make_trace):
    other = make_trace(TTFT[:30], ids=[f"b{place}" for place in range(30)], prompt_tokens=PROMPTS[:30])
    assert pair(run(), other).kind == "none"


def test_unpaired_intervals_are_about_right(make_trace):
    """Two samples of 400 of one distribution: the interval of the ratio of means is about that of the textbook."""
    random = np.random.default_rng(1)
    values = random.uniform(0.1, 0.3, (2, 400))
    one = make_trace(values[0], prompt_tokens=list(range(1, 401)))
    other = make_trace(values[1], prompt_tokens=list(range(2, 402)))
    low, high = pair(one, other).compared.metrics["ttft"].percentiles["mean"].error_ci95
    relative = [sample.std() / sample.mean() / 20 for sample in values]
    assert (high - low) / 2 == pytest.approx(1.96 * np.hypot(*relative), rel=0.25)


def test_another_pace_is_said(run):
    found = pair(run(), run(arrival=[0.5 * place for place in range(COUNT)]))
    assert found.notes == ("requests came at another pace, 1 a second in A and 2 in B: the load differs",)


def test_runs_without_anything_in_common_are_refused(run, make_trace):
    nan = [float("nan")] * COUNT
    empty = make_trace(nan, nan, prompt_tokens=[one + 7 for one in PROMPTS])
    with pytest.raises(InputError, match="no metric in common"):
        pair(run(), empty)


def test_a_run_does_not_differ_from_itself(run):
    one = run()
    figures = Compared(pair(one, one).compared)
    assert {figures.estimate(*name).value for name in figures.names} == {0.0}

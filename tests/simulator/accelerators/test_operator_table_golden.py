"""Latencies of LLMServingSim's own composition on its published tables, to the nanosecond."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from profiles.operator_tables import load_tables, read_bundle, write_tables
from simulator.accelerators.operator_table import OperatorTable
from simulator.batch import Batch

ROOT = Path(__file__).parents[3]
TABLES = Path(os.environ.get("SERVECAL_TABLES", ROOT / "../shared/operator_tables"))
BUNDLE = TABLES / "RTXPRO6000/meta-llama/Llama-3.1-8B/bf16"

pytestmark = pytest.mark.skipif(
    not BUNDLE.is_dir(), reason=f"no operator tables in {TABLES}; SERVECAL_TABLES names their folder"
)


@pytest.fixture(scope="module")
def llama_on_rtx_pro_6000(tmp_path_factory: pytest.TempPathFactory) -> OperatorTable:
    folder = tmp_path_factory.mktemp("tables")
    tables, skew, _ = read_bundle(BUNDLE, 1)
    write_tables(tables, folder)
    return OperatorTable(load_tables(folder, skew), num_hidden_layers=32, hidden_size=4096)


@pytest.mark.parametrize(
    ("batch", "ns"),
    [
        pytest.param(Batch([(2048, 0)], []), 82_945_344, id="prefill of 2048"),
        pytest.param(Batch([(310, 2048)], []), 19_496_205, id="prefill of 310 after 2048"),
        pytest.param(Batch([], [2358]), 11_506_465, id="decode at 2358"),
    ],
)
def test_published_tables_give_the_published_iteration_latency(llama_on_rtx_pro_6000, batch, ns):
    assert round(1e9 * sum(llama_on_rtx_pro_6000.step(batch))) == ns


def test_uneven_decodes_take_the_published_alpha_of_their_bucket(llama_on_rtx_pro_6000):
    """16 decodes of mean 4096, longest 7680, skew rate (4096 - 512) / (7680 - 512) = 0.5."""
    with (BUNDLE / "tp1/skew_fit.csv").open(newline="") as stream:
        rows = {tuple(row.values())[:5]: float(row["alpha"]) for row in csv.DictReader(stream)}
    alpha = rows["0", "n<=16", "sr<=70%", "kvB<=16k", "kp=0"]
    mean, longest = (llama_on_rtx_pro_6000.attention_ns(Batch([], [context] * 16)) for context in (4096, 7680))

    uneven = llama_on_rtx_pro_6000.attention_ns(Batch([], [512] * 8 + [7680] * 8))

    assert alpha not in (0.0, 0.0543)
    assert uneven == round(mean + alpha * (longest - mean))

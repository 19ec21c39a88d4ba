"""Bundles that LLMServingSim publishes, imported as a user would."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from profiles.deployment import Facts, resolve
from profiles.errors import InputError
from profiles.import_bundle import import_bundle
from profiles.profile import load_profile
from simulator.batch import Batch

ROOT = Path(__file__).parents[2]
TABLES = Path(os.environ.get("SERVECAL_TABLES", ROOT / "../shared/operator_tables"))

pytestmark = pytest.mark.skipif(
    not TABLES.is_dir(), reason=f"no operator tables in {TABLES}; SERVECAL_TABLES names their folder"
)


def imported(bundle: str, degree: int, folder: Path):
    """The accelerator of a bundle's profile."""
    output = folder / "mine.yaml"
    profile = import_bundle(TABLES / bundle, degree, output)
    facts = Facts(version="0.19.0", arguments={"max_num_seqs": 128, "max_num_batched_tokens": 2048})
    return profile, resolve(load_profile(str(output)), facts).accelerator.device


@pytest.mark.parametrize(
    ("bundle", "degree", "name"),
    [
        ("RTXPRO6000/meta-llama/Llama-3.1-8B/bf16", 1, "rtx-pro-6000-llama-3.1-8b-tp1"),
        ("RTXPRO6000/meta-llama/Llama-3.1-8B/bf16", 2, "rtx-pro-6000-llama-3.1-8b-tp2"),
        ("L4/meta-llama/Llama-3.2-1B-Instruct/bf16", 1, "l4-llama-3.2-1b-tp1"),
    ],
)
def test_published_bundle_becomes_a_profile_that_prices_more_work_higher(tmp_path, bundle, degree, name):
    profile, device = imported(bundle, degree, tmp_path)
    small, large = (sum(device.step(batch)) for batch in (Batch([], [500]), Batch([(2000, 0)], [500] * 16)))

    assert profile.name == name
    assert 1e-3 < small < large < 1.0


def test_qwen3_32b_on_two_devices_spends_128_all_reduces_a_step(tmp_path):
    """operator-tables.md section 4: 1,280,429 ns at 2,048 tokens and 40,635 at one, on the default link."""
    _, device = imported("RTXPRO6000/Qwen/Qwen3-32B/bf16", 2, tmp_path)
    collectives = device.components.index("collectives")

    assert round(1e9 * device.step(Batch([(2048, 0)], []))[collectives]) == 128 * 1_280_429
    assert round(1e9 * device.step(Batch([], [700]))[collectives]) == 128 * 40_635


def test_published_mixture_of_experts_bundle_is_refused(tmp_path):
    with pytest.raises(InputError, match="mixture-of-experts"):
        import_bundle(TABLES / "RTXPRO6000/Qwen/Qwen3-30B-A3B-Instruct-2507/bf16", 1, tmp_path / "mine.yaml")
    assert list(tmp_path.iterdir()) == []

"""A deployment whose iterations all last 10 ms plus 1 us a token, and traces made in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from profiles.deployment import Deployment, Facts, resolve
from profiles.profile import load_profile
from replay.block_hashes import chain
from replay.trace import Trace, requests_table

PROFILE = """
schema: servecal.profile/1
name: steady
engine: {version: "0.19.0", max_num_seqs: 4, max_num_batched_tokens: 64, max_model_len: 512, num_gpu_blocks: 24}
accelerator: {kind: linear, seconds: {step: 0.01, token: 1.0e-6}}
host: {per_step: 0.0, per_sequence: 0.0}
"""


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Deployment]:
    """Deploy the steady profile with other engine arguments, as ``--set`` gives them."""
    path: Path = tmp_path_factory.mktemp("profile") / "steady.yaml"
    path.write_text(PROFILE)

    def deploy(*settings: str) -> Deployment:
        return resolve(load_profile(str(path)), Facts(model="nobody/knows-it"), settings=settings)

    return deploy


def _made(rows: list[dict[str, Any]], **meta: Any) -> Trace:
    """A row's ``prompt``: (group, shared, own) for ``shared`` tokens that the group has in common, and own ones."""
    columns: dict[str, list[Any]] = {
        "id": [row.get("id", f"r{index}") for index, row in enumerate(rows)],
        "status": [row.get("status", "ok") for row in rows],
        "arrival": [row["arrival"] for row in rows],
        "prompt_tokens": [row["prompt"][1] + row["prompt"][2] for row in rows],
        "output_tokens": [row["output"] for row in rows],
        "token_times": [[row["arrival"] or 0.0] for row in rows],
        "block_hashes": [
            chain([row["prompt"][0]] * row["prompt"][1] + [10_000 + index] * row["prompt"][2], 16)
            for index, row in enumerate(rows)
        ],
    }
    for name in ("first_token", "last_token"):
        columns[name] = [row.get(name) for row in rows]
    return Trace(requests_table(columns, len(rows)), {"name": "made", "block_hash": {"block_size": 16}, **meta})


@pytest.fixture(scope="session")
def made() -> Callable[..., Trace]:
    """Make a trace of rows with arrival, prompt, output."""
    return _made

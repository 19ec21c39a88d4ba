"""What tests share: the public traces, the command line as a user runs it, and tiny traces of each format."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
# Folders here have the names of the packages; the packages must come first, however pytest was started.
sys.path.insert(0, str(ROOT))
settings.register_profile("servecal", deadline=None, derandomize=True)
settings.load_profile("servecal")
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="session")
def traces() -> Path:
    """Folder of the public traces; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("SERVECAL_TRACES", ROOT / "../shared/traces")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no public traces in {folder} (SERVECAL_TRACES)")
    return folder


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self, *parts: str) -> None:
        """Assert exit code 2, nothing printed, and one line of error that holds every part."""
        assert self.code == 2, self
        assert self.out == "", self
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        assert "internal" not in lines[0], self.err
        for part in parts:
            assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


def _surroundings(folder: Path, environment: dict[str, object]) -> dict[str, str]:
    """An empty trace cache, no network, and what a test adds."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), NOWHERE)
    added = {name: str(value) for name, value in environment.items()}
    return {"SERVECAL_TRACES": str(folder / "cache"), **proxies, **added}


@pytest.fixture
def servecal(tmp_path: Path) -> Callable[..., Finished]:
    """Run ``servecal`` in ``tmp_path`` as a process of its own, with an empty trace cache and no network."""

    def run(*arguments: object, **environment: object) -> Finished:
        env = {**os.environ, "PYTHONWARNINGS": "error", **_surroundings(tmp_path, environment)}
        process = subprocess.run(
            [sys.executable, "-m", "calibrate.cli.main", *map(str, arguments)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        return Finished(process.returncode, process.stdout, process.stderr)

    return run


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """The same without the process: for many calls of which only the outcome matters."""
    from calibrate.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, **environment: object) -> Finished:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            for name, value in _surroundings(tmp_path, environment).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["servecal", *map(str, arguments)])
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
                main()
        return Finished(int(ended.value.code or 0), out.getvalue(), err.getvalue())

    return run


WALL, ENGINE = 1_760_000_000.0, 5_000.0
"""Where the two clocks of the sample stood when the run's logger started. All stamps are dyadic, so exact."""
SMALLEST_LAG = 1 / 64
PROMPTS = [
    list(range(100, 148)),
    list(range(100, 132)) + list(range(900, 920)),
    list(range(100, 116)) + list(range(700, 730)),
    list(range(300, 340)),
    list(range(100, 148)) + [7] * 16,
    list(range(400, 409)),
]
"""The first shares 2 blocks of 16 tokens with the second, 1 with the third, 3 with the fifth."""
OUTPUTS = [6, 4, 9, 1, 5, 3]


@dataclass
class BenchFolder:
    """A run as LLMServingSim's ``bench`` writes it; change it, then ``write`` it."""

    requests: list[dict[str, Any]]
    workload: list[dict[str, Any]] | None
    meta: dict[str, Any] | None
    timeseries: str | None
    engine_start = ENGINE
    smallest_lag = SMALLEST_LAG
    prompts = PROMPTS

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "requests.jsonl").write_text(json_lines(self.requests), encoding="utf-8")
        if self.workload is not None:
            (folder / "workload.jsonl").write_text(json_lines(self.workload), encoding="utf-8")
        if self.meta is not None:
            (folder / "meta.json").write_text(json.dumps(self.meta, indent=1), encoding="utf-8")
        if self.timeseries is not None:
            (folder / "timeseries.csv").write_text(self.timeseries, encoding="utf-8")
        return folder


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _bench_folder() -> BenchFolder:
    requests, workload = [], []
    for index, (prompt, output) in enumerate(zip(PROMPTS, OUTPUTS, strict=True)):
        sent = 0.25 + index / 8
        queued = sent + SMALLEST_LAG * (1 + index % 3)
        first = queued + 1 / 32
        requests.append(
            {
                "request_id": f"bench-{index}",
                "input_toks": len(prompt),
                "output_toks": output,
                "arrival_time": WALL + sent,
                "queued_ts": ENGINE + queued,
                "scheduled_ts": ENGINE + queued + 1 / 1024,
                "first_token_ts": ENGINE + first,
                "last_token_ts": ENGINE + first + (output - 1) / 64,
            }
        )
        early = 2_000_000 if index == 2 else 0
        workload.append(
            {
                "input_toks": len(prompt),
                "output_toks": output,
                "arrival_time_ns": int(1e9 * (sent - 0.125)) - early,
                "input_tok_ids": prompt,
            }
        )
    meta = {
        "schema_version": 1,
        "model": "meta-llama/Llama-3.2-1B",
        "vllm_version": "0.19.0",
        "engine_kwargs": {
            "model": "meta-llama/Llama-3.2-1B",
            "tensor_parallel_size": 1,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 256,
            "max_model_len": None,
            "dtype": "bfloat16",
            "seed": 42,
        },
        "started_at": "2025-10-09T08:53:20Z",
        "tick_seconds": 0.5,
    }
    timeseries = "t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct\n"
    timeseries += "0.5,100.0,10.0,1,0,25.0\n1.0,50.0,20.0,2,1,50.0\n1.5,0.0,5.0,1,0,12.5\n"
    return BenchFolder(requests, workload, meta, timeseries)


@pytest.fixture(scope="session")
def bench_folder() -> Callable[[], BenchFolder]:
    """Make a valid bench folder of six requests."""
    return _bench_folder


@dataclass
class ServeResult:
    """A file as ``vllm bench serve --save-result --save-detailed`` writes it; change it, then ``write`` it."""

    document: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(self.document), encoding="utf-8")
        return path


_SERVED = {
    "input_lens": [100, 200, 40, 64, 16],
    "output_lens": [4, 3, 2, 1, 3],
    "ttfts": [0.0625, 0.09375, 0.03125, 0.046875, 0.0625],
    "itls": [[0.015625, 0.03125, 0.015625], [0.03125, 0.03125], [0.0625], [], [0.015625, 0.015625]],
    "start_times": [8123.125, 8123.0, 8123.5, 8124.25, 8125.0],
    "errors": ["", "", "", "", ""],
}


def _serve_result(
    *, start_times: bool = True, chat: bool = False, failed: tuple[int, ...] = (), silent: tuple[int, ...] = ()
) -> ServeResult:
    arrays = copy.deepcopy(_SERVED)
    count = len(arrays["ttfts"])
    for index in (*failed, *silent):
        arrays["output_lens"][index] = 0
        arrays["ttfts"][index] = 0.0
        arrays["itls"][index] = []
    for index in failed:
        arrays["errors"][index] = "Traceback: ServerDisconnectedError"
    if chat:
        for index in set(range(count)) - {*failed, *silent}:
            # The role chunk comes first; the first content follows a little later.
            arrays["itls"][index].insert(0, 0.0078125)
    if not start_times:
        del arrays["start_times"]
    return ServeResult(
        {
            "date": "20260101-120000",
            "backend": "openai-chat" if chat else "vllm",
            "model_id": "meta-llama/Llama-3.2-1B",
            "tokenizer_id": "meta-llama/Llama-3.2-1B",
            "num_prompts": count,
            "request_rate": 2.0,
            "burstiness": 1.0,
            "max_concurrency": None,
            "duration": 2.5,
            "completed": count - len(failed),
            "total_input_tokens": sum(arrays["input_lens"]),
            "total_output_tokens": sum(arrays["output_lens"]),
            "request_throughput": 2.0,
            "output_throughput": 5.2,
            **arrays,
            "mean_ttft_ms": 59.4,
        }
    )


@pytest.fixture(scope="session")
def serve_result() -> Callable[..., ServeResult]:
    """Make a valid benchmark result of five requests."""
    return _serve_result


HOSTILE = (
    '</script><img src=x onerror="alert(1)">\'|`*_~ @team #12 [a](javascript:alert(2)) ::error::x\n'
    "## $y$\u202e\x00 &amp;"
)
"""A name that breaks whatever does not escape: HTML, scripts, Markdown, XML, workflow commands."""


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE


@pytest.fixture(scope="session")
def judged() -> Callable[..., Any]:
    """Give a report gates of every verdict, findings of every severity, an attribution; foreign text in all."""
    from calibrate.attribution import PARTS, Attribution, Share
    from calibrate.gates import GateResult, Judgement
    from replay.quality import Finding

    def shares(*points: float) -> tuple[Share, ...]:
        return tuple(Share(part, value) for part, value in zip(PARTS, points, strict=True))

    def judge(report: Any, text: str = "by hand") -> Any:
        results = (
            GateResult("ttft", "p99", 0.1, 0.07, (0.05, 0.09), "pass", f"within: {text}"),
            GateResult("e2e", "mape", 0.1, 0.4, (0.3, 0.5), "fail", f"40 % is above 10 %: {text}"),
            GateResult("tpot", "p50", 0.1, 0.11, (0.05, 0.2), "inconclusive", f"holds the limit: {text}"),
        )
        findings = (
            Finding("first_request", "info", f"The first request was slow: {text}"),
            Finding("duplicate_ids", "error", f"Two requests have the same id: {text}", (text, *map(str, range(9)))),
            Finding("littles_law", "warning", f"Requests are missing: {text}", (text,)),
        )
        parts = {"ttft": {"mean": shares(0.02, 0.01, 0.15, 0, -0.03, 0.005), "p99": shares(0.04, 0, 0.19, 0, 0, 0)}}
        attribution = Attribution("recorded iterations", "", parts, {"utilisation": 0.93}, (f"TTFT p99 +23 %: {text}",))
        return replace(report, judgement=Judgement(results), findings=findings, attribution=attribution)

    return judge

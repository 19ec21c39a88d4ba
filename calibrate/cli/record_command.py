"""``servecal record``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from calibrate.cli.options import output_options, write_output
from replay.readers import read_trace, recording
from replay.recorder.hashes import SALT
from replay.recorder.scheduler import FOLDER, TOKEN_IDS
from replay.trace import Trace

SCHEDULER = "replay.recorder.RecordingScheduler"
OLDEST = "0.10.2"
TEXT = """\
Record a vLLM engine ({oldest} or newer): every iteration and every request, for some 10 us an
iteration and 0.2 us a request in it.

1  Where vLLM is installed, once (the recorder needs nothing but Python and vLLM):

     pip install --no-deps servecal

2  Start vLLM with one more argument:

     {folder_variable}={folder} vllm serve MODEL ... --scheduler-cls {scheduler}

   or, offline: LLM(model, ..., scheduler_cls="{scheduler}")
   The server's log says "servecal: recording to ...". Without {folder_variable} a folder
   servecal-recording-<run> is made where the server was started. One file an engine core.

3  Serve your load, then stop the server. A killed one loses no more than its last second.

4  See what was recorded, and use it:

     servecal record {folder}
     servecal report {folder} --profile roofline:<hardware>
     servecal fit {folder} --base roofline:<hardware> -o fitted.yaml
     servecal conformance {folder}

What is kept of a prompt: its length, and keyed hashes of its KV blocks, so that shared prefixes are seen and texts
are not. {tokens_variable}=1 keeps the token ids too.
{salt_variable}=SECRET makes hashes comparable between hosts; else they are between the processes of one host until it
boots again.
"""


@click.command("record")
@click.argument("folder", required=False, metavar="[FOLDER]")
@output_options("text", "json")
def command(folder: str | None, style: str, output: Path | None) -> None:
    """Say how to record a vLLM engine, or what a recording holds.

    FOLDER is where the recording goes; if it is there already, its content is told. For one engine core of several,
    FOLDER#dp0.
    """
    head, _, selection = (folder or "").partition("#")
    if folder and Path(head).exists():
        document = _content(read_trace(Path(head), selection or None), Path(head))
        text = "".join(_told(document))
    else:
        document = _instructions(folder or "/path/of/recording")
        text = TEXT.format(oldest=OLDEST, scheduler=SCHEDULER, **document["variables"], folder=document["folder"])
    write_output(json.dumps(document, indent=1) + "\n" if style == "json" else text, output)


def _instructions(folder: str) -> dict[str, Any]:
    quoted = shlex.quote(folder)
    return {
        "schema": "servecal.record/1",
        "oldest_vllm": OLDEST,
        "install": "pip install --no-deps servecal",
        "argument": f"--scheduler-cls {SCHEDULER}",
        "folder": quoted,
        "variables": {"folder_variable": FOLDER, "tokens_variable": TOKEN_IDS, "salt_variable": SALT},
        "next": [f"servecal record {quoted}", f"servecal report {quoted} --profile roofline:<hardware>"],
    }


def _content(trace: Trace, path: Path) -> dict[str, Any]:
    statuses = trace.statuses.tolist()
    engine = trace.meta.get("engine") or {}
    return {
        "schema": "servecal.record/1",
        "format": trace.meta["source"]["format"],
        "name": trace.name,
        "engine_cores": recording.selections(path) if path.is_dir() else [],
        "engine": f"{engine.get('name')} {engine.get('version')}",
        "model": trace.meta.get("model"),
        "hardware": trace.meta.get("hardware"),
        "requests": {status: statuses.count(status) for status in sorted(set(statuses))},
        "iterations": trace.iterations.num_rows if trace.iterations is not None else None,
        "preemptions": int(trace.requests.column("preemptions").to_numpy().sum()) if _whole(trace) else None,
        "notes": trace.meta.get("notes") or [],
    }


def _whole(trace: Trace) -> bool:
    return bool(trace.requests.column("preemptions").null_count == 0)


def _told(document: dict[str, Any]) -> list[str]:
    requests = ", ".join(f"{count:,} {status}" for status, count in document["requests"].items())
    lines = [
        f"{document['name']}  {document['engine']}, {document['model']} on {document['hardware']}\n",
        f"requests     {requests}\n",
    ]
    if document["iterations"] is not None:
        lines.append(f"iterations   {document['iterations']:,}\n")
    if document["preemptions"] is not None:
        lines.append(f"preemptions  {document['preemptions']:,}\n")
    if len(document["engine_cores"]) > 1:
        lines.append(f"engine cores {', '.join(document['engine_cores'])}\n")
    return lines + [f"- {note}\n" for note in document["notes"]]

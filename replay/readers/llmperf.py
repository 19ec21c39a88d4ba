"""LLMPerf's ``<prefix>_individual_responses.json``: an array, one object a request, in the order of completion.

Closed loop of ``num_concurrent_requests`` clients; no send times. Its ``inter_token_latency_s`` is about the whole
latency over the output tokens, and no gap between tokens: it is not read. Token counts are those of a Llama tokenizer,
whatever the model. Format: ray-project/llmperf @f1d6bed.
"""

from __future__ import annotations

from pathlib import Path

from replay.readers.client_requests import ClientRequest, client_trace, message_of
from replay.readers.fields import Record
from replay.readers.json_records import keys_of, stream_array
from replay.trace import Trace

FORMAT = "llmperf"
REQUESTS_FILE = ""
_KEYS = frozenset({"[].ttft_s", "[].end_to_end_latency_s", "[].number_output_tokens"})


def detect(path: Path) -> bool:
    """Whether a file holds LLMPerf's individual responses."""
    keys = keys_of(path)
    # A request that failed may be the first one, and has only some of the fields.
    return keys >= _KEYS or {"[].error_code", "[].error_msg"} <= keys


def read(path: Path) -> Trace:
    """Read a run.

    Raises
    ------
    InputError
        Naming file, request and field of what cannot be used.
    """
    requests = [_request(record, index) for index, record in enumerate(stream_array(path))]
    said = "assumed: counted with LLMPerf's Llama tokenizer, whatever the model"
    return client_trace(
        path,
        requests,
        {},
        clock="differences of the client's monotonic clock; when requests were sent is not written",
        origins={"prompt_tokens": said, "output_tokens": said},
        notes=[
            "lengths were counted with LLMPerf's own tokenizer: TPOT is off by as much as the output tokens are",
            "the clients kept a fixed number of requests in flight (a closed loop), and the file does not say how "
            "many: drawn arrivals are no substitute for it",
        ],
        format=FORMAT,
    )


def _request(record: Record, index: int) -> ClientRequest:
    prompt = record.tokens("number_input_tokens") if record.get("number_input_tokens") is not None else None
    if record.get("error_code") is not None or record.get("error_msg"):
        return ClientRequest(str(index), prompt, None, "failed", message_of(record, "error_msg"))
    first, last = record.seconds("ttft_s"), record.seconds("end_to_end_latency_s", positive=True)
    output = record.tokens("number_output_tokens")
    if output == 0 and first == 0:
        return ClientRequest(str(index), prompt, 0)
    if first > last:
        raise record.error("ttft_s", f"expected at most end_to_end_latency_s ({last:g}), found {first:g}")
    return ClientRequest(str(index), record.tokens("number_input_tokens", 1), output, first=first, last=last)

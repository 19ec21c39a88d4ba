"""An OpenAI-style server that streams words on a schedule, to see what a client's tool writes of it. Needs aiohttp.

``python stub_server.py PORT LOG`` appends a line a request to LOG: id, path, time, tokens and ``x-`` headers.
"""

import asyncio
import itertools
import json
import sys
import time
from pathlib import Path

from aiohttp import web

FIRST, NEXT, FAILS = 0.02, 0.005, 7
NUMBERS = itertools.count()
LOG = Path(sys.argv[2])


async def models(_):
    return web.json_response({"object": "list", "data": [{"id": "stub", "object": "model", "max_model_len": 8192}]})


async def generate(request):
    number, begun, body = next(NUMBERS), time.time(), await request.json()
    chat = "chat" in request.path
    output = int(body.get("max_completion_tokens") or body.get("max_tokens") or 8)
    prompt = max(1, len(json.dumps(body.get("messages") or body.get("prompt")).split()))
    name = f"{'chatcmpl' if chat else 'cmpl'}-{number}"
    headers = {key: value for key, value in request.headers.items() if key.lower().startswith("x-")}
    line = {"id": name, "path": request.path, "time": begun, "ptok": prompt, "out": output, "headers": headers}
    with LOG.open("a") as log:
        log.write(json.dumps(line) + "\n")
    if number % FAILS == FAILS - 1:
        return web.json_response({"error": {"message": "stub says no"}}, status=500)
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    usage["prompt_tokens_details"] = {"cached_tokens": 2}
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)

    async def send(choices, **more):
        event = {"id": name, "created": int(begun), "model": body.get("model"), "choices": choices, **more}
        event["object"] = "chat.completion.chunk" if chat else "text_completion"
        await response.write(f"data: {json.dumps(event)}\n\n".encode())

    await asyncio.sleep(FIRST)
    if chat:
        await send([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    for place in range(output):
        await asyncio.sleep(NEXT if place else 0)
        content = {"delta": {"content": "hello "}} if chat else {"text": "hello "}
        await send([{"index": 0, **content, "finish_reason": "length" if place == output - 1 else None}])
    if (body.get("stream_options") or {}).get("include_usage"):
        await send([], usage=usage)
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def healthy(_):
    return web.Response(text="ok")


if __name__ == "__main__":
    app = web.Application(client_max_size=2**30)
    app.add_routes([web.get("/v1/models", models), web.get("/health", healthy)])
    app.add_routes([web.post(f"/v1/{path}", generate) for path in ("completions", "chat/completions")])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]))

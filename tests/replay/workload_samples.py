"""Minimal files of every workload format, true to the formats, made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,3180,8\r\n"
    "2023-11-16 18:17:06.0000000,110,27"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-12 00:00:00.123000+00:00,100,10\n"
    "2024-05-12 00:00:01+00:00,200,20\n"
)
AZURE_2025 = (
    "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:01.5,0,100,10\n2024-10-15 00:00:00,2,7,20\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,GPT-4,1087,230,1317,API log\n"
    "45,ChatGPT,417,0,417,Conversation log\n"
)
BURSTGPT_8 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "19000005.0,s1,3.0,ChatGPT,472,18,490,Conversation log\n"
    "19000006.0,,2.0,GPT-4,1087,230,1317,API log\n"
    "19000009.0,s1,9.0,ChatGPT,600,40,640,Conversation log\n"
)
MOONCAKE = [
    {"timestamp": 27000, "input_length": 1400, "output_length": 52, "hash_ids": [0, 1, 2]},
    {"timestamp": 27000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 3]},
    {"timestamp": 30001, "input_length": 512, "output_length": 500, "hash_ids": [1]},
]
TIMED = [
    {"timestamp": 1.5, "input_length": 40, "output_length": 5, "hash_ids": [4, 5, 6]},
    {"timestamp": 1.75, "input_length": 32, "output_length": 9, "hash_ids": [4, 5]},
]
TIMED_PLAIN = [{"timestamp": 0, "input_length": 40, "output_length": 5}]
BAILIAN = [
    {
        "chat_id": 1,
        "parent_chat_id": -1,
        "timestamp": 0.1,
        "input_length": 40,
        "output_length": 9,
        "type": "text",
        "turn": 1,
        "hash_ids": [7, 8, 9],
    },
    {
        "chat_id": 5,
        "parent_chat_id": 1,
        "timestamp": 61.114,
        "input_length": 64,
        "output_length": 13,
        "type": "text",
        "turn": 2,
        "hash_ids": [7, 8, 10, 11],
    },
    {
        "chat_id": 6,
        "parent_chat_id": 5,
        "timestamp": 70.0,
        "input_length": 16,
        "output_length": 1,
        "type": "file",
        "turn": 3,
        "hash_ids": [7],
    },
    {
        "chat_id": 8,
        "parent_chat_id": 99,
        "timestamp": 71.0,
        "input_length": 16,
        "output_length": 1,
        "type": "search",
        "turn": 4,
        "hash_ids": [8],
    },
]
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.314579,396,109\n"
VIDUR_LENGTHS = (
    "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.85\n2015,156,2171,12.9\n"
)
FRONTIER = (
    "arrived_at,num_prefill_tokens,num_decode_tokens,session_id,block_hash_ids\n0.0,32,4,a,11|22\n1.0,16,1,b,11\n"
)
SHAREGPT = [
    {
        "id": "x_0",
        "conversations": [
            {"from": "human", "value": 'Tell me of [brackets] and "quotes".'},
            {"from": "gpt", "value": "Gladly."},
            {"from": "human", "value": "More."},
        ],
    },
    {"id": "x_1", "conversations": [{"from": "human", "value": "hi"}]},
    {"id": "x_2", "conversations": [{"from": "human", "value": "größer"}, {"from": "gpt", "value": "ja"}]},
]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


SAMPLES: dict[str, tuple[str, str]] = {
    "azure": ("azure-csv", AZURE),
    "azure-2024": ("azure-csv", AZURE_2024),
    "azure-2025": ("azure-csv", AZURE_2025),
    "burstgpt": ("burstgpt-csv", BURSTGPT),
    "burstgpt-8": ("burstgpt-csv", BURSTGPT_8),
    "mooncake": ("mooncake-jsonl", lines(MOONCAKE)),
    "timed": ("vllm-timed-trace", lines(TIMED)),
    "timed-plain": ("vllm-timed-trace", lines(TIMED_PLAIN)),
    "bailian": ("bailian-jsonl", lines(BAILIAN)),
    "vidur": ("vidur-csv", VIDUR),
    "vidur-lengths": ("vidur-csv", VIDUR_LENGTHS),
    "frontier": ("vidur-csv", FRONTIER),
    "sharegpt": ("sharegpt-json", json.dumps(SHAREGPT, indent=2)),
    "sharegpt-dense": ("sharegpt-json", json.dumps(SHAREGPT, ensure_ascii=False)),
}
"""By a name: the format it is to be found as, and the content."""


def writer(folder: Path) -> Callable[[str], Path]:
    """Write a sample under a name that says nothing of its format."""

    def write(name: str) -> Path:
        path = folder / f"{name}.data"
        path.write_bytes(SAMPLES[name][1].encode())
        return path

    return write

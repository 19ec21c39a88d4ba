"""A small Llama of random weights for captures: nothing is downloaded.

A folder with ``config.json`` is all that vLLM needs with ``load_format="dummy"``; its HTTP server and
``vllm bench serve`` want a tokenizer as well, one word a token here.
"""

from __future__ import annotations

import json
from pathlib import Path

MODEL_NAME = "servecal/cpu-llama-{num_hidden_layers}x{hidden_size}"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SPECIAL = ("<unk>", "<s>", "</s>")


def write_model(folder: Path, *, tokenizer: bool = False) -> None:
    """Write ``config.json``, and a tokenizer of ``vocab_size`` words if asked (needs ``tokenizers``)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    if not tokenizer:
        return
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), int(str(MODEL["vocab_size"]))))]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=SPECIAL[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "model_max_length": MODEL["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")

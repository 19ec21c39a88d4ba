"""Roofline: every operator takes the longer of its arithmetic at peak rate and its traffic at peak bandwidth.

Nothing is measured and nothing fitted, so the result bounds an iteration from below: kernels reach neither
peak, and nothing is counted between them. Each operator's time goes to the component that binds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from simulator.accelerators.base import Floats
from simulator.accelerators.collectives import ring_all_reduce
from simulator.batch import Batch
from simulator.errors import SimulationError
from simulator.hardware import Hardware
from simulator.model import BYTES, ModelShape

TILE = 128
"""Rows (tokens) of a matrix kernel's tile, as in the large tiles of cuBLAS and CUTLASS."""
ATTENTION_TILE = 128
"""Rows of queries and of keys in an attention kernel's tile."""


class _Matrix(NamedTuple):
    """``layers`` layers' matrix: weights that a row meets, weights read, rows, input plus output width, dtype."""

    layers: int
    weights: float
    read: float
    rows: float
    widths: int
    dtype: str


class Roofline:
    """Prices a batch from the shapes of a model and the datasheet of a device.

    Components
    ----------
    dense_compute
        Projections and MLPs (or experts) whose arithmetic binds.
    weight_traffic
        The same where reading weights and activations binds.
    prefill_attention, decode_attention
        Scores and values of prefill chunks (causal) and of decodes, key-value traffic included.
    output_head
        Vocabulary projection of one position per sequence.
    embedding
        Reading the token embeddings, norms and activations between operators.
    collectives
        Two all-reduces a layer, if tensor parallel.
    dense_exposed
        The shorter of arithmetic and traffic of every projection, which an ideal device hides behind the longer.
    tile_padding
        Arithmetic of the rows that fill up a kernel's last tile of ``TILE`` tokens, where arithmetic binds.
    decode_kernels
        Arithmetic of one attention tile (128 queries by 128 keys) per layer and decoding sequence: a kernel computes
        whole tiles, of which one query's decode uses a row, and starts and combines per sequence.

    The last three cost nothing (coefficient 0) until a profile or a fit says otherwise: an ideal device has none.

    Parameters
    ----------
    model : ModelShape
    hardware : Hardware
    tensor_parallel_size : int
        Devices over which every matrix is split.
    kv_cache_dtype : str
        vLLM's; ``"auto"`` keeps the activations' type.

    Raises
    ------
    SimulationError
        If the model has parts that its description cannot say, or devices lack a link.
    """

    components = (
        "dense_compute",
        "weight_traffic",
        "prefill_attention",
        "decode_attention",
        "output_head",
        "embedding",
        "collectives",
        "dense_exposed",
        "tile_padding",
        "decode_kernels",
    )

    default_coefficients = MappingProxyType({"dense_exposed": 0.0, "tile_padding": 0.0, "decode_kernels": 0.0})

    expected_coefficients = MappingProxyType(
        {
            "dense_compute": (1.2, 0.1),
            "weight_traffic": (1.15, 0.08),
            "prefill_attention": (3.3, 0.7),
            "decode_attention": (1.2, 0.15),
            "output_head": (1.15, 0.1),
            "embedding": (2.0, 1.0),
            "collectives": (1.0, 0.25),
            "dense_exposed": (0.37, 0.1),
            "tile_padding": (1.0, 0.5),
            "decode_kernels": (1.1, 0.25),
        }
    )
    """What kernels reach of a datasheet, mean and spread. The first seven but collectives, and ``decode_kernels``: from
    LLMServingSim's operator tables of Llama-3.1-8B on an RTX PRO 6000 (1.14, 1.10, 3.4, 1.17, 1.13, 2, 0.37 and 0.90)
    and of Llama-3.2-1B on an L4 (1.28, 1.23, 3.4, 1.34, 1.25, 2, 0.37 and 1.23), each fitted by non-negative least
    squares over 1 to 2,048 tokens. A fit starts there, so that what its data cannot tell is a usual efficiency and not
    an ideal one."""

    floors = MappingProxyType(dict.fromkeys(components[:6], 1.0))
    """No device is faster than its datasheet: a fit keeps these coefficients at 1 or more. A link may be faster than
    what is said of it."""

    def __init__(
        self,
        model: ModelShape,
        hardware: Hardware,
        *,
        tensor_parallel_size: int = 1,
        kv_cache_dtype: str = "auto",
    ) -> None:
        if model.unsupported:
            raise SimulationError(f"roofline cannot price {model.name}: it has " + ", ".join(model.unsupported))
        if tensor_parallel_size > 1 and not hardware.interconnect.bandwidth:
            raise SimulationError(f"hardware {hardware.name} has no interconnect for tensor_parallel_size > 1")
        self.model = model
        self.hardware = hardware
        self.tensor_parallel_size = tensor_parallel_size
        self._attention_flops = hardware.flops(model.activation_dtype)
        self._kv_bytes = model.kv_bytes_per_token(kv_cache_dtype, tensor_parallel_size)
        # Flops of attention per (query token, context token): scores and values, two operations each.
        self._attention_work = 4.0 * model.query_size * model.num_hidden_layers / tensor_parallel_size
        self._query_bytes = (
            2.0 * model.query_size * model.activation_bytes * model.num_hidden_layers / tensor_parallel_size
        )
        self._token_parts = lru_cache(maxsize=65536)(self._price_tokens)
        self._head_parts = lru_cache(maxsize=4096)(self._price_head)

    def step(self, batch: Batch) -> Sequence[float]:
        """Return seconds per component."""
        compute, traffic, embedding, collectives, exposed, padding = self._token_parts(batch.num_tokens)
        return (
            compute,
            traffic,
            sum(self._attention(query, context) for query, context in batch.prefills),
            self._decode_attention(batch),
            self._head_parts(batch.num_seqs),
            embedding,
            collectives,
            exposed,
            padding,
            batch.num_decodes * ATTENTION_TILE**2 * self._attention_work / self._attention_flops,
        )

    def decode_run(self, batch: Batch, steps: int) -> Floats:
        """Return seconds per step and component, each step as ``step`` prices it."""
        run: Floats = np.tile(np.array(self.step(batch), dtype=np.float64), (steps, 1))
        num = batch.num_decodes
        positions = batch.decode_context + num + num * np.arange(steps)
        traffic = positions * self._kv_bytes + num * self._query_bytes
        run[:, self.components.index("decode_attention")] = np.maximum(
            positions * self._attention_work / self._attention_flops, traffic / self.hardware.memory_bandwidth
        )
        return run

    def _attention(self, query: int, context: int) -> float:
        pairs = query * (context + (query + 1) / 2)
        traffic = (context + query) * self._kv_bytes + query * self._query_bytes
        return max(pairs * self._attention_work / self._attention_flops, traffic / self.hardware.memory_bandwidth)

    def _decode_attention(self, batch: Batch) -> float:
        num = batch.num_decodes
        if not num:
            return 0.0
        positions = batch.decode_context + num
        traffic = positions * self._kv_bytes + num * self._query_bytes
        return max(positions * self._attention_work / self._attention_flops, traffic / self.hardware.memory_bandwidth)

    def _price_tokens(self, tokens: int) -> tuple[float, float, float, float, float, float]:
        """Dense compute, weight traffic, embedding, collectives, exposed and tile padding, all layers."""
        model, devices = self.model, self.tensor_parallel_size
        bandwidth = self.hardware.memory_bandwidth
        compute = traffic = exposed = 0.0
        for matrix in self._matrices(tokens):
            arithmetic = matrix.layers * 2.0 * matrix.rows * matrix.weights / devices
            arithmetic /= self.hardware.flops(matrix.dtype)
            moved = matrix.read * BYTES[matrix.dtype] + matrix.rows * matrix.widths * model.activation_bytes
            memory = matrix.layers * moved / devices / bandwidth
            if arithmetic >= memory:
                compute += arithmetic
            else:
                traffic += memory
            exposed += min(arithmetic, memory)
        padding = compute * (-tokens % TILE) / tokens
        row_bytes = tokens * model.hidden_size * model.activation_bytes
        # The embedding row is read and written once; every layer's two residual adds and norms read and write.
        embedding = (2 + 8 * model.num_hidden_layers) * row_bytes / bandwidth
        reduce = ring_all_reduce(row_bytes, devices, self.hardware.interconnect)
        return compute, traffic, embedding, 2 * model.num_hidden_layers * reduce, exposed, padding

    def _matrices(self, tokens: int) -> list[_Matrix]:
        model = self.model
        layers, dtype = model.num_hidden_layers, model.attention_weight_dtype
        hidden, qkv_width = model.hidden_size, model.query_size + 2 * model.kv_size
        qkv, out = hidden * qkv_width, model.query_size * hidden
        matrices = [
            _Matrix(layers, qkv, qkv, tokens, hidden + qkv_width, dtype),
            _Matrix(layers, out, out, tokens, model.query_size + hidden, dtype),
        ]
        plain = model.num_unquantized_mlp_layers
        matrices += self._mlp(model.num_dense_layers - plain, model.intermediate_size, tokens, model.weight_dtype)
        matrices += self._mlp(plain, model.intermediate_size, tokens, model.activation_dtype)
        if model.num_moe_layers:
            shared = model.shared_expert_intermediate_size
            matrices += self._mlp(model.num_moe_layers, shared, tokens, model.weight_dtype)
            matrices += self._experts(tokens)
        return matrices

    def _mlp(self, count: int, width: int, rows: float, dtype: str, copies_read: float = 1.0) -> list[_Matrix]:
        """Up (and gate) and down projection of ``count`` layers; ``copies_read`` experts' worth of weights."""
        if not count or not width:
            return []
        hidden, ups = self.model.hidden_size, self.model.mlp_matrices - 1
        up, down = ups * hidden * width, hidden * width
        return [
            _Matrix(count, up, copies_read * up, rows, hidden + ups * width, dtype),
            _Matrix(count, down, copies_read * down, rows, width + hidden, dtype),
        ]

    def _experts(self, tokens: int) -> list[_Matrix]:
        """Experts under uniform routing: E (1 - (1 - k/E)^T) of E are read for T tokens of k experts each."""
        model = self.model
        experts, per_token = model.num_experts, model.num_experts_per_tok
        active = experts * (1.0 - (1.0 - per_token / experts) ** tokens)
        layers, width = model.num_moe_layers, model.moe_intermediate_size
        router = model.hidden_size * experts
        return [
            _Matrix(layers, router, router, tokens, model.hidden_size + experts, model.activation_dtype),
            *self._mlp(layers, width, float(tokens * per_token), model.weight_dtype, active),
        ]

    def _price_head(self, sequences: int) -> float:
        model = self.model
        weights = model.vocab_size * model.hidden_size
        arithmetic = 2.0 * sequences * weights / self._attention_flops
        moved = (weights + sequences * (model.hidden_size + model.vocab_size)) * model.activation_bytes
        return max(arithmetic, moved / self.hardware.memory_bandwidth) / self.tensor_parallel_size

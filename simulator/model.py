"""Shapes of a decoder-only transformer, as far as its cost depends on them."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5, "fp4": 0.5}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One model.

    ``num_experts`` is 0 for dense models; ``intermediate_size`` is the width of a dense MLP,
    ``moe_intermediate_size`` of one expert, ``shared_expert_intermediate_size`` of experts that every token
    visits. ``weight_dtype`` (MLPs and experts), ``attention_weight_dtype`` and ``activation_dtype`` (also
    embedding and output head) name entries of ``BYTES``; ``num_unquantized_mlp_layers`` keep the activations'
    type. ``gated_mlp`` models have three MLP matrices, others two. ``unsupported`` lists what an accelerator
    model must know to price the model and this description cannot say (sliding windows, latent attention,
    state-space layers).
    """

    name: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    gated_mlp: bool = True
    qk_norm: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    num_moe_layers: int = 0
    weight_dtype: str = "bfloat16"
    activation_dtype: str = "bfloat16"
    attention_weight_dtype: str = "bfloat16"
    num_unquantized_mlp_layers: int = 0
    sliding_window: int | None = None
    unsupported: tuple[str, ...] = ()

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Weights of one layer's four attention projections."""
        return self.hidden_size * (2 * self.query_size + 2 * self.kv_size)

    @property
    def mlp_matrices(self) -> int:
        """Matrices of one MLP or expert."""
        return 3 if self.gated_mlp else 2

    @property
    def dense_mlp_parameters(self) -> int:
        """Weights of one dense layer's MLP."""
        return self.mlp_matrices * self.hidden_size * self.intermediate_size

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert."""
        return self.mlp_matrices * self.hidden_size * self.moe_intermediate_size

    @property
    def num_dense_layers(self) -> int:
        """Layers whose MLP every token passes."""
        return self.num_hidden_layers - self.num_moe_layers

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights, norms left out except the two of a layer and the last."""
        moe = self.num_experts * (self.expert_parameters + self.hidden_size)
        moe += self.mlp_matrices * self.hidden_size * self.shared_expert_intermediate_size
        return (
            self.embedding_parameters * (1 if self.tie_word_embeddings else 2)
            + self.num_hidden_layers * (self.attention_parameters + 2 * self.hidden_size)
            + self.num_dense_layers * self.dense_mlp_parameters
            + self.num_moe_layers * moe
            + self.hidden_size
        )

    @property
    def activation_bytes(self) -> float:
        """Bytes per activation, and per weight of embedding and output head."""
        return BYTES[self.activation_dtype]

    def memory_bytes(self, tensor_parallel_size: int = 1) -> float:
        """Bytes of weights on one of ``tensor_parallel_size`` devices."""
        attention = self.num_hidden_layers * self.attention_parameters
        outside = self.embedding_parameters * (1 if self.tie_word_embeddings else 2)
        inside = self.num_parameters - outside - attention
        plain = self.num_unquantized_mlp_layers * self.dense_mlp_parameters
        total = (outside + plain) * self.activation_bytes + (inside - plain) * BYTES[self.weight_dtype]
        return (total + attention * BYTES[self.attention_weight_dtype]) / tensor_parallel_size

    def kv_bytes_per_token(self, kv_cache_dtype: str = "auto", tensor_parallel_size: int = 1) -> float:
        """Bytes of keys and values that one token keeps on one device, all layers."""
        heads = max(1, -(-self.num_key_value_heads // tensor_parallel_size))
        size = 1.0 if kv_cache_dtype.startswith("fp8") else self.activation_bytes
        return 2 * heads * self.head_dim * self.num_hidden_layers * size

"""Models of Transformers that llama.cpp knows: its names for their architectures, tensors and settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Transformers' model_type, and llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Names within a block there, and here.
BLOCK_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPES = ("default", "linear", "llama3")


def check_model(config: Any) -> None:
    """Refuse models that llama.cpp would run differently.

    Raises:
        ValueError: what, got, expected and what to do.
    """
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"Cannot write a {config.model_type!r} model as GGUF: expected one of {', '.join(ARCHITECTURES)}. Write a "
            "float copy (hf_onebit.load(DIR, dequantize=True).save_pretrained(OUT)) and convert it with llama.cpp's "
            "own convert_hf_to_gguf.py"
        )
    rope = rope_of(config)
    problems = []
    if config.hidden_act != "silu":
        problems.append(f"hidden_act is {config.hidden_act!r}: expected 'silu'")
    if rope.get("rope_type", "default") not in _ROPES:
        problems.append(f"rope_type is {rope['rope_type']!r}: expected one of {', '.join(_ROPES)}")
    if (rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1) != 1:
        problems.append("only a part of each head is rotated: expected all of it")
    if getattr(config, "use_sliding_window", False) and config.model_type != "mistral":
        problems.append("use_sliding_window is on: expected full attention")
    if problems:
        raise ValueError(
            "Cannot write this model as GGUF: " + "; ".join(problems) + ". llama.cpp's convert_hf_to_gguf.py may do it "
            "from a float copy: hf_onebit.load(DIR, dequantize=True).save_pretrained(OUT)"
        )


def add_settings(writer: Any, config: Any, name: str) -> None:
    """Write the settings of the architecture."""
    import gguf

    rope = rope_of(config)
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    writer.add_name(name)
    # Within its window, a model of sliding windows attends to everything.
    writer.add_context_length(min(filter(None, (config.max_position_embeddings, window))))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(config.vocab_size)


def rope_factors(config: Any) -> Tensor | None:
    """What divides each rotary frequency, float32 ``(head / 2,)``, where that is told by a tensor (Llama 3)."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_size(config), 2).float() / head_size(config)
    return (1.0 / rope["rope_theta"] ** exponents / scaled).float()


def row_order(config: Any, tensor: str) -> Tensor | None:
    """Which row of ours is each row there, for a tensor of ``BLOCK_TENSORS``; None where they are the same.

    Rotary embeddings turn pairs of rows of a head: row i with row i + half here, and neighbours in llama.cpp's "llama".
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(tensor)
    if heads is None or ARCHITECTURES[config.model_type] != "llama":
        return None
    rows = torch.arange(heads * head_size(config))
    return rows.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def head_size(config: Any) -> int:
    """Rows of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: Any) -> dict[str, Any]:
    """Settings of the rotary embeddings."""
    return dict(config.rope_parameters)

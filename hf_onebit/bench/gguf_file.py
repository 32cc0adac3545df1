"""A Llama model of Transformers as a GGUF file, so that llama.cpp runs the same architecture in the same sizes."""

import os
from typing import Any

import numpy as np
from torch import Tensor

from hf_onebit.bench.ggml import TYPES, Ggml
from hf_onebit.interchange.gguf_models import head_size, rope_of

LINEAR_TYPES = (*TYPES, "f16")
# Transformers' names within a block, and GGUF's.
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def obstacle(config: Any, ggml: Ggml, linear: str) -> str | None:
    """Why a model of that config cannot be written with linear layers of that type, or None."""
    try:
        import gguf
    except ImportError:
        return 'writing GGUF files needs the package gguf: pip install "hf_onebit[gguf]"'
    if TYPES.get(linear, 0) not in set(gguf.GGMLQuantizationType):
        return f"the installed package gguf is older than the type {linear}: pip install -U gguf"
    if config.model_type != "llama":
        return f"only Llama models are written as GGUF files, and this is {config.model_type!r}"
    if config.attention_bias or config.mlp_bias:
        return "its linear layers have biases, which this writer leaves to others"
    if rope_of(config).get("rope_type", "default") != "default":
        return f"its rotary embeddings are of the type {rope_of(config)['rope_type']!r}, expected 'default'"
    sizes = {config.hidden_size, config.intermediate_size, config.num_attention_heads * head_size(config)}
    reasons = [ggml.obstacle(linear, size) for size in sorted(sizes)] if linear in TYPES else []
    return next(filter(None, reasons), None)


def write(model: Any, path: str | os.PathLike[str], ggml: Ggml, linear: str, head: str) -> None:
    """Write the float Llama ``model`` with its linear layers and its head in types of ggml.

    Norms are float32 and the embedding is float16. There is no vocabulary: callers pass token ids.

    Args:
        model: a LlamaForCausalLM with float weights.
        path: file to write.
        ggml: does the rounding.
        linear: type of the linear layers in the blocks, of ``LINEAR_TYPES``.
        head: type of the output head, of ``LINEAR_TYPES``; a tied head is written on its own.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope_of(config)["rope_theta"])
    writer.add_rope_dimension_count(head_size(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: Tensor, kind: str) -> None:
        W = tensor.detach().float()
        if kind in TYPES:
            data, dtype = ggml.quantize(kind, W).numpy(), gguf.GGMLQuantizationType(TYPES[kind])
            writer.add_tensor(name, data, raw_dtype=dtype)
        else:
            writer.add_tensor(name, W.numpy().astype(np.float16 if kind == "f16" else np.float32))

    add("token_embd.weight", model.model.embed_tokens.weight, "f16")
    for number, block in enumerate(model.model.layers):
        for ours, theirs in _BLOCK.items():
            weight = block.get_submodule(ours).weight
            if theirs == "attn_q":
                weight = _pairs_together(weight, config.num_attention_heads)
            elif theirs == "attn_k":
                weight = _pairs_together(weight, config.num_key_value_heads)
            add(f"blk.{number}.{theirs}.weight", weight, "f32" if theirs.endswith("norm") else linear)
    add("output_norm.weight", model.model.norm.weight, "f32")
    add("output.weight", model.lm_head.weight, head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pairs_together(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head so that the two that rotary embeddings turn together are neighbours, as llama.cpp has them.

    Transformers turns row i of a head with row i + half.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)

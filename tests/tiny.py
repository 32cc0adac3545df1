"""Tiny random models and a tokenizer, made in memory: no file, no network, a few milliseconds each.

Every model is in eval mode and float32, and depends on `seed` alone. All linear layers inside the blocks have
at least 32 inputs, the least that one-bit layers take; sizes that are no multiple of 32 come from the
`ragged` variant.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 288
"""Rows of every tiny embedding: the tokenizer's 259 tokens and some that never occur."""

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")


def make(model_class: type[PreTrainedModel], config: Any, seed: int = 0) -> PreTrainedModel:
    """A model with random weights that depend on `seed` only; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        # Transformers starts biases at zero, where a kernel that forgets them goes unseen.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model


def tiny_llama(
    tied: bool = False,
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    bias: bool = False,
    positions: int = 128,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
) -> PreTrainedModel:
    """Llama: seven linear layers a block, grouped key-value heads."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
        **_token_ids(),
    )
    return make(transformers.LlamaForCausalLM, config, seed)


def tiny_llama_ragged(seed: int = 0, **more: Any) -> PreTrainedModel:
    """Llama with 72 and 104 features: the last packed word of every column is partly padding."""
    return tiny_llama(hidden=72, intermediate=104, seed=seed, **more)


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    """GPT-2: Conv1D layers (weights transposed) with biases, tied embeddings, learned positions."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, **_token_ids()
    )
    return make(transformers.GPT2LMHeadModel, config, seed)


def tiny_opt(seed: int = 0) -> PreTrainedModel:
    """OPT: linear layers with biases, learned positions."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        **_token_ids(),
    )
    return make(transformers.OPTForCausalLM, config, seed)


def tiny_gemma3(seed: int = 0) -> PreTrainedModel:
    """Gemma 3, text only: tied embeddings, norms of queries and keys, sliding and full attention."""
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        **_token_ids(),
    )
    return make(transformers.Gemma3ForCausalLM, config, seed)


def tiny_qwen3_moe(experts: int = 4, seed: int = 0) -> PreTrainedModel:
    """Qwen3-MoE: fused experts, one 3-D parameter for gate and up and one for down."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=experts,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **_token_ids(),
    )
    return make(transformers.Qwen3MoeForCausalLM, config, seed)


def tiny_mixtral(seed: int = 0, tied: bool = False) -> PreTrainedModel:
    """Mixtral: fused experts, whose files name an expert's matrices w1, w3 and w2."""
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        **_token_ids(),
    )
    return make(transformers.MixtralForCausalLM, config, seed)


def tiny_deepseek_v3(seed: int = 0) -> PreTrainedModel:
    """DeepSeek-V3: a dense block first, then one with shared experts, whose layers have the names of an expert's."""
    config = transformers.DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **_token_ids(),
    )
    return make(transformers.DeepseekV3ForCausalLM, config, seed)


def tiny_gpt_oss(seed: int = 0) -> PreTrainedModel:
    """GPT-OSS: fused experts in the files too, transposed, gate and up alternating, with biases."""
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        **_token_ids(),
    )
    return make(transformers.GptOssForCausalLM, config, seed)


def tiny_nemotron_h(seed: int = 0) -> PreTrainedModel:
    """Nemotron-H: experts without a gate, and blocks of several kinds."""
    config = transformers.NemotronHConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        layers_block_type=["attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=64,
        max_position_embeddings=128,
        use_mamba_kernels=False,
        **_token_ids(),
    )
    return make(transformers.NemotronHForCausalLM, config, seed)


def tiny_mamba(seed: int = 0) -> PreTrainedModel:
    """Mamba: no attention, and one linear layer (dt_proj) with fewer than 32 inputs."""
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8, **_token_ids()
    )
    return make(transformers.MambaForCausalLM, config, seed)


def tiny_t5(seed: int = 0) -> PreTrainedModel:
    """T5, gated: encoder and decoder, and a layer (`wo`) that casts its input to the dtype of its weight."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return make(transformers.T5ForConditionalGeneration, config, seed)


def tiny_bert(seed: int = 0) -> PreTrainedModel:
    """BERT with a masked-token head: an encoder alone."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return make(transformers.BertForMaskedLM, config, seed)


CAUSAL: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama-tied": lambda: tiny_llama(tied=True),
    "llama-bias": lambda: tiny_llama(bias=True),
    "llama-ragged": tiny_llama_ragged,
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "gemma3": tiny_gemma3,
    "qwen3-moe": tiny_qwen3_moe,
    "mamba": tiny_mamba,
}
"""Models that generate, by name: for `@pytest.mark.parametrize("name", CAUSAL)`."""

OTHERS: dict[str, Callable[[], PreTrainedModel]] = {"t5": tiny_t5, "bert": tiny_bert}
"""Models that are no causal language models."""


def _token_ids() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte: any text round-trips. Ids 0, 1, 2 are padding, beginning and end of text.

    With `bos`, a text begins with `<s>`, as with Llama's tokenizers.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    pad, start, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=start, eos_token=end, model_max_length=128
    )


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ':' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def tiny_chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a chat template: `<s>role:content</s>`."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_ids(rows: int = 2, tokens: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 (rows, tokens), without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), VOCABULARY, (rows, tokens), generator=generator)


def save_float(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a float model, and its tokenizer if given, as a checkpoint folder; returns the folder."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Path(folder)

"""Tiny random models of many architectures with what they are fed, for tests that go through all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tiny
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

IMAGE_TOKEN = 5


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        make: called with ``tied``, whether head and embedding are one matrix.
        ties: the values of ``tied`` that it knows.
        inputs: a batch.
        special: what it is in the list for.
        covered: whether 90 % of its linear weights are packed.
        calibrates: whether presets with data work.
        output: of what it gives, the tensor to compare.
    """

    make: Callable[[bool], PreTrainedModel]
    special: str
    ties: tuple[bool, ...] = (False, True)
    inputs: Callable[[], dict[str, Tensor]] = lambda: {"input_ids": tiny.tiny_ids()}
    covered: bool = True
    calibrates: bool = True
    output: str = "logits"


def _ids() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _common(tied: bool) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "vocab_size": tiny.VOCABULARY,
        **sizes,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        **_ids(),
    }


def retied(make: Callable[[], PreTrainedModel]) -> Callable[[bool], PreTrainedModel]:
    """The same model with head and embedding tied or not."""

    def changed(tied: bool) -> PreTrainedModel:
        config = make().config
        config.tie_word_embeddings = tied
        return tiny.make(type(make()), config)

    return changed


def phi3(tied: bool) -> PreTrainedModel:
    """Phi-3: q, k and v in one matrix, gate and up in another."""
    config = transformers.Phi3Config(**_common(tied), num_key_value_heads=2)
    return tiny.make(transformers.Phi3ForCausalLM, config)


def gpt_neox(tied: bool) -> PreTrainedModel:
    """GPT-NeoX: q, k and v in one matrix, with biases."""
    return tiny.make(transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**_common(tied)))


def nomic_bert(tied: bool) -> PreTrainedModel:
    """Nomic-BERT: the files hold q, k and v in one matrix, the model in three."""
    config = transformers.NomicBertConfig(**_common(tied))
    return tiny.make(transformers.NomicBertForMaskedLM, config)


def llava(tied: bool) -> PreTrainedModel:
    """LLaVA: a Llama that sees, through a CLIP tower and a projector."""
    text = transformers.LlamaConfig(**_common(tied), num_key_value_heads=2)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**tower, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=tied,
    )
    return tiny.make(transformers.LlavaForConditionalGeneration, config)


def _images_and_text() -> dict[str, Tensor]:
    ids = tiny.tiny_ids(1, 12)
    ids[ids == IMAGE_TOKEN] = IMAGE_TOKEN + 1
    ids[:, 1:5] = IMAGE_TOKEN  # an image has 4 patches
    return {"input_ids": ids, "pixel_values": _image(16)}


def _image(size: int) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def vit(_tied: bool) -> PreTrainedModel:
    """ViT: an encoder of images."""
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return tiny.make(transformers.ViTForImageClassification, config)


def whisper(tied: bool) -> PreTrainedModel:
    """Whisper: an encoder of sound and a decoder of text."""
    sizes = {"layers": 1, "attention_heads": 4, "ffn_dim": 96}
    layers = {f"{part}_{size}": value for part in ("encoder", "decoder") for size, value in sizes.items()}
    config = transformers.WhisperConfig(
        vocab_size=tiny.VOCABULARY,
        d_model=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        decoder_start_token_id=1,
        tie_word_embeddings=tied,
        **layers,
        **_ids(),
    )
    return tiny.make(transformers.WhisperForConditionalGeneration, config)


def _sound() -> dict[str, Tensor]:
    features = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": tiny.tiny_ids(1, 8)}


def clip(_tied: bool) -> PreTrainedModel:
    """CLIP: an encoder of text beside one of images; Transformers knows of no token embedding of the whole."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": 32, **sizes, **_ids()}
    vision = {"image_size": 16, "patch_size": 8, **sizes}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    return tiny.make(transformers.CLIPModel, config)


def wav2vec2(_tied: bool) -> PreTrainedModel:
    """wav2vec 2.0: an encoder of raw sound, with no embedding at all."""
    config = transformers.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    return tiny.make(transformers.Wav2Vec2ForCTC, config)


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 400, generator=torch.Generator().manual_seed(0))}


def _both_sides() -> dict[str, Tensor]:
    return {"input_ids": tiny.tiny_ids(), "decoder_input_ids": tiny.tiny_ids(seed=1)}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(lambda tied: tiny.tiny_llama_ragged(tied=tied), "sizes that are no multiple of 32"),
    "gpt2": Architecture(retied(tiny.tiny_gpt2), "Conv1D"),
    "opt": Architecture(retied(tiny.tiny_opt), "biases, learned positions"),
    "gemma3": Architecture(retied(tiny.tiny_gemma3), "norms of queries, two kinds of attention"),
    "phi3": Architecture(phi3, "fused q/k/v and gate/up"),
    "gpt-neox": Architecture(gpt_neox, "fused q/k/v with biases"),
    "nomic-bert": Architecture(nomic_bert, "files with fused q/k/v"),
    "qwen3-moe": Architecture(retied(tiny.tiny_qwen3_moe), "experts"),
    "mixtral": Architecture(retied(tiny.tiny_mixtral), "experts under other names in the files"),
    "gpt-oss": Architecture(retied(tiny.tiny_gpt_oss), "experts fused in the files"),
    "llava": Architecture(llava, "vision and language", inputs=_images_and_text, covered=False),
    "t5": Architecture(
        retied(tiny.tiny_t5), "encoder-decoder, float32 layers", inputs=_both_sides, covered=False, calibrates=False
    ),
    "bert": Architecture(retied(tiny.tiny_bert), "encoder"),
    "vit": Architecture(vit, "images", ties=(False,), inputs=lambda: {"pixel_values": _image(16)}, calibrates=False),
    "whisper": Architecture(whisper, "sound", inputs=_sound, calibrates=False),
    "wav2vec2": Architecture(wav2vec2, "no embedding", ties=(False,), inputs=_wave, calibrates=False),
    "clip": Architecture(
        clip,
        "no token embedding, two towers",
        ties=(False,),
        inputs=lambda: {"input_ids": tiny.tiny_ids(1, 12), "pixel_values": _image(16)},
        covered=False,
        calibrates=False,
        output="logits_per_image",
    ),
    "mamba": Architecture(retied(tiny.tiny_mamba), "matrices that the model's code reads", covered=False),
}
"""By name: for `@pytest.mark.parametrize`."""

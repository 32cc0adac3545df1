"""What export-gguf writes is the packed model: weights read back by others, and run by llama.cpp."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from foreign import write_gptq
from tiny import _token_ids, make, tiny_gpt2, tiny_ids, tiny_llama, tiny_llama_ragged, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import hf_onebit
from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer
from hf_onebit.cli import main
from hf_onebit.interchange import gguf_file
from hf_onebit.interchange.gguf_file import export_gguf
from hf_onebit.interchange.gguf_vocabulary import pre_tokenizer_name
from hf_onebit.interchange.importing import import_checkpoint

needs_llama = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="no llama-cpp-python")
CHILD = Path(__file__).parent / "llama_child.py"
PACKED = (hf_onebit.nn.linear.OneBitLinear, hf_onebit.nn.mpq.MPQLinear, hf_onebit.nn.mpq.MPQEmbedding)


def ask_llama(request: dict[str, Any]) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, str(CHILD)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def mpq(**options: Any) -> MPQConfig:
    """The quickest search: what is written is compared with the packed model, not with the float one."""
    return MPQConfig(search="min-max", **options)


def packed(folder: Path, model: Any, config: Any, tokenizer: Any = None) -> Any:
    """Quantize a float model and save it; returns it, packed."""
    quantizer = (MPQQuantizer if isinstance(config, MPQConfig) else OneBitQuantizer)(config)
    quantizer.quantize_model(model)
    quantizer.save(model, folder, tokenizer=tokenizer)
    return model


def one_bit_values(data: np.ndarray) -> np.ndarray:
    """Q1_0 by its description: float16 d, then 128 bits, the lowest of the first byte first; +d or -d."""
    blocks = data.reshape(data.shape[0], -1, 18)
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float64)
    bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little")
    values: np.ndarray = (d * (2.0 * bits - 1)).reshape(data.shape[0], -1)
    return values


def read(path: Path) -> dict[str, np.ndarray]:
    """Float tensors of a file, restored by the gguf package."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q1_0:
            found[tensor.name] = one_bit_values(tensor.data)
        else:
            found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
    return found


def back(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rows: pairs that turn together lie together there, half a head apart here."""
    result: np.ndarray = rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
    return result


NAMES = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip


def check_weights(model: Any, path: Path, largest: float = 0.0) -> None:
    """Every weight matrix of the blocks, beside what the packed layers stand for."""
    found = read(path)
    config = model.config
    for number, block in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            layer = block.get_submodule(ours)
            W = layer.dequantize(torch.float64) if isinstance(layer, PACKED) else layer.weight.double()
            assert np.abs(found[f"blk.{number}.{theirs}.weight"] - W.detach().numpy()).max() <= largest, ours
        for letter, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            layer = block.get_submodule(f"self_attn.{letter}_proj")
            W = layer.dequantize(torch.float64).numpy()
            assert np.abs(back(found[f"blk.{number}.attn_{letter}.weight"], heads) - W).max() <= largest


# -------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "kind"),
    [
        (1, 128, True, "Q1_0"),
        (1, -1, True, "Q1_0"),
        (1, 64, True, "Q4_0"),
        (1, 128, False, "Q4_1"),
        (2, 32, True, "Q4_0"),
        (2, 64, False, "Q4_1"),
        (3, -1, True, "Q4_0"),
        (4, 32, True, "Q4_0"),
        (4, 64, False, "Q4_1"),
        (5, 128, True, "Q5_0"),
        (5, 32, False, "Q5_1"),
        (6, 64, True, "Q8_0"),
        (8, 32, True, "Q8_0"),
    ],
)
def test_types_that_hold_the_weights_exactly(
    tmp_path: Path, bits: int, group_size: int, symmetric: bool, kind: str
) -> None:
    config = mpq(bits=bits, group_size=group_size, symmetric=symmetric)
    model = packed(tmp_path / "m", tiny_llama(hidden=128, intermediate=256, layers=1), config)
    report = export_gguf(tmp_path / "m", tmp_path / "m.gguf", vocabulary=False)
    assert set(report["types"]) == {kind, "F32"}
    assert report["types"][kind] == 7
    assert (report["exact"], report["max_error"]) == (len(report["tensors"]), 0.0)
    check_weights(model, tmp_path / "m.gguf")
    assert report["file_bytes"] == (tmp_path / "m.gguf").stat().st_size


def test_eight_bits_with_zeros_are_rounded_and_told(tmp_path: Path) -> None:
    model = packed(tmp_path / "m", tiny_llama(layers=1), mpq(bits=8, group_size=32))
    report = export_gguf(tmp_path / "m", tmp_path / "m.gguf", vocabulary=False)
    told = report["tensors"]["blk.0.ffn_up.weight"]
    assert (told["type"], told["exact"]) == ("Q8_0", False)
    assert "no type has codes of 8 bits and an offset" in told["why"]
    assert 0 < told["max_error"] < 1e-3
    check_weights(model, tmp_path / "m.gguf", report["max_error"])


@pytest.mark.parametrize("tied", [True, False])
def test_packed_heads_and_embeddings(tmp_path: Path, tied: bool) -> None:
    config = mpq(bits=4, group_size=32, lm_head_bits=8, embedding_bits=8, head_group_size=32, symmetric=True)
    model = packed(tmp_path / "m", tiny_llama(layers=1, tied=tied), config)
    report = export_gguf(tmp_path / "m", tmp_path / "m.gguf", vocabulary=False)
    found = read(tmp_path / "m.gguf")
    assert ("output.weight" in found) == (not tied)
    assert report["max_error"] < 1e-3
    embedding = model.model.embed_tokens.dequantize(torch.float64).numpy()
    error = report["tensors"]["token_embd.weight"]["max_error"]
    assert np.abs(found["token_embd.weight"] - embedding).max() <= error + 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = packed(tmp_path / "m", tiny_llama(layers=1).to(dtype), mpq(bits=4, group_size=32, symmetric=True))
    report = export_gguf(tmp_path / "m", tmp_path / "m.gguf", vocabulary=False)
    assert report["tensors"]["token_embd.weight"]["type"] == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert report["exact"] == len(report["tensors"])
    W = model.model.embed_tokens.weight.detach().double().numpy()
    assert np.array_equal(read(tmp_path / "m.gguf")["token_embd.weight"], W)


# --------------------------------------------------------------------------------------------------------------- onebit


def share_scales(model: Any, tied_heads: bool = True) -> None:
    """Column scales that can be folded: one vector for all readers of a norm, one for heads that share values."""
    generator = torch.Generator().manual_seed(7)

    def vector(size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator).add(0.5).half()

    repeats = model.config.num_attention_heads // model.config.num_key_value_heads
    for block in model.model.layers:
        a, m = block.self_attn, block.mlp
        with torch.no_grad():
            for layers in ((a.q_proj, a.k_proj, a.v_proj), (m.gate_proj, m.up_proj)):
                b = vector(layers[0].in_features)
                for layer in layers:
                    layer.b.copy_(b)
            one = vector(a.o_proj.in_features // repeats).view(model.config.num_key_value_heads, 1, -1)
            if tied_heads:
                a.o_proj.b.copy_(one.expand(-1, repeats, -1).reshape(-1))


def test_column_scales_move_into_what_produces_the_inputs(tmp_path: Path) -> None:
    model = tiny_llama(hidden=128, intermediate=256, bias=True)
    quantizer = OneBitQuantizer(OneBitConfig())
    quantizer.quantize_model(model)
    share_scales(model)
    quantizer.save(model, tmp_path / "m")
    report = export_gguf(tmp_path / "m", tmp_path / "m.gguf", vocabulary=False)
    tensors = report["tensors"]
    assert report["types"]["Q1_0"] == 14
    assert report["max_error"] < 1e-4
    assert tensors["blk.0.attn_q.weight"]["folded"] == "input_layernorm's gain"
    assert tensors["blk.1.ffn_down.weight"]["folded"] == "up_proj's rows"
    assert tensors["blk.1.attn_output.weight"]["folded"] == "v_proj's rows"
    # Only products of two float16 scales are rounded.
    rounded = {name for name, tensor in tensors.items() if not tensor["exact"] and name.endswith("weight")}
    assert rounded == {f"blk.{n}.{name}.weight" for n in (0, 1) for name in ("attn_v", "ffn_up")}
    found, block = read(tmp_path / "m.gguf"), model.model.layers[0]
    gain = block.input_layernorm.weight.double() * block.self_attn.q_proj.b.double()
    assert np.array_equal(found["blk.0.attn_norm.weight"], gain.detach().numpy())
    m = block.mlp
    up = m.up_proj.dequantize(torch.float64) / m.up_proj.b.double() * m.down_proj.b.double()[:, None]
    assert np.abs(found["blk.0.ffn_up.weight"] - up.detach().numpy()).max() <= 2**-11 * float(up.abs().max())
    bias = m.up_proj.bias.double() * m.down_proj.b.double()
    assert np.allclose(found["blk.0.ffn_up.bias"], bias.detach().numpy(), rtol=1e-7)


def test_column_scales_that_cannot_move_are_refused_with_the_reason(tmp_path: Path) -> None:
    packed(tmp_path / "m", tiny_llama(layers=1), OneBitConfig())
    with pytest.raises(ValueError, match="--fallback f16") as refused:
        export_gguf(tmp_path / "m", tmp_path / "m.gguf", vocabulary=False)
    text = str(refused.value)
    assert "6 of 7 packed layers" in text
    assert "q_proj, k_proj, v_proj read the same input_layernorm and do not have the same column scales" in text
    assert "2 query heads share each head of v_proj" in text
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(("fallback", "largest"), [("f16", 2e-4), ("bf16", 2e-3), ("q8_0", 2e-3)])
def test_what_fits_no_type_may_be_stored_in_another(tmp_path: Path, fallback: str, largest: float) -> None:
    model = packed(tmp_path / "m", tiny_llama(hidden=128, layers=1), OneBitConfig(planes=2))
    report = export_gguf(tmp_path / "m", tmp_path / "m.gguf", vocabulary=False, fallback=fallback)
    assert report["types"][fallback.upper()] == 7
    assert 0 < report["max_error"] < largest
    assert "2 planes" in report["tensors"]["blk.0.ffn_up.weight"]["why"]
    check_weights(model, tmp_path / "m.gguf", largest)


def test_layers_that_fit_no_block(tmp_path: Path) -> None:
    packed(tmp_path / "ragged", tiny_llama_ragged(), mpq(bits=4, group_size=32))
    with pytest.raises(ValueError, match="its 72 inputs are no multiple of 32"):
        export_gguf(tmp_path / "ragged", tmp_path / "m.gguf", vocabulary=False)
    with pytest.raises(ValueError, match="which Q8_0 needs"):
        export_gguf(tmp_path / "ragged", tmp_path / "m.gguf", vocabulary=False, fallback="q8_0")
    write_gptq(tiny_llama(layers=1), tmp_path / "src", desc_act=True)
    import_checkpoint(tmp_path / "src", tmp_path / "ordered")
    with pytest.raises(ValueError, match="inputs are in an order of their own"):
        export_gguf(tmp_path / "ordered", tmp_path / "m.gguf", vocabulary=False)
    write_gptq(tiny_llama(layers=1), tmp_path / "plain", version=2)
    import_checkpoint(tmp_path / "plain", tmp_path / "out")
    assert export_gguf(tmp_path / "out", tmp_path / "m.gguf", vocabulary=False)["max_error"] == 0.0


# ------------------------------------------------------------------------------------------------------------ llama.cpp


def tiny_qwen(kind: str) -> Any:
    config_class, model_class = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }[kind]
    sizes = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    sizes |= {"num_attention_heads": 4 if kind == "qwen3" else 2, "num_key_value_heads": 2}
    config = config_class(**sizes, max_position_embeddings=128, tie_word_embeddings=True, **_token_ids())
    return make(model_class, config)


def with_rope(**rope: Any) -> Any:
    model = tiny_llama(positions=256)
    config = model.config
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    fresh = make(type(model), config)
    fresh.load_state_dict(model.state_dict())
    return fresh


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(tied=True),
    "llama with biases": lambda: tiny_llama(bias=True),
    "mistral": lambda: tiny_qwen("mistral"),
    "qwen2": lambda: tiny_qwen("qwen2"),
    "qwen3": lambda: tiny_qwen("qwen3"),
    "llama 3": lambda: with_rope(**LLAMA3, original_max_position_embeddings=32),
    "linear rope": lambda: with_rope(rope_type="linear", factor=4.0),
}


@needs_llama
def test_llama_cpp_computes_our_logits(tmp_path: Path) -> None:
    """One process runs all of them; it rounds activations to 8 bits in blocks: a few percent."""
    ids = tiny_ids(1, 24)
    ours: dict[str, torch.Tensor] = {}
    configs = {name: (mpq(bits=8, group_size=32, symmetric=True), make_model) for name, make_model in MODELS.items()}
    configs["4 bits"] = mpq(bits=4, group_size=64), lambda: tiny_llama(hidden=128, intermediate=256)
    configs["5 bits"] = mpq(bits=5, group_size=64), lambda: tiny_llama(hidden=128, intermediate=256)
    configs["1 bit"] = (
        mpq(bits=1, group_size=128, symmetric=True),
        lambda: tiny_llama(hidden=128, intermediate=256),
    )
    for name, (config, make_model) in configs.items():
        model = packed(tmp_path / name, make_model(), config)
        export_gguf(tmp_path / name, tmp_path / f"{name}.gguf", vocabulary=False)
        with torch.no_grad():
            ours[name] = model(ids).logits[0, -1]
    model = tiny_llama(hidden=128, intermediate=256, kv_heads=4, bias=True)
    quantizer = OneBitQuantizer(OneBitConfig())
    quantizer.quantize_model(model)
    share_scales(model)
    quantizer.save(model, tmp_path / "onebit")
    export_gguf(tmp_path / "onebit", tmp_path / "onebit.gguf", vocabulary=False)
    dense = packed(tmp_path / "fallback", tiny_llama(), OneBitConfig())
    export_gguf(tmp_path / "fallback", tmp_path / "fallback.gguf", vocabulary=False, fallback="f16")
    with torch.no_grad():
        ours["onebit"] = model(ids).logits[0, -1]
        ours["fallback"] = dense(ids).logits[0, -1]
    answer = ask_llama({"logits": {str(tmp_path / f"{name}.gguf"): ids[0].tolist() for name in ours}})
    for name, logits in ours.items():
        theirs = torch.tensor(answer[str(tmp_path / f"{name}.gguf")])
        error = float((theirs - logits).norm() / logits.norm())
        assert error < 0.05, (name, error)


def trained(pre_tokenizer: Any, begins: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of the test's texts; with `begins` it puts <s> before each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TEXTS = [
    "The boat's captain didn't say 12345 words, he'll say 7.",
    "  two  spaces\n\nand lines\twith tabs   ",
    "naïve café — 你好, мир! x=3.14159",
    "<s>special</s> tokens",
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> Any:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


CUTS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: split(LLAMA_3),
    "qwen2": lambda: split(LLAMA_3.replace("{1,3}", "")),
}


@needs_llama
def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path: Path) -> None:
    begin = {"gpt-2": True, "smollm": False, "llama-bpe": False, "qwen2": True}
    tokenizers = {name: trained(make_cut(), begin[name]) for name, make_cut in CUTS.items()}
    for name, tokenizer in tokenizers.items():
        model = tiny_llama(layers=1, vocabulary=len(tokenizer) + 5)
        packed(tmp_path / name, model, mpq(bits=4, group_size=32), tokenizer)
        export_gguf(tmp_path / name, tmp_path / f"{name}.gguf")
        fields = gguf.GGUFReader(tmp_path / f"{name}.gguf").fields
        assert fields["tokenizer.ggml.pre"].contents() == name
        assert fields["tokenizer.ggml.bos_token_id"].contents() == 1
        assert len(fields["tokenizer.ggml.tokens"].contents()) == len(tokenizer) + 5
    answer = ask_llama({"tokens": {str(tmp_path / f"{name}.gguf"): TEXTS for name in tokenizers}})
    for name, tokenizer in tokenizers.items():
        theirs = answer[str(tmp_path / f"{name}.gguf")]
        expected = [tokenizer(text)["input_ids"] for text in TEXTS]
        assert theirs == expected, name


def test_a_chat_template_goes_along(tmp_path: Path) -> None:
    from tiny import CHAT_TEMPLATE, tiny_chat_tokenizer

    packed(tmp_path / "m", tiny_llama(layers=1), mpq(bits=4, group_size=32), tiny_chat_tokenizer())
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "vocab": {}, "byte_fallback": True}, "pre_tokenizer": {"type": "ByteLevel"}},
        {"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": None},
        {"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {
            "model": {"type": "BPE", "vocab": {}},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "\\d"}},
                    {"type": "ByteLevel", "use_regex": False},
                ],
            },
        },
    ],
)
def test_cuts_without_a_name(tokenizer: dict[str, Any]) -> None:
    assert pre_tokenizer_name(tokenizer) is None


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "m"
    packed(folder, tiny_llama(layers=1), mpq(bits=4, group_size=32), tiny_tokenizer())
    return folder


def test_the_command(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export-gguf", str(small), "-o", str(tmp_path / "m.gguf")]) == 0
    said = capsys.readouterr().out
    assert "blk.0.attn_q.weight" in said
    assert "12 of 12 tensors exactly; 5 F32, 7 Q4_1" in said
    assert main(["export-gguf", str(small), "-o", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err


def test_wrong_input_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fallback is 'q4'"):
        export_gguf(small, tmp_path / "m.gguf", fallback="q4")
    packed(tmp_path / "gpt2", tiny_gpt2(), mpq(bits=4, group_size=32))
    with pytest.raises(
        ValueError, match=r"Cannot write a 'gpt2' model as GGUF: expected one of llama.*dequantize=True"
    ):
        export_gguf(tmp_path / "gpt2", tmp_path / "m.gguf")
    packed(tmp_path / "bare", tiny_llama(layers=1), mpq(bits=4, group_size=32))
    with pytest.raises(ValueError, match=r"no tokenizer.json.*--no-vocabulary"):
        export_gguf(tmp_path / "bare", tmp_path / "m.gguf")
    model = with_rope(rope_type="dynamic", factor=2.0)
    packed(tmp_path / "rope", model, mpq(bits=4, group_size=32))
    with pytest.raises(ValueError, match="rope_type is 'dynamic'"):
        export_gguf(tmp_path / "rope", tmp_path / "m.gguf", vocabulary=False)
    assert not (tmp_path / "m.gguf").exists()


def test_a_failure_leaves_the_old_file(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_text("old")

    def fail(*args: object) -> None:
        raise RuntimeError("no more disk")

    monkeypatch.setattr(gguf_file, "write_blocks", fail)
    with pytest.raises(RuntimeError, match="no more disk"):
        export_gguf(small, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "old"


def test_without_the_package_that_is_said(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_onebit\[gguf\]'"):
        export_gguf(small, tmp_path / "m.gguf")


def test_an_older_package_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not know Q1_0: the same weights in a type that it knows."""
    warned: list[str] = []
    monkeypatch.setattr(gguf_file.logger, "warning", warned.append)
    kinds = {kind.name: kind for kind in gguf.GGMLQuantizationType if kind.name != "Q1_0"}

    class Older:
        GGMLQuantizationType = type("Kinds", (), {**kinds, "__class_getitem__": classmethod(lambda _, key: kinds[key])})

        def __getattr__(self, name: str) -> Any:
            return getattr(gguf, name)

    monkeypatch.setattr(gguf_file, "_package", Older)
    config = mpq(bits=1, group_size=128, symmetric=True)
    model = packed(tmp_path / "m", tiny_llama(hidden=128, intermediate=256, layers=1), config)
    report = export_gguf(tmp_path / "m", tmp_path / "m.gguf", vocabulary=False)
    assert report["types"]["Q4_0"] == 7
    assert "pip install -U gguf" in warned[0]
    check_weights(model, tmp_path / "m.gguf")

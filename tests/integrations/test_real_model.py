"""The main job on SmolLM2-135M-Instruct: quantize, save, reload, evaluate, generate."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_onebit
from hf_onebit import OneBitConfig, cli, evaluation, loading
from hf_onebit.inspection import inspect
from hf_onebit.nn import find_layers, packed_layers
from hf_onebit.storage.verification import verify

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def packed_dir(smollm2_gguf, tmp_path_factory):
    """Quantized from the .gguf through the command line, with a little calibration text."""
    folder = tmp_path_factory.mktemp("smollm2") / "onebit"
    text = tmp_path_factory.mktemp("text") / "calibration.txt"
    text.write_text("It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 40)
    arguments = ["quantize", str(smollm2_gguf), "-o", str(folder), "--preset", "closed", "--calibration", str(text)]
    assert cli.main([*arguments, "--calibration-tokens", "512", "--calibration-context", "256"]) == 0
    return folder


def test_sizes(packed_dir, capsys):
    assert cli.main(["inspect", str(packed_dir), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert len(info["layers"]) == 210
    assert info["coverage"] == 1.0
    weights = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)
    scales = 30 * 16 * (2 * (576 + 576) + 2 * (192 + 576) + 3 * (576 + 1536))
    assert info["linear_bpw"] == pytest.approx(1 + scales / weights)
    assert info["total_weights"] == 134_515_008
    assert info["file_bytes"] == (packed_dir / "model.safetensors").stat().st_size
    assert info["skipped"] == {
        "lm_head": {"reason": "shares its weight with another module (tied)", "weights": 49152 * 576}
    }
    assert cli.main(["verify", str(packed_dir)]) == 0


def test_quantizing_on_load_equals_quantizing_the_file(smollm2_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, quantization_config=OneBitConfig())
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    ids = torch.arange(1000, 1032)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    errors = [record["relative_weight_error"] for record in model.hf_quantizer.report["layers"].values()]
    assert len(errors) == 210
    # Real weights have heavier tails than Gaussian ones (0.363), and structure that the scales catch.
    assert 0.33 < sum(errors) / len(errors) < 0.40


def test_evaluation_and_generation_run_from_the_packed_weights(packed_dir, smollm2_dir):
    model, tokenizer = loading.load(packed_dir), loading.load_tokenizer(packed_dir)
    reference = loading.load_float(smollm2_dir)
    text = "The king was in his counting house, counting out his money. The queen was in the parlour. " * 4
    windows = evaluation.token_windows(text, tokenizer, 64, 128)
    quality = evaluation.compare(model, reference, windows)
    assert quality["reference_perplexity"] < 60
    assert math.isfinite(quality["kl"])
    assert quality["perplexity"] > quality["reference_perplexity"]
    plain = loading.load(packed_dir, dequantize=True)
    assert not packed_layers(plain)
    assert evaluation.perplexity(plain, windows)["nll"] == pytest.approx(quality["nll"], rel=1e-3)
    ids = tokenizer("The king", return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("bits", [(8, 8), (4, 8)], ids=str)
def test_a_packed_head_and_embedding(bits, smollm2_dir, tmp_path):
    """The other layers float: what is lost is lost in head and embedding."""
    reference, tokenizer = loading.load_float(smollm2_dir), loading.load_tokenizer(smollm2_dir)
    names = list(find_layers(reference).selected)
    config = OneBitConfig(lm_head_bits=bits[0], embedding_bits=bits[1], modules_to_not_convert=names)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, quantization_config=config)
    hf_onebit.save(model, tmp_path / "packed", report=model.hf_quantizer.report)
    assert verify(tmp_path / "packed")["ok"]
    info = inspect(tmp_path / "packed")
    assert info["total_weights"] == model.hf_quantizer.report["total_weights"] == 134_515_008
    assert info["layers"]["lm_head"]["bits_per_weight"] == bits[0] + 16 / 64
    assert info["untied"] == (bits == (4, 8))
    loaded = loading.load(tmp_path / "packed")
    assert evaluation.tensor_bytes(loaded) <= 1.05 * info["file_bytes"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (bits == (8, 8))
    text = "The king was in his counting house, counting out his money. The queen was in the parlour. " * 4
    quality = evaluation.compare(loaded, reference, evaluation.token_windows(text, tokenizer, 64, 128))
    assert quality["kl"] < {8: 0.005, 4: 0.2}[bits[0]]
    ids = tokenizer("The king", return_tensors="pt").input_ids
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = loading.load(tmp_path / "packed", dequantize=True).generate(ids, **options)
    assert torch.equal(loaded.generate(ids, **options), expected)

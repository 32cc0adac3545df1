"""Adapters on a packed base, with stock PEFT."""

import pytest
import torch
from tiny import save_float, tiny_ids, tiny_llama

peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM  # noqa: E402  after the skip

from hf_onebit import OneBitConfig  # noqa: E402


@pytest.fixture
def packed(tmp_path):
    save_float(tiny_llama(), tmp_path / "float")
    AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=OneBitConfig()).save_pretrained(
        tmp_path / "packed"
    )
    return tmp_path / "packed"


def test_lora_trains_on_packed_weights_and_reloads(packed, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(packed)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 14
    optimizer, ids = torch.optim.AdamW(trained, lr=1e-2), tiny_ids()
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = {name.replace(".base_layer", ""): t for name, t in base.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["up_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["up_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("method", CONFIGS)
def test_merging_into_packed_words_is_refused(method, merge, packed):
    base = AutoModelForCausalLM.from_pretrained(packed)
    layer = base.model.layers[0].mlp.up_proj
    words = layer.weight.clone()
    model = peft.get_peft_model(base, CONFIGS[method]())
    with pytest.raises(ValueError, match="Cannot merge an adapter into packed weights"):
        getattr(model, merge)()
    assert torch.equal(layer.weight, words)


def test_merging_into_a_float_model_still_works():
    model = peft.get_peft_model(tiny_llama(), CONFIGS["lora"]())
    assert type(model.merge_and_unload().model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("first", ["peft", "hf_onebit"])
def test_the_guard_stands_whichever_is_imported_first(first):
    import subprocess
    import sys

    second = {"peft": "hf_onebit", "hf_onebit": "peft"}[first]
    script = (
        f"import sys, {first}\n"
        f"assert {first != 'hf_onebit'} or 'peft' not in sys.modules\n"
        f"import {second}\n"
        "from peft.tuners.tuners_utils import BaseTuner\n"
        "assert BaseTuner._check_merge_allowed.knows_packed_layers\n"
        "from peft.tuners.oft.layer import resolve_quantization_backend\n"
        "from peft.tuners.lora.dora import dequantize_module_weight\n"
        "assert resolve_quantization_backend.knows_packed_layers\n"
        "assert dequantize_module_weight.knows_packed_layers"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, None)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_lora_beside_a_packed_head_and_embedding(bits, tied, tmp_path):
    save_float(tiny_llama(tied=tied), tmp_path / "float")
    config = OneBitConfig(lm_head_bits=bits[0], embedding_bits=bits[1])
    AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).save_pretrained(
        tmp_path / "packed"
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert len([p for p in model.parameters() if p.requires_grad]) == 2 * 14
    ids = tiny_ids()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {name.replace(".base_layer", ""): t for name, t in base.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merging_into_a_packed_head_or_embedding_is_refused(target, tmp_path):
    save_float(tiny_llama(), tmp_path / "float")
    config = OneBitConfig(lm_head_bits=4, embedding_bits=8)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    words = base.get_submodule({"lm_head": "lm_head", "embed_tokens": "model.embed_tokens"}[target]).weight.clone()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM"))
    assert torch.isfinite(model(tiny_ids()).logits).all()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="Cannot merge an adapter into packed weights"):
            merge()
    layer = next(m for name, m in model.named_modules() if name.endswith(f"{target}.base_layer"))
    assert torch.equal(layer.weight, words)

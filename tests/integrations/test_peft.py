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


def test_merging_lora_into_packed_words_is_refused_not_silent(packed):
    base = AutoModelForCausalLM.from_pretrained(packed)
    words = base.model.layers[0].mlp.up_proj.weight.clone()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(RuntimeError):
        model.merge_and_unload()
    assert torch.equal(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight, words)

"""Plans leave the model as it was."""

import pytest
import torch
from tiny import tiny_ids, tiny_mixtral, tiny_qwen3_moe

from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.dry_run import dry_run


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe])
@pytest.mark.parametrize("preset", ["closed", "fast"])
def test_experts_are_joined_again(make, preset):
    """Planning gives each expert's matrices layers of their own."""
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    dataset = None if preset == "closed" else [{"input_ids": tiny_ids(1, 64, seed)[0].tolist()} for seed in range(4)]
    planned = dry_run(OneBitQuantizer.from_pretrained(model, config=OneBitConfig(preset=preset, dataset=dataset)))
    assert any(".experts.0." in name for name in planned["layers"])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [type(module) for module in model.modules()] == kinds


def test_a_plan_that_fails_leaves_the_model_too():
    model = tiny_mixtral()
    names = set(model.state_dict())
    rows = [{"input_ids": [10**6] * 8}]  # ids that the model does not know
    quantizer = OneBitQuantizer.from_pretrained(model, config=OneBitConfig(preset="closed", dataset=rows))
    with pytest.raises(ValueError, match="token id"):
        dry_run(quantizer)
    assert set(model.state_dict()) == names

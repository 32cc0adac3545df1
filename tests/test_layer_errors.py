"""Errors of packed layers, beside a plain computation with every input at hand."""

import pytest
import torch
from tiny import tiny_gpt2, tiny_ids, tiny_llama
from torch import Tensor

from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.nn.replace import float_weight
from hf_onebit.quantization.layer_errors import last_batches, layer_errors


def sequences() -> list[dict[str, Tensor]]:
    mask = torch.ones(1, 24, dtype=torch.int64)
    mask[:, 15:] = 0
    return [{"input_ids": tiny_ids(1, 24), "attention_mask": mask}, {"input_ids": tiny_ids(1, 31, seed=1)}]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("run_float", [False, True])
def test_errors_are_those_of_the_products_on_the_inputs_seen(make, run_float):
    reference, model = make(), make()
    OneBitQuantizer(OneBitConfig(lm_head_bits=4, embedding_bits=4)).quantize_model(model)
    names = [*model.config.quantization_config.modules]
    floats = {name: reference.get_submodule(name) for name in names}
    found = layer_errors(model, floats, sequences(), reference if run_float else None)
    assert list(found) == names
    runner = reference if run_float else model
    for name in names:
        W = float_weight(floats[name]).double()
        Q = model.get_submodule(name).dequantize().double()
        assert found[name]["relative_weight_error"] == pytest.approx(float((W - Q).square().sum() / W.square().sum()))
        seen = []
        hook = runner.get_submodule(name).register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
        for batch in sequences():
            runner(**batch)
        hook.remove()
        if not seen[0].is_floating_point():
            assert found[name]["relative_output_error"] is None
            continue
        rows = torch.cat([seen[0].flatten(0, -2)[:15], seen[1].flatten(0, -2)]).detach().double()
        error = (rows @ (W - Q).T).square().sum() / (rows @ W.T).square().sum()
        assert found[name]["relative_output_error"] == pytest.approx(float(error), rel=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_without_a_row_there_is_no_error():
    model, reference = tiny_llama(), tiny_llama()
    OneBitQuantizer(OneBitConfig()).quantize_model(model)
    name = "model.layers.0.mlp.up_proj"
    (found,) = layer_errors(model, {name: reference.get_submodule(name)}, []).values()
    assert found["relative_output_error"] is None
    assert found["relative_weight_error"] > 0


@pytest.mark.parametrize(("tokens", "expected"), [(1, [4]), (9, [3, 4]), (100, [0, 1, 2, 3, 4])])
def test_the_last_sequences_are_measured(tokens, expected):
    batches = [{"input_ids": torch.full((1, 4), i)} for i in range(5)]
    assert [int(batch["input_ids"][0, 0]) for batch in last_batches(batches, tokens)] == expected

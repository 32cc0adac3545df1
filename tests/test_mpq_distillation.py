"""Distilling group-quantized models: the training form is the packed model, codes learn, what comes back is exact."""

from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_llama

from hf_onebit import MPQConfig, MPQQuantizer
from hf_onebit.algorithms.code_linear import code_layers
from hf_onebit.algorithms.distill import DistillOptions
from hf_onebit.distillation import distill_model, training_form
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn import MBWQLinear, MPQLinear, packed_layers
from hf_onebit.quantization.group_tensors import dequantize_entry, pack_fit, unpack_fit
from hf_onebit.quantization.planning import packing_table, plan_layers

CASES: dict[str, dict[str, Any]] = {
    "plain": {"bits": 2, "group_size": 32},
    "symmetric rows": {"bits": 2, "group_size": -1, "symmetric": True},
    "one bit": {"bits": 1, "group_size": 32},
    "double quant": {"bits": 2, "group_size": 32, "double_quant": True},
    "heads": {"bits": 2, "group_size": 32, "lm_head_bits": 8, "embedding_bits": 8},
}


def lively() -> Any:
    """A tiny model whose predictions differ: at its first weights all logits are nearly zero."""
    model = tiny_llama().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


def packed(**options: Any) -> tuple[Any, Any, dict[str, TableEntry]]:
    """A packed model, its float model, and how each layer is packed."""
    model, teacher = lively(), lively()
    quantizer = MPQQuantizer(MPQConfig(**options))
    table = packing_table(plan_layers(model, quantizer.config))
    quantizer.quantize_model(model)
    return model.eval(), teacher, table


def batches(count: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tiny_ids(4, 32, seed)} for seed in range(first, first + count)]


def options(**changes: Any) -> DistillOptions:
    return DistillOptions(
        **{"steps": 20, "learning_rate": 0.03, "sign_rate": 0.1, "warmup": 2, "evaluate_every": 5} | changes
    )


@pytest.mark.parametrize("case", CASES)
def test_the_training_form_is_the_packed_model(case: str) -> None:
    model, _, table = packed(**CASES[case])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    form = training_form(model, dtype=torch.float32, entries=table)
    ids = tiny_ids(2, 16)
    with torch.no_grad():
        got, expected = form.student(ids).logits, model(ids).logits
        assert (got - expected).norm() < 1e-3 * expected.norm()
    form.write_back({})
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == []


@pytest.mark.parametrize("case", CASES)
def test_distilling_lowers_the_divergence_and_writes_back_what_was_judged(case: str) -> None:
    model, teacher, table = packed(**CASES[case])
    codes = {name: layer.weight.clone() for name, layer in packed_layers(model).items()}
    form = training_form(model, entries=table)
    generator = torch.Generator().manual_seed(0)
    margins = {}
    for name, layer in code_layers(form.student).items():  # anywhere in their code's interval
        margins[name] = layer.codes + torch.rand(layer.codes.shape, generator=generator) - 0.5
    arguments = batches(20), batches(4, 50), options(sign_rate=0.01)
    run, form = distill_model(model, teacher, *arguments, dtype=torch.float32, margins=margins, entries=table)
    result = run.run()
    assert result.best < result.start
    form.write_back(run.stored())
    again, _ = distill_model(model, teacher, *arguments, dtype=torch.float32, entries=table)
    assert again.evaluate() == pytest.approx(result.best, rel=1e-4)  # as the packed model says it, read anew
    moved = [name for name in codes if not torch.equal(codes[name], model.get_submodule(name).weight)]
    heads = {"lm_head", "model.embed_tokens"}
    assert {name.removesuffix(".weight") for name in moved} == set(codes) - heads


def test_without_margins_no_code_moves() -> None:
    model, teacher, table = packed(bits=2, group_size=32)
    codes = {name: layer.weight.clone() for name, layer in packed_layers(model).items()}
    run, form = distill_model(model, teacher, batches(20), batches(4, 50), options(), entries=table)
    result = run.run()
    form.write_back(run.stored())
    assert result.best < result.start
    assert all(torch.equal(codes[name], layer.weight) for name, layer in packed_layers(model).items())


def test_a_run_goes_on_where_it_was_stopped() -> None:
    def start() -> tuple[Any, Any]:
        model, teacher, table = packed(bits=2, group_size=32, double_quant=True)
        forms = code_layers(training_form(model, entries=table).student)
        margins = {name: layer.codes.float() + 0.3 for name, layer in forms.items()}
        return distill_model(
            model, teacher, batches(4), batches(2, 50), options(steps=8), margins=margins, entries=table
        )

    whole, whole_form = start()
    whole.run()
    first, _ = start()
    first.run(until=5)
    tensors, values = first.state()
    second, second_form = start()
    second.load_state(tensors, values)
    second.run()
    for one, other in zip(
        code_layers(whole_form.student).values(), code_layers(second_form.student).values(), strict=True
    ):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.folded, other.folded)
    assert {k: v.tolist() for k, v in whole.stored().items()} == {k: v.tolist() for k, v in second.stored().items()}


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_presets_distil(preset: str) -> None:
    model = lively()
    # With fewer rows it learns them by heart.
    dataset = [{"input_ids": tiny_ids(1, 64, seed)[0].tolist()} for seed in range(64)]
    quantizer = MPQQuantizer(MPQConfig(bits=2, group_size=32, preset=preset, dataset=dataset))
    quantizer.quantize_model(model)
    assert quantizer.report is not None
    found = quantizer.report["fit"]["distillation"]
    assert found["kl_after"] < found["kl_before"]


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_fits_come_back_from_their_tensors(order: bool, group_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = 3 if group_size == 32 else 1
    entry = TableEntry("mpq", bits=3, group_size=group_size, symmetric=False, q_perm=order)
    blocks = ((3, 96, group_size),)
    cls = MBWQLinear if order else MPQLinear
    about: dict[str, Any] = {"blocks": blocks, "q_perm": True} if order else {"bits": 3, "group_size": group_size}
    layer = cls(96, 7, symmetric=False, **about)
    with torch.no_grad():
        layer.scales.copy_(torch.rand(groups, 7, generator=generator) + 0.1)
        layer.zeros.copy_(torch.rand(groups, 7, generator=generator))
        if order:
            layer.q_perm.copy_(torch.randperm(96, generator=generator))
    tensors = {name: getattr(layer, name).detach() for name in entry.tensor_names}
    fit = unpack_fit(tensors, entry, 96)
    assert fit is not None
    again = pack_fit(fit, entry)
    torch.testing.assert_close(dequantize_entry(again, entry, 96), layer.dequantize(), rtol=0, atol=0)


def test_codes_of_several_widths_stay_as_they_are() -> None:
    blocks = ((4, 64, 32), (2, 32, 32))
    entry = TableEntry("mpq", bits=4, group_size=32, symmetric=False, blocks=blocks)
    layer = MBWQLinear(96, 7, symmetric=False, blocks=blocks)
    assert unpack_fit({name: getattr(layer, name).detach() for name in entry.tensor_names}, entry, 96) is None

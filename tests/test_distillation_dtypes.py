"""Distilling in a dtype coarser than the model's: what that may round, and what stays exact."""

import copy
import math
from typing import Any

import pytest
import torch
from distilled import bits, packed, same_bits, sequences
from safetensors.torch import load, save
from tiny import tiny_gpt2, tiny_ids, tiny_llama
from torch import nn

from hf_onebit import MPQConfig, MPQQuantizer
from hf_onebit.algorithms.distill import Distillation, DistillOptions, Pair, Trained
from hf_onebit.casting import cast
from hf_onebit.conducting import installing
from hf_onebit.distillation import distill_model, training_form
from hf_onebit.quantization.planning import packing_table, plan_layers
from hf_onebit.quantize import OneBitConfig, OneBitQuantizer
from hf_onebit.rungs.recipes import RECIPES, Recipe


def uneven(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model with gains and biases that no 16-bit float can hold."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    return cast(model, dtype)


def run_of(student: Any, teacher: Any, steps: int = 0, **options: Any) -> tuple[Distillation, Any]:
    options = {"warmup": 0, "evaluate_every": 2, **options}
    return distill_model(student, teacher, sequences(3), sequences(2, 50), DistillOptions(steps=steps, **options))


def grouped(model: Any, **options: Any) -> tuple[Any, Any]:
    quantizer = MPQQuantizer(MPQConfig(bits=2, group_size=32, **options))
    model = copy.deepcopy(model)
    table = packing_table(plan_layers(model, quantizer.config))
    quantizer.quantize_model(model)
    return model.eval(), table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, lambda: tiny_llama(bias=True)], ids=["llama", "gpt2", "bias"])
def test_without_a_step_nothing_changes(make: Any, dtype: torch.dtype) -> None:
    teacher = uneven(make(), dtype)
    student = packed(teacher)
    before = bits(student.state_dict())
    run, form = run_of(student, teacher)
    run.run()
    form.write_back(run.stored())
    assert same_bits(before, bits(student.state_dict()))


@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"symmetric": True}])
def test_without_a_step_nothing_changes_in_groups(options: dict[str, Any]) -> None:
    teacher = uneven(tiny_llama(bias=True))
    student, table = grouped(teacher, **options)
    before = bits(student.state_dict())
    run, form = distill_model(student, teacher, sequences(3), sequences(2, 50), DistillOptions(steps=0), entries=table)
    run.run()
    form.write_back(run.stored())
    assert same_bits(before, bits(student.state_dict()))


def test_steps_that_only_hurt_leave_nothing_behind() -> None:
    teacher = uneven(tiny_llama(bias=True))
    student = packed(teacher)
    before = bits(student.state_dict())
    run, form = run_of(student, teacher, steps=4, learning_rate=50.0)
    assert run.run().best_step == 0
    form.write_back(run.stored())
    assert same_bits(before, bits(student.state_dict()))


def test_vectors_learn_from_their_exact_values_and_are_computed_with_in_the_dtype() -> None:
    teacher = uneven(tiny_llama())
    run, form = run_of(packed(teacher), teacher)
    for name in (name for name in form.trained if "norm" in name):
        exact = teacher.get_parameter(name).detach()
        assert torch.equal(run.stored()[name], exact)
        assert not torch.equal(exact, exact.bfloat16().float())
        assert torch.equal(form.student.get_parameter(name).detach(), exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotary_frequencies_stay_exact_in_all_three_models(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    frequencies = tiny_llama().model.rotary_emb.inv_freq.clone()
    assert not torch.equal(frequencies, frequencies.bfloat16().float())
    teacher = uneven(tiny_llama(), dtype)
    student = packed(teacher)
    assert torch.equal(teacher.model.rotary_emb.inv_freq, frequencies)
    judges: list[Any] = []
    monkeypatch.setattr(
        "hf_onebit.distillation.pair", lambda one, other, probe: judges.extend([one, other]) or _no_pair()
    )
    _, form = run_of(student, teacher.train())  # a copy answers for a teacher in training
    assert judges[0] is form.student
    assert judges[1] is not teacher
    for model in judges:
        assert {p.dtype for name, p in model.named_parameters() if "norm" in name} == {torch.bfloat16}
        for name in ("inv_freq", "original_inv_freq"):
            assert getattr(model.model.rotary_emb, name).dtype == torch.float32
            assert torch.equal(getattr(model.model.rotary_emb, name), frequencies)


def _no_pair() -> Pair:
    return Pair(lambda batch: torch.zeros(1, 2), lambda batch: torch.zeros(1, 2))


def test_products_stay_in_bfloat16() -> None:
    """No gain and no buffer widens what goes through the blocks."""
    teacher = uneven(tiny_llama(bias=True))
    student = training_form(packed(teacher)).student
    judge = cast(copy.deepcopy(teacher), torch.bfloat16)
    for model in (student, judge):
        seen: list[tuple[str, torch.dtype]] = []
        for name, module in model.named_modules():
            if name and not any(part in name for part in ("rotary", "planes")):
                module.register_forward_hook(_note(seen, name))
        model(tiny_ids())
        assert len(seen) > 20
        assert {dtype for _, dtype in seen} == {torch.bfloat16}


def _note(seen: list[tuple[str, torch.dtype]], name: str) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        tensor = first if isinstance(first, torch.Tensor) else first[0]
        seen.append((name, tensor.dtype))

    return hook


class Shifted(nn.Module):
    """Adds a float buffer to what it reads, which widens it where the buffer is wider."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.shift = nn.Buffer(torch.full((8,), 1 / 3))

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.inner(nn.functional.one_hot(input_ids, 8).to(self.inner.weight.dtype) + self.shift),)


def test_a_buffer_that_does_not_fit_the_dtype_is_rounded() -> None:
    model = cast(Shifted(), torch.bfloat16)
    assert model.shift.dtype == torch.bfloat16
    assert model(torch.zeros(1, 2, dtype=torch.int64))[0].dtype == torch.bfloat16
    assert cast(Shifted(), torch.float32).shift.dtype == torch.float32


def test_the_quantizers_teacher_has_exact_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def look(model: Any, teacher: Any, *_: Any, **__: Any) -> None:
        seen["teacher"] = teacher

    monkeypatch.setattr(installing, "product_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(installing, "distill_scales", look)
    monkeypatch.setitem(RECIPES, "fast", Recipe(rounds=0, steps=1))
    model = tiny_llama()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    rows = [{"input_ids": tiny_ids(1, 32, seed=i)} for i in range(4)]
    OneBitQuantizer(OneBitConfig(preset="fast", dataset=rows)).quantize_model(model)
    assert seen["teacher"].lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(seen["teacher"].model.rotary_emb.inv_freq, frequencies)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_is_bit_exact(stop: int) -> None:
    def start() -> tuple[Distillation, Any, Any]:
        teacher = uneven(tiny_llama(bias=True))
        student = packed(teacher)
        return *run_of(student, teacher, steps=4), student

    whole, whole_form, whole_student = start()
    whole.run()
    whole_form.write_back(whole.stored())
    first, _, _ = start()
    first.run(until=stop)
    tensors, values = first.state()
    second, form, student = start()
    second.load_state(load(save(tensors)), values)
    second.run()
    form.write_back(second.stored())
    assert same_bits(bits(whole_student.state_dict()), bits(student.state_dict()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_divergence_that_is_not_finite_ends_the_run_at_once(whose: str, value: float) -> None:
    models = {"teacher": tiny_llama().bfloat16()}
    models["student"] = packed(models["teacher"])
    with torch.no_grad():
        models[whose].model.norm.weight[0] = value
    before = bits(models["student"].state_dict())
    run, _ = run_of(models["student"], models["teacher"], steps=4)
    with pytest.raises(ValueError, match=rf"KL is (nan|inf) before.*expected.*{whose} gives NaN or inf for 32"):
        run.run()
    assert run.step == 0
    assert same_bits(before, bits(models["student"].state_dict()))


def test_logits_that_overflow_alone_are_said_to() -> None:
    weight = nn.Parameter(torch.full((1, 2), 3e38))
    heads = {"student_head": torch.full((4, 2), 2.0), "teacher_head": torch.ones(4, 2)}
    both = Pair(lambda batch: weight * 1, lambda batch: torch.ones(1, 2), **heads)
    run = Distillation(both, {"w": Trained(weight, torch.float32)}, [0], [0], DistillOptions(steps=1))
    with pytest.raises(ValueError, match="features are finite, so the logits"):
        run.run()

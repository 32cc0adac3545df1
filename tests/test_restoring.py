"""Whatever goes wrong while layers are put in place, and until the report is made: the model is as it was."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_llama, tiny_mixtral
from torch import Tensor

from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer
from hf_onebit.conducting import in_memory
from hf_onebit.conducting.restoring import restored_on_failure
from hf_onebit.nn import packed_layers
from hf_onebit.streaming import run

ROWS = [{"input_ids": tiny_ids(1, 32, seed)} for seed in range(8)]
CASES: dict[str, tuple[Any, Any]] = {
    "signs": (lambda: tiny_llama(bias=True), OneBitQuantizer(OneBitConfig())),
    "fused calls": (tiny_llama, OneBitQuantizer(OneBitConfig(fuse_projections=True))),
    "distilled": (lambda: tiny_llama(bias=True), OneBitQuantizer(OneBitConfig(preset="fast", dataset=ROWS))),
    "tied": (lambda: tiny_llama(tied=True), MPQQuantizer(MPQConfig(lm_head_bits=4, embedding_bits=4))),
    "untied": (lambda: tiny_llama(tied=True), MPQQuantizer(MPQConfig(lm_head_bits=4))),
    "experts": (tiny_mixtral, MPQQuantizer(MPQConfig())),
}
STEPS = ("install", "settle_tie", "attach", "build_report", "release_experts")
WHERE = [(case, step) for case in CASES for step in STEPS]


def failing(monkeypatch: pytest.MonkeyPatch, where: Any, step: str) -> None:
    """Have a step fail when it is done."""
    real = getattr(where, step)

    def fail(*args: Any, **options: Any) -> None:
        real(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(where, step, fail)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(tiny_ids()).logits
    return result


@pytest.mark.parametrize(("case", "step"), WHERE)
def test_a_step_that_fails(case: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, quantizer = CASES[case]
    model = make()
    expected, config, options = logits(model), model.config.to_dict(), quantizer.config.to_dict()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    attributes = {name: dict(vars(module)) for name, module in modules.items()}
    values = {name: (p.clone(), p.dtype, p.requires_grad) for name, p in parameters.items()}
    with monkeypatch.context() as patched:
        failing(patched, in_memory, step)
        with pytest.raises(KeyboardInterrupt):
            quantizer.quantize_model(model)
    if (case, step) != ("experts", "release_experts"):  # whose tensors are made anew then
        assert dict(model.named_modules()) == modules
        assert dict(model.named_parameters(remove_duplicate=False)) == parameters
        assert {name: vars(module) for name, module in model.named_modules()} == attributes
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value, *kind = values.pop(name)
        assert torch.equal(parameter, value)
        assert [parameter.dtype, parameter.requires_grad] == kind
    assert not values
    assert model.config.to_dict() == config
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model), expected)
    assert quantizer.config.to_dict() == options


def test_another_dtype_is_taken_back() -> None:
    model = tiny_llama(bias=True).bfloat16()
    values = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    with contextlib.suppress(KeyboardInterrupt), restored_on_failure(model):
        model.float()
        raise KeyboardInterrupt
    for name, parameter in model.named_parameters():
        before, value = values.pop(name)
        assert parameter is before
        assert parameter.dtype is torch.bfloat16
        assert torch.equal(parameter, value)
    assert not values


@pytest.mark.parametrize("case", ["tied", "untied", "experts"])
def test_it_can_be_quantized_then(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make, quantizer = CASES[case]
    fresh = quantizer.from_dict(quantizer.to_dict()).quantize_model(make())
    model = make()
    with monkeypatch.context() as patched:
        failing(patched, in_memory, "attach")
        with pytest.raises(KeyboardInterrupt):
            quantizer.quantize_model(model)
    quantizer.quantize_model(model)
    assert torch.equal(logits(model), logits(fresh))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(fresh))


@pytest.mark.parametrize("step", ["attach", "build_report"])
def test_from_files_nothing_is_left(step: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    quantizer = OneBitQuantizer.from_pretrained(tmp_path / "float", config=OneBitConfig(low_memory=True))
    options = quantizer.config.to_dict()
    with monkeypatch.context() as patched:
        failing(patched, run, step)
        with pytest.raises(KeyboardInterrupt):
            quantizer.quantize(tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
    assert quantizer.config.to_dict() == options
    assert packed_layers(quantizer.quantize(tmp_path / "packed"))

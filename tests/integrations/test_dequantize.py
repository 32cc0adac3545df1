"""`model.dequantize(dtype)`: a float model of that dtype, all of it, that computes, saves and loads."""

import copy
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_gpt2, tiny_ids, tiny_llama

from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer
from hf_onebit.nn.replace import packed_layers

HEADS = {"lm_head_bits": 8, "embedding_bits": 8, "head_group_size": 32}
KINDS: dict[str, Any] = {
    "onebit": lambda: OneBitQuantizer(OneBitConfig()).quantize_model(tiny_llama(bias=True)),
    "two planes, packed head": lambda: OneBitQuantizer(OneBitConfig(planes=2, **HEADS)).quantize_model(
        tiny_llama(tied=True)
    ),
    "mpq": lambda: MPQQuantizer(MPQConfig(bits=3, group_size=32)).quantize_model(tiny_gpt2()),
    "mpq, packed head": lambda: MPQQuantizer(MPQConfig(bits=4, group_size=32, **HEADS)).quantize_model(tiny_llama()),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@pytest.mark.parametrize(
    ("loaded", "dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_every_dtype(model: Any, loaded: torch.dtype, dtype: torch.dtype) -> None:
    packed = copy.deepcopy(model).to(loaded)
    with torch.no_grad():
        before = packed(tiny_ids()).logits.double()
        plain = packed.dequantize(dtype)
        after = plain(tiny_ids()).logits
    assert not packed_layers(plain)
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert after.dtype == dtype
    few = torch.bfloat16 in (loaded, dtype)
    assert (after.double() - before).norm() < (2e-2 if few else 5e-3) * before.norm()


def test_what_comes_out_is_saved_as_a_float_model(model: Any, tmp_path: Any) -> None:
    plain = copy.deepcopy(model).dequantize("bfloat16")
    plain.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert getattr(again.config, "quantization_config", None) is None
    with torch.no_grad():
        assert torch.equal(again(tiny_ids()).logits, plain(tiny_ids()).logits)

"""In which dtype large products are computed."""

import pytest
import torch

from hf_onebit.arithmetic import autocast_dtype, product_dtype


@pytest.mark.parametrize(
    ("capability", "dtype"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32), ("DEFAULT", torch.float32)]
)
def test_bfloat16_where_the_processor_multiplies_it(
    capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu = torch.device("cpu")
    assert product_dtype(cpu) == dtype
    assert autocast_dtype(cpu) == (dtype if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_where_a_gpu_does_not_emulate_it(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert product_dtype(torch.device("cuda:1")) == (torch.bfloat16 if supported else torch.float32)
    assert product_dtype(torch.device("xpu")) == torch.bfloat16

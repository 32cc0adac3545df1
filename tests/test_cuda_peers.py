"""The other libraries' layers of ``hf-onebit bench --device cuda``, with stand-ins for the libraries; no GPU."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hf_onebit.bench import cuda_peers as peers

CPU = torch.device("cpu")


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "gemlite" else object())
    assert peers.missing("gemlite1") == "gemlite is not installed"
    assert peers.missing("bnb4") == ""


@pytest.mark.parametrize("kind", ["gemlite1", "gemlite2", "gemlite4"])
def test_gemlite_is_given_the_matrix_that_is_checked(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    class Layer:
        def __init__(self, bits: int, **about: Any) -> None:
            assert about["input_dtype"] == about["output_dtype"] == "half"
            self.bits, self.group = bits, about["group_size"]

        def pack(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: None) -> None:
            assert int(codes.max()) < 1 << self.bits
            s, z = (t.float().repeat_interleave(self.group, 1) for t in (scales, zeros))
            self.W = (codes.float() - z) * s

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x.float() @ self.W.T

    stand_in(monkeypatch, "gemlite", GemLiteLinear=Layer, DType=SimpleNamespace(FP16="half", BF16="brain"))
    call, W = peers.peer(kind, 24, 128, 64, torch.float16, CPU)
    x = torch.randn(3, 128).half()
    assert W.shape == (24, 128)
    torch.testing.assert_close(call(x), x.float() @ W.T)


def test_gptqmodel_is_given_the_matrix_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(torch.nn.Module):
        def __init__(self, **about: Any) -> None:
            super().__init__()
            self.about = about

        def pack(self, linear: Any, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor) -> None:
            s, z = (t[:, g_idx.long()] for t in (scales, zeros))
            q = torch.round(linear.weight / s) + z
            assert 0 <= float(q.min()) <= float(q.max()) < 16
            self.W = (q - z) * s

        def post_init(self) -> None:
            self.ready = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.ready
            return x.float() @ self.W.T

    stand_in(monkeypatch, "gptqmodel")
    stand_in(monkeypatch, "gptqmodel.nn_modules")
    stand_in(monkeypatch, "gptqmodel.nn_modules.qlinear")
    stand_in(monkeypatch, "gptqmodel.nn_modules.qlinear.tritonv2", TritonV2QuantLinear=Layer)
    call, W = peers.peer("gptqmodel4", 24, 128, 64, torch.float16, CPU)
    x = torch.randn(3, 128).half()
    torch.testing.assert_close(call(x), x.float() @ W.T, rtol=1e-4, atol=1e-4)
    stand_in(monkeypatch, "gptqmodel.nn_modules.qlinear.tritonv2")
    with pytest.raises(RuntimeError, match="no Triton layer"):
        peers.peer("gptqmodel4", 24, 128, 64, torch.float16, CPU)

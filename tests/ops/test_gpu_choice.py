"""What registers the GPU kernels and what happens where they fail: without triton and without a device."""

import warnings

import pytest
import torch

from hf_onebit import ops
from hf_onebit.ops import gpu, gpu_examination


def test_not_registered_on_a_cpu_build():
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("this torch knows GPUs")
    assert gpu.obstacle() == "this torch is built for the CPU only"
    assert ops.backends()["gpu"] == "not in use: this torch is built for the CPU only"


def test_why_not(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in gpu.obstacle()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    assert gpu.obstacle() == ""
    monkeypatch.setenv("HF_ONEBIT_TRITON", "off")
    assert gpu.obstacle() == "HF_ONEBIT_TRITON=off"


@pytest.mark.parametrize("outcome", ["is off by 1.0e+00", RuntimeError("no such compiler\nmore")])
def test_a_kernel_that_disagrees_is_left_out_and_one_warning_says_so(monkeypatch, outcome):
    def examine(*_, **__):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(gpu, "_launch", lambda: None)
    monkeypatch.setattr(gpu, "_examined", {})
    monkeypatch.setattr(gpu, "_plans", {})
    monkeypatch.setattr(gpu, "_warned", False)
    monkeypatch.setitem(gpu_examination.EXAMINATIONS, "onebit", examine)
    layer = (torch.randint(-9, 9, (2, 5), dtype=torch.int32), torch.rand(5), torch.rand(40))
    x = torch.randn(3, 40)
    with pytest.warns(UserWarning, match="in plain torch, slowly: the Triton kernel for onebit") as seen:
        y = gpu.onebit_linear(x, *layer)
    assert len(seen) == 1
    text = "is off by 1.0e+00" if isinstance(outcome, str) else "fails (RuntimeError: no such compiler)"
    assert text in str(seen[0].message)
    torch.testing.assert_close(y, ops.reference.onebit_linear(x, *layer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpu.onebit_linear(x[:2], *layer)
        gpu.onebit_linear(x.bfloat16(), *layer)  # another kernel, examined too, but said once
    monkeypatch.setattr(gpu, "obstacle", lambda: "")
    assert "except onebit dtype=torch.bfloat16 planes=1 on cpu: " + text in gpu.status()


def test_wrong_sizes_are_refused_in_every_call(monkeypatch):
    """A signature that was fine lets no other one pass."""
    monkeypatch.setattr(gpu, "_plans", {})
    layer = (torch.zeros(2, 5, dtype=torch.int32), torch.rand(5), torch.rand(40))
    x = torch.randn(3, 40, dtype=torch.float64)
    for _ in range(2):
        gpu.onebit_linear(x, *layer)
        with pytest.raises(RuntimeError, match="x has 39 features"):
            gpu.onebit_linear(x[:, 1:], *layer)
        with pytest.raises(RuntimeError, match="bias has 4 entries"):
            gpu.onebit_linear(x, *layer, torch.rand(4))


def test_plans_do_not_pile_up(monkeypatch):
    plans: dict = {}
    monkeypatch.setattr(gpu, "_plans", plans)
    monkeypatch.setattr(gpu, "_MOST_PLANS", 5)
    layer = (torch.zeros(2, 5, dtype=torch.int32), torch.rand(5), torch.rand(40))
    for rows in range(1, 20):
        gpu.onebit_linear(torch.randn(rows, 40, dtype=torch.float64), *layer)
        assert len(plans) <= 5

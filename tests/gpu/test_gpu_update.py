"""One optimizer step on packed words on a CUDA device: the codes of the CPU."""

import copy

import pytest
import torch

from hf_onebit import ops
from hf_onebit.nn import MBWQLinear, MPQLinear, OneBitLinear
from hf_onebit.nn.parameter import MPQWeightParameter
from hf_onebit.ops import gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
K, N = 200, 130


@pytest.fixture(autouse=True)
def _kernels_answer():
    """Nothing refused afterwards, or these tests would examine torch."""
    assert ops.backends()["gpu"].startswith("in use"), ops.backends()["gpu"]
    yield
    known = {what: why for (device, what), why in gpu._examined.items() if what.startswith("update")}
    assert known
    assert not any(known.values()), known


def steps(layer, device, rounding, dtype):
    """Words and moments after three steps."""
    weight = copy.deepcopy(layer).to(device).weight
    weight.rounding, weight.seed, weight.stream = rounding, 11, 3
    m, v = (torch.zeros(K, N, dtype=dtype, device=device) for _ in range(2))
    random = torch.Generator().manual_seed(1)
    for _ in range(3):
        grad = torch.randn(K, N, generator=random).to(device)
        MPQWeightParameter.update(weight, v, m, None, lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99, grad=grad)
    return [t.detach().cpu() for t in (weight.data, m, v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_and_moments_are_those_of_the_cpu(bits, rounding, dtype):
    torch.manual_seed(0)
    layer = MPQLinear(K, N, False, bits=bits, group_size=32, symmetric=bits % 2 == 0, g_idx=bits == 4)
    for cpu, cuda in zip(*(steps(layer, device, rounding, dtype) for device in ("cpu", "cuda")), strict=True):
        assert torch.equal(cpu, cuda)


def test_inputs_in_another_order():
    torch.manual_seed(0)
    layer = MBWQLinear(K, N, False, blocks=[(4, 96, 32), (3, 104, 32)], q_perm=torch.randperm(K))
    for cpu, cuda in zip(
        *(steps(layer, device, "stochastic", torch.float32) for device in ("cpu", "cuda")), strict=True
    ):
        assert torch.equal(cpu, cuda)


@pytest.mark.parametrize("rounding", ["inertia", "stochastic"])
def test_signs(rounding):
    torch.manual_seed(0)
    layer = OneBitLinear(K, N, bias=False)
    cpu, cuda = (steps(layer, device, rounding, torch.float32) for device in ("cpu", "cuda"))
    assert torch.equal(cpu[0], cuda[0])
    torch.testing.assert_close(cpu[1:], cuda[1:], rtol=1e-5, atol=1e-8)

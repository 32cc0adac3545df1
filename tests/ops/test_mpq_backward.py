"""The gradient of mpq_linear's input from the compiled kernels, beside the reference."""

import pytest
import torch
from packed_layers import RELATIVE, Groups
from products import Products

from hf_onebit.ops import cpu, cpu_backward, reference_mpq

pytestmark = pytest.mark.skipif(cpu.isa() is None, reason=f"no compiled CPU kernels: {cpu.status()}")
ISAS = sorted({*cpu.isas()[:1], *cpu.isas()[-1:]}) or ["none"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(params=ISAS)
def isa(request):
    before = cpu.isa()
    cpu.select_isa(request.param)
    yield request.param
    cpu.select_isa(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_it_is_the_reference(bits, symmetric, dtype, isa):
    for out_features, in_features, group_size, shape in (
        (40, 96, 32, (7,)),
        (33, 70, 64, (2, 3)),
        (1, 33, -1, ()),
    ):
        layer = Groups(out_features, in_features, bits, group_size, symmetric)
        torch.manual_seed(0)
        x, grad = torch.randn(*shape, in_features).to(dtype), torch.randn(*shape, out_features).to(dtype)
        args = (grad, x, layer.weight, layer.scales, layer.zeros, bits, group_size)
        for needs in ([True, True, not symmetric], [True, False, False], [False, True, False]):
            got = cpu_backward.mpq_linear_backward(*args, needs)
            expected = reference_mpq.mpq_linear_backward(*args, needs)
            for one, two in zip(got, expected, strict=True):
                assert (one.shape, one.dtype) == (two.shape, two.dtype)
                bound = 1e-12 if dtype == torch.float64 else RELATIVE[dtype]
                assert (one.double() - two.double()).norm() <= bound * two.double().norm()


def test_the_dispatcher_takes_it():
    layer = Groups(40, 96)
    x, grad = torch.randn(5, 96), torch.randn(5, 40)
    args = (grad, x, layer.weight, layer.scales, layer.zeros, 4, 64, [True, False, False])
    called = torch.ops.hf_onebit.mpq_linear_backward.default(*args)[0]
    assert torch.equal(called, cpu_backward.mpq_linear_backward(*args)[0])


def test_no_rows_and_bad_arguments():
    layer = Groups(40, 96)
    about = (layer.weight, layer.scales, layer.zeros, 4, 64, [True, True, True])
    empty = cpu_backward.mpq_linear_backward(torch.empty(0, 40), torch.empty(0, 96), *about)
    assert [t.shape for t in empty] == [(0, 96), layer.scales.shape, layer.scales.shape]
    with pytest.raises(RuntimeError, match="grad must have shape"):
        cpu_backward.mpq_linear_backward(torch.randn(5, 41), torch.randn(5, 96), *about)


@pytest.mark.parametrize(("capability", "product"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_the_product_is_in_bfloat16_only_where_that_is_fast(capability, product, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    layer = Groups(40, 96)
    about = (layer.weight, layer.scales, layer.zeros, 4, 64, [True, False, False])
    for dtype, expected in ((torch.bfloat16, product), (torch.float16, torch.float32)):
        with Products() as products:
            cpu_backward.mpq_linear_backward(torch.randn(5, 40).to(dtype), torch.randn(5, 96).to(dtype), *about)
        assert products.dtypes == {expected}

"""The GPU kernels in Triton's interpreter, on CPU tensors, against float64. Run by test_triton_interpreter.py.

The interpreter is chosen when triton is imported, hence a process of its own. It computes no bfloat16 products, and it
sees neither races nor alignment nor shared memory: the compiled kernels are examined in test_triton_aot.py, and on a
device in tests/gpu.
"""

from types import SimpleNamespace

import pytest
import torch
from interpreter import let_loops_run
from packed_layers import Groups, MixedRows, OneBit, check

from hf_onebit.formats import mpq
from hf_onebit.ops import (
    gpu,
    gpu_examination,
    gpu_mbwq,
    gpu_mpq,
    gpu_onebit,
    gpu_packing,
    gpu_plans,
    gpu_products,
    reference,
    reference_mpq,
    triton_launch,
)

DTYPES = (torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _no_examination(monkeypatch):
    """Its own tests are below; here every call goes to the kernels."""
    let_loops_run()
    monkeypatch.setattr(gpu, "agrees", lambda *_, **__: True)
    monkeypatch.setattr(gpu_plans, "multiprocessors", lambda _: 2)  # so that programs take several blocks
    gpu_products._plans.clear()


def rows_of(rows, layer, dtype):
    return torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 17, 33])
def test_onebit(rows, planes, dtype):
    for out, in_ in ((70, 600), (1, 33)):
        layer = OneBit(out, in_, planes)
        x = rows_of(rows, layer, dtype)
        assert gpu_plans.plan_for(rows, in_, operand_of(layer), dtype, x.device) != gpu_plans.EXPAND
        check(gpu_onebit.onebit_linear(x, *layer.args()), layer.exact(x))


def operand_of(layer):
    if isinstance(layer, Groups):
        weight, scales, zeros, _, bits, group_size = layer.args()
        return triton_launch.mpq_operand(weight, scales, zeros, bits, group_size)
    weight, a, b, _, weight_1, a_1, b_1 = layer.args()
    return triton_launch.onebit_operand(weight, a, b, weight_1, a_1, b_1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_mpq(bits, symmetric):
    layer = Groups(37, 600, bits, 64, symmetric)
    for rows in (1, 17):
        x = rows_of(rows, layer, torch.float16)
        check(gpu_mpq.mpq_linear(x, *layer.args()), layer.exact(x))
    x = rows_of(3, layer, torch.float32)
    check(gpu_mpq.mpq_linear(x, *layer.args()), layer.exact(x))


@pytest.mark.parametrize("group_size", [32, 96, -1])
def test_group_sizes(group_size):
    layer = Groups(21, 200, 4, group_size)
    x = rows_of(9, layer, torch.float16)
    check(gpu_mpq.mpq_linear(x, *layer.args()), layer.exact(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_are_expanded(dtype):
    for layer in (OneBit(40, 70, 2), Groups(40, 70, 3, 32)):
        x = rows_of(100, layer, dtype)
        assert gpu_plans.plan_for(100, 70, operand_of(layer), dtype, x.device) == gpu_plans.EXPAND
        op = gpu_mpq.mpq_linear if isinstance(layer, Groups) else gpu_onebit.onebit_linear
        check(op(x, *layer.args()), layer.exact(x))


@pytest.mark.parametrize("plan", [(32, 8, 1, 1, 1), (64, 16, 2, 2, 1), (32, 32, 8, 2, 1)], ids=str)
@pytest.mark.parametrize("layer", [OneBit(70, 1100, 2), Groups(70, 1100, 2, 64)], ids=["onebit", "mpq"])
def test_plans(layer, plan):
    x, plan = rows_of(3, layer, torch.float16), gpu_plans.Plan(*plan)
    check(triton_launch.run(x, operand_of(layer), layer.bias, plan), layer.exact(x))


def test_large_and_small_inputs_keep_their_digits():
    layer = OneBit(40, 100, bias=False)
    x = rows_of(4, layer, torch.float32)
    x[0] *= 1e30
    x[1] *= 1e-25
    x[2, ::7] *= 1e4
    x[3] = 0
    y, exact = gpu_onebit.onebit_linear(x, *layer.args()), layer.exact(x)
    for row in range(3):
        check(y[row], exact[row])
    assert (y[3] == 0).all()


def test_strides_and_shapes():
    layer = OneBit(40, 96)
    x = rows_of(12, layer, torch.float16)
    exact = layer.exact(x)
    check(gpu_onebit.onebit_linear(x.view(3, 4, 96), *layer.args()), exact.view(3, 4, 40))
    check(gpu_onebit.onebit_linear(x[5], *layer.args()), exact[5])
    check(gpu_onebit.onebit_linear(x.T.contiguous().T, *layer.args()), exact)
    check(gpu_onebit.onebit_linear(torch.cat([x, x], 1)[:, 96:], *layer.args()), exact)
    assert gpu_onebit.onebit_linear(x[:0], *layer.args()).shape == (0, 40)
    with pytest.raises(RuntimeError, match="x has 95 features"):
        gpu_onebit.onebit_linear(x[:, 1:], *layer.args())


@pytest.mark.parametrize("needs", [(1, 1, 1, 1, 1), (1, 0, 0, 0, 0), (0, 1, 0, 0, 1)], ids=str)
def test_onebit_backward(needs):
    layer = OneBit(40, 70, 2, scale_dtype=torch.float32)
    weight, a, b, _, weight_1, a_1, b_1 = layer.args()
    x, grad = rows_of(5, layer, torch.float16), torch.randn(5, 40).half()
    needs = [bool(need) for need in needs]
    got = gpu_onebit.onebit_linear_backward(grad, x, weight, a, b, weight_1, a_1, b_1, needs)
    scales = (weight, a.double(), b.double(), weight_1, a_1.double(), b_1.double())
    exact = reference.onebit_linear_backward(grad.double(), x.double(), *scales, needs)
    for need, mine, theirs in zip(needs, got, exact, strict=True):
        assert mine.shape == theirs.shape
        assert not need or float((mine.double() - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 32, False), (3, -1, True), (1, 64, True)])
def test_mpq_backward(bits, group_size, symmetric):
    layer = Groups(37, 200, bits, group_size, symmetric, scale_dtype=torch.float32)
    weight, scales, zeros, *_ = layer.args()
    x, grad, needs = rows_of(5, layer, torch.float16), torch.randn(5, 37).half(), [True, True, not symmetric]
    got = gpu_mpq.mpq_linear_backward(grad, x, weight, scales, zeros, bits, group_size, needs)
    doubles = (scales.double(), None if zeros is None else zeros.double())
    exact = reference_mpq.mpq_linear_backward(grad.double(), x.double(), weight, *doubles, bits, group_size, needs)
    for need, mine, theirs in zip(needs, got, exact, strict=True):
        assert mine.shape == theirs.shape
        assert not need or float((mine.double() - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_mixed_rows(monkeypatch, ordered, symmetric):
    """Forward and backward, each block by the kernels."""
    blocks = [(4, 96, 32), (3, 64, 64), (2, 104, 32)]
    three, half = (MixedRows(blocks, 21, ordered, symmetric, dtype) for dtype in (torch.float32, torch.float16))
    one = MixedRows(blocks[:1], 21, ordered, symmetric, torch.float16)
    cases = [(layer, rows_of(3, layer, dtype)) for layer in (three, half, one) for dtype in DTYPES]
    needs = [True, True, not symmetric]
    exact = [(layer.exact(x), layer.exact_gradients(x, needs)) for layer, x in cases]
    calls = []
    product, backward = triton_launch.product, gpu_mpq.mpq_linear_backward

    def multiplied(*given):
        calls.append("product")
        return product(*given)

    def went_back(*given):
        calls.append("backward")
        return backward(*given)

    monkeypatch.setattr(triton_launch, "product", multiplied)
    monkeypatch.setattr(torch.ops.hf_onebit, "mpq_linear_backward", SimpleNamespace(default=went_back))
    for (layer, x), (y, gradients) in zip(cases, exact, strict=True):
        check(gpu_mbwq.mbwq_linear(x, *layer.args()), y)
        got = layer.gradients(x, needs)
        check(got[0], gradients[0])
        for mine, theirs in zip(got, gradients, strict=True):
            assert mine.shape == theirs.shape
            assert not theirs.numel() or float((mine.double() - theirs).norm() / theirs.norm()) < 1e-3
    assert calls.count("backward") == 2 * (3 + 3 + 1)
    assert calls.count("product") == 3 + 1  # of 16-bit x and scales; others are expanded, to keep their digits


@pytest.mark.parametrize("bits", range(1, 9))
def test_g_idx(bits):
    layer = Groups(21, 70, bits, 32, bits % 2 == 0)
    weight, scales, zeros, bias, *_ = layer.args()
    g_idx = torch.randint(0, 3, (70,), generator=torch.Generator().manual_seed(1))
    W = mpq.dequantize(weight, scales, zeros, 70, bits, 32, torch.float64, g_idx)
    for dtype in DTYPES:
        for rows in (1, 16, 17):  # the last are expanded
            x = rows_of(rows, layer, dtype)
            y = gpu_mbwq.mpq_linear_g_idx(x, weight, scales, zeros, bias, g_idx.int(), bits)
            check(y, x.double() @ W.T + bias.double())
        x = rows_of(3, layer, dtype)
        grad = torch.randn(3, 21).to(dtype)
        grad_x, *others = gpu_mbwq.mpq_linear_g_idx_backward(
            grad, x, weight, scales, zeros, g_idx, bits, [True, False, False]
        )
        check(grad_x, grad.double() @ W)
        assert not any(t.numel() for t in others)
    g_idx[4] = 3  # no group, and no memory of this layer
    for dtype in DTYPES:
        y = gpu_mbwq.mpq_linear_g_idx(torch.ones(1, 70, dtype=dtype), weight, scales, zeros, bias, g_idx, bits)
        assert y.isnan().all()


def test_inputs_in_groups_of_a_large_layer():
    """More units than a tile takes, in several splits, and every group from all places."""
    layer = Groups(40, 2000, 4, 128)
    weight, scales, zeros, bias, *_ = layer.args()
    g_idx = torch.randint(0, scales.shape[0], (2000,), generator=torch.Generator().manual_seed(1))
    W = mpq.dequantize(weight, scales, zeros, 2000, 4, 128, torch.float64, g_idx)
    x = rows_of(5, layer, torch.float16)
    check(gpu_mbwq.mpq_linear_g_idx(x, weight, scales, zeros, bias, g_idx, 4), x.double() @ W.T + bias.double())


def test_the_examination_of_g_idx():
    examine = gpu_examination.EXAMINATIONS["g_idx"]
    assert examine(triton_launch, torch.device("cpu"), dtype=torch.float16, bits=3, zeros=True) == ""


@pytest.mark.parametrize("bits", range(1, 9))
def test_embedding_and_codes(bits):
    layer = Groups(21, 70, bits, 32, bits % 2 == 0)
    weight, scales, zeros, *_ = layer.args()
    ids = torch.tensor([[3, 0], [20, 3]])
    rows = gpu_mpq.mpq_embedding(ids, weight, scales, zeros, bits, 32, 70, torch.float32)
    torch.testing.assert_close(rows.double(), layer.W[ids], rtol=1e-6, atol=1e-6)
    assert torch.equal(gpu_packing.unpack(weight, bits, 70), layer.codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits):
    for shape in ((1, 1), (21, 70), (130, 96)):
        codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
        for given in (codes, codes.long(), codes.T.contiguous().T):
            assert torch.equal(gpu_packing.pack(given, bits), reference.pack(codes, bits))
    with pytest.raises(ValueError, match=rf"codes of {bits} bits must lie in 0\.\."):
        gpu_packing.pack(torch.full((3, 40), 1 << bits), bits)
    assert gpu_packing.pack(codes[None], bits).shape[0] == 1


@pytest.mark.parametrize("ids", ["column", "step", "expanded"])
def test_ids_that_are_no_neighbours(ids):
    layer = Groups(21, 70, 4, 32)
    weight, scales, zeros, *_ = layer.args()
    every = torch.arange(20)
    chosen = {"column": every.view(4, 5)[:, -1:], "step": every[::3], "expanded": every[7:8].expand(5)}[ids]
    rows = gpu_mpq.mpq_embedding(chosen, weight, scales, zeros, 4, 32, 70, torch.float32)
    torch.testing.assert_close(rows.double(), layer.W[chosen], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_bias_that_is_no_neighbours(rows, dtype):
    one = torch.randn(1).to(dtype)
    for bias in (torch.randn(140).to(dtype)[::2], one.expand(70)):
        for layer, op in ((OneBit(70, 96), gpu_onebit.onebit_linear), (Groups(70, 96, 4, 32), gpu_mpq.mpq_linear)):
            x, args = rows_of(rows, layer, dtype), list(layer.args())
            args[3] = bias
            exact = layer.exact(x) - layer.bias.double() + bias.double()
            check(op(x, *args), exact)


@pytest.mark.parametrize("kind", ["onebit", "mpq"])
def test_the_process_does_not_change_what_is_examined(kind, monkeypatch):
    """Not its default device, not autocast; and its random numbers are left alone."""
    monkeypatch.setattr(gpu, "_examined", {})
    about = {"planes": 2} if kind == "onebit" else {"bits": 4, "zeros": True}
    before = torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert gpu.examine(torch.device("cpu"), kind, dtype=torch.float32, **about) == ""
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_does_not_reach_into_an_operator():
    layer = Groups(40, 70, 3, 32)
    x = rows_of(100, layer, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = gpu_mpq.mpq_linear(x, *layer.args())
    check(y, layer.exact(x))


def test_examinations_see_a_wrong_kernel(monkeypatch):
    device = torch.device("cpu")
    examine = gpu_examination.EXAMINATIONS["onebit"]
    assert examine(triton_launch, device, dtype=torch.float16, planes=1) == ""
    right = triton_launch.product
    monkeypatch.setattr(triton_launch, "product", lambda *given: right(*given) * 1.01)
    assert "off by" in examine(triton_launch, device, dtype=torch.float16, planes=1)
    monkeypatch.setattr(triton_launch, "codes", lambda *given: torch.zeros(1))
    assert gpu_examination.EXAMINATIONS["codes"](triton_launch, device, bits=3) == "gives other codes"

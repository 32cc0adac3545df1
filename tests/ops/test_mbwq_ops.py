"""mpq_linear_g_idx and mbwq_linear: reference and every compiled instruction set against float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from hf_onebit import ops
from hf_onebit.formats import mbwq, mpq
from hf_onebit.ops import cpu, reference_mbwq

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLEMENTATIONS = ("reference", *cpu.isas())
BLOCKS = [
    [(4, 70, 32)],
    [(1, 33, -1)],
    [(8, 32, 32), (6, 32, 32), (5, 64, 64), (4, 32, -1), (3, 96, 64), (2, 40, 32)],
    [(6, 1, 32), (3, 15, 32)],
]


@pytest.fixture(params=IMPLEMENTATIONS)
def g_idx_linear(request):
    """mpq_linear_g_idx of each implementation."""
    if request.param == "reference":
        yield reference_mbwq.mpq_linear_g_idx
        return
    before = cpu.isa()
    cpu.select_isa(request.param)
    yield ops.mpq_linear_g_idx
    cpu.select_isa(before)


class Layer:
    """Arguments of both operators and the float64 result with its bound."""

    def __init__(self, blocks, rows=3, out_features=21, symmetric=False, bias=True, order=True, dtype=torch.float32,
                 scale_dtype=torch.float16, seed=0, groups=None):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.blocks = blocks
        self.flat = [number for block in blocks for number in block]
        self.bits = blocks[0][0]
        K = sum(count for _, count, _ in blocks)
        widths = torch.tensor([bits for bits, count, _ in blocks for _ in range(count)])
        codes = (torch.rand(K, out_features, generator=generator) * (1 << widths)[:, None]).to(torch.uint8)
        self.weight = mbwq.pack_blocks(codes.T, blocks)
        if len(blocks) == 1 and K % 32:
            self.weight[-1] |= -(1 << 31)  # padding must not count
        count = groups or sum(mbwq.block_group_counts(blocks))
        self.x = torch.randn(rows, K, generator=generator).to(dtype)
        self.scales = torch.randn(count, out_features, generator=generator).to(scale_dtype)
        zeros = torch.randn(count, out_features, generator=generator).to(scale_dtype)
        self.zeros = None if symmetric else zeros
        self.bias = torch.randn(out_features, generator=generator).to(scale_dtype) if bias else None
        self.g_idx = torch.randint(0, count, (K,), generator=generator, dtype=torch.int32)
        self.q_perm = torch.randperm(K, generator=generator).to(torch.int32) if order else None
        middle = torch.tensor([mpq.zero_point(int(bits)) for bits in widths], dtype=torch.float64)[:, None]

        def matrix(group):
            s = self.scales.double()[group]
            z = s * middle if self.zeros is None else self.zeros.double()[group]
            return s * codes.double() - z, s.abs() * (1 << widths)[:, None] + z.abs()

        self.by_index, self.index_size = matrix(self.g_idx.long())
        packed, size = matrix(mbwq.groups_of_rows(blocks))
        if self.q_perm is None:
            self.in_blocks, self.block_size = packed, size
        else:
            self.in_blocks, self.block_size = torch.empty_like(packed), torch.empty_like(size)
            self.in_blocks[self.q_perm.long()], self.block_size[self.q_perm.long()] = packed, size

    def g_idx_args(self):
        return self.x, self.weight, self.scales, self.zeros, self.bias, self.g_idx, self.bits

    def block_args(self):
        return self.x, self.weight, self.scales, self.zeros, self.bias, self.q_perm, self.flat

    def check(self, y, W, size, allowed=5e-6):
        exact, bound = self.x.double() @ W, self.x.double().abs() @ size
        if self.bias is not None:
            exact, bound = exact + self.bias.double(), bound + self.bias.double().abs()
        assert y.dtype == self.x.dtype
        assert y.shape == exact.shape
        eps = 0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
        allowed = 1e-14 if y.dtype == torch.float64 else allowed
        limit = allowed * bound + 0.51 * eps * exact.abs() + torch.finfo(y.dtype).smallest_normal
        assert ((y.double() - exact).abs() <= limit).all()


@settings(max_examples=100, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 7, 17, 65]),
    in_features=st.integers(1, 200),
    out_features=st.one_of(st.integers(1, 80), st.just(1030)),
    bits=st.integers(1, 8),
    groups=st.integers(1, 7),
    symmetric=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES[:3]),
    seed=st.integers(0, 1000),
)
@example(1, 577, 65, 3, 20, False, True, torch.float32, torch.float16, 0)
@pytest.mark.parametrize("isa", cpu.isas())
def test_compiled_against_float64(
    isa, rows, in_features, out_features, bits, groups, symmetric, bias, dtype, scale_dtype, seed
):
    before = cpu.isa()
    cpu.select_isa(isa)
    try:
        layer = Layer(
            [(bits, in_features, -1)], rows, out_features, symmetric, bias, False, dtype, scale_dtype, seed, groups
        )
        layer.check(ops.mpq_linear_g_idx(*layer.g_idx_args()), layer.by_index, layer.index_size)
    finally:
        cpu.select_isa(before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_groups_in_any_order(g_idx_linear, bits, symmetric):
    for rows, K, N, groups in ((1, 70, 21, 3), (5, 33, 1, 40), (40, 100, 130, 7), (0, 40, 3, 2), (2, 64, 0, 2)):
        for dtype in DTYPES:
            layer = Layer([(bits, K, -1)], rows, N, symmetric, dtype=dtype, groups=groups)
            layer.check(g_idx_linear(*layer.g_idx_args()), layer.by_index, layer.index_size)


def test_indices_of_either_kind_and_strides(g_idx_linear):
    layer = Layer([(3, 70, -1)], groups=4)
    x, weight, scales, zeros, bias, g_idx, bits = layer.g_idx_args()
    expected = g_idx_linear(x, weight, scales, zeros, bias, g_idx, bits)
    wide = g_idx.long().repeat_interleave(2)[::2]
    far = torch.full((2 * 4, 3 * 21), float("nan"), dtype=torch.float16)[::2, ::3].copy_(scales)
    assert torch.equal(g_idx_linear(x, weight.T.contiguous().T, far, zeros, bias, wide, bits), expected)
    assert torch.equal(g_idx_linear(x.T.contiguous().T, weight, scales, zeros, bias, g_idx, bits), expected)
    torch.testing.assert_close(g_idx_linear(x[0], weight, scales, zeros, bias, g_idx, bits), expected[0])


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_an_index_of_no_group_is_refused(g_idx_linear, bad):
    layer = Layer([(3, 70, -1)], groups=4)
    layer.g_idx[33] = bad
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|g_idx"):
        g_idx_linear(*layer.g_idx_args())


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_row_blocks(blocks, symmetric, order):
    for rows in (0, 1, 5, 40):
        for dtype in DTYPES:
            for bias in (True, False):
                layer = Layer(blocks, rows, 21, symmetric, bias, order, dtype)
                layer.check(ops.mbwq_linear(*layer.block_args()), layer.in_blocks, layer.block_size)
    layer = Layer(blocks, 6, 21, symmetric, True, order)
    cube = layer.x.view(3, 2, -1)
    assert torch.equal(ops.mbwq_linear(cube, *layer.block_args()[1:]).view(6, -1), ops.mbwq_linear(*layer.block_args()))


@pytest.mark.skipif(cpu.isa() is None, reason="no compiled CPU kernels")
@pytest.mark.parametrize("rows", [1, 40])
def test_threads_do_not_change_a_bit(rows):
    layer = Layer([(3, 512, -1)], rows, 1100, groups=9)
    results = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append(ops.mpq_linear_g_idx(*layer.g_idx_args()))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# --- gradients and tracing ----------------------------------------------------------------------------------


def twins(layer, blocks):
    """(operator's result, dense float64 matrix as a function of scales and zeros)."""
    if blocks:
        arguments = layer.weight, layer.scales, layer.zeros, layer.blocks, layer.q_perm, torch.float64
        return ops.mbwq_linear(*layer.block_args()), mbwq.dequantize(*arguments)
    arguments = layer.weight, layer.scales, layer.zeros, layer.x.shape[-1], layer.bits, -1
    group = layer.g_idx
    q = mpq.dequantize(layer.weight, torch.ones(1, 21), torch.zeros(1, 21), layer.x.shape[-1], layer.bits, -1).T
    scales = layer.scales.index_select(0, group)
    z = scales * mpq.zero_point(layer.bits) if layer.zeros is None else layer.zeros.index_select(0, group)
    return ops.mpq_linear_g_idx(*layer.g_idx_args()), (scales * q.double() - z).T


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients(symmetric, blocks):
    for kind in ([(4, 70, -1)], BLOCKS[2]):
        if not blocks and len(kind) > 1:
            continue
        groups = None if blocks else 5
        layer = Layer(kind, 6, 21, symmetric, True, blocks, torch.float64, torch.float64, groups=groups)
        names = [n for n in ("x", "scales", "zeros", "bias") if getattr(layer, n) is not None]
        inputs = [getattr(layer, n).requires_grad_() for n in names]
        y, W = twins(layer, blocks)
        direction = torch.randn_like(y)
        grads = torch.autograd.grad((y * direction).sum(), inputs, retain_graph=True)
        wanted = torch.autograd.grad(((layer.x @ W.T + layer.bias) * direction).sum(), inputs)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want)
        for i in range(len(inputs)):  # each alone
            (grad,) = torch.autograd.grad(y, inputs[i], direction, retain_graph=True)
            torch.testing.assert_close(grad, wanted[i])
        (grad,) = torch.autograd.grad(y.square().sum(), inputs[:1], create_graph=True)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            grad.sum().backward()


def test_gradient_of_x_alone_keeps_no_activations():
    layer = Layer(BLOCKS[0])
    layer.x.requires_grad_()
    y = ops.mbwq_linear(*layer.block_args())
    assert not any(t is not None and t.shape == layer.x.shape for t in y.grad_fn.saved_tensors)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, symmetric):
    layer = Layer(BLOCKS[2], 3, 21, symmetric, True, True, dtype)
    single = Layer([(3, 70, -1)], 3, 21, symmetric, True, True, dtype, groups=4)
    grad, needs = torch.randn(3, 21).to(dtype), [True, True, not symmetric]
    operators = torch.ops.hf_onebit
    args = layer.block_args()
    back = operators.mbwq_linear_backward.default
    assert set(opcheck(back, (grad, *args[:4], *args[5:], needs)).values()) == {"SUCCESS"}
    args = single.g_idx_args()
    back = operators.mpq_linear_g_idx_backward.default
    assert set(opcheck(back, (grad, *args[:4], *args[5:], needs)).values()) == {"SUCCESS"}
    for each in (layer, single):
        for name in ("x", "scales", "zeros", "bias"):
            if getattr(each, name) is not None:
                getattr(each, name).requires_grad_()
    result = opcheck(operators.mbwq_linear.default, layer.block_args(), atol=1e-2, rtol=1e-2)
    assert set(result.values()) == {"SUCCESS"}
    result = opcheck(operators.mpq_linear_g_idx.default, single.g_idx_args(), atol=1e-2, rtol=1e-2)
    assert set(result.values()) == {"SUCCESS"}


def test_compiles_whole_with_dynamic_batch():
    layer = Layer(BLOCKS[2], out_features=296, bias=False)
    single = Layer([(4, 296, -1)], out_features=9, groups=4)

    def model(x):
        y = torch.ops.hf_onebit.mbwq_linear.default(x, *layer.block_args()[1:])
        return torch.ops.hf_onebit.mpq_linear_g_idx.default(torch.relu(y), *single.g_idx_args()[1:]) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 3, 5):
        x = torch.randn(count, 296)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 69)}, "x must have shape"),
        ({"x": torch.ones(3, 70, dtype=torch.int32)}, "x must be"),
        ({"weight": torch.zeros(11, 21, dtype=torch.int32)}, r"weight must have shape \(12, out\)"),
        ({"weight": torch.zeros(12, 21)}, "packed int32 words"),
        ({"scales": torch.ones(2, 21)}, r"scales must have shape \(3, 21\)"),
        ({"zeros": torch.ones(3, 20)}, r"zeros must have shape \(3, 21\)"),
        ({"q_perm": torch.arange(69)}, r"q_perm must have shape \(70,\)"),
        ({"q_perm": torch.ones(70)}, "q_perm must be torch.int32 or torch.int64"),
        ({"flat": [4, 70]}, "blocks must hold bits, rows and group size"),
        ({"flat": [9, 70, 32]}, "bits must be between 1 and 8"),
        ({"flat": [4, 70, 31]}, "multiples of 32 or -1"),
        ({"bias": torch.ones(20)}, "bias"),
    ],
)
def test_wrong_arguments_of_row_blocks(change, message):
    layer = Layer(BLOCKS[0])
    for name, value in change.items():
        setattr(layer, name, value)
    for device in ("cpu", "meta"):
        arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in layer.block_args()]
        with pytest.raises(RuntimeError, match=message):
            ops.mbwq_linear(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 97)}, "weight"),
        ({"scales": torch.ones(4, 20)}, "scales must"),
        ({"zeros": torch.ones(3, 21)}, "zeros must"),
        ({"g_idx": torch.zeros(69, dtype=torch.int32)}, "g_idx must have shape"),
        ({"g_idx": torch.zeros(70)}, "g_idx must be torch.int32 or torch.int64"),
        ({"bits": 0}, "bits must be between 1 and 8"),
    ],
)
def test_wrong_arguments_of_g_idx(change, message):
    layer = Layer([(3, 70, -1)], groups=4)
    for name, value in change.items():
        setattr(layer, name, value)
    for device in ("cpu", "meta"):
        arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in layer.g_idx_args()]
        with pytest.raises(RuntimeError, match=message):
            ops.mpq_linear_g_idx(*arguments)

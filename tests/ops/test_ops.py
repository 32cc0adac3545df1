"""torch.ops.hf_onebit.*: values, gradients, tracing and refusals, against dense float64 arithmetic."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from hf_onebit import ops
from hf_onebit.formats.onebit import dequantize, pack_signs
from hf_onebit.formats.packing import pack, unpack
from hf_onebit.ops import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROOT = Path(ops.__file__).parents[2]
NAMES = ("x", "weight", "a", "b", "bias", "weight_1", "a_1", "b_1")
TINY = {"in_features": 33, "out_features": 5, "batch": (3,)}


class Case:
    """Arguments of onebit_linear, and the same layer as a dense float64 computation."""

    def __init__(self, in_features=33, out_features=5, batch=(3,), planes=1, bias=False, dtype=torch.float32,
                 scale_dtype=None, requires_grad=(), seed=0):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        scale_dtype = scale_dtype or dtype
        self.signs = [randn(out_features, in_features) >= 0 for _ in range(planes)]
        self.args: dict[str, Tensor] = {"x": randn(*batch, in_features).to(dtype)}
        for signs, suffix in zip(self.signs, ("", "_1"), strict=False):
            self.args[f"weight{suffix}"] = pack_signs(signs)
            self.args[f"a{suffix}"] = randn(out_features).to(scale_dtype)
            self.args[f"b{suffix}"] = randn(in_features).to(scale_dtype)
        if bias:
            self.args["bias"] = randn(out_features).to(scale_dtype)
        for name in requires_grad:
            self.args[name].requires_grad_()

    def tuple(self) -> tuple[Tensor | None, ...]:
        return tuple(self.args.get(name) for name in NAMES)

    def run(self, **changes: Tensor) -> Tensor:
        return ops.onebit_linear(**{**self.args, **changes})

    def dense(self, floats: dict[str, Tensor]) -> Tensor:
        y = torch.zeros((), dtype=torch.float64)
        for signs, suffix in zip(self.signs, ("", "_1"), strict=False):
            a, b = floats[f"a{suffix}"], floats[f"b{suffix}"]
            W = a[:, None] * torch.where(signs, 1.0, -1.0).double() * b[None, :]
            y = y + floats["x"] @ W.T
        return y + floats["bias"] if "bias" in floats else y

    def float64_args(self) -> dict[str, Tensor]:
        floats = {n: t.detach().double() for n, t in self.args.items() if t.is_floating_point()}
        return {n: t.requires_grad_(self.args[n].requires_grad) for n, t in floats.items()}

    def expected(self) -> Tensor:
        return self.dense(self.float64_args()).detach()


def assert_rounded(actual: Tensor, exact: Tensor, inputs: torch.dtype | None = None) -> None:
    """`actual` is `exact` (float64) up to one rounding to its dtype and the error of a float32 sum, or of the
    16-bit codes that float16 and bfloat16 `inputs` may become (those of `actual`, if None).

    A sum kept in float16 or bfloat16 is off by many roundings; the sizes below make it fail here.
    """
    assert actual.shape == exact.shape
    eps = torch.finfo(actual.dtype).eps
    accumulation = {torch.float64: 1e-14, torch.float32: 3e-6}.get(inputs or actual.dtype, 5e-5)
    scale = exact.abs().max().item() if exact.numel() else 1.0
    error = (actual.double() - exact).abs()
    assert (error <= 0.51 * eps * exact.abs() + accumulation * scale).all(), error.max()


@pytest.fixture
def poisoned():
    """Fill what torch.empty returns with NaN, so that a kernel that leaves an element unwritten shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


# --- forward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("in_features", "out_features", "batch"),
    [
        (1, 1, (1,)), (31, 2, ()), (32, 1, (2,)), (33, 7, (2, 3)), (100, 63, (5,)), (1000, 64, (4,)),
        (64, 3, (0,)), (64, 3, (2, 0, 4)), (0, 3, (2,)), (40, 0, (2,)),
    ],
)  # fmt: skip
def test_forward(in_features, out_features, batch, dtype, planes, poisoned):
    for bias in (False, True):
        case = Case(in_features, out_features, batch, planes, bias, dtype)
        y = case.run()
        assert y.dtype == dtype
        assert y.shape == (*batch, out_features)
        assert y.is_contiguous()
        assert_rounded(y, case.expected())


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_of_any_float_dtype(dtype, scale_dtype):
    case = Case(70, 9, (4,), 2, True, dtype, scale_dtype)
    y = case.run()
    assert y.dtype == dtype
    assert_rounded(y, case.expected())


def test_half_precision_sums_do_not_overflow_on_the_way():
    x = torch.full((1, 2048), 60.0, dtype=torch.float16)
    x[0, 1024:] = -60.0
    b = torch.full((2048,), 60.0, dtype=torch.float16)
    weight = pack_signs(torch.ones(1, 2048, dtype=torch.bool))
    y = ops.onebit_linear(x, weight, torch.ones(1, dtype=torch.float16), b, torch.ones(1))
    assert y.item() == 1.0  # partial sums reach 3.7e6, beyond float16


def strided(tensor: Tensor) -> Tensor:
    """The same values as every second entry of a larger tensor full of NaN (full of ones if it is packed)."""
    filler = float("nan") if tensor.is_floating_point() else -1
    wide = tensor.new_full([2 * n + 1 for n in tensor.shape], filler)
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype, planes, poisoned):
    case = Case(75, 9, (2, 3), planes, True, dtype, requires_grad=("x", "a", "b"))
    expected = case.run()
    wanted = torch.autograd.grad(expected.sum(), [case.args[n] for n in ("x", "a", "b")])
    args = {n: strided(t.detach()).requires_grad_(t.requires_grad) for n, t in case.args.items()}
    assert not any(t.is_contiguous() for t in args.values())
    y = ops.onebit_linear(**args)
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.sum(), [args[n] for n in ("x", "a", "b")])
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)
    x = args["x"].detach().transpose(0, 1)
    torch.testing.assert_close(ops.onebit_linear(**{**args, "x": x}), expected.transpose(0, 1))
    row = case.args["x"].detach()[0, 0].expand(4, 75)
    torch.testing.assert_close(ops.onebit_linear(**{**args, "x": row}), expected[0, 0].expand(4, 9))


@pytest.mark.parametrize("planes", [1, 2])
def test_padding_bits_do_not_matter(planes):
    case = Case(33, 6, (2,), planes, requires_grad=("x", "a", "b"))
    floats = [case.args[n] for n in ("x", "a", "b")]
    y = case.run()
    grads = torch.autograd.grad(y.square().sum(), floats)
    dirty = {n: t | torch.tensor([[0], [-2]], dtype=torch.int32) for n, t in case.args.items() if "weight" in n}
    assert all((dirty[n] != case.args[n]).any() for n in dirty)
    y_dirty = case.run(**dirty)
    assert torch.equal(y_dirty, y)
    for grad, want in zip(torch.autograd.grad(y_dirty.square().sum(), floats), grads, strict=True):
        assert torch.equal(grad, want)


def test_nothing_is_written_to_the_inputs():
    case = Case(40, 6, (2,), 2, True, requires_grad=("x", "a", "b", "a_1", "b_1", "bias"))
    before = {n: t.detach().clone() for n, t in case.args.items()}
    case.run().sum().backward()
    for name, tensor in case.args.items():
        assert torch.equal(tensor.detach(), before[name]), name


def test_agrees_with_the_dequantized_matrix():
    case = Case(100, 20, (7,), 2, dtype=torch.float64)
    _, weight, a, b, _, weight_1, a_1, b_1 = case.tuple()
    W = dequantize([(weight, a, b), (weight_1, a_1, b_1)], 100, torch.float64)
    torch.testing.assert_close(case.run(), case.args["x"] @ W.T)


# --- backward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("in_features", "out_features", "batch"),
    [(1, 1, (1,)), (33, 7, ()), (40, 5, (2, 3)), (500, 64, (6,)), (64, 3, (0,)), (0, 3, (2,)), (40, 0, (2,))],
)
def test_backward(in_features, out_features, batch, dtype, planes, poisoned):
    trained = [n for n in NAMES if "weight" not in n and (planes == 2 or "_1" not in n)]
    case = Case(in_features, out_features, batch, planes, True, dtype, requires_grad=trained)
    y = case.run()
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    grads = torch.autograd.grad(y, [case.args[n] for n in trained], upstream)
    floats = case.float64_args()
    exact = torch.autograd.grad(case.dense(floats), [floats[n] for n in trained], upstream.double())
    for name, grad, want in zip(trained, grads, exact, strict=True):
        assert grad.dtype == case.args[name].dtype, name
        assert_rounded(grad, want)


def test_gradients_come_in_the_dtype_of_their_inputs():
    """Float32 scales get float32 gradients, not gradients rounded to x's dtype on the way."""
    trained = ("x", "a", "b", "a_1", "b_1", "bias")
    case = Case(100, 9, (50,), 2, True, torch.bfloat16, torch.float32, requires_grad=trained)
    y = case.run()
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    y.backward(upstream)
    floats = case.float64_args()
    case.dense(floats).backward(upstream.double())
    for name in trained:
        grad = case.args[name].grad
        assert grad.dtype == (torch.bfloat16 if name == "x" else torch.float32)
        assert_rounded(grad, floats[name].grad, torch.bfloat16)
    assert all(case.args[n].grad is None for n in ("weight", "weight_1"))

    results = torch.ops.hf_onebit.onebit_linear_backward(*backward_args(case, (True,) * 5))
    assert [t.dtype for t in results] == [torch.bfloat16] + [torch.float32] * 4


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_every_combination_of_trained_arguments(planes, bias):
    trainable = [n for n in Case(**TINY, planes=planes, bias=bias).args if "weight" not in n]
    full = Case(**TINY, planes=planes, bias=bias, dtype=torch.float64, requires_grad=trainable)
    wanted = dict(
        zip(
            trainable,
            torch.autograd.grad(full.run().square().sum(), [full.args[n] for n in trainable]),
            strict=True,
        )
    )
    for flags in itertools.product((False, True), repeat=len(trainable)):
        trained = [n for n, flag in zip(trainable, flags, strict=True) if flag]
        case = Case(**TINY, planes=planes, bias=bias, dtype=torch.float64, requires_grad=trained)
        y = case.run()
        assert y.requires_grad == bool(trained)
        if trained:
            y.square().sum().backward()
        for name in trainable:
            grad = case.args[name].grad
            if name in trained:
                torch.testing.assert_close(grad, wanted[name])
            else:
                assert grad is None


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(planes, bias):
    case = Case(33, 3, (2,), planes, bias, torch.float64)
    trained = [n for n in case.args if "weight" not in n]
    inputs = [case.args[n].requires_grad_() for n in trained]
    assert torch.autograd.gradcheck(lambda *t: case.run(**dict(zip(trained, t, strict=True))), inputs)


def test_frozen_scales_do_not_keep_activations_alive():
    """Adapters train with frozen scales: backward needs no x, so none is saved."""

    def saved_x(requires_grad: tuple[str, ...]) -> bool:
        case = Case(64, 5, (3,), requires_grad=requires_grad)
        saved: list[int] = []

        def record(tensor: Tensor) -> Tensor:
            saved.append(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            y = case.run()
        y.sum().backward()
        return case.args["x"].data_ptr() in saved

    assert not saved_x(("x",))
    assert saved_x(("x", "b"))
    assert saved_x(("a",))


def test_second_derivatives_are_refused():
    case = Case(**TINY, requires_grad=("x", "a"))
    (grad,) = torch.autograd.grad(case.run().square().sum(), [case.args["x"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()


def backward_args(case: Case, needs: tuple[bool, ...]) -> tuple:
    x, weight, a, b, _, weight_1, a_1, b_1 = case.tuple()
    grad = torch.ones(*x.shape[:-1], a.shape[0], dtype=x.dtype)
    return grad, x, weight, a, b, weight_1, a_1, b_1, list(needs)


def test_backward_op_returns_empty_tensors_where_nothing_is_needed():
    case = Case(**TINY, planes=2)
    everything = torch.ops.hf_onebit.onebit_linear_backward(*backward_args(case, (True,) * 5))
    assert [t.shape for t in everything] == [(3, 33), (5,), (33,), (5,), (33,)]
    for needs in itertools.product((False, True), repeat=5):
        some = torch.ops.hf_onebit.onebit_linear_backward(*backward_args(case, needs))
        for need, tensor, full in zip(needs, some, everything, strict=True):
            assert torch.equal(tensor, full) if need else tensor.numel() == 0


# --- pack and unpack ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_and_unpack_are_the_format(bits):
    codes = torch.randint(0, 1 << bits, (2, 5, 45), dtype=torch.uint8)
    words = ops.pack(codes, bits)
    assert torch.equal(words, pack(codes, bits))
    assert torch.equal(ops.unpack(words, bits, 45), unpack(words, bits, 45))
    assert torch.equal(ops.unpack(words, bits, 45), codes)


def test_pack_looks_at_values():
    with pytest.raises(ValueError, match=r"must lie in 0\.\.3, got values from 0 to 4"):
        ops.pack(torch.tensor([[0, 4]]), 2)


# --- tracing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_onebit_linear(dtype, planes, bias):
    trained = ("x", "a", "b", *(("a_1", "b_1") if planes == 2 else ()), *(("bias",) if bias else ()))
    for requires_grad in (trained, ()):
        case = Case(**TINY, planes=planes, bias=bias, dtype=dtype, requires_grad=requires_grad)
        result = opcheck(torch.ops.hf_onebit.onebit_linear.default, case.tuple(), atol=1e-2, rtol=1e-2)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_onebit_linear_backward(dtype, planes):
    case = Case(**TINY, planes=planes, dtype=dtype, scale_dtype=torch.float16)
    second = planes == 2
    for needs in (
        (True, True, True, second, second),
        (True,) + (False,) * 4,
        (False, False, True, False, second),
    ):
        result = opcheck(torch.ops.hf_onebit.onebit_linear_backward.default, backward_args(case, needs))
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_opcheck_pack(dtype):
    bits = 1 if dtype == torch.bool else 3
    codes = torch.randint(0, 1 << bits, (2, 5, 45)).to(dtype)
    assert set(opcheck(torch.ops.hf_onebit.pack.default, (codes, bits)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_opcheck_unpack(bits):
    words = pack(torch.randint(0, 1 << bits, (2, 5, 45)), bits)
    assert set(opcheck(torch.ops.hf_onebit.unpack.default, (words, bits, 45)).values()) == {"SUCCESS"}


def test_meta_tensors():
    case = Case(**TINY, planes=2, bias=True)
    y = ops.onebit_linear(*(None if t is None else t.to("meta") for t in case.tuple()))
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.float32, (3, 5))
    words = ops.pack(torch.empty(2, 7, 50, dtype=torch.uint8, device="meta"), 3)
    assert (words.device.type, words.shape) == ("meta", (2, 6, 7))
    assert ops.unpack(words, 3, 50).shape == (2, 7, 50)


def inductor_works() -> bool:
    try:
        return torch.compile(lambda t: t + 1, backend="inductor")(torch.zeros(2)).tolist() == [1.0, 1.0]
    except Exception:  # no C++ compiler on this machine
        torch._dynamo.reset()
        return False


@pytest.fixture
def compiler():
    # No caches on disk: their keys know the operators by name only, and an older formula would be tested.
    with torch.compiler.config.patch(force_disable_caches=True):
        yield "inductor" if inductor_works() else "aot_eager"
    torch._dynamo.reset()


def test_compiles_whole_with_dynamic_batch(compiler):
    case = Case(70, 9, (4,), 2, True, requires_grad=("x", "a", "b", "a_1", "b_1", "bias"))
    trained = [n for n in case.args if "weight" not in n and n != "x"]
    graphs = torch._dynamo.testing.CompileCounterWithBackend(compiler)

    def layer(x: Tensor) -> Tensor:
        return torch.relu(case.run(x=x)) + 1.0

    compiled = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    for batch in ((4,), (7,), (3,)):
        x = Case(70, 9, batch, seed=5).args["x"].requires_grad_()
        inputs = [x, *(case.args[n] for n in trained)]
        expected, y = layer(x), compiled(x)
        torch.testing.assert_close(y, expected)
        wanted = torch.autograd.grad(expected.square().sum(), inputs)
        for grad, want in zip(torch.autograd.grad(y.square().sum(), inputs), wanted, strict=True):
            torch.testing.assert_close(grad, want)
    assert graphs.frame_count == 1  # one graph for all batch sizes


def test_compiles_without_gradients():
    case = Case(40, 6, (2,), dtype=torch.bfloat16)

    @torch.no_grad()
    def layer(x: Tensor) -> Tensor:
        return case.run(x=x).relu()

    torch.testing.assert_close(
        torch.compile(layer, fullgraph=True, backend="aot_eager")(case.args["x"]), layer(case.args["x"])
    )


# --- refusals -----------------------------------------------------------------------------------------------

int32 = torch.int32
REFUSED = [
    (
        {"x": torch.ones(3, 33, dtype=int32)},
        r"x must be floating point, got torch\.int32.*modules_to_not_convert",
    ),
    ({"x": torch.ones(3, 33, dtype=torch.complex64)}, r"x must be floating point, got torch\.complex64"),
    ({"x": torch.ones(3, 33).to(torch.float8_e4m3fn)}, r"float32 or float64, got torch\.float8_e4m3fn"),
    ({"x": torch.ones(3, 32)}, "x has 32 features in its last dimension, the layer expects 33"),
    ({"x": torch.ones(())}, "got a scalar"),
    ({"weight": torch.ones(2, 5)}, r"weight must be packed signs in torch\.int32, got torch\.float32; pack"),
    ({"weight": torch.ones(2, 5, dtype=torch.int64)}, r"torch\.int32, got torch\.int64"),
    (
        {"weight": torch.ones(1, 2, 5, dtype=int32)},
        r"must have shape \(ceil\(in / 32\), out\), got \(1, 2, 5\)",
    ),
    ({"weight": torch.ones(1, 5, dtype=int32)}, r"weight has 1 word rows, expected 2 = ceil\(33 / 32\)"),
    (
        {"weight": torch.ones(2, 4, dtype=int32)},
        "a has 5 entries, expected 4, one scale per column of weight",
    ),
    ({"a": torch.ones(1)}, "a has 1 entries, expected 5"),
    ({"a": torch.ones(1, 5)}, r"a must have shape \(5,\), one scale per column of weight, got \(1, 5\)"),
    ({"a": torch.ones(5, dtype=int32)}, r"a must be floating point, got torch\.int32"),
    (
        {"a": torch.ones(5).to(torch.float8_e4m3fn)},
        r"a must be .*float32 or float64, got torch\.float8_e4m3fn; cast",
    ),
    ({"bias": torch.ones(5).to(torch.float8_e5m2)}, r"bias must be .*float32 or float64, got torch\.float8_e5m2; cast"),
    ({"b": torch.ones(1, 33)}, r"b must have shape \(in,\), got \(1, 33\)"),
    ({"b": torch.ones(65)}, "weight has 2 word rows, expected 3"),
    ({"b": torch.ones(34)}, "x has 33 features in its last dimension, the layer expects 34"),
    ({"b": torch.ones(33, dtype=torch.bool)}, r"b must be floating point, got torch\.bool"),
    ({"bias": torch.ones(1)}, "bias has 1 entries, expected 5, one entry per output"),
    ({"bias": torch.ones(5, dtype=int32)}, r"bias must be floating point, got torch\.int32"),
    ({"weight_1": None}, "weight_1, a_1 and b_1 together, got no weight_1"),
    ({"a_1": None, "b_1": None}, "together, got no a_1, b_1"),
    ({"weight_1": torch.ones(2, 5)}, r"weight_1 must be packed signs in torch\.int32"),
    (
        {"weight_1": torch.ones(2, 4, dtype=int32), "a_1": torch.ones(4)},
        "a_1 has 4 entries, expected 5, as a",
    ),
    ({"b_1": torch.ones(34)}, "b_1 has 34 entries, expected 33, as b"),
    (
        {"b_1": torch.ones(1)},
        r"weight_1 has 2 word rows, expected 1 = ceil\(1 / 32\) for the 1 entries of b_1",
    ),
    ({"weight": torch.ones(2, 5, dtype=int32, device="meta")}, "weight is on meta, x on cpu"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refusals_say_what_was_got_and_expected(changes, message):
    case = Case(**TINY, planes=2, bias=True)
    with pytest.raises(RuntimeError, match=message) as caught:
        case.run(**changes)
    assert "onebit_linear: " in str(caught.value)
    with pytest.raises(RuntimeError, match=message):  # whichever kernel answered above
        reference.onebit_linear(**{**case.args, **changes})


def on_meta(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to("meta")


@pytest.mark.parametrize(("changes", "message"), REFUSED[:-1])
def test_fakes_refuse_the_same(changes, message):
    args = {**Case(**TINY, planes=2, bias=True).args, **changes}
    with pytest.raises(RuntimeError, match=message):
        ops.onebit_linear(**{name: on_meta(tensor) for name, tensor in args.items()})


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(3, 4), r"grad must have shape \(3, 5\), got \(3, 4\)"),
        (0, torch.ones(5), r"grad must have shape \(3, 5\), got \(5,\)"),
        (0, torch.ones(3, 5).double(), r"grad must have x's dtype torch\.float32, got torch\.float64"),
        (0, torch.ones(3, 5, device="meta"), "grad is on meta, x on cpu"),
        (2, torch.ones(1, 5, dtype=int32), "weight has 1 word rows, expected 2"),
        (8, [True, True, True, True, False], "no second plane"),
        (8, [True, True], "5"),
    ],
)
def test_backward_refuses_what_no_forward_made(position, value, message):
    args = list(backward_args(Case(**TINY), (True, True, True, False, False)))
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hf_onebit.onebit_linear_backward(*args)


words = torch.zeros(2, 3, dtype=int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.pack(torch.zeros(2, 32), 1),
            r"pack: codes must be bool or integers, got torch\.float32",
        ),
        (
            lambda: ops.pack(torch.zeros(32, dtype=torch.uint8), 1),
            r"pack: codes must have shape .*, got \(32,\)",
        ),
        (
            lambda: ops.pack(torch.zeros(2, 32, dtype=torch.uint8), 9),
            "pack: bits must be between 1 and 8, got 9",
        ),
        (lambda: ops.unpack(words, 0, 64), "unpack: bits must be between 1 and 8, got 0"),
        (lambda: ops.unpack(words.long(), 1, 64), r"unpack: words must be torch\.int32, got torch\.int64"),
        (lambda: ops.unpack(words, 1, 65), "unpack: 65 inputs of 1 bits take 3 word rows, got 2"),
        (lambda: ops.unpack(words, 1, -1), "unpack: in_features must not be negative, got -1"),
        (lambda: ops.unpack(words[0], 1, 64), r"unpack: words must have shape .*, got \(3,\)"),
        (lambda: ops.unpack(words, 1, 2**40), r"take 34359738368 word rows"),
    ],
)
def test_pack_and_unpack_refuse_wrong_arguments(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


# --- dispatch -----------------------------------------------------------------------------------------------


def test_backends():
    assert list(ops.backends()) == ["cpu", "gpu", "reference"]
    assert all("in use" in status for status in ops.backends().values())
    ops.backends().clear()
    assert "reference" in ops.backends()


def run_python(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    return done.stdout.strip()


def test_importing_is_light():
    """Torch only: no transformers, no triton, no compiler, no accelerator."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import hf_onebit.ops.schema, hf_onebit.ops.reference, hf_onebit.formats.onebit\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(sorted(new & {'triton', 'transformers', 'peft', 'numpy', 'safetensors'}))"
    )
    # An empty stand-in for the package: its own __init__ registers with Transformers, not measured here.
    stand_in = (
        "import sys, types; package = types.ModuleType('hf_onebit')\n"
        f"package.__path__ = [{str(ROOT / 'hf_onebit')!r}]; sys.modules['hf_onebit'] = package\n"
    )
    assert run_python(stand_in + code) == "[]"


def test_a_kernel_for_one_device_takes_over_there_alone():
    """What a compiled backend will do: claim the CPU key, leaving schema, fake and autograd as they are."""
    code = (
        "import torch; from hf_onebit import ops\n"
        "from hf_onebit.formats.onebit import pack_signs\n"
        "calls = []\n"
        "lib = torch.library.Library('hf_onebit', 'IMPL')\n"
        "def kernel(x, weight, a, b, bias=None, weight_1=None, a_1=None, b_1=None):\n"
        "    calls.append('cpu'); return x.new_full((*x.shape[:-1], a.shape[0]), 7.0)\n"
        "lib.impl('onebit_linear', kernel, 'CPU')\n"
        "w = pack_signs(torch.ones(3, 32, dtype=torch.bool)); a = torch.ones(3); b = torch.ones(32)\n"
        "x = torch.ones(2, 32, requires_grad=True)\n"
        "y = ops.onebit_linear(x, w, a, b); y.sum().backward()\n"
        "assert calls == ['cpu'] and y.eq(7).all() and x.grad.eq(3).all()\n"
        "assert ops.onebit_linear(x.to('meta'), *(t.to('meta') for t in (w, a, b))).shape == (2, 3)\n"
        "assert calls == ['cpu']; print('ok')"
    )
    assert run_python(code) == "ok"

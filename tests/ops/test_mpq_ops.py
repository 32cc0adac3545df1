"""mpq_linear and mpq_embedding: the reference and every compiled instruction set against float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpq_layers import Layer, spread
from torch import Tensor
from torch.library import opcheck

from hf_onebit import ops
from hf_onebit.formats import mpq
from hf_onebit.ops import cpu, reference_mpq

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BATCHES = (0, 1, 2, 15, 16, 17, 129)
GROUPS = (32, 64, 96, 128, -1)
# The plain-torch kernels are called as functions: with compiled ones at hand the dispatcher never takes them.
IMPLEMENTATIONS = ("reference", *cpu.isas())


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """(mpq_linear, mpq_embedding) of each implementation."""
    if request.param == "reference":
        yield reference_mpq.mpq_linear, reference_mpq.mpq_embedding
        return
    before = cpu.isa()
    cpu.select_isa(request.param)
    yield ops.mpq_linear, ops.mpq_embedding
    cpu.select_isa(before)


@pytest.fixture
def poisoned():
    """torch.empty returns NaN, so that an output left unwritten shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


# Few rows are held to 1e-6; many rows, and the reference's own product, sum up to 64 products in float32.
MANY = 5e-6


@settings(max_examples=150, deadline=None)
@given(
    rows=st.sampled_from(BATCHES),
    in_features=st.one_of(st.integers(1, 200), st.sampled_from([256, 576, 1000])),
    out_features=st.one_of(st.integers(1, 80), st.sampled_from([1030, 2100])),
    bits=st.integers(1, 8),
    group_size=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES[:3]),
    scale_dtype=st.sampled_from(DTYPES[:3]),
    seed=st.integers(0, 1000),
)
@example(2, 1, 1, 8, -1, True, True, torch.float16, torch.float16, 0)
@example(129, 577, 65, 3, 32, False, True, torch.float32, torch.float32, 0)
@pytest.mark.parametrize("isa", cpu.isas())
def test_compiled_against_float64(
    isa, rows, in_features, out_features, bits, group_size, symmetric, bias, dtype, scale_dtype, seed
):
    before = cpu.isa()
    cpu.select_isa(isa)
    try:
        layer = Layer(rows, in_features, out_features, bits, group_size, symmetric, bias, dtype, scale_dtype, seed)
        layer.check(ops.mpq_linear, 1e-6 if rows <= 2 else MANY)
    finally:
        cpu.select_isa(before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_forward(implementation, bits, symmetric, poisoned):
    for group_size in GROUPS:
        for rows, in_features, out_features in (
            (1, 1, 1),
            (2, 100, 63),
            (17, 33, 7),
            (5, 0, 3),
            (3, 40, 0),
            (0, 64, 3),
        ):
            for dtype in DTYPES:
                layer = Layer(rows, in_features, out_features, bits, group_size, symmetric, True, dtype)
                layer.check(implementation[0], MANY)


@pytest.mark.parametrize("in_features", [576, 4096])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bound_where_every_rounding_has_one_sign(implementation, bits, in_features):
    for seed in range(3):
        for group_size in (64, -1):
            for symmetric in (True, False):
                layer = Layer(1, in_features, 40, bits, group_size, symmetric, seed=seed, constant=True)
                many = implementation[0] is reference_mpq.mpq_linear
                layer.check(implementation[0], 1e-4 if many else 1e-6)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(implementation, dtype, rows, poisoned):
    linear, embedding = implementation
    layer = Layer(rows, 70, 37, 3, 32, False, True, dtype)
    expected = layer.check(linear, MANY)
    x, weight, scales, zeros, bias, *about = layer.args()
    strided = [spread(t) for t in (x, weight, scales, zeros, bias)]
    assert torch.equal(linear(*strided, *about), expected)
    assert torch.equal(linear(x, weight.T.contiguous().T, scales.T.contiguous().T, zeros, bias, *about), expected)
    torch.testing.assert_close(linear(x[:1].expand(4, -1), *layer.args()[1:]), expected[:1].expand(4, -1))
    cube = torch.stack((x, x)).transpose(0, 1)
    wanted = torch.stack((expected, expected)).transpose(0, 1)
    torch.testing.assert_close(linear(cube, *layer.args()[1:]), wanted)
    torch.testing.assert_close(linear(x[0], *layer.args()[1:]), expected[0])
    ids = torch.tensor([[1, 36], [0, 1]])
    rows_of = embedding(ids, weight, scales, zeros, 3, 32, 70, dtype)
    assert torch.equal(embedding(ids.T.contiguous().T, *strided[1:4], 3, 32, 70, dtype), rows_of)


@pytest.mark.parametrize("bits", range(1, 9))
def test_neighbouring_rows_are_the_rows_one_by_one(implementation, bits):
    for symmetric, dim in ((True, 70), (False, 128)):
        layer = Layer(1, dim, 150, bits, 32, symmetric)
        about = layer.weight, layer.scales, layer.zeros, bits, 32, dim
        ids = torch.cat([torch.arange(3, 150), torch.tensor([7, 9]), torch.arange(20, 29), torch.arange(40, 47)])
        for dtype in DTYPES:
            rows = implementation[1](ids, *about, dtype)
            assert torch.equal(rows, reference_mpq.mpq_embedding(ids, *about, dtype))
            for i in (0, 63, 64, 146, 148, 155):
                assert torch.equal(rows[i], implementation[1](ids[i], *about, dtype))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_embedding_is_rows_of_the_matrix(implementation, bits, symmetric, poisoned):
    for group_size in GROUPS:
        for dim in (1, 32, 100, 577):
            layer = Layer(1, dim, 12, bits, group_size, symmetric)
            for dtype in DTYPES:
                for ids in (torch.tensor([0, 11, 3, 3]), torch.zeros(0, 2, dtype=torch.int64), torch.tensor(7)):
                    for kind in (torch.int32, torch.int64):
                        about = layer.weight, layer.scales, layer.zeros, bits, group_size, dim
                        y = implementation[1](ids.to(kind), *about, dtype)
                        W = mpq.dequantize(layer.weight, layer.scales, layer.zeros, dim, bits, group_size, dtype)
                        assert y.dtype == dtype
                        assert torch.equal(y, W[ids])


@pytest.mark.parametrize("bad", [-1, 12, 2**40])
def test_ids_out_of_range_are_refused(implementation, bad):
    layer = Layer(1, 40, 12)
    with pytest.raises((IndexError, RuntimeError), match=rf"index {bad} is out of range, ids must lie in 0\.\.11"):
        implementation[1](torch.tensor([0, bad]), layer.weight, layer.scales, layer.zeros, 4, 32, 40, torch.float32)


@pytest.mark.skipif(cpu.isa() is None, reason="no compiled CPU kernels")
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_threads_do_not_change_a_bit(rows):
    for bits in (2, 3, 8):
        layer = Layer(rows, 512, 2100, bits, 64)
        ids = torch.randint(0, 2100, (100,))
        results = []
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            y = ops.mpq_linear(*layer.args())
            rows_of = ops.mpq_embedding(ids, layer.weight, layer.scales, layer.zeros, bits, 64, 512, torch.bfloat16)
            results.append((y, rows_of))
        for y, rows_of in results[1:]:
            assert torch.equal(y, results[0][0])
            assert torch.equal(rows_of, results[0][1])


@pytest.mark.skipif(cpu.isa() is None, reason="no compiled CPU kernels")
def test_no_memory_beside_the_output():
    layer = Layer(4, 512, 256)
    ops.mpq_linear(*layer.args())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.mpq_linear(*layer.args())
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) == 4 * 256 * 4


def test_weights_changed_in_place_are_seen(implementation):
    layer = Layer(2, 64, 33, symmetric=True)
    before = layer.check(implementation[0], MANY)
    layer.scales.mul_(2)
    assert torch.equal(implementation[0](*layer.args()), 2 * before)


# --- gradients and tracing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_gradients(bits, group_size, symmetric):
    layer = Layer(6, 70, 21, bits, group_size, symmetric, True, torch.float64, torch.float64)
    names = [n for n in ("x", "scales", "zeros", "bias") if getattr(layer, n) is not None]
    inputs = [getattr(layer, n).requires_grad_() for n in names]
    weight = torch.randn(6, 21, dtype=torch.float64)
    grads = torch.autograd.grad((ops.mpq_linear(*layer.args()) * weight).sum(), inputs)
    W = mpq.dequantize(layer.weight, layer.scales, layer.zeros, 70, bits, group_size, torch.float64)
    wanted = torch.autograd.grad(((layer.x @ W.T + layer.bias) * weight).sum(), inputs)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)
    ids = torch.tensor([[1, 20, 1], [0, 3, 5]])
    about = layer.weight, layer.scales, layer.zeros, bits, group_size, 70, torch.float64
    statistics = [getattr(layer, n) for n in names[1:-1]]
    weight = torch.randn(2, 3, 70, dtype=torch.float64)
    grads = torch.autograd.grad((ops.mpq_embedding(ids, *about) * weight).sum(), statistics)
    W = mpq.dequantize(layer.weight, layer.scales, layer.zeros, 70, bits, group_size, torch.float64)
    wanted = torch.autograd.grad((W[ids] * weight).sum(), statistics)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_gradient_of_x_alone_keeps_no_activations():
    layer = Layer(6, 70, 21)
    x = layer.x.requires_grad_()
    y = ops.mpq_linear(*layer.args())
    assert not any(t is not None and t.shape == x.shape for t in y.grad_fn.saved_tensors)
    (grad,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(grad, layer.W.sum(0).float().expand(6, 70), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(ops.mpq_linear(*layer.args()).pow(2).sum(), [x], create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, symmetric):
    layer = Layer(3, 70, 21, 3, 32, symmetric, True, dtype)
    for name in ("x", "scales", "zeros", "bias"):
        if getattr(layer, name) is not None:
            getattr(layer, name).requires_grad_()
    result = opcheck(torch.ops.hf_onebit.mpq_linear.default, layer.args(), atol=1e-2, rtol=1e-2)
    assert set(result.values()) == {"SUCCESS"}
    ids = torch.tensor([[1, 20], [0, 3]])
    about = layer.weight, layer.scales, layer.zeros, 3, 32, 70, dtype
    result = opcheck(torch.ops.hf_onebit.mpq_embedding.default, (ids, *about), atol=1e-2, rtol=1e-2)
    assert set(result.values()) == {"SUCCESS"}
    needs = [True, True, not symmetric]
    grad = torch.randn(3, 21).to(dtype)
    args = [None if t is None else t.detach() for t in (layer.x, layer.weight, layer.scales, layer.zeros)]
    result = opcheck(torch.ops.hf_onebit.mpq_linear_backward.default, (grad, *args, 3, 32, needs))
    assert set(result.values()) == {"SUCCESS"}
    grad = torch.randn(2, 2, 70).to(dtype)
    result = opcheck(torch.ops.hf_onebit.mpq_embedding_backward.default, (grad, ids, *args[1:], 3, 32, needs[1:]))
    assert set(result.values()) == {"SUCCESS"}


def test_compiles_whole_with_dynamic_batch():
    layer = Layer(3, 70, 70)

    def model(ids: Tensor) -> Tensor:
        about = layer.weight, layer.scales, layer.zeros
        x = torch.ops.hf_onebit.mpq_embedding.default(ids, *about, 4, 32, 70, torch.float32)
        return torch.relu(torch.ops.hf_onebit.mpq_linear.default(x, *about, None, 4, 32)) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 3, 5):
        ids = torch.randint(0, 70, (count,))
        assert torch.equal(compiled(ids), model(ids))


# --- refusals -----------------------------------------------------------------------------------------------


def replaced(**changes):
    layer = Layer(bias=True)
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer.args()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(3, 70, dtype=torch.int32)}, "x must be floating point, got torch.int32. Usually"),
        ({"x": torch.tensor(1.0)}, r"x must have shape \(\.\.\., in\), got a scalar"),
        ({"x": torch.ones(3, 100)}, r"weight has 12 word rows, expected .*ceil\(100 / 32\) \* 4"),
        ({"x": torch.ones(3, 33)}, r"weight has 12 word rows, expected .*ceil\(33 / 32\) \* 4"),
        ({"bits": 0}, "bits must be between 1 and 8, got 0"),
        ({"bits": 9}, "bits must be between 1 and 8, got 9"),
        ({"bits": 3}, r"weight has 12 word rows, expected .*ceil\(70 / 32\) \* 3"),
        ({"group_size": 48}, "group_size must be a multiple of 32, or -1 for the whole row, got 48"),
        ({"group_size": 0}, "group_size must be a multiple of 32, or -1 for the whole row, got 0"),
        ({"group_size": 64}, r"scales must have shape \(2, 21\), one row per group of 64 inputs .*, got \(3, 21\)"),
        ({"scales": torch.ones(3)}, r"scales must have shape \(3, 21\)"),
        ({"scales": torch.ones(3, 1)}, r"scales must have shape \(3, 21\)"),
        ({"zeros": torch.ones(1, 21)}, r"zeros must have shape \(3, 21\)"),
        ({"zeros": torch.ones(3, 21, dtype=torch.int32)}, "zeros must be floating point, got torch.int32"),
        ({"weight": torch.ones(12, 21)}, "weight must be packed codes in torch.int32, got torch.float32"),
        ({"weight": torch.ones(12, dtype=torch.int32)}, r"weight must have shape .*, got \(12,\)"),
        ({"bias": torch.ones(20)}, "bias has 20 entries, expected 21, one entry per output"),
    ],
)  # fmt: skip
def test_linear_refuses(changes, message):
    arguments = replaced(**changes)
    for linear in (ops.mpq_linear, reference_mpq.mpq_linear):
        with pytest.raises(RuntimeError, match="mpq_linear: " + message):
            linear(*arguments)
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
    with pytest.raises(RuntimeError, match="mpq_linear: " + message):
        ops.mpq_linear(*meta)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.ones(3)}, "ids must be torch.int32 or torch.int64, got torch.float32"),
        ({"dim": -1}, "embedding_dim must not be negative, got -1"),
        ({"dim": 100}, r"weight has 12 word rows, expected .*ceil\(100 / 32\) \* 4"),
        ({"dtype": torch.int32}, "dtype must be float16, bfloat16, float32 or float64, got torch.int32"),
    ],
)
def test_embedding_refuses(changes, message):
    layer = Layer()
    given = {"ids": torch.tensor([1]), "dim": 70, "dtype": torch.float32, **changes}
    about = layer.weight, layer.scales, layer.zeros, 4, 32, given["dim"], given["dtype"]
    for embedding in (ops.mpq_embedding, reference_mpq.mpq_embedding):
        with pytest.raises(RuntimeError, match="mpq_embedding: " + message):
            embedding(given["ids"], *about)

"""Forward mode: tangents through every operator against the dequantized matrix, and what stays refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from hf_onebit import ops
from hf_onebit.nn import fuse_projections
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.mbwq import MBWQLinear
from hf_onebit.nn.mpq import MPQEmbedding, MPQLinear

K, N = 70, 33
LAYERS = {
    "onebit": lambda: OneBitLinear(K, N),
    "onebit, no bias": lambda: OneBitLinear(K, N, bias=False),
    "onebit, two planes": lambda: OneBitLinear(K, N, planes=2),
    "mpq": lambda: MPQLinear(K, N, bits=4, group_size=32),
    "mpq, one bit": lambda: MPQLinear(K, N, bits=1, group_size=32),
    "mpq, zeros": lambda: MPQLinear(K, N, bits=3, group_size=32, symmetric=False),
    "mpq, g_idx": lambda: MPQLinear(K, N, bits=4, group_size=32, g_idx=torch.randint(0, 3, (K,))),
    "mpq, zeros and g_idx": lambda: MPQLinear(
        K, N, bits=4, group_size=32, symmetric=False, g_idx=torch.randint(0, 3, (K,))
    ),
    "mbwq": lambda: MBWQLinear(K, N, blocks=((4, 64, 32), (2, 6, 32)), q_perm=True),
    "mbwq, one width": lambda: MBWQLinear(K, N, blocks=((4, K, 32),), symmetric=True, q_perm=True),
}


@pytest.fixture(params=LAYERS)
def layer(request) -> nn.Module:
    torch.manual_seed(5)
    layer = LAYERS[request.param]()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.is_floating_point():
                parameter.mul_(torch.rand(parameter.shape) + 0.5)
            elif name.startswith("weight"):
                parameter.copy_(random_words(layer, parameter))
    return layer


def random_words(layer: nn.Module, words: Tensor) -> Tensor:
    """Words of signs at random; of codes, as they are: padding must stay zero."""
    if not isinstance(layer, OneBitLinear):
        return words
    return torch.randint(-(2**31), 2**31, words.shape, dtype=torch.int64).to(torch.int32)


def inputs() -> tuple[Tensor, Tensor]:
    """x and its tangent."""
    random = torch.Generator().manual_seed(6)
    return torch.randn(3, K, generator=random), torch.randn(3, K, generator=random)


def floats(layer: nn.Module) -> dict[str, Tensor]:
    """The float parameters in float64, so that differences of them say something."""
    return {n: p.detach().double() for n, p in layer.named_parameters() if p.is_floating_point()}


def difference(layer: nn.Module, x: Tensor, held: dict[str, Tensor], tangents: dict[str, Tensor]) -> Tensor:
    """The tangent of the result in float64: every layer is at most quadratic in its parameters, so this is exact."""
    there = [{n: held[n] + sign * tangents.get(n, 0 * held[n]) / 2 for n in held} for sign in (1, -1)]
    with torch.no_grad():
        plus, minus = (functional_call(layer, values, (x,)) for values in there)
    return plus - minus


def assert_close(actual: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual is not None
    assert actual.dtype == expected.dtype or expected.dtype == torch.float64
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, f"off by {error:.2e}"


@pytest.mark.parametrize("recording", [True, False])
def test_dual_numbers(layer, recording):
    x, v = inputs()
    with torch.set_grad_enabled(recording), forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v)))
        assert torch.equal(y, layer(x))
        assert_close(tangent, v @ layer.dequantize().T)
        assert forward_ad.unpack_dual(layer(x)).tangent is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tangents_have_the_dtype_of_x(layer, dtype):
    x, v = (t.to(dtype) for t in inputs())
    y, tangent = torch.func.jvp(layer, (x,), (v,))
    assert tangent.dtype == y.dtype == dtype
    assert_close(tangent.float(), v.float() @ layer.dequantize().T, 2e-2)


def test_autocast(layer):
    x, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y, tangent = torch.func.jvp(layer, (x,), (v,))
    assert tangent.dtype == y.dtype == torch.bfloat16
    assert_close(tangent.float(), v @ layer.dequantize().T, 2e-2)


def test_func_jvp(layer):
    x, v = inputs()
    y, tangent = torch.func.jvp(layer, (x,), (v,))
    assert torch.equal(y, layer(x))
    assert_close(tangent, v @ layer.dequantize().T)


def test_jacfwd(layer):
    x, _ = inputs()
    assert_close(torch.func.jacfwd(layer)(x[0]), layer.dequantize())
    assert torch.func.jacfwd(layer)(x).shape == (3, N, 3, K)


def test_vmap_inside_and_outside(layer):
    x, v = inputs()
    expected = v @ layer.dequantize().T
    assert_close(torch.func.jvp(torch.vmap(layer), (x,), (v,))[1], expected)
    assert_close(torch.vmap(lambda x, v: torch.func.jvp(layer, (x,), (v,))[1])(x, v), expected)
    assert_close(torch.vmap(layer)(x), layer(x))


def test_forward_over_forward(layer):
    x, v = inputs()

    def inner(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: layer(x * x), (x,), (v,))[1]

    assert_close(torch.func.jvp(inner, (x,), (v,))[1], 2 * v * v @ layer.dequantize().T)


def test_reverse_over_forward(layer):
    x, v = inputs()
    W = layer.dequantize()
    expected = 2 * v @ W.T @ W
    assert_close(torch.func.grad(lambda v: torch.func.jvp(layer, (x,), (v,))[1].square().sum())(v), expected)
    v.requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
        tangent.square().sum().backward()
    assert_close(v.grad, expected)


def test_tangents_of_parameters(layer):
    """Of each float parameter alone, and of all of them and x at once."""
    x, v = (t.double() for t in inputs())
    held = floats(layer)
    tangents = {name: torch.randn_like(value) for name, value in held.items()}
    for name in held:
        one = {name: tangents[name]}
        actual = torch.func.jvp(lambda t: functional_call(layer, {**held, **t}, (x,)), ({name: held[name]},), (one,))[1]
        assert_close(actual, difference(layer, x, held, one), 1e-9)
    actual = torch.func.jvp(lambda x, t: functional_call(layer, t, (x,)), (x, held), (v, tangents))[1]
    alone = [{name: tangent} for name, tangent in tangents.items()]
    of_x = torch.func.jvp(lambda x: functional_call(layer, held, (x,)), (x,), (v,))[1]
    assert_close(actual, of_x + sum(difference(layer, x, held, one) for one in alone), 1e-9)


def test_dual_parameters(layer):
    """As forward_ad has them: set in the place of the parameter."""
    x, _ = inputs()
    name = "a" if isinstance(layer, OneBitLinear) else "scales"
    value = getattr(layer, name).detach().clone()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, value)
        tangent = forward_ad.unpack_dual(functional_call(layer, {name: dual}, (x,))).tangent
    held = floats(layer)
    assert_close(tangent, difference(layer, x.double(), held, {name: held[name]}), 1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_embedding(symmetric):
    torch.manual_seed(5)
    layer = MPQEmbedding(N, K, bits=3, group_size=32, symmetric=symmetric, embed_scale=2.0)
    ids = torch.tensor([[3, 0], [32, 3]])
    held = {name: getattr(layer, name).detach().float() for name in layer.scale_names}
    tangents = {name: torch.randn_like(value) for name, value in held.items()}
    y, tangent = torch.func.jvp(lambda t: functional_call(layer, t, (ids,)), (held,), (tangents,))
    assert_close(y, layer(ids))
    assert_close(tangent, functional_call(layer, tangents, (ids,)))


def test_group():
    torch.manual_seed(5)
    x, v = inputs()
    layers = [OneBitLinear(K, N), OneBitLinear(K, N + 4)]
    lists = [[getattr(layer, name).detach() for layer in layers] for name in ("weight", "a", "b", "bias")]
    ys, tangents = torch.func.jvp(lambda x: tuple(ops.onebit_linear_group(x, *lists)), (x,), (v,))
    for layer, y, tangent in zip(layers, ys, tangents, strict=True):
        assert torch.equal(y, layer(x))
        assert_close(tangent, v @ layer.dequantize().T)


def test_fused_projections():
    torch.manual_seed(5)
    model = nn.ModuleDict({name: OneBitLinear(K, N) for name in ("q_proj", "k_proj", "v_proj")})
    assert fuse_projections(model) == 1
    x, v = inputs()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        for given in (x, dual, dual, x):
            for layer in model.values():
                tangent = forward_ad.unpack_dual(layer(given)).tangent
                if given is x:
                    assert tangent is None
                else:
                    assert_close(tangent, v @ layer.dequantize().T)


def test_weights_that_learn_are_refused_while_gradients_are_recorded(layer):
    x, v = inputs()
    layer.weight.requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        with pytest.raises((NotImplementedError, RuntimeError), match="forward mode AD"):
            layer(dual)
        with torch.no_grad():
            assert_close(forward_ad.unpack_dual(layer(dual)).tangent, v @ layer.dequantize().T)


def test_backward_while_a_level_is_open(layer):
    """Tensors without tangents, and ones whose tangents the gradient does not depend on."""
    x, v = inputs()
    x.requires_grad_()
    layer.bias = None
    layer.requires_grad_(False)
    expected = torch.ones(3, N) @ layer.dequantize()
    with forward_ad.dual_level():
        assert_close(torch.autograd.grad(layer(x).sum(), x)[0], expected)
        assert_close(torch.autograd.grad(layer(forward_ad.make_dual(x, v)).sum(), x)[0], expected)


def test_gradients_of_parameters_while_a_level_is_open(layer):
    x, _ = inputs()
    x.requires_grad_()
    learning = [x, *(p.requires_grad_() for p in layer.parameters() if p.is_floating_point())]
    expected = torch.autograd.grad(layer(x).square().sum(), learning)
    with forward_ad.dual_level():
        actual = torch.autograd.grad(layer(x).square().sum(), learning)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_forward_over_reverse_is_refused(layer):
    x, v = inputs()

    def square(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    with pytest.raises(NotImplementedError, match=r"has first derivatives only.*dequantize the layers first"):
        torch.func.jvp(torch.func.grad(square), (x,), (v,))
    with pytest.raises(NotImplementedError, match="has first derivatives only"):
        torch.func.hessian(square)(x[0])
    y = layer(x.requires_grad_())
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="has first derivatives only"):
            torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones(3, N), torch.randn(3, N)))
        y = layer(forward_ad.make_dual(x, v))
        with pytest.raises(NotImplementedError, match="has first derivatives only"):
            torch.autograd.grad(y.square().sum(), x)
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="has first derivatives only"):
            grad.sum().backward()


@pytest.mark.parametrize("recording", [True, False])
def test_compiled_layers(layer, recording):
    """Compiled before a level was open, and called where one is."""
    torch._dynamo.reset()
    x, v = inputs()
    expected = v @ layer.dequantize().T
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.set_grad_enabled(recording):
        assert_close(compiled(x), layer(x))
        with forward_ad.dual_level():
            assert_close(forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, v))).tangent, expected)
        assert_close(compiled(x), layer(x))
    assert_close(torch.func.jvp(compiled, (x,), (v,))[1], expected)


def test_compiled_jvp(layer):
    torch._dynamo.reset()
    x, v = inputs()
    compiled = torch.compile(lambda x, v: torch.func.jvp(layer, (x,), (v,))[1], backend="aot_eager")
    for _ in range(2):
        assert_close(compiled(x, v), v @ layer.dequantize().T)


def test_compiles_whole_where_no_level_is_open(layer):
    torch._dynamo.reset()
    x, _ = inputs()
    x.requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert_close(actual, torch.autograd.grad(layer(x).square().sum(), x)[0])

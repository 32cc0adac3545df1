"""hf_onebit::onebit_linear_group: the bits of one call a layer, gradients, tracing and refusals."""

import pytest
import torch
from torch.library import opcheck

from hf_onebit import ops
from hf_onebit.formats.onebit import pack_signs
from hf_onebit.ops import cpu, reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LISTS = ("weight", "a", "b", "bias", "weight_1", "a_1", "b_1")


def lists_of(in_features=33, outs=(5, 130, 1), planes=1, bias=False, scale_dtype=torch.float16):
    """The operator's lists, None for what is not there."""
    lists = dict.fromkeys(LISTS)
    lists |= {name: [] for name in LISTS if ("_1" not in name or planes == 2) and (name != "bias" or bias)}
    for out_features in outs:
        for suffix in ("", "_1")[:planes]:
            lists[f"weight{suffix}"].append(pack_signs(torch.randn(out_features, in_features) >= 0))
            lists[f"a{suffix}"].append(torch.randn(out_features).to(scale_dtype))
            lists[f"b{suffix}"].append(torch.randn(in_features).to(scale_dtype))
        if bias:
            lists["bias"].append(torch.randn(out_features))
    return lists


def one_by_one(x, lists):
    return [
        ops.onebit_linear(x, *(lists[name][i] if lists[name] else None for name in LISTS))
        for i in range(len(lists["weight"]))
    ]


def equal(results, others):
    return all(torch.equal(y, z) and y.dtype == z.dtype for y, z in zip(results, others, strict=True))


@pytest.mark.parametrize("isa", [*cpu.isas(), "reference"])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_bits_of_one_call_a_layer(isa, planes, bias):
    before = cpu.isa()
    try:
        if isa != "reference":
            cpu.select_isa(isa)
        # (1100, ...) of 512 inputs: enough work for several threads, cut inside of layers.
        for in_features, outs in ((33, (5, 130, 1)), (512, (1100, 7, 1500)), (96, (64, 64)), (40, (3,))):
            lists = lists_of(in_features, outs, planes, bias)
            for dtype in DTYPES:
                for batch in ((), (1,), (1, 1), (0, 2), (3,), (2, 9)):
                    x = torch.randn(*batch, in_features).to(dtype)
                    if isa == "reference":
                        results = reference.onebit_linear_group(x, *lists.values())
                        assert equal(results, one_by_one(x, lists))
                        continue
                    expected = one_by_one(x, lists)
                    for threads in (1, 2, 8):
                        torch.set_num_threads(threads)
                        assert equal(ops.onebit_linear_group(x, **lists), expected)
    finally:
        if before is not None:
            cpu.select_isa(before)


@torch.no_grad()
def test_strides():
    torch.set_num_threads(2)
    lists = lists_of(512, (1100, 1500), planes=2, bias=True)
    spread = {
        name: [torch.stack((t, t), -1)[..., 0] for t in group]
        if name != "weight"
        else [t.T.contiguous().T for t in group]
        for name, group in lists.items()
    }
    assert not spread["a"][0].is_contiguous()
    x = torch.randn(1, 512)
    expected = one_by_one(x, lists)
    assert equal(ops.onebit_linear_group(x, **spread), expected)
    assert equal(ops.onebit_linear_group(torch.stack((x, x), -1)[..., 0], **spread), expected)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("used", [(0, 1, 2), (1,)], ids=str)
def test_gradients_are_those_of_the_layers(planes, used):
    lists = lists_of(planes=planes, bias=True, scale_dtype=torch.float64)
    trained = [t.requires_grad_() for name in LISTS if "weight" not in name for t in lists[name] or ()]
    x = torch.randn(4, 33, dtype=torch.float64, requires_grad=True)
    grads = []
    for results in (ops.onebit_linear_group(x, **lists), one_by_one(x, lists)):
        loss = sum((results[i] ** 2).sum() for i in used)
        grads.append(torch.autograd.grad(loss, [x, *trained], allow_unused=True, materialize_grads=True))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert any(bool(grad.any()) for grad in grads[0])


def test_x_is_not_kept_for_frozen_scales():
    lists = lists_of()
    x = torch.randn(4, 33, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ops.onebit_linear_group(x, **lists)
    assert torch.Size([4, 33]) not in saved
    lists["a"][1].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ops.onebit_linear_group(x, **lists)
    assert torch.Size([4, 33]) in saved


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, planes, bias):
    for requires_grad in (True, False):
        lists = lists_of(planes=planes, bias=bias, scale_dtype=dtype)
        for name in LISTS:
            for tensor in lists[name] or ():
                tensor.requires_grad_(requires_grad and "weight" not in name)
        x = torch.randn(3, 33).to(dtype).requires_grad_(requires_grad)
        result = opcheck(torch.ops.hf_onebit.onebit_linear_group.default, (x, *lists.values()), atol=1e-2, rtol=1e-2)
        assert set(result.values()) == {"SUCCESS"}


def test_compiles_to_one_graph():
    lists = lists_of(planes=2, bias=True)
    compiled = torch.compile(lambda x: ops.onebit_linear_group(x, **lists), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 33)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert equal(compiled(x), one_by_one(x, lists))


REFUSED = {
    "weight is empty, expected one tensor for each layer": {"weight": []},
    "a has 2 tensors, expected 3, one for each of weight": {"a": lambda group: group[:2]},
    "bias has 1 tensors, expected 3, one for each of weight": {"bias": lambda group: [torch.ones(5)]},
    "the second plane needs weight_1, a_1 and b_1 together, got no b_1": {
        "weight_1": lambda group: lists_of()["weight"],
        "a_1": lambda group: lists_of()["a"],
    },
    r"x has 33 features in its last dimension, the layer expects 40": {"b": lambda group: [*group[:2], torch.ones(40)]},
    r"a must have shape \(1,\), one scale per column of weight, got \(1, 1\)": {
        "a": lambda group: [*group[:2], group[2][None]]
    },
    "weight must be packed signs in torch.int32, got torch.float32": {
        "weight": lambda group: [*group[:2], group[2].float()]
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_are_the_same_in_every_implementation(message):
    lists = lists_of()
    for name, change in REFUSED[message].items():
        lists[name] = change(lists[name]) if callable(change) else change
    if "expects 40" in message:
        lists["weight"][2] = torch.zeros(2, 1, dtype=torch.int32)
    x = torch.randn(2, 33)
    for op in (lambda: ops.onebit_linear_group(x, **lists), lambda: reference.onebit_linear_group(x, *lists.values())):
        with pytest.raises(RuntimeError, match=f"^onebit_linear_group: .*{message}"):
            op()


def test_no_gradient_is_lost_past_the_autograd_key():
    """Without gradient mode the call goes past the formula; modes that look at calls still see it."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    lists = lists_of()
    x = torch.randn(2, 33, requires_grad=True)
    single = [lists[name][0] for name in ("weight", "a", "b")]
    with torch.no_grad(), Watch():
        group, y = ops.onebit_linear_group(x, **lists), ops.onebit_linear(x, *single)
    assert torch.ops.hf_onebit.onebit_linear.default in seen
    assert torch.ops.hf_onebit.onebit_linear_group.default in seen
    assert not y.requires_grad
    assert not group[0].requires_grad
    assert ops.onebit_linear(x, *single).requires_grad
    assert all(y.requires_grad for y in ops.onebit_linear_group(x, **lists))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = ops.onebit_linear(mode.from_tensor(x), *single)
    assert isinstance(fake, torch._subclasses.FakeTensor)

"""MPQWeightParameter: its contract, what it survives, its gradient, and updates against a naive float64 twin."""

import copy
import inspect
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from torch import nn

from hf_onebit.formats import mbwq, mpq
from hf_onebit.formats.packing import pack
from hf_onebit.formats.weight_layout import pack_zero_points
from hf_onebit.nn import MBWQLinear, MPQEmbedding, MPQLinear, MPQWeightParameter, OneBitLinear, ignore_in_ddp

INIT = {
    "data": None,
    "requires_grad": True,
    "privileged_grad": None,
    "scales": None,
    "zeros": None,
    "g_idx": None,
    "w_bit": -1,
    "asym": False,
    "group_size": -1,
    "layer_type": -1,
    "q_perm": None,
    "qscales_zeros": None,
    "qscales_scales": None,
    "qzeros_zeros": None,
    "qzeros_scales": None,
    "q_group_map": None,
    "rows": None,
}
UPDATE = {
    "exp_avg_s": None,
    "exp_avg_l": None,
    "step": None,
    "lr": 1e-4,
    "weight_decay": 0.0,
    "beta1": 0.99,
    "beta2": 0.9999,
    "eps": 1e-6,
    "dtype": torch.float16,
    "correct_bias": None,
    "projector": None,
    "grad": None,
}


# --- the contract -------------------------------------------------------------------------------------------


def test_signatures():
    assert issubclass(MPQWeightParameter, nn.Parameter)
    parameters = list(inspect.signature(MPQWeightParameter.__init__).parameters.values())[1:]
    assert {p.name: p.default for p in parameters} == INIT
    assert [p.name for p in parameters] == list(INIT)
    assert list(inspect.signature(MPQWeightParameter).parameters.values()) == parameters  # what help() shows
    assert isinstance(inspect.getattr_static(MPQWeightParameter, "update"), staticmethod)
    first, *others = inspect.signature(MPQWeightParameter.update).parameters.values()
    assert (first.name, first.default) == ("qweight", inspect.Parameter.empty)
    assert {p.name: p.default for p in others} == UPDATE
    assert [p.name for p in others] == list(UPDATE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int8, torch.float16, torch.float32])
def test_any_data_may_require_gradients(dtype):
    data = torch.ones(4, 6, dtype=dtype)
    weight = MPQWeightParameter(data)
    assert weight.requires_grad is True
    assert MPQWeightParameter(data, False).requires_grad is False
    assert weight.dtype == dtype
    assert torch.equal(weight.data, data)
    assert weight.data_ptr() == data.data_ptr()
    module = nn.Module()
    module.weight = weight
    assert dict(module.named_parameters())["weight"] is weight
    weight.requires_grad_(False)
    assert not weight.requires_grad
    weight.requires_grad = True
    assert weight.requires_grad
    assert MPQWeightParameter().shape == (0,)


def test_arguments_become_attributes():
    tensors = {name: torch.ones(2, 6) for name in ("scales", "zeros", "qscales_zeros", "qscales_scales")}
    tensors |= {"qzeros_zeros": torch.ones(1), "qzeros_scales": torch.ones(1), "privileged_grad": torch.ones(64, 6)}
    tensors |= {"g_idx": torch.zeros(64, dtype=torch.int32), "q_perm": torch.arange(64, dtype=torch.int16)}
    tensors["q_group_map"] = torch.zeros(128, dtype=torch.int16)
    rows = [0, 0, 0, 64, 64, 64, 8]
    numbers = {"w_bit": 4, "group_size": 32, "layer_type": 2}
    weight = MPQWeightParameter(torch.zeros(8, 6, dtype=torch.int32), True, **tensors, **numbers, asym=True, rows=rows)
    for name, value in {**tensors, "rows": rows}.items():
        assert getattr(weight, name) is value
    assert {name: getattr(weight, name) for name in numbers} == numbers
    assert weight.asym is True
    plain = MPQWeightParameter(torch.zeros(8, 6, dtype=torch.int32))
    assert {name: getattr(plain, name) for name in list(INIT)[2:]} == dict(list(INIT.items())[2:])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": [1]}, TypeError, "got data of type list, expected a tensor"),
        ({"w_bit": 4.0}, TypeError, "got w_bit=4.0, expected a whole number"),
        ({"layer_type": True}, TypeError, "got layer_type=True"),
        ({"asym": 1}, TypeError, "got asym=1, expected True or False"),
        ({"requires_grad": "no"}, TypeError, "got requires_grad='no', expected True or False"),
        ({"group_size": 0}, ValueError, "got group_size=0, expected at least 1, or -1 for all inputs"),
        ({"group_size": -2}, ValueError, "got group_size=-2"),
        ({"scales": [1.0]}, TypeError, "got scales of type list"),
        ({"scales": torch.ones(2, 6, dtype=torch.int32)}, ValueError, "got scales of torch.int32, expected floating"),
        ({"scales": torch.ones(2, 5)}, ValueError, r"got scales of shape \(2, 5\), expected \(groups, 6\)"),
        ({"scales": torch.ones(2, 6), "zeros": torch.ones(1, 6)}, ValueError, "got zeros of shape"),
        ({"zeros": torch.ones(2, 5)}, ValueError, r"got zeros of shape \(2, 5\), expected \(groups, 6\)"),
        (
            {"zeros": torch.ones(2, 1, dtype=torch.int32)},
            ValueError,
            "integer zeros with asym=False, expected asym=True",
        ),
        ({"g_idx": torch.ones(64)}, ValueError, "got g_idx of torch.float32"),
        ({"q_perm": torch.ones(2, 2, dtype=torch.int16)}, ValueError, "expected integers of one dimension"),
        ({"q_group_map": torch.ones(3, dtype=torch.int16)}, ValueError, "of 3 numbers, expected pairs"),
        ({"rows": [1, 2]}, ValueError, "rows must be a list of 7 whole numbers"),
        ({"rows": [32, 16, 16, 16, 16, 16, 128]}, ValueError, "rising to the number of inputs"),
        ({"rows": [0, 0, 0, 32, 32, 64, 8]}, ValueError, "a mask of the widths, expected 10"),
        ({"privileged_grad": torch.ones(2, 6, dtype=torch.int32)}, ValueError, "got privileged_grad of torch.int32"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        MPQWeightParameter(**({"data": torch.zeros(8, 6, dtype=torch.int32)} | arguments))


def test_what_the_docs_show():
    docs = (Path(__file__).parents[2] / "docs" / "methods" / "mpq.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", docs.partition("## The weight parameter")[2], re.M | re.S)
    scope = {"torch": torch, "MPQLinear": MPQLinear, "MPQWeightParameter": MPQWeightParameter}
    exec(code, scope)
    assert scope["layer"].weight.privileged_grad is scope["layer"].weight.grad


# --- what it survives ---------------------------------------------------------------------------------------

MAKERS = {
    "neighbours": lambda **place: MPQLinear(70, 9, group_size=32, symmetric=False, **place),
    "symmetric": lambda **place: MPQLinear(70, 9, False, bits=3, group_size=32, **place),
    "g_idx": lambda **place: MPQLinear(70, 9, group_size=32, g_idx=True, **place),
    "q_perm": lambda **place: MBWQLinear(70, 9, blocks=[(4, 70, 32)], q_perm=True, **place),
    "mixed": lambda **place: MBWQLinear(
        100, 9, blocks=[(6, 32, 32), (3, 68, 64)], symmetric=False, q_perm=True, **place
    ),
}


@pytest.fixture(params=sorted(MAKERS))
def make(request):
    return MAKERS[request.param]


def filled(module: nn.Module) -> nn.Module:
    if getattr(module, "g_idx", None) is not None:
        module.g_idx.copy_(torch.randint(0, module.scales.shape[0], (module.in_features,)))
    if getattr(module, "q_perm", None) is not None:
        module.q_perm.copy_(torch.randperm(module.in_features))
    return module


def check_bound(module: nn.Module, learns: bool = False) -> None:
    for weight in (module._parameters["weight"], module.weight):
        assert type(weight) is MPQWeightParameter
        assert weight.requires_grad is learns
        mixed = isinstance(module, MBWQLinear) and len(module.blocks) > 1
        for name in ("scales", "zeros", "g_idx", "q_perm"):
            assert getattr(weight, name) is getattr(module, name, None)
        assert weight.layer_type == (2 if isinstance(module, MBWQLinear) else 1)
        assert (weight.w_bit, weight.asym) == (module.bits, not module.symmetric)
        assert weight.group_size == (-1 if mixed else module.group_size)
        assert weight.rows == (mbwq.rows_of(module.blocks) if mixed else None)
        assert (weight.q_group_map is not None) is mixed
        devices = {getattr(weight, name).device for name in ("scales", "zeros", "g_idx", "q_perm", "q_group_map")
                   if getattr(weight, name) is not None}  # fmt: skip
        assert devices == {weight.device}


def test_new_modules_are_bound(make):
    module = filled(make())
    check_bound(module)
    module.weight.requires_grad_(True)
    check_bound(module, learns=True)
    if not module.weight.is_meta:
        assert torch.equal(module.weight.float_weight().T, module.dequantize())


@pytest.mark.parametrize("learns", [False, True])
def test_copies_are_bound_to_the_copy(make, learns):
    module = filled(make())
    module.weight.requires_grad_(learns)
    module.weight.privileged_grad = torch.ones(module.in_features, 9)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    x = torch.randn(2, module.in_features)
    expected = module(x)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
        copy.deepcopy(nn.Sequential(module))[0],
    ):
        check_bound(other, learns)
        assert other.scales is not module.scales
        assert other.weight.data_ptr() != module.weight.data_ptr()
        assert torch.equal(other.weight.privileged_grad, module.weight.privileged_grad)
        assert torch.equal(other(x), expected)
        other.weight.requires_grad_(not learns)  # a flag of its own
        assert module.weight.requires_grad is learns
    alone = copy.deepcopy(module.weight)
    assert alone.scales is not module.scales
    assert torch.equal(alone.scales, module.scales)
    assert alone.requires_grad is learns


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(make, assign, swap, learns):
    module, other = filled(make()), make()
    other.weight.requires_grad_(learns)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        nn.Sequential(other).load_state_dict(nn.Sequential(module).state_dict(), assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    check_bound(other, learns)
    assert torch.equal(other.dequantize(), module.dequantize())


@pytest.mark.parametrize("learns", [False, True])
def test_moves_and_casts(make, learns):
    module = filled(make())
    module.weight.requires_grad_(learns)
    module.weight.privileged_grad = torch.ones(module.in_features, 9)
    expected, weight = module.dequantize(), module.weight
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        module = nn.Sequential(module).to(dtype)[0].to("cpu")
        check_bound(module, learns)
        assert module.weight is weight
        assert torch.equal(module.dequantize(), expected)
        assert module.weight.grad.dtype == torch.float32
    module.to("meta")
    check_bound(module, learns)
    assert module.weight.is_meta
    assert module.weight.grad.is_meta
    module.to_empty(device="cpu")
    check_bound(module, learns)
    assert module.weight.grad is None
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    check_bound(module, learns)


def test_meta_modules_and_what_replaces_their_tensors(make):
    source = filled(make())
    with torch.device("meta"):
        module = make()
    check_bound(module)
    for name, tensor in source.named_parameters():  # as loaders do, one tensor after the other
        setattr(module, name, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.is_floating_point()))
    module.scales.requires_grad_(False)
    check_bound(module)
    assert torch.equal(module.dequantize(), source.dequantize())
    # A float tensor stands in for the words while a loader quantizes: left as it is, bound once the words come.
    words = module.weight
    module.weight = nn.Parameter(torch.zeros(9, module.in_features))
    assert type(module._parameters["weight"]) is nn.Parameter
    module.weight = nn.Parameter(words.data, requires_grad=False)
    check_bound(module)


def test_a_shared_weight_stays_one_object():
    module, other = MPQLinear(64, 9), nn.Module()
    other.weight = nn.Parameter(module.weight.data.clone(), requires_grad=False)
    module.weight = other.weight
    assert module.weight is other.weight
    check_bound(module)


@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload"])
def test_offloading_hooks(make, place, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    module = filled(make())
    model = nn.Sequential(module, nn.ReLU())
    x = torch.randn(2, module.in_features)
    expected = model(x)
    seen = []
    module.register_forward_hook(lambda *_: seen.append(module.weight.device.type))
    if place == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    for _ in range(2):
        assert torch.equal(model(x), expected)
        assert module._parameters["weight"].is_meta
        check_bound_lazily(module)


def check_bound_lazily(module: nn.Module) -> None:
    """Hooks write the table of parameters itself: asking the module for its weight binds it."""
    assert isinstance(module._parameters["weight"], MPQWeightParameter)
    assert module.weight.scales is module.scales
    check_bound(module)


def test_data_parallel_passes_over_packed_weights():
    model = nn.Sequential(MPQLinear(64, 32), nn.Linear(32, 64), MBWQLinear(64, 8, blocks=[(2, 64, 32)]))
    model._ddp_params_and_buffers_to_ignore = ["other"]
    assert ignore_in_ddp(model) == ["0.weight", "2.weight"]
    assert ignore_in_ddp(model) == ["0.weight", "2.weight"]
    assert model._ddp_params_and_buffers_to_ignore == ["other", "0.weight", "2.weight"]
    assert ignore_in_ddp(model[0]) == ["weight"]


def test_trains_beside_data_parallel(tmp_path):
    script = """
    from hf_onebit.nn import MPQLinear, ignore_in_ddp
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), MPQLinear(64, 32))
    model[1].weight.requires_grad_(True)
    ignore_in_ddp(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(torch.randn(3, 64)).sum().backward()
    print(model[0].weight.grad is not None, tuple(model[1].weight.grad.shape))
    """
    assert run_ranks(script, 1, tmp_path, 400, 300) == ["True (64, 32)\n"]


# --- its gradient -------------------------------------------------------------------------------------------


def float_twin(module: nn.Module, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    W = module.dequantize(torch.float64).requires_grad_()
    (nn.functional.linear(x.double(), W) * direction.double()).sum().backward()
    return W.grad.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_the_float_weight_and_accumulates(make, dtype):
    module = filled(make()).to(dtype)
    module.weight.requires_grad_(True)
    x, direction = torch.randn(2, 5, module.in_features).to(dtype), torch.randn(2, 5, 9).to(dtype)
    rtol = 1e-4 if dtype == torch.float32 else 2**-8  # sums of one backward pass may be rounded to bfloat16 once
    for times in (1, 2):
        (module(x) * direction).sum().backward()  # x does not learn and the bias may be absent: it runs all the same
        wanted = times * float_twin(module, x, direction)
        assert module.weight.grad is module.weight.privileged_grad
        torch.testing.assert_close(module.weight.privileged_grad.double(), wanted, rtol=rtol, atol=1e-4)
    norm = nn.utils.clip_grad_norm_(module.weight, 1.0)
    assert float(norm) == pytest.approx(float(wanted.norm()), rel=max(rtol, 1e-3))
    assert float(module.weight.grad.norm()) == pytest.approx(1, rel=1e-3)
    torch.optim.SGD([module.weight]).zero_grad()
    assert module.weight.grad is None


def test_gradient_of_a_module_used_twice_and_checkpointed():
    module = MPQLinear(64, 64, False)
    module.weight.requires_grad_(True)
    x = torch.randn(3, 64)
    expected = None
    for run in (
        lambda: module(module(x)),
        lambda: torch.utils.checkpoint.checkpoint(lambda v: module(module(v)), x, use_reentrant=False),
    ):
        module.zero_grad()
        run().square().sum().backward()
        W = module.dequantize().requires_grad_()
        nn.functional.linear(nn.functional.linear(x, W), W).square().sum().backward()
        torch.testing.assert_close(module.weight.grad, W.grad.T, rtol=1e-4, atol=1e-4)
        expected = module.weight.grad if expected is None else expected
    torch.testing.assert_close(module.weight.grad, expected)


@pytest.mark.parametrize("embed_scale", [None, 3.0])
def test_gradient_of_an_embedding_and_of_a_head_tied_to_it(embed_scale):
    embedding = MPQEmbedding(20, 64, symmetric=False, embed_scale=embed_scale)
    head = MPQLinear(64, 20, False, bits=8, symmetric=False)
    for name in ("weight", "scales", "zeros"):
        setattr(head, name, getattr(embedding, name))
    assert embedding.weight is head.weight
    embedding.weight.requires_grad_(True)
    ids = torch.tensor([[1, 5, 5], [0, 19, 1]])
    direction = torch.randn(2, 3, 20)
    model = nn.Sequential(embedding, head)
    assert ignore_in_ddp(model) == ["0.weight", "1.weight"]
    (model(ids) * direction).sum().backward()
    W = embedding.dequantize().requires_grad_()
    x = nn.functional.embedding(ids, W) * (embed_scale or 1)
    (nn.functional.linear(x, W) * direction).sum().backward()
    torch.testing.assert_close(embedding.weight.grad, W.grad.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_of_float_weights_fail_and_change_nothing(make, optimizer):
    module = filled(make())
    module.weight.requires_grad_(True)
    module(torch.randn(2, module.in_features)).sum().backward()
    words = module.weight.data.clone()
    with pytest.raises(RuntimeError):
        optimizer([module.weight], lr=1.0).step()
    assert torch.equal(module.weight.data, words)


def test_frozen_weights_and_no_grad_leave_no_gradient(make):
    module = filled(make())
    x = torch.randn(2, module.in_features, requires_grad=True)
    module(x).sum().backward()
    assert module.weight.grad is None
    module.weight.requires_grad_(True)
    with torch.no_grad():
        assert not module(x).requires_grad
    assert module.weight.grad is None


def test_learning_under_compile(make):
    torch.compiler.reset()
    module = filled(make())
    compiled = torch.compile(module, backend="aot_eager")
    x = torch.randn(2, module.in_features)
    torch.testing.assert_close(compiled(x), module(x))
    module.weight.requires_grad_(True)
    with torch.no_grad():  # an evaluation amid training, before there is a gradient and after
        torch.testing.assert_close(compiled(x), module(x))
    compiled(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, x.sum(0)[:, None].expand(-1, 9), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("make", [MAKERS["q_perm"], lambda: OneBitLinear(70, 9, bias=False)])
def test_a_gradient_that_was_left_does_not_break_the_graph(make):
    torch.compiler.reset()
    module, x = make(), torch.randn(2, 70)
    module.weight.requires_grad_(True)
    module(x).sum().backward()
    module.weight.requires_grad_(False)
    assert module.weight.grad is not None
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    assert module.weight.grad is not None
    module.weight.grad = None
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (lambda: MPQEmbedding(10, 64), torch.tensor([[1, 2]])),
        (lambda: OneBitLinear(64, 9, planes=2), torch.randn(2, 64)),
    ],
    ids=["embedding", "signs"],
)
def test_other_modules_that_learn_are_evaluated_under_compile(module, given):
    torch.compiler.reset()
    layer = module()
    layer.weight.requires_grad_(True)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager")
        torch.testing.assert_close(compiled(given), layer(given))


# --- updates ------------------------------------------------------------------------------------------------


def packed_weight(kind, bits=4, K=96, N=10, seed=0, asym=False):
    """A weight in one of the layouts, and its (scale, offset, inputs' order, largest codes), rows in packed order."""
    generator = torch.Generator().manual_seed(seed)
    rows = None
    widths = torch.full((K,), bits)
    if kind == "mixed":
        counts = {8: 0, 6: 32, 5: 0, 4: 0, 3: 32, 2: K - 64}
        widths = torch.tensor([b for b, n in counts.items() for _ in range(n)])
        rows = [*torch.tensor(list(counts.values())).cumsum(0).tolist(), 0b100110]
    group = torch.arange(K) // 32
    attributes = {"w_bit": bits, "group_size": 32, "layer_type": 1 if kind in ("plain", "g_idx", "gptq") else 2}
    if kind in ("g_idx", "gptq"):
        group = torch.randint(0, 3, (K,), generator=generator)
        attributes["g_idx"] = group.int()
    perm = torch.arange(K)
    if attributes["layer_type"] == 2:
        perm = torch.randperm(K, generator=generator)
        attributes["q_perm"] = perm.to(torch.int16)
    if kind == "mixed":
        left = torch.tensor([32 - i % 32 for i in range(K)])
        attributes |= {"rows": rows, "q_group_map": torch.stack((group, left), 1).flatten().to(torch.int16)}
    levels = (1 << widths) - 1
    codes = (torch.rand(K, N, generator=generator) * (levels + 1)[:, None]).to(torch.uint8)
    parts = [pack(codes[widths == b].T, b) for b in (8, 7, 6, 5, 4, 3, 2, 1) if bool((widths == b).any())]
    scales = torch.rand(3, N, generator=generator) * 0.1 + 0.05
    middle = torch.tensor([mpq.zero_point(int(b)) for b in widths], dtype=torch.float64)[:, None]
    scale = scales.double()[group]
    if kind == "gptq":
        points = torch.randint(1, (1 << bits) + 1, (3, N), generator=generator)
        attributes |= {"zeros": pack_zero_points(points, bits), "asym": True}
        offset = scale * points.double()[group]
    elif asym:
        zeros = torch.randn(3, N, generator=generator)
        attributes |= {"zeros": zeros, "asym": True}
        offset = zeros.double()[group]
    else:
        offset = scale * middle
    weight = MPQWeightParameter(torch.cat(parts), scales=scales, **attributes)
    weight.rounding = "nearest"  # the oracle is exact; tests/nn/test_rounding.py has the others
    return weight, (codes, scale, offset, perm, levels[:, None].double())


def naive_update(about, grad, states, t, lr, wd, beta1, beta2, eps, correct):
    """Codes after one step, element by element in float64 by the documented rule; states move too."""
    codes, scale, offset, perm, levels = about
    m, v = states
    m.mul_(beta1).add_((1 - beta1) * grad)
    v.mul_(beta2).add_((1 - beta2) * grad**2)
    size = lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) if correct else lr
    W = (scale * codes.double() - offset) * (1 - lr * wd) - size * (m / (v.sqrt() + eps))[perm]
    exact = (W + offset) / scale
    q = exact.round().clamp(min=0).minimum(levels)
    return q.to(torch.uint8), (exact - exact.floor() - 0.5).abs() < 1e-4  # ties go where float32 sees them


KINDS = ["plain", "g_idx", "gptq", "q_perm", "mixed"]


@pytest.mark.parametrize("correct", [None, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_update_against_float64(kind, bits, correct):
    for asym in (False, True):
        weight, about = packed_weight(kind, bits, asym=asym)
        pointer, scales = weight.data_ptr(), weight.scales.clone()
        step = torch.tensor(0)
        m, v = torch.zeros(96, 10, dtype=torch.float64), torch.zeros(96, 10, dtype=torch.float64)
        twins = m.clone(), v.clone()
        changed = 0
        for t in (1, 2, 3):
            grad = torch.randn(96, 10)
            options = {"lr": 0.3, "weight_decay": 0.05, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6}
            result = MPQWeightParameter.update(
                weight, v, m, step, **options, dtype=torch.float64, correct_bias=correct, grad=grad
            )
            assert result is None
            assert int(step) == t
            wanted, ties = naive_update(about, grad.double(), twins, t, 0.3, 0.05, 0.9, 0.99, 1e-6, correct)
            torch.testing.assert_close(m, twins[0])
            torch.testing.assert_close(v, twins[1])
            got = weight.weight_layout().unpack(weight.data)
            assert torch.equal(got[~ties], wanted[~ties])
            changed += int((got != about[0]).sum())
            about = (got, *about[1:])
        assert changed > 100
        assert weight.data_ptr() == pointer
        assert torch.equal(weight.scales, scales)
        assert weight.dtype == torch.int32


@pytest.mark.parametrize("kind", KINDS)
def test_update_with_all_defaults_takes_the_privileged_gradient(kind):
    weight, about = packed_weight(kind)
    weight.privileged_grad = torch.randn(96, 10)
    zero = torch.zeros(96, 10, dtype=torch.float64)
    wanted, ties = naive_update(
        about, weight.privileged_grad.double(), (zero.clone(), zero.clone()), 1, 20.0, 0.0, 0.99, 0.9999, 1e-6, None
    )
    MPQWeightParameter.update(weight, lr=20.0)
    got = weight.weight_layout().unpack(weight.data)
    assert torch.equal(got[~ties], wanted[~ties])
    assert not torch.equal(got, about[0])
    words = weight.data.clone()
    MPQWeightParameter.update(weight)  # less than half a level: nothing moves, by nearest rounding
    assert torch.equal(weight.data, words)


def test_update_of_a_module(make):
    module = filled(make())
    module.weight.requires_grad_(True)
    x = torch.randn(50, module.in_features)
    before = float(module(x).detach().square().mean())
    for _ in range(3):
        module.zero_grad()
        module(x).square().mean().backward()
        module.weight.update(module.weight, lr=float(module.scales.float().mean()) * 2)
    assert float(module(x).detach().square().mean()) < before
    if module.in_features % 32:
        tail = torch.cat([part[-bits:] for part, (bits, _, _) in zip(
            module.weight.split(mbwq.block_words(module.blocks)), module.blocks, strict=True
        )]) if isinstance(module, MBWQLinear) else module.weight[-module.bits:]  # fmt: skip
        assert tail.numel()
    tensors = {n: p.detach() for n, p in module.named_parameters() if n != "bias"}
    module.set_tensors(tensors)  # padding codes among others are as they must be


class Projector:
    """The first rows of the gradient, as a projection."""

    def project(self, grad, step):
        return grad[:16]

    def project_back(self, low):
        return torch.cat((low, low.new_zeros(96 - 16, low.shape[1])))


@pytest.mark.parametrize("projected", [True, False])
def test_update_with_a_projector(projected):
    weight, about = packed_weight("plain")
    grad = torch.randn(96, 10)
    m, v = torch.zeros(16, 10), torch.zeros(16, 10)
    given = grad[:16] if projected else grad
    MPQWeightParameter.update(weight, v, m, torch.tensor(0), lr=20.0, projector=Projector(), grad=given)
    torch.testing.assert_close(m, grad[:16] * 0.01)
    got = weight.weight_layout(96).unpack(weight.data)
    assert torch.equal(got[16:], about[0][16:])
    assert not torch.equal(got[:16], about[0][:16])


def test_a_scale_of_zero_keeps_its_codes():
    weight, about = packed_weight("plain")
    weight.scales[1] = 0
    MPQWeightParameter.update(weight, lr=20.0, grad=torch.randn(96, 10))
    got = weight.weight_layout().unpack(weight.data)
    assert torch.equal(got[32:64], about[0][32:64])
    assert not torch.equal(got[:32], about[0][:32])


def test_update_in_pieces_is_the_same(monkeypatch):
    results = []
    for tile in (1 << 21, 3 * 96, 1):
        monkeypatch.setattr("hf_onebit.nn.packed_update._TILE", tile)
        weight, _ = packed_weight("mixed", asym=True)
        m, v = torch.zeros(96, 10), torch.zeros(96, 10)
        generator = torch.Generator().manual_seed(1)
        MPQWeightParameter.update(weight, v, m, lr=20.0, grad=torch.randn(96, 10, generator=generator))
        results.append((weight.data.clone(), m, v))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"layer_type": -1}, {}, NotImplementedError, "layer_type -1 is not implemented"),
        ({"layer_type": 3}, {}, NotImplementedError, "layer_type 3 is not implemented"),
        ({"w_bit": 16}, {}, NotImplementedError, "w_bit 16 is not implemented"),
        ({"w_bit": -1}, {"grad": None}, NotImplementedError, "w_bit -1 is not implemented"),
        ({}, {"grad": None}, ValueError, "no gradient"),
        (
            {},
            {"grad": torch.ones(95, 10)},
            ValueError,
            r"expected the gradient.s \(95, 10\)",
        ),
        ({}, {"grad": torch.full((96, 10), float("nan"))}, ValueError, "inf or nan"),
        ({}, {"exp_avg_l": torch.ones(2, 2)}, ValueError, r"exp_avg_l has shape \(2, 2\)"),
        ({"scales": None}, {}, ValueError, "scales is None"),
        ({"scales": torch.ones(4, 10)}, {}, ValueError, "scales has 4 groups, expected 3"),
        ({"g_idx": torch.full((96,), 3)}, {}, ValueError, "'?g_idx'? has values from 3 to 3"),
        ({"layer_type": 2, "q_perm": torch.zeros(96, dtype=torch.int16)}, {}, ValueError, "no permutation.*all zeros"),
        ({"layer_type": 2, "q_perm": torch.arange(95)}, {}, ValueError, "different numbers of inputs"),
        ({"zeros": torch.ones(2, 10)}, {}, ValueError, "zeros has shape"),
    ],
)
def test_update_refuses_before_anything_is_touched(changes, options, error, message):
    weight, _ = packed_weight("plain")
    for name, value in changes.items():
        setattr(weight, name, value)
    step, states = torch.tensor(4), {"exp_avg_s": torch.ones(96, 10), "exp_avg_l": torch.ones(96, 10)}
    words = weight.data.clone()
    arguments = {"grad": torch.ones(96, 10), **states, **options}
    with pytest.raises(error, match=message):
        MPQWeightParameter.update(weight, step=step, **arguments)
    assert int(step) == 4
    assert all(bool((state == 1).all()) for state in states.values())
    assert torch.equal(weight.data, words)


def test_update_of_another_parameter():
    with pytest.raises(TypeError, match="got a Parameter, expected an MPQWeightParameter"):
        MPQWeightParameter.update(nn.Parameter(torch.ones(2)), grad=torch.ones(2))


def test_the_padding_row_of_an_embedding_takes_no_gradient():
    embedding = MPQEmbedding(10, 64, padding_idx=0)
    embedding.weight.requires_grad_(True)
    embedding(torch.tensor([[0, 1, 1]])).sum().backward()
    found = embedding.weight.privileged_grad
    assert found[:, 0].abs().sum() == 0
    assert torch.equal(found[:, 1], torch.full((64,), 2.0))

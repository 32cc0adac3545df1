"""DiodeMix: its steps against float twins, what it keeps and loads, its groups, and the memory of training."""

import copy
import gc
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_onebit import DiodeMix, MPQWeightParameter, diode_mix
from hf_onebit.bench.memory import allocated
from hf_onebit.nn import MPQLinear, OneBitLinear
from hf_onebit.training.float_step import round_half
from hf_onebit.training.metrics import summary


def layer_of(bits=4, K=96, N=64, kind=MPQLinear):
    torch.manual_seed(0)
    made = kind(K, N, False) if kind is OneBitLinear else kind(K, N, False, bits=bits, group_size=32)
    made.weight.requires_grad_(True)
    return made


def gradients(shape, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def run(optimizer, parameters, grads):
    for grad in grads:
        for p in parameters:
            p.grad = grad.to(p.dtype) if p.is_floating_point() else grad.clone()
        optimizer.step()
        optimizer.zero_grad()


def test_what_the_docs_show():
    docs = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    code, _ = re.findall(r"^```python\n(.*?)^```", docs, re.M | re.S)  # the other is in test_trainer.py
    exec(code, {})


# --- the steps ----------------------------------------------------------------------------------------------


def test_packed_steps_with_float_states_are_those_of_update():
    layer, twin = layer_of(), layer_of()
    optimizer = DiodeMix([layer.weight], lr=1e-2, weight_decay=0.1, states="float32", seed=7)
    twin.weight.seed = 7
    m, v, step = torch.zeros(96, 64), torch.zeros(96, 64), torch.tensor(0)
    for grad in gradients((96, 64), 4):
        run(optimizer, [layer.weight], [grad])
        about = {"lr": 1e-2, "weight_decay": 0.1, "correct_bias": True, "dtype": torch.float32, "grad": grad}
        MPQWeightParameter.update(twin.weight, v, m, step, **about)
        assert torch.equal(layer.weight.data, twin.weight.data)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_float_parameters_take_adamw(weight_decay):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(100, 50)), nn.Parameter(torch.randn(2, 3, 4))]
    theirs = copy.deepcopy(ours)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": weight_decay}
    optimizer = DiodeMix(ours, eps=1e-12, states="float32", **options)
    reference = torch.optim.AdamW(theirs, eps=1e-12, **options)
    for i in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(i))
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", ["8bit", "factored"])
def test_large_float_parameters_with_small_states_follow_adamw(states, dtype):
    torch.manual_seed(0)
    start = torch.randn(160, 40)
    ours = nn.Parameter(start.to(dtype, copy=True))
    theirs = nn.Parameter(start.to(dtype).float())
    first = ours.detach().float().clone()
    options = {"lr": 1e-2, "betas": (0.9, 0.99)}
    optimizer = DiodeMix([ours], states=states, **options)
    reference = torch.optim.AdamW([theirs], weight_decay=0.0, **options)
    slope = torch.rand(160, 1) * torch.rand(40) + 0.1  # of rank one, as a factored moment takes it to be
    for i in range(20):
        noise = torch.randn(160, 40, generator=torch.Generator().manual_seed(i))
        theirs.grad = (0.5 + noise) * slope
        ours.grad = theirs.grad.to(dtype)
        optimizer.step()
        reference.step()
    a, b = ours.detach().float() - first, theirs.detach() - first
    # A factored moment knows a weight's own noise by its row and column only, so its first steps are other ones.
    assert 0 < float((a - b).norm() / b.norm()) < (0.55 if states == "factored" else 0.2)
    assert float((a * b).sum() / (b * b).sum()) == pytest.approx(1, abs=0.2 if states == "factored" else 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_to_neighbours_with_the_right_mean(dtype):
    values = torch.tensor([1.001, -1.001, 3.14159, 1e-3, 0.0, float("inf")]).repeat(20000, 1)
    words = torch.randint(0, 1 << 32, values.shape, generator=torch.Generator().manual_seed(0))
    got = round_half(values, dtype, words)
    assert got.dtype == dtype
    for column in range(4):
        assert len(got[:, column].unique()) == 2
        step = float(got[:, column].float().max() - got[:, column].float().min())
        assert abs(float(got[:, column].double().mean()) - float(values[0, column])) < 5 * step / 2 / 20000**0.5
    assert not got[:, 4].any()
    assert bool(got[:, 5].isinf().all())


@pytest.mark.parametrize("small", [True, False])
def test_bfloat16_parameters_learn_small_steps(small):
    # lr is a tenth of what rounding to the nearest would ignore.
    p = nn.Parameter(torch.ones(60 if small else 100, 60, dtype=torch.bfloat16))
    optimizer = DiodeMix([p], lr=2e-4, betas=(0.9, 0.9))
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert float(1 - p.detach().float().mean()) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"states": "factored"}, {"rank": 16, "update_proj_gap": 10}])
@pytest.mark.parametrize("kind", ["mpq", "onebit"])
def test_packed_layers_learn(kind, options):
    torch.manual_seed(0)
    x, W = torch.randn(256, 64), torch.randn(8, 48).T @ torch.randn(8, 64) * 0.05
    target = x @ W.T
    layer = MPQLinear(64, 48, bits=4, group_size=32) if kind == "mpq" else OneBitLinear(64, 48)
    with torch.no_grad():
        if kind == "mpq":
            layer.scales.fill_(float(W.std()) * 6 / 16)
        else:
            layer.a.fill_(float(W.std()) ** 0.5)
            layer.b.fill_(float(W.std()) ** 0.5)
    layer.weight.requires_grad_(True)
    lr = {"lr": 1.2e-2} if kind == "mpq" else {"lr": 3e-3}
    optimizer = DiodeMix([p for p in layer.parameters() if p.requires_grad], betas=(0.9, 0.97), **lr, **options)
    losses = []
    for i in range(150):
        for group in optimizer.param_groups:
            group["lr"] = lr["lr"] * (1 - i / 150)
        loss = nn.functional.mse_loss(layer(x), target)
        losses.append(float(loss.detach() / target.var()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 1.2
    # Within a subspace of a quarter of the dimensions there is less to take from a step.
    assert losses[-1] < (losses[0] / (3 if "rank" in options else 4) if kind == "mpq" else 0.75)


# --- state ----------------------------------------------------------------------------------------------------


def mixed(dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = nn.ModuleList([
        MPQLinear(96, 64, True, dtype=dtype),
        OneBitLinear(96, 64, False),
        nn.Linear(96, 64, dtype=dtype),
    ])  # fmt: skip
    for layer in model[:2]:
        layer.weight.requires_grad_(True)
    return model


def train(model, optimizer, first, last):
    for i in range(first, last):
        generator = torch.Generator().manual_seed(i)
        for p in model.parameters():
            if p.requires_grad:
                shape = p.shape if p.is_floating_point() else (96, 64)
                p.grad = torch.randn(shape, generator=generator).to(p.dtype if p.is_floating_point() else torch.float32)
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{}, {"states": "factored"}, {"states": "float32"}, {"rank": 8, "update_proj_gap": 3}, {"rounding": "stochastic"}],
)
def test_a_resumed_run_is_the_same_to_the_bit(options):
    options = {"lr": 1e-2, "lr_signs": 0.3, "lr_packed": 2e-3, "seed": 3, **options}
    whole = mixed()
    optimizer = DiodeMix([p for p in whole.parameters() if p.requires_grad], **options)
    train(whole, optimizer, 0, 7)
    model = mixed()
    optimizer = DiodeMix([p for p in model.parameters() if p.requires_grad], **options)
    train(model, optimizer, 0, 4)
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    resumed = mixed()
    resumed.load_state_dict(saved["model"])
    later = DiodeMix([p for p in resumed.parameters() if p.requires_grad], **{**options, "seed": None})
    later.load_state_dict(saved["optimizer"])
    for a, b in zip(optimizer.state.values(), later.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(not isinstance(a[key], torch.Tensor) or a[key].dtype == b[key].dtype for key in a)
    train(resumed, later, 4, 7)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a.data, b.data), name
    # What was saved is no part of the run that goes on.
    again = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    number = next(iter(again["optimizer"]["state"]))
    assert int(saved["optimizer"]["state"][number]["step"]) == int(again["optimizer"]["state"][number]["step"]) == 4


def test_streams_differ_and_stay_where_they_were_set():
    layers = [layer_of() for _ in range(3)]
    layers[1].weight.stream = 50
    optimizer = DiodeMix([layer.weight for layer in layers[:2]], rounding="nearest", seed=4)
    optimizer.add_param_group({"params": [layers[2].weight], "rounding": "stochastic"})
    assert [layer.weight.stream for layer in layers] == [0, 50, 2]
    assert [layer.weight.rounding for layer in layers] == ["nearest", "nearest", "stochastic"]
    assert {layer.weight.seed for layer in layers} == {4}


def test_groups_by_kind():
    model = mixed(torch.float32)
    mpq, signs, _ = model
    for p in (mpq.scales, signs.a, signs.b):
        p.data = p.data.float()
        p.requires_grad_(True)
    learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = DiodeMix(learning, lr=1e-3, lr_packed=2e-3, lr_signs=3e-3, lr_scales=4e-3)
    found = {group["lr"]: group["param_names"] for group in optimizer.param_groups}
    assert found == {
        1e-3: ["0.bias", "2.weight", "2.bias"],
        2e-3: ["0.weight"],
        3e-3: ["1.weight"],
        4e-3: ["0.scales", "1.a", "1.b"],
    }
    groups = [{"params": [p for _, p in learning[:2]], "weight_decay": 0.5}, {"params": [p for _, p in learning[2:]]}]
    split = DiodeMix(groups, lr_packed=1.0).param_groups
    assert [group["weight_decay"] for group in split] == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert sum(len(group["params"]) for group in split) == len(learning)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    optimizer.step()
    schedule.step()
    assert sorted(group["lr"] for group in optimizer.param_groups) == [5e-4, 1e-3, 1.5e-3, 2e-3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "got lr=-1.0"),
        ({"eps": float("nan")}, "got eps=nan"),
        ({"betas": (0.9, 1.0)}, r"got betas\[1\]=1.0, expected a number from 0 to below 1"),
        ({"states": "4bit"}, "expected one of 8bit, factored, float32"),
        ({"rank": 0}, "got rank=0"),
        ({"update_proj_gap": 0}, "got update_proj_gap=0"),
        ({"seed": -1}, "got seed=-1"),
        ({"rounding": "up"}, "got rounding='up'"),
        ({"dtype": torch.int8}, "expected a floating"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        diode_mix(**options)


def test_parameters_that_cannot_be_trained():
    with pytest.raises(ValueError, match=r"torch.int32.*is no MPQWeightParameter"):
        DiodeMix([nn.Parameter(torch.zeros(2, 2, dtype=torch.int32), requires_grad=False)])
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradient"):
        DiodeMix(embedding.parameters()).step()
    layer = layer_of()
    optimizer = DiodeMix([layer.weight])
    layer.weight.grad = torch.full((96, 64), float("nan"))
    words = layer.weight.data.clone()
    with pytest.raises(ValueError, match="inf or nan"):
        optimizer.step()
    assert torch.equal(layer.weight.data, words)


def test_what_the_trainer_takes():
    made, options = diode_mix(lr=2e-4, fused=True, rank=8)
    assert made is DiodeMix
    assert options == {"lr": 2e-4, "fused": True, "rank": 8}
    with pytest.raises(TypeError):
        diode_mix(learning_rate=1.0)


def test_metrics():
    layer = layer_of(8)
    scale = float(layer.scales[0, 0])
    optimizer = DiodeMix([layer.weight], lr=scale / 4, betas=(0.9, 0.99))
    assert optimizer.metrics() == {}
    before = layer.weight.weight_layout().unpack(layer.weight.data)
    run(optimizer, [layer.weight], gradients((96, 64), 1))
    after = layer.weight.weight_layout().unpack(layer.weight.data)
    got = optimizer.metrics()
    assert got["flip_rate"] == pytest.approx(float((before != after).float().mean()))
    assert got["saturation"] == pytest.approx(float(((after == 0) | (after == 255)).float().mean()))
    assert got["update_levels"] == pytest.approx(0.25, rel=1e-3)
    assert got["update_signal"] == pytest.approx(0.25 / (0.25 * 0.75) ** 0.5, rel=1e-3)
    assert summary([]) == {}
    silent = DiodeMix([layer.weight], metrics=False)
    run(silent, [layer.weight], gradients((96, 64), 1))
    assert silent.metrics() == {}
    signs = layer_of(kind=OneBitLinear)
    optimizer = DiodeMix([signs.weight], lr=10.0, betas=(0.9, 0.9))
    run(optimizer, [signs.weight], gradients((96, 64), 1))
    got = optimizer.metrics()
    assert got["flip_rate"] == pytest.approx(got["update_levels"], abs=0.02)  # inertia is nothing to such votes
    assert 0.4 < got["flip_rate"] < 0.6


def test_metrics_are_of_the_last_step_alone():
    first, second = layer_of(8), layer_of(8)
    optimizer = DiodeMix([first.weight, second.weight], lr=float(first.scales[0, 0]) / 4, betas=(0.9, 0.99))
    run(optimizer, [first.weight, second.weight], gradients((96, 64), 1))
    run(optimizer, [second.weight], gradients((96, 64), 1))
    tallies = list(optimizer._tallies)
    assert tallies == [id(second.weight)]
    optimizer.step()
    assert optimizer.metrics() == {}


def test_metrics_of_a_fused_optimizer_are_those_of_the_last_pass():
    layers = [layer_of(), layer_of()]
    optimizer = DiodeMix([layer.weight for layer in layers], fused=True)
    x = torch.randn(4, 96)
    for used in (layers, layers[:1], layers, layers[1:]):
        sum(layer(x).square().sum() for layer in used).backward()
        optimizer.step()
        assert set(optimizer._tallies) == {id(layer.weight) for layer in used}
        assert optimizer.metrics()["update_levels"] > 0
    layers[1](x).square().sum().backward()
    optimizer.unfuse()
    layers[0](x).sum().backward()
    optimizer.step()
    assert list(optimizer._tallies) == [id(layers[0].weight)]
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.metrics() == {}


# --- within backward ------------------------------------------------------------------------------------------


class Searched(list):
    """A list that counts how often it is gone through."""

    times = 0

    def __iter__(self):
        Searched.times += 1
        return super().__iter__()


def test_a_fused_step_goes_through_no_other_parameters():
    """Or the time of a pass would grow with the square of their number."""
    model = mixed(torch.float32)
    optimizer = DiodeMix([p for p in model.parameters() if p.requires_grad], fused=True)
    (group,) = optimizer.param_groups
    group["params"] = Searched(group["params"])
    sum(layer(torch.randn(2, 96)).sum() for layer in model).backward()
    assert len(optimizer.state) == 5
    assert Searched.times == 0


def test_a_fused_optimizer_follows_its_groups():
    """Options of a loaded state count, and a group that comes later is stepped by step()."""
    layers, plain = [layer_of(), layer_of()], [layer_of(), layer_of()]
    fused, other = (DiodeMix([both[0].weight], lr=1.0, fused=both is layers, seed=1) for both in (layers, plain))
    generator = torch.Generator().manual_seed(0)
    for optimizer, both in ((fused, layers), (other, plain)):
        saved = optimizer.state_dict()
        saved["param_groups"][0]["lr"] = 1e-2
        optimizer.load_state_dict(saved)
        optimizer.add_param_group({"params": [both[1].weight], "lr": 1e-3})
    for _ in range(3):
        x = torch.randn(4, 96, generator=generator)
        for optimizer, both in ((fused, layers), (other, plain)):
            sum(layer(x).square().sum() for layer in both).backward()
            assert (both[0].weight.grad is None) == (optimizer is fused)
            optimizer.step()
            optimizer.zero_grad()
        assert fused.metrics() == pytest.approx(other.metrics())
    for a, b in zip(layers, plain, strict=True):
        assert torch.equal(a.weight.data, b.weight.data)
    fused.fuse()
    sum(layer(x).sum() for layer in layers).backward()
    assert all(layer.weight.grad is None for layer in layers)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_goes_on_and_is_not_fused(copied):
    layer = layer_of()
    optimizer = DiodeMix([layer.weight], lr=1e-2)
    run(optimizer, [layer.weight], gradients((96, 64), 2))
    other, twin = copied((optimizer, layer))
    assert other.metrics() == {}
    for one, weight in ((optimizer, layer.weight), (other, twin.weight)):
        run(one, [weight], gradients((96, 64), 2, seed=5))
    assert torch.equal(layer.weight.data, twin.weight.data)
    assert other.metrics() == optimizer.metrics() != {}
    optimizer.fuse()
    other, twin = copied((optimizer, layer))
    twin(torch.randn(2, 96)).sum().backward()
    assert twin.weight.grad is not None


# --- memory ---------------------------------------------------------------------------------------------------


class LargestFloat(TorchDispatchMode):
    """The most numbers of a floating tensor that any operation made."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.found = max(self.found, tensor.numel())
        return result


def floats_alive():
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]  # its type, since some are lazy
    return sum(t.numel() for t in tensors if t.is_floating_point())


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("kind", [MPQLinear, OneBitLinear])
def test_no_float_copy_of_the_weight_is_made(monkeypatch, kind, rank):
    monkeypatch.setattr("hf_onebit.nn.packed_update._TILE", 1024)
    layer = layer_of(K=128, N=128, kind=kind)
    optimizer = DiodeMix([layer.weight], rank=rank)
    layer.weight.grad = torch.randn(128, 128)
    optimizer.step()
    before = floats_alive()
    with LargestFloat() as mode:
        optimizer.step()
    assert 0 < mode.found <= (128 * 16 if rank else 2048)
    assert floats_alive() == before
    with LargestFloat() as mode:
        layer.dequantize()
    assert mode.found >= 128 * 128  # it sees them


def test_training_takes_at_most_three_bytes_a_weight(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(MPQLinear(128, 128, False, bits=4) for _ in range(32)))
    for layer in model:
        layer.weight.requires_grad_(True)
    weights = 32 * 128 * 128
    held = sum(p.nbytes for p in model.parameters())
    x = torch.randn(1, 128)
    # Without updates in backward there is a float gradient of everything.
    assert allocated(lambda: model(x).sum().backward()).peak / weights > 4
    optimizer = DiodeMix([layer.weight for layer in model], fused=True)
    optimizer.zero_grad()
    states = allocated(lambda: model(x).sum().backward()).left
    assert 2.5 < (held + states) / weights < 2.7  # half a byte of codes, two moments of one each, and their peaks
    # A step's pieces take the same memory whatever the model's size: here they are small like the model. Each layer's
    # step is like the others', and the profiler is slow, so it looks at two of them.
    monkeypatch.setattr("hf_onebit.nn.packed_update._TILE", 512)
    for layer in model[2:]:
        layer.weight.requires_grad_(False)
    within = allocated(lambda: model(x).sum().backward())
    assert (held + states + within.peak) / weights <= 3
    assert within.left < 0.01 * weights
    assert within.peak > 4 * 128 * 128  # the gradient of one layer was there

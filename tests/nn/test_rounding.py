"""How packed codes take steps: stochastic rounding without bias, flips by inertia, and what does not depend on what."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hf_onebit.algorithms.counter_random import fraction, random_words
from hf_onebit.formats.weight_layout import pack_zero_points
from hf_onebit.nn import MPQLinear, MPQWeightParameter, OneBitLinear
from hf_onebit.nn.packed_update import _TILE
from hf_onebit.nn.sign_parameter import SignWeightParameter


def learning(bits=4, K=128, N=64, **options):
    layer = MPQLinear(K, N, False, bits=bits, group_size=32, **options)
    layer.weight.requires_grad_(True)
    return layer


def codes_of(weight):
    return weight.weight_layout().unpack(weight.data)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("levels", [0.003, -0.4, 1.7])
def test_the_mean_of_many_draws_is_the_step(bits, levels):
    layer = learning(bits)
    scale = float(layer.scales[0, 0])
    before = codes_of(layer.weight).double()
    # Where there is room for the step; what is cut off at the ends is no rounding.
    free = (before - levels >= 1) & (before - levels <= (1 << bits) - 2)
    if bits == 1:
        free = before == (1 if levels > 0 else 0)
        levels = max(-0.9, min(levels, 0.9))
    draws, total = 100, torch.zeros_like(before)
    for seed in range(draws):
        weight = copy.deepcopy(layer).weight
        weight.seed = seed
        # One step from nothing is the gradient's sign.
        MPQWeightParameter.update(
            weight, lr=scale * abs(levels), grad=torch.full((128, 64), 1.0 if levels > 0 else -1.0)
        )
        total += codes_of(weight).double() - before
    moved = total[free] / draws
    part = abs(levels) % 1
    sigma = (part * (1 - part) / (draws * int(free.sum()))) ** 0.5
    assert int(free.sum()) > 1000
    assert abs(float(moved.mean()) + levels) < 4 * sigma + 1e-4
    # Nor is a single weight favoured.
    spread = float((moved + levels).square().mean()) / (part * (1 - part) / draws)
    assert 0.8 < spread < 1.2


@pytest.mark.parametrize("bits", [4, 8])
def test_small_steps_add_up_by_moving_codes(bits):
    torch.manual_seed(0)
    results = {}
    for rounding in ("stochastic", "nearest"):
        layer = learning(bits)
        layer.weight.rounding = rounding
        scale = float(layer.scales[0, 0])
        gradient = torch.randn(128, 64).sign()
        before, start = codes_of(layer.weight).double(), layer.dequantize().T
        room = torch.where(gradient > 0, before, (1 << bits) - 1 - before) >= 9
        step = torch.tensor(0)
        v, m = torch.zeros(128, 64), torch.zeros(128, 64)
        about = {"beta1": 0.9, "beta2": 0.99, "correct_bias": True}
        for _ in range(400):
            MPQWeightParameter.update(layer.weight, v, m, step, lr=scale / 100, grad=gradient, **about)
        moved = ((start - layer.dequantize().T) * gradient)[room]
        results[rounding] = float(moved.mean()) / (4 * scale)
        assert int(room.sum()) > 1000
        if rounding == "stochastic":
            assert torch.equal(layer.scales, learning(bits).scales)
            assert float((codes_of(layer.weight).double() != before)[room].double().mean()) > 0.9
    assert 0.9 < results["stochastic"] < 1.1
    assert results["nearest"] == 0


def stepped(seed=3, stream=1, steps=3, dtype=torch.float16, layer=None):
    if layer is None:
        torch.manual_seed(0)
        layer = learning(symmetric=False)
    layer.weight.seed, layer.weight.stream = seed, stream
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        grad = torch.randn(128, 64, generator=generator)
        MPQWeightParameter.update(layer.weight, lr=1e-3, dtype=dtype, grad=grad)
    return layer.weight.data.clone()


def test_updates_repeat_and_depend_on_seed_and_stream():
    first = stepped()
    assert torch.equal(first, stepped())
    assert not torch.equal(first, stepped(seed=4))
    assert not torch.equal(first, stepped(seed=3 + (1 << 32)))
    assert not torch.equal(first, stepped(stream=2))


def test_updates_do_not_depend_on_pieces_or_threads(monkeypatch):
    expected = stepped()
    for tile in (1, 1000, 5 * 128, _TILE):
        monkeypatch.setattr("hf_onebit.nn.packed_update._TILE", tile)
        assert torch.equal(stepped(), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(stepped(), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_internal_count_goes_on_in_copies_and_moves():
    torch.manual_seed(0)
    layer = learning(symmetric=False)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(128, 64, generator=generator) for _ in range(4)]

    def run(layer, some):
        for grad in some:
            MPQWeightParameter.update(layer.weight, lr=1e-3, grad=grad)

    whole = copy.deepcopy(layer)
    run(whole, grads)
    run(layer, grads[:2])
    assert layer.weight.updates == 2
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    assigned = learning(symmetric=False)
    vars(assigned.weight)["updates"] = 2
    assigned.load_state_dict(layer.state_dict(), assign=True)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stream, weights_only=False),
        copy.deepcopy(layer).to("cpu", torch.float16),
        assigned,
    ]
    for other in copies:
        assert other.weight.updates == 2
        run(other, grads[2:])
        assert torch.equal(other.weight.data, whole.weight.data)


def test_moments_without_a_state_are_corrected_as_a_first_step():
    results = []
    for step in (torch.tensor(0), torch.tensor(500)):
        layer = learning(8)
        torch.manual_seed(0)
        nn.init.zeros_(layer.weight)
        layer.weight.rounding = "nearest"
        scale = float(layer.scales[0, 0])
        options = {"lr": 3 * scale, "correct_bias": True, "grad": -torch.ones(128, 64)}
        MPQWeightParameter.update(layer.weight, step=step, **options)
        results.append(codes_of(layer.weight))
        assert int(results[-1].min()) == 3
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rounding", "up", "rounding is 'up', expected one of stochastic, nearest, inertia"),
        ("rounding", "inertia", "rounding='inertia' flips signs, got codes up to 15"),
        ("seed", -1, "seed is -1"),
        ("seed", 1 << 64, "expected a whole number from 0 to 2.64 - 1"),
        ("stream", 1 << 32, "stream is"),
        ("stream", 1.0, "stream is 1.0"),
    ],
)
def test_wrong_training_attributes(name, value, message):
    weight = learning().weight
    setattr(weight, name, value)
    words = weight.data.clone()
    with pytest.raises(ValueError, match=message):
        MPQWeightParameter.update(weight, lr=1.0, grad=torch.ones(128, 64))
    assert torch.equal(weight.data, words)
    assert weight.updates == 0


# --- signs --------------------------------------------------------------------------------------------------


def naive_flips(x, direction, m, n, lr, wd, beta1, beta2, eps):
    """Signs after one step of double momentum, in float64 by the documented rule; m and n move too."""
    m.mul_(beta1).add_((1 - beta1) * direction)
    rho = m.square().mean(0, keepdim=True).sqrt()
    n.mul_(beta2 * (1 - lr * wd)).add_((1 - beta2) * lr * m / (m.abs() + eps * rho))
    return torch.where(n > 0, -1.0, torch.where(n < 0, 1.0, x)), n.abs() < 1e-12


@pytest.mark.parametrize("K", [64, 70])
def test_flips_against_float64(K):
    torch.manual_seed(0)
    layer = OneBitLinear(K, 48, False)
    with torch.no_grad():
        layer.a.copy_(torch.randn(48))
        layer.b.copy_(torch.randn(K))
    weight = layer.weight
    assert type(weight) is SignWeightParameter
    assert weight.rounding == "inertia"
    x = layer.weight.weight_layout().unpack(weight.data).double() * 2 - 1
    signs = (layer.b.double()[:, None] * layer.a.double()[None]).sign()
    n = -x * fraction(random_words((K, 48), 0, 0, 0), torch.float64) * 1e-3
    got_n = torch.zeros(K, 48, dtype=torch.float64)
    weight.start_inertia(got_n)
    torch.testing.assert_close(got_n, n, rtol=1e-6, atol=1e-12)
    n = got_n.clone()
    m, got_m = torch.zeros(K, 48, dtype=torch.float64), torch.zeros(K, 48, dtype=torch.float64)
    step, changed, start = torch.tensor(0), 0, x
    options = {"lr": 1e-2, "weight_decay": 0.3, "beta1": 0.9, "beta2": 0.95, "eps": 0.01}
    for _ in range(6):
        grad = torch.randn(K, 48)
        MPQWeightParameter.update(weight, got_n, got_m, step, **options, dtype=torch.float64, grad=grad)
        x, ties = naive_flips(x, grad.double() * signs, m, n, 1e-2, 0.3, 0.9, 0.95, 0.01)
        torch.testing.assert_close(got_m * signs, m)
        torch.testing.assert_close(got_n, n)
        got = layer.weight.weight_layout().unpack(weight.data).double() * 2 - 1
        assert torch.equal(got[~ties], x[~ties])
        changed += int((x != start).sum())
    assert changed > 100
    if K % 32:
        assert not bool((weight.data[-1] >> K % 32).any())  # padding bits stay zero


def test_inertia_holds_signs_back_and_a_steady_gradient_turns_them():
    layer = OneBitLinear(64, 32, False)
    weight = layer.weight
    want = torch.where(torch.rand(64, 32) < 0.5, -1.0, 1.0)
    gradient = -want * (layer.a.float()[None, :] * layer.b.float()[:, None]).sign()
    n, m = torch.zeros(64, 32), torch.zeros(64, 32)
    weight.start_inertia(n)
    shares = []
    for _ in range(100):
        MPQWeightParameter.update(weight, n, m, lr=1e-3, beta1=0.9, beta2=0.97, grad=gradient)
        signs = weight.weight_layout().unpack(weight.data) * 2.0 - 1
        shares.append(float((signs == want).float().mean()))
    assert 0.4 < shares[0] < 0.6  # inertia
    assert shares == sorted(shares)
    assert shares[30] > shares[0] + 0.1
    assert shares[-1] == 1


def test_signs_without_states_rarely_flip():
    layer = OneBitLinear(64, 64, False)
    before = layer.weight.data.clone()
    # A flip takes a start below (1 - β₂) lr / β₂: 1 % of them here, of the half that the gradient is against.
    options = {"lr": 1e-3, "beta2": 0.99, "grad": torch.ones(64, 64)}
    layer.weight.update(layer.weight, **options)
    flips = sum(int(b) for b in (before ^ layer.weight.data).view(torch.uint8).flatten().tolist() for b in bin(b)[2:])
    assert 1 <= flips <= 60
    assert layer.weight.updates == 1


def test_the_steps_of_one_bit_codes_and_of_signs_agree():
    torch.manual_seed(0)
    signs = OneBitLinear(64, 32, False)
    codes = MPQLinear(64, 32, False, bits=1, group_size=32)
    with torch.no_grad():
        signs.a.fill_(0.5)
        signs.b.fill_(0.25)
        codes.scales.fill_(0.25)  # levels 0 and 1 less a half
        codes.weight.copy_(signs.weight)
    assert codes.weight.rounding == "stochastic"
    grad = torch.randn(64, 32)
    for rounding, lr in (("stochastic", 0.05), ("nearest", 0.3)):
        for layer in (signs, codes):
            layer.weight.rounding, layer.weight.seed = rounding, 9
        pair = [layer.weight for layer in (signs, codes)]
        for weight in pair:
            MPQWeightParameter.update(weight, lr=lr, grad=grad)
        assert torch.equal(pair[0].data, pair[1].data)


@pytest.mark.parametrize("change", ["a", "shape"])
def test_signs_that_stand_for_nothing(change):
    weight = OneBitLinear(64, 32, False).weight
    if change == "a":
        weight.a = None
        message = "a or b is None"
    else:
        weight.b = torch.ones(96)
        message = r"packed signs must be int32 \(3, 32\) for 96 inputs"
    with pytest.raises(ValueError, match=message):
        MPQWeightParameter.update(weight, grad=torch.ones(64, 32))


def test_zero_points_of_gptq_and_a_zero_scale_stay_where_they_are():
    points = torch.full((2, 32), 8)
    weight = MPQWeightParameter(
        torch.zeros(8, 32, dtype=torch.int32), scales=torch.tensor([[0.0], [0.5]]).expand(2, 32).clone(),
        zeros=pack_zero_points(points, 4), asym=True, w_bit=4, group_size=32, layer_type=1,
    )  # fmt: skip
    zeros = weight.zeros.clone()
    MPQWeightParameter.update(weight, lr=0.6, grad=-torch.ones(64, 32))
    codes = codes_of(weight)
    assert int(codes[:32].max()) == 0
    assert set(codes[32:].flatten().tolist()) == {1, 2}
    assert torch.equal(weight.zeros, zeros)

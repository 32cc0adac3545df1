"""Wrong input of ``DiodeMix``, its groups and states: refused by the option's own name, and nothing has changed."""

import copy

import pytest
import torch
from torch import nn

from hf_onebit import DiodeMix, diode_mix
from hf_onebit.nn import MPQLinear, OneBitLinear

NAN, INF = float("nan"), float("inf")
NUMBER = "expected a finite number >= 0"
BETA = "expected a number from 0 to below 1"
BOOL = "expected True or False"
WHOLE = "expected a whole number"

OPTIONS = [
    *((name, value, NUMBER) for name in ("lr", "eps", "weight_decay", "scale") for value in ("a", -1.0, NAN, INF)),
    *(("lr", value, NUMBER) for value in (None, True, 10**400, [1e-3], 1j, torch.zeros(2), torch.tensor(-1.0))),
    ("betas", 0.9, "expected two numbers"),
    ("betas", None, "expected two numbers"),
    ("betas", "ab", "expected two numbers"),
    ("betas", (0.9,), "expected two numbers"),
    ("betas", (0.9, 0.9, 0.9), "expected two numbers"),
    ("states", "int8", "expected one of 8bit, factored, float32"),
    ("states", None, "expected one of 8bit"),
    ("states", ["8bit"], "expected one of 8bit"),
    ("rounding", "up", "expected None or one of stochastic, nearest, inertia"),
    ("rounding", 1, "expected None or one of"),
    *(("rank", value, WHOLE) for value in (0, -1, 2.0, "8", True)),
    *(("update_proj_gap", value, WHOLE) for value in (0, None, 1.5, "200")),
    *(("seed", value, WHOLE) for value in (-1, 1 << 64, 0.5, "0")),
    *((name, value, BOOL) for name in ("correct_bias", "metrics") for value in (None, 1, "yes")),
    *(("dtype", value, "expected a floating torch.dtype") for value in (None, "float32", torch.int8, torch.complex64)),
]
BETAS = [(("a", 0), r"betas\[0\]='a'"), ((0.9, 1.0), r"betas\[1\]=1.0"), ((-0.1, 0), r"betas\[0\]=-0.1")]
BETAS += [((0.9, NAN), r"betas\[1\]=nan"), ((True, 0.9), r"betas\[0\]=True")]
ALL = [(name, value, rf"got {name}=.*{expected}") for name, value, expected in OPTIONS]
ALL += [("betas", value, rf"got {message}, {BETA}") for value, message in BETAS]
ONLY_WHOLE = [
    *(
        (name, value, rf"got {name}=.*{NUMBER}")
        for name in ("lr_packed", "lr_signs", "lr_scales")
        for value in ("a", -1)
    ),
    ("lr_signs", NAN, rf"got lr_signs=nan, {NUMBER}"),
    ("fused", None, rf"got fused=None, {BOOL}"),
    ("fused", "no", rf"got fused='no', {BOOL}"),
]


def parameter():
    return nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(("name", "value", "message"), ALL + ONLY_WHOLE)
def test_wrong_options(name, value, message):
    for make in (lambda: diode_mix(**{name: value}), lambda: DiodeMix([parameter()], **{name: value})):
        with pytest.raises(ValueError, match=rf"^DiodeMix {message}"):
            make()


@pytest.mark.parametrize(("name", "value", "message"), ALL)
def test_wrong_options_of_groups_and_states(name, value, message):
    first, second = parameter(), parameter()
    with pytest.raises(ValueError, match=rf"^DiodeMix's param group 1 {message}"):
        DiodeMix([{"params": [first]}, {"params": [second], name: value}])
    optimizer = DiodeMix([first])
    with pytest.raises(ValueError, match=rf"^DiodeMix's param group 1 {message}"):
        optimizer.add_param_group({"params": [second], name: value})
    assert len(optimizer.param_groups) == 1
    state = optimizer.state_dict()
    state["param_groups"][0][name] = value
    before = copy.deepcopy(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=rf"^DiodeMix's state, param group 0, {message}"):
        optimizer.load_state_dict(state)
    assert str(optimizer.param_groups[0]) == str(before)
    # What a schedule, or a user, sets later.
    optimizer.param_groups[0][name] = value
    first.grad = torch.ones(2)
    with pytest.raises(ValueError, match=rf"^DiodeMix's param group 0 {message}"):
        optimizer.step()
    assert not first.detach().any()
    assert not optimizer.state
    optimizer.fuse()
    first.grad = None
    with pytest.raises(ValueError, match=rf"^DiodeMix's param group {message}"):
        first.sum().backward()
    assert not first.detach().any()


def test_lr_signs_is_looked_at_where_there_are_signs():
    signs = OneBitLinear(64, 32, False).weight.requires_grad_(True)
    with pytest.raises(ValueError, match="DiodeMix got lr_signs=-1, expected a finite number >= 0"):
        DiodeMix([signs], lr_signs=-1)


def test_numbers_of_other_kinds_are_taken():
    p = parameter()
    p.grad = torch.ones(2)
    rate = torch.tensor(1e-2)
    optimizer = DiodeMix(
        [p], lr=rate, betas=[torch.tensor(0.9), 0], eps=0, weight_decay=0, scale=0, dtype=torch.float64
    )
    optimizer.step()
    assert torch.allclose(p.detach(), torch.full((2,), -1e-2))


@pytest.mark.parametrize("name", [name for name, _, _ in ONLY_WHOLE[::2]])
def test_options_that_only_the_whole_optimizer_has(name):
    group = {"params": [parameter()], name: 0.1}
    with pytest.raises(ValueError, match=rf"param group 0 got {name}, which only DiodeMix as a whole takes"):
        DiodeMix([group], lr_packed=1e-3)
    optimizer = DiodeMix([parameter()])
    with pytest.raises(ValueError, match=rf"param group 1 got {name}, which only DiodeMix as a whole takes"):
        optimizer.add_param_group(group)


def test_params_that_are_none():
    for wrong in (3, None, torch.zeros(2), nn.Parameter(torch.zeros(2))):
        for rates in ({}, {"lr_packed": 1e-3}):
            with pytest.raises(TypeError, match=r"got params=.*expected parameters in a list"):
                DiodeMix(wrong, **rates)
    for wrong in ({}, {"lr": 1.0}):
        with pytest.raises(ValueError, match=r"param group 0 has the keys .*, expected params among them"):
            DiodeMix([wrong], lr_packed=1e-3)
    with pytest.raises(TypeError, match=r"param group 1 is \[1\], expected a dict"):
        DiodeMix([parameter()]).add_param_group([1])


def test_a_group_that_is_refused_leaves_nothing_behind():
    codes = [MPQLinear(64, 32, False, bits=4, group_size=32).weight.requires_grad_(True) for _ in range(2)]
    one_bit = MPQLinear(64, 32, False, bits=1, group_size=32).weight.requires_grad_(True)
    optimizer = DiodeMix([parameter()])
    for last, options, message in (
        (codes[1], {"rounding": "inertia"}, "rounding='inertia', which flips signs, for codes of 4 bits"),
        (nn.Parameter(torch.zeros(2, dtype=torch.int32), False), {"rounding": "nearest"}, "is no MPQWeightParameter"),
    ):
        with pytest.raises(ValueError, match=f"DiodeMix's param group 1 got .*{message}"):
            optimizer.add_param_group({"params": [one_bit, last], "seed": 5, **options})
        assert len(optimizer.param_groups) == 1
        assert (one_bit.seed, one_bit.rounding) == (0, "stochastic")
    optimizer.add_param_group({"params": [one_bit], "rounding": "inertia"})
    assert one_bit.rounding == "inertia"


def test_states_of_others():
    p = parameter()
    optimizer = DiodeMix([p])
    for wrong in (None, {}, 3, {"state": {}}):
        with pytest.raises(ValueError, match=r"DiodeMix got the state .*, expected what DiodeMix.state_dict\(\) gave"):
            optimizer.load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"param group 0, got no correct_bias and no dtype.*another optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW([p]).state_dict())
    with pytest.raises(ValueError, match="state of parameter 0 has step, expected step and moments"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"step": torch.tensor(1)}}})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**optimizer.state_dict(), "param_groups": []})


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (torch.full((64, 32), NAN), ValueError, "gradient with inf or nan"),
        (torch.full((64, 32), INF), ValueError, "gradient with inf or nan"),
        (torch.ones(64, 32, dtype=torch.int32), ValueError, "got grad of torch.int32, expected a dense tensor"),
        ([1.0], TypeError, r"got grad=\[1.0\], expected a tensor"),
    ],
)
def test_gradients_that_are_none(rank, grad, error, message):
    weight = MPQLinear(64, 32, False, bits=4, group_size=32).weight.requires_grad_(True)
    words = weight.data.clone()
    optimizer = DiodeMix([weight], rank=rank)
    weight.privileged_grad = grad  # past the check of .grad
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(weight.data, words)
    weight.privileged_grad = torch.ones(64, 32)
    optimizer.step()
    assert int(optimizer.state[weight]["step"]) == 1


def test_grad_takes_what_pytorch_takes():
    weight = MPQLinear(64, 32, False, bits=4, group_size=32).weight
    for wrong in ([1.0], 3, torch.ones(64, 32, dtype=torch.int32)):
        with pytest.raises(TypeError, match=r"grad of packed words is .*, expected None or a floating tensor"):
            weight.grad = wrong
    weight.grad = torch.ones(64, 32)
    weight.grad = None

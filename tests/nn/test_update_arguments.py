"""Wrong arguments of ``MPQWeightParameter.update``: refused by name, and words, moments and counts are as they were."""

import time

import pytest
import torch

from hf_onebit.algorithms.moments import BlockwiseMoment, FactoredMoment
from hf_onebit.nn import MPQLinear, MPQWeightParameter, OneBitLinear
from hf_onebit.nn.parameter_checks import check_update
from hf_onebit.nn.update_step import Step

NAN, INF = float("nan"), float("inf")
SHAPE = (64, 32)
ONES = torch.ones(SHAPE)
SHARED = torch.ones(SHAPE)
NUMBER, BETA = "expected a finite number >= 0", "expected a number from 0 to below 1"
DENSE = "expected a dense tensor of float16, bfloat16, float32 or float64"
STEP = "expected None or a tensor of one number"

ARGUMENTS = [
    *(
        ({name: value}, ValueError, rf"got {name}=.*{NUMBER}")
        for name in ("lr", "weight_decay", "eps")
        for value in (NAN, INF, -1, -1e-9, "1e-4", None, True, 1j, [1.0], torch.zeros(2), 10**400)
    ),
    *(
        ({name: value}, ValueError, rf"got {name}=.*{BETA}")
        for name in ("beta1", "beta2")
        for value in (1.0, 1.5, -1, NAN, "0.9", None, False)
    ),
    *(({"dtype": value}, TypeError, "got dtype=.*expected a torch.dtype") for value in (None, "float16", float, 3)),
    *(
        ({"dtype": value}, ValueError, "got dtype=torch.*expected float16, bfloat16, float32 or float64")
        for value in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    *(({"step": value}, TypeError, rf"got step=.*{STEP}.*torch.tensor\(0\)") for value in (3, 0, 1.0, "1", [1])),
    *(
        ({"step": value}, ValueError, rf"got step=.*{STEP}")
        for value in (
            torch.zeros(2), torch.zeros(0), torch.tensor(True), torch.tensor(1, dtype=torch.int8), torch.tensor(1j),
            torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(0, device="meta"),
        )
    ),
    *(
        ({"step": torch.tensor(value)}, ValueError, "got step=.*expected a whole number >= 0")
        for value in (-1, -1.0, NAN, INF, 0.5)
    ),
    *(({"correct_bias": value}, TypeError, "got correct_bias=.*True, False or None") for value in ("x", 2, [])),
    *(({"projector": value}, TypeError, "got projector=.*project_back") for value in (3, "svd", object())),
    ({"grad": [1]}, TypeError, r"got grad=\[1\], expected a tensor"),
    ({"grad": 1.0}, TypeError, "got grad=1.0, expected a tensor"),
    ({"grad": torch.ones(SHAPE, dtype=torch.int32)}, ValueError, f"got grad of torch.int32, {DENSE}"),
    ({"grad": torch.ones(SHAPE, dtype=torch.complex64)}, ValueError, f"got grad of torch.complex64, {DENSE}"),
    ({"grad": ONES.to_sparse()}, ValueError, f"got grad of torch.sparse_coo, {DENSE}"),
    ({"grad": ONES.to("meta")}, ValueError, "got grad on meta, expected cpu"),
    ({"grad": torch.ones(64)}, ValueError, r"gradient of shape \(64,\)"),
    ({"grad": torch.ones(32, 64)}, ValueError, r"gradient of shape \(32, 64\), expected \(in, out\) = \(64, 32\)"),
    ({"grad": torch.full(SHAPE, INF)}, ValueError, "gradient with inf or nan; nothing was changed"),
    *(
        ({name: value}, error, message)
        for name in ("exp_avg_s", "exp_avg_l")
        for value, error, message in (
            (3, TypeError, f"got {name}=3, expected None, a tensor, or a moment"),
            ([1.0], TypeError, f"got {name}=.*expected None, a tensor, or a moment"),
            (torch.zeros(SHAPE, dtype=torch.int32), ValueError, f"got {name} of torch.int32, {DENSE}"),
            (ONES.to_sparse(), ValueError, f"got {name} of torch.sparse_coo, {DENSE}"),
            (ONES.to("meta"), ValueError, f"got {name} on meta, expected cpu"),
            (torch.zeros(64, 1).expand(SHAPE), ValueError, f"got {name} with numbers that share memory"),
            (torch.zeros(2, 2), ValueError, rf"{name} has shape \(2, 2\), expected the gradient's \(64, 32\)"),
            (BlockwiseMoment.zeros((2, 2), True, 0), ValueError, rf"{name} has shape \(2, 2\)"),
        )
    ),
    ({"exp_avg_l": FactoredMoment.zeros(SHAPE)}, ValueError, "exp_avg_l as a FactoredMoment, which has no signs"),
    ({"exp_avg_l": BlockwiseMoment.zeros(SHAPE, False, 0)}, ValueError, "exp_avg_l as a BlockwiseMoment without signs"),
    ({"exp_avg_s": SHARED, "exp_avg_l": SHARED}, ValueError, "one object as exp_avg_s and exp_avg_l"),
    ({"exp_avg_s": SHARED, "grad": SHARED}, ValueError, "got grad as a moment too"),
]  # fmt: skip


def refused(weight, error, message, arguments, states):
    """Update with wrong arguments, and look at everything that it could have changed."""
    step = torch.tensor(4)
    words = weight.data.clone()
    before = [state.clone() for state in states]
    with pytest.raises(error, match=message):
        MPQWeightParameter.update(weight, **{"step": step, **arguments})
    assert torch.equal(weight.data, words)
    assert int(step) == 4
    assert weight.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))


@pytest.mark.parametrize(("wrong", "error", "message"), ARGUMENTS)
def test_wrong_arguments_change_nothing(wrong, error, message):
    weight = MPQLinear(64, 32, False, bits=4, group_size=32).weight
    m, v = torch.ones(SHAPE), torch.ones(SHAPE)
    arguments = {"lr": 0.1, "grad": ONES, "exp_avg_s": v, "exp_avg_l": m, **wrong}
    refused(weight, error, rf"(?s){message}", arguments, (m, v))
    # And without a count of the caller's.
    words = weight.data.clone()
    with pytest.raises(error):
        MPQWeightParameter.update(weight, **{"step": None, **arguments})
    assert weight.updates == 0
    assert torch.equal(weight.data, words)


def test_a_gradient_of_its_own_is_named_too():
    weight = MPQLinear(64, 32, False, bits=4, group_size=32).weight
    weight.privileged_grad = ONES.int()
    refused(weight, ValueError, "got privileged_grad of torch.int32", {}, ())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (FactoredMoment.zeros(SHAPE), "exp_avg_s as a FactoredMoment, which has no signs"),
        (BlockwiseMoment.zeros(SHAPE, False, 1), "exp_avg_s as a BlockwiseMoment without signs"),
    ],
)
def test_inertia_is_signed(state, message):
    weight, m = OneBitLinear(64, 32, False).weight, torch.ones(SHAPE)
    arguments = {"grad": ONES, "exp_avg_s": state, "exp_avg_l": m}
    refused(weight, ValueError, message, arguments, (m, *vars(state).values())[:3])
    weight.inertia = "much"
    refused(weight, ValueError, "the weight got inertia='much', expected a finite number >= 0", {"grad": ONES}, ())


class Projector:
    """Rows of the gradient, and back whatever a test says."""

    def __init__(self, back=None, forth=None):
        self.back, self.forth = back, forth

    def project_back(self, low):
        if isinstance(self.back, Exception):
            raise self.back
        return self.back


class Whole(Projector):
    def project(self, grad, step):
        return self.forth


@pytest.mark.parametrize(
    ("projector", "error", "message"),
    [
        (Projector(), TypeError, r"a projector without project\(tensor, step\)"),
        (Whole(forth=3), ValueError, "the projector's project gave 3, expected a floating tensor"),
        (Whole(forth=torch.ones(16)), ValueError, r"project gave a tensor of torch.float32 \(16,\)"),
        (Whole(forth=torch.ones(8, 32)), ValueError, r"exp_avg_s has shape \(16, 32\), expected the gradient's"),
        (Whole(ONES[:3], ONES[:16]), ValueError, r"project_back gave .* \(3, 32\), expected the weight's .*\(64, 32\)"),
        (Whole(None, ONES[:16]), ValueError, "project_back gave None"),
        (Whole(ZeroDivisionError("own"), ONES[:16]), ZeroDivisionError, "own"),
    ],
)
@pytest.mark.parametrize("kind", ["tensors", "factored"])
@pytest.mark.parametrize("signs", [False, True])
def test_projectors_that_fail_leave_the_moments(projector, error, message, kind, signs):
    weight = (OneBitLinear(64, 32, False) if signs else MPQLinear(64, 32, False, bits=4, group_size=32)).weight
    first, second = torch.full((16, 32), 0.5), torch.full((16, 32), 0.5)
    if kind == "factored":
        first, second = BlockwiseMoment.zeros((16, 32), True, 0), FactoredMoment.zeros((16, 32))
    if signs:
        second = torch.full(SHAPE, 0.5)
        message = message.replace("exp_avg_s", "exp_avg_l")
    states = [t for s in (first, second) for t in ([s] if isinstance(s, torch.Tensor) else vars(s).values())]
    states = [t for t in states if isinstance(t, torch.Tensor)]
    arguments = {"grad": torch.randn(SHAPE), "projector": projector, "exp_avg_s": second, "exp_avg_l": first}
    refused(weight, error, message, arguments, states)


def test_what_is_taken():
    weight = MPQLinear(64, 32, False, bits=4, group_size=32).weight
    plain = {"lr": 0.1, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0, "grad": ONES}
    same = {"lr": torch.tensor(0.1, dtype=torch.float64), "beta1": 0, "eps": torch.zeros(1), "correct_bias": False}
    words, results = weight.data.clone(), []
    for more in ({}, same, {"step": torch.tensor(0)}, {"step": torch.tensor([0.0])}):
        weight.data.copy_(words)
        weight.updates = 0
        MPQWeightParameter.update(weight, **{**plain, **more})
        results.append(weight.data.clone())
        assert weight.updates == (0 if "step" in more else 1)
        assert int(more.get("step", 1)) == 1
    assert all(torch.equal(result, results[0]) for result in results)
    assert not torch.equal(results[0], words)


def test_looking_costs_next_to_nothing():
    weight = MPQLinear(64, 32, False, bits=4, group_size=32).weight
    step = Step(ONES, SHARED, torch.tensor(0), 0.1, 0.0, 0.9, 0.99, 1e-6, torch.float32, True, None)
    grad = torch.zeros(SHAPE)
    best = INF
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(10):
            check_update(weight, grad, step, False)
        best = min(best, (time.perf_counter() - start) / 10)
    assert best < 500e-6  # measured: some 10 µs; a step of the smallest layer takes a hundred and more

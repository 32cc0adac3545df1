"""The greedy choice of options against the best of all choices, counted out."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_onebit.algorithms.allocation import Option, allocate, depth_ramp

OPTIONS = st.builds(Option, st.integers(0, 60), st.floats(0, 10, allow_nan=False))
PROBLEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=3), min_size=1, max_size=6)


def best_of_all(options, budget):
    """The slow twin: the least cost of any choice within the budget."""
    costs = [
        math.fsum(option.cost for option in choice)
        for choice in itertools.product(*options)
        if sum(option.bits for option in choice) <= budget
    ]
    return min(costs, default=None)


def best_by_table(options, budget):
    """Another one, by dynamic programming over the bits spent, for more layers than can be counted out."""
    table = {0: 0.0}
    for layer in options:
        following = {}
        for spent, cost in table.items():
            for option in layer:
                bits, total = spent + option.bits, cost + option.cost
                if bits <= budget and total < following.get(bits, math.inf):
                    following[bits] = total
        table = following
    return min(table.values(), default=None)


@settings(deadline=None, max_examples=300)
@given(PROBLEMS, st.integers(0, 300))
def test_greedy_is_within_its_bound_of_the_best(options, budget):
    best = best_of_all(options, budget)
    if best is None:
        with pytest.raises(ValueError, match="too small: the layers take"):
            allocate(options, budget)
        return
    assert best_by_table(options, budget) == pytest.approx(best, abs=1e-9)
    found = allocate(options, budget)
    chosen = [layer[choice] for layer, choice in zip(options, found.choices, strict=True)]
    assert found.bits == sum(option.bits for option in chosen) <= budget
    assert found.cost == math.fsum(option.cost for option in chosen)
    assert found.bound - 1e-9 <= best <= found.cost + 1e-9
    # The gap is below what one layer can gain.
    largest = max(layer[0].cost - min(o.cost for o in layer) for layer in map(sorted, options))
    assert found.cost - found.bound <= largest + 1e-9


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from([3, 9, 27]), st.floats(0, 1), st.floats(0, 1)), min_size=20, max_size=60),
    st.floats(0, 1),
)
def test_many_layers_of_one_or_two_planes(layers, share):
    options = [[Option(size, max(x, y)), Option(2 * size, min(x, y))] for size, x, y in layers]
    least = sum(size for size, *_ in layers)
    budget = int(least * (1 + share))
    found, best = allocate(options, budget), best_by_table(options, budget)
    assert found.bound - 1e-9 <= best <= found.cost + 1e-9
    assert found.cost - best <= max(layer[0].cost - layer[1].cost for layer in options) + 1e-9
    # What is left is too little for any layer that still has something to gain.
    waiting = [layer[0].bits for layer, c in zip(options, found.choices, strict=True)
               if c == 0 and layer[1].cost < layer[0].cost]  # fmt: skip
    assert not waiting or budget - found.bits < min(waiting)


def test_equal_steps_are_filled_exactly():
    options = [[Option(8, 1.0), Option(16, 0.25)]] * 5
    for budget, second in ((40, 0), (47, 0), (48, 1), (79, 4), (80, 5), (10_000, 5)):
        found = allocate(options, budget)
        assert sum(found.choices) == second
        assert found.choices == tuple([1] * second + [0] * (5 - second))
    assert found.bound == found.cost


def test_an_option_off_the_hull_or_without_gain_is_never_chosen():
    options = [[Option(1, 10.0), Option(2, 9.9), Option(3, 0.0)], [Option(1, 1.0), Option(2, 1.0)]]
    assert allocate(options, 100).choices == (2, 0)
    assert allocate(options, 3).choices == (0, 0)  # the middle one is worth less per bit than the whole way
    assert allocate([[Option(5, 1.0), Option(3, 1.0), Option(3, 0.5)]], 5).choices == (2,)


@pytest.mark.parametrize(
    ("options", "budget", "message"),
    [
        ([[]], 1, "layer 0 has no option"),
        ([[Option(1, 0.0)], [Option(-1, 0.0)]], 1, "layer 1 has an option of -1 bits"),
        ([[Option(1, math.nan)]], 1, "cost nan"),
        ([[Option(7, 0.0)], [Option(5, 0.0), Option(9, -1.0)]], 11, "budget of 11 bits is too small: .* 12 at"),
    ],
)
def test_what_cannot_be_allocated_is_refused(options, budget, message):
    with pytest.raises(ValueError, match=message):
        allocate(options, budget)


def test_no_layers_need_no_bits():
    assert allocate([], 0).choices == ()


def test_the_ramp_is_neutral_in_the_middle_and_off_at_zero():
    assert depth_ramp(0.5) == 1.0
    assert depth_ramp(1.0, 0.6) == pytest.approx(math.exp(0.3))
    assert depth_ramp(0.0, 0.6) * depth_ramp(1.0, 0.6) == pytest.approx(1.0)
    assert {depth_ramp(x / 4, 0.0) for x in range(5)} == {1.0}

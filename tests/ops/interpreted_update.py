"""The GPU kernels of the packed weight's step in Triton's interpreter, beside torch's step, to the bit.

Run by test_triton_interpreter.py, in a process of its own.
"""

import dataclasses
import functools

import pytest
import torch
from interpreter import let_loops_run

from hf_onebit.algorithms.moments import BlockwiseMoment
from hf_onebit.formats.packing import pack, word_rows
from hf_onebit.formats.sign_layout import SignLayout
from hf_onebit.formats.weight_layout import WeightLayout
from hf_onebit.nn import gpu_update, packed_update
from hf_onebit.nn.packed_update import update_words
from hf_onebit.nn.update_step import Rounding, Step, Tally

K, N = 40, 5


@pytest.fixture(autouse=True)
def _loops_run():
    let_loops_run()


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def groups_layout(bits=4, zeros="float", perm=False, blocks=None, scale_dtype=torch.float16):
    """Words and their layout: random codes, scales of both signs and of zero."""
    widths = blocks or ((bits, K),)
    parts, held = [], []
    for seed, (b, rows) in enumerate(widths):
        codes = torch.randint(0, 1 << b, (N, rows), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        parts.append(pack(codes, b))
        held.append((b, rows, word_rows(rows, b)))
    rows = sum(n for _, n in widths)
    group = torch.arange(rows) // 32
    if perm:
        group = group[torch.randperm(rows, generator=torch.Generator().manual_seed(1))]
    scales = rand(2, N).to(scale_dtype)
    scales[0, 1] *= -1
    scales[1, 2] = 0
    offsets = {
        "float": (rand(2, N, seed=2), None),
        "codes": (None, rand(2, N, seed=2).round() + 3),
        "none": (None, None),
    }
    floats, points = offsets[zeros]
    middle = torch.cat([torch.full((n, 1), 0.5 if b == 1 else 2.0 ** (b - 1)) for b, n in widths])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3)) if perm else None
    return torch.cat(parts), WeightLayout(
        rows, tuple(held), group, order, scales, floats, points, middle if zeros == "none" else None
    )


def signs_layout():
    words = pack(torch.randint(0, 2, (N, K), generator=torch.Generator().manual_seed(0), dtype=torch.uint8), 1)
    a, b = rand(N).half() - 0.5, rand(K, seed=1).half()
    a[3] = 0
    return words, SignLayout(K, a, b)


def taken(made, step, steps):
    """Words, moments and sums after some steps."""
    words, layout = made
    words, rows = words.clone(), layout.in_features
    states = [s.clone() if isinstance(s, torch.Tensor) else (s() if callable(s) else s)
              for s in (step.exp_avg_s, step.exp_avg_l)]  # fmt: skip
    step = dataclasses.replace(step, exp_avg_s=states[0], exp_avg_l=states[1], tally=step.tally and Tally())
    random = torch.Generator().manual_seed(9)
    for count in range(steps):
        gradient = torch.randn(rows, N, generator=random)
        update_words(words, layout, gradient, dataclasses.replace(step, count=count))
    return words, states, step.tally


def both(monkeypatch, made, step, steps=2):
    expected = taken(made, step, steps)
    calls = []

    def takes(*given):
        calls.append(gpu_update.suits(*given))
        return calls[-1]

    monkeypatch.setattr(packed_update.gpu_update, "takes", takes)
    got = taken(made, step, steps)
    assert calls == [True] * steps
    assert not torch.equal(expected[0], made[0])
    return expected, got


def same(expected, got, exact=True):
    assert torch.equal(got[0], expected[0])
    for mine, theirs in zip(got[1], expected[1], strict=True):
        if isinstance(theirs, torch.Tensor) and exact:
            assert torch.equal(mine, theirs)
        elif isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
    if expected[2] is not None:
        for name, wanted in dataclasses.asdict(expected[2]).items():
            assert float(getattr(got[2], name)) == pytest.approx(float(wanted), rel=1e-4), name


def a_step(first=None, second=None, rounding="stochastic", decay=0.0, tally=False, correct=True, seed=(3 << 32) + 7):
    return Step(second, first, None, 0.3, decay, 0.9, 0.99, 1e-6, torch.float16, correct, None, 0,
                Rounding(rounding, seed, (1 << 31) + 5, 0.5), Tally() if tally else None)  # fmt: skip


def zeros(dtype=torch.float32, rows=K):
    return torch.zeros(rows, N, dtype=dtype)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(monkeypatch, bits):
    same(*both(monkeypatch, groups_layout(bits), a_step(zeros(), zeros(), decay=0.1, tally=True)))


@pytest.mark.parametrize("offsets", ["codes", "none"])
@pytest.mark.parametrize("moments", ["first", "second", "half", "nothing"])
def test_moments_and_offsets(monkeypatch, moments, offsets):
    states = {"first": (zeros(), None), "second": (None, zeros()), "half": (zeros(torch.float16),) * 2}
    first, second = states.get(moments, (None, None))
    made = groups_layout(3 if offsets == "codes" else 2, offsets, scale_dtype=torch.float32)
    same(*both(monkeypatch, made, a_step(first, second, decay=0.2, correct=False)))


def test_nearest(monkeypatch):
    same(*both(monkeypatch, groups_layout(4), a_step(zeros(), zeros(), "nearest", tally=True)))


def test_inputs_in_another_order(monkeypatch):
    same(*both(monkeypatch, groups_layout(4, perm=True), a_step(zeros(), zeros(), decay=0.1)))


@pytest.mark.parametrize("blocks", [((4, 24), (3, 16)), ((8, 7), (2, 33))], ids=str)
def test_blocks_of_several_widths(monkeypatch, blocks):
    same(*both(monkeypatch, groups_layout(blocks=blocks, perm=True), a_step(zeros(), zeros()), steps=1))


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_signs_of_two_scales(monkeypatch, rounding):
    step = dataclasses.replace(
        a_step(zeros(), zeros(), rounding, decay=0.3), lr=0.02 if rounding == "stochastic" else 9
    )
    same(*both(monkeypatch, signs_layout(), step))


def test_moments_in_eight_bits_leave_the_direction_to_torch(monkeypatch):
    monkeypatch.setattr(gpu_update, "WEIGHTS_AT_ONCE", 3 * K)  # pieces of three columns and two
    states = [lambda signed=signed: BlockwiseMoment.zeros((K, N), signed, 0) for signed in (True, False)]
    same(*both(monkeypatch, groups_layout(4), a_step(*states, decay=0.1, tally=True)))


@pytest.mark.parametrize("moments", ["both", "half", "nothing"])
@pytest.mark.parametrize("what", ["signs", "codes", "order"])
def test_flips(monkeypatch, what, moments):
    made = signs_layout() if what == "signs" else groups_layout(1, perm=what == "order")
    dtype = torch.float16 if moments == "half" else torch.float32
    n = None if moments == "nothing" else zeros(dtype)
    first = None if moments == "nothing" else zeros(dtype)
    step = dataclasses.replace(a_step(first, n, "inertia", decay=0.2, tally=True), beta2=0.9)
    same(*both(monkeypatch, made, step), exact=moments == "half")


def test_flips_of_a_moment_in_eight_bits(monkeypatch):
    first = lambda: BlockwiseMoment.zeros((K, N), True, 0)  # noqa: E731
    step = dataclasses.replace(a_step(first, zeros(), "inertia"), beta2=0.9)
    same(*both(monkeypatch, groups_layout(1), step), exact=False)


@pytest.mark.parametrize(
    ("bits", "signs", "rounding"),
    [(3, False, "stochastic"), (1, False, "inertia"), (1, True, "inertia"), (4, False, "nearest")],
)
def test_an_examination_passes_and_sees_wrong_codes(monkeypatch, bits, signs, rounding):
    def examine():
        return gpu_update.examine(torch.device("cpu"), update_words, bits, signs, rounding)

    right = functools.cache(gpu_update.taken)
    monkeypatch.setattr(gpu_update, "taken", right)
    assert examine() == ""
    for place, said in ((0, "codes"), (1, "moments or sums"), (3, "moments or sums")):

        def wrong(*given, place=place):
            found = list(right(*given))
            if given[-1][1] is None:  # the kernels'
                found[place] = found[place] + 1
            return found

        monkeypatch.setattr(gpu_update, "taken", wrong)
        assert examine() == f"gives other {said}, of {bits} bits{', signs,' if signs else ''} with rounding {rounding}"

"""``packed_step``: the compiled kernel against its twin in PyTorch, to the bit; checks, tracing, what is left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_onebit.algorithms.moments import BLOCK, BlockwiseMoment, FactoredMoment
from hf_onebit.formats.packing import pack, word_rows
from hf_onebit.formats.weight_layout import pack_zero_points
from hf_onebit.nn import MPQWeightParameter
from hf_onebit.nn.packed_update import packed_step as twin
from hf_onebit.nn.sign_parameter import SignWeightParameter
from hf_onebit.ops import cpu

OP = torch.ops.hf_onebit.packed_step.default
ISAS = cpu.isas()
compiled = pytest.mark.skipif(cpu.isa() is None, reason=f"no compiled CPU kernels: {cpu.status()}")


@pytest.fixture
def restored():
    before, threads = cpu.isa(), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if before is not None:
        cpu.select_isa(before)


def words_of(codes, bits, rows, held):
    parts = codes.split(rows)
    return torch.cat([pack(p.T, b, check=False)[:h] for p, b, h in zip(parts, bits, held, strict=True)])


def states_of(kind, K, N, flips):
    blocks = -(-K // BLOCK)
    if kind == "none":
        return [None] * 4
    if kind == "float32":
        return [torch.zeros(K, N), None, torch.zeros(K, N), None]
    first = [torch.zeros(K, N, dtype=torch.int8), torch.zeros(blocks, N)]
    if kind == "factored" and not flips:
        return [*first, torch.rand(K) + 0.5, torch.rand(N) + 0.1]
    return [*first, torch.zeros(K, N, dtype=torch.int8 if flips else torch.uint8), torch.zeros(blocks, N)]


def options(rounding="stochastic", weight_decay=0.1, count=1, is_direction=False, seed=0x1234567890ABCDE, column=3):
    numbers = (1e-2, 1.3e-2, weight_decay, 0.9, 0.999, 1e-6, 1e-3)
    return (rounding, *numbers, seed, 7, count, column, is_direction)


def case(K, N, bits=(4,), sizes=None, held=None, zeros=True, perm=False, signs=False, group=32, seed=0, dtype=None):
    """(words, layout's arguments) of a random weight."""
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes or [K]
    held = held or [word_rows(r, b) for r, b in zip(sizes, bits, strict=True)]
    codes = [
        torch.randint(0, 1 << b, (r, N), dtype=torch.uint8, generator=generator)
        for b, r in zip(bits, sizes, strict=True)
    ]
    words = words_of(torch.cat(codes), bits, sizes, held)
    groups = 1 if signs else -(-K // group)
    scales = (torch.rand(groups, N, generator=generator) * 0.1 + 0.01).to(dtype or torch.float16)
    scales[0, 0] = 0  # such a weight stays where it is
    scales[-1, -1] *= -1
    offsets = (scales * 2 ** (bits[0] - 1)) if zeros and not signs else None
    b = torch.randn(K, generator=generator) if signs else None
    # Groups in any order, as g_idx has them.
    index = torch.zeros(K, dtype=torch.int64) if signs else torch.arange(K) // group
    order = torch.randperm(K, generator=generator) if perm else None
    if perm:
        index = index[torch.randperm(K, generator=generator)]
    flat = [number for block in zip(bits, sizes, held, strict=True) for number in block]
    return words, (scales, offsets, b, index, order, flat)


def check_equal(words, layout, kind, rounding, weight_decay=0.1, steps=3, is_direction=False, dtype=torch.float32):
    K, N = layout[3].numel(), words.shape[1]
    ours = [words.clone(), *states_of(kind, K, N, rounding == "inertia")]
    theirs = [None if t is None else t.clone() for t in ours]
    generator = torch.Generator().manual_seed(1)
    for count in range(1, steps + 1):
        # Magnitudes apart by orders, as in one block of a moment.
        gradient = torch.randn(K, N, generator=generator) * 10 ** torch.randn(K, N, generator=generator)
        about = options(rounding, weight_decay, count, is_direction)
        got = OP(ours[0], gradient.to(dtype), *ours[1:], *layout, *about)
        expected = twin(theirs[0], gradient.to(dtype), *theirs[1:], *layout, *about)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert torch.equal(got[:2], expected[:2])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    return ours[0]


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["none", "float32", "8bit", "factored"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "inertia"])
def test_equal_to_its_twin(isa, kind, rounding, restored):
    cpu.select_isa(isa)
    for number, (K, N, bits) in enumerate([(128, 64, 4), (96, 65, 1), (300, 37, 8), (5, 3, 3), (161, 130, 2)]):
        width = 1 if rounding == "inertia" else bits
        for perm in (False, True):
            words, layout = case(K, N, (width,), zeros=bool(number % 2), perm=perm, seed=number)
            after = check_equal(words, layout, kind, rounding, weight_decay=0.1 * (number % 3))
            assert not torch.equal(after, words) or K == 5


@compiled
@pytest.mark.parametrize("bits", range(1, 9))
def test_all_widths(bits):
    for zeros in (False, True):
        words, layout = case(70, 66, (bits,), zeros=zeros)
        check_equal(words, layout, "8bit", "stochastic")


@compiled
@pytest.mark.parametrize("perm", [False, True])
def test_blocks_of_several_widths(perm):
    # The second form is other programs': a block ends after 16 rows where that fills whole words.
    forms = [((8, 6, 5, 4, 3, 2), [32, 64, 40, 100, 7, 30], None), ((8, 4, 2), [48, 16, 144], [12, 2, 9])]
    for bits, sizes, held in forms:
        words, layout = case(sum(sizes), 70, bits, sizes, held, zeros=False, perm=perm)
        check_equal(words, layout, "8bit", "stochastic")


@compiled
@pytest.mark.parametrize("rounding", ["inertia", "stochastic"])
@pytest.mark.parametrize("kind", ["none", "8bit"])
def test_signs(rounding, kind):
    words, layout = case(140, 70, (1,), signs=True, dtype=torch.float32)
    check_equal(words, layout, kind, rounding)


@compiled
@pytest.mark.parametrize("rounding", ["inertia", "stochastic"])
def test_a_direction_in_place_of_the_gradient(rounding):
    words, layout = case(140, 70, (1,))
    check_equal(words, layout, "none", rounding, is_direction=True)


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_and_scales_of_other_dtypes(dtype):
    words, layout = case(96, 70, (4,), dtype=dtype)
    gradient = torch.randn(96, 70).to(dtype)
    ours, theirs = words.clone(), words.clone()
    OP(ours, gradient, *[None] * 4, *layout, *options())
    twin(theirs, gradient, *[None] * 4, *layout, *options())
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, words)


@compiled
@settings(max_examples=40, deadline=None)
@given(
    K=st.integers(1, 200),
    N=st.integers(1, 80),
    bits=st.integers(1, 8),
    zeros=st.booleans(),
    perm=st.booleans(),
    kind=st.sampled_from(["none", "float32", "8bit", "factored"]),
    rounding=st.sampled_from(["stochastic", "nearest"]),
    decay=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 1000),
)
def test_any_shape(K, N, bits, zeros, perm, kind, rounding, decay, seed):
    words, layout = case(K, N, (bits,), zeros=zeros, perm=perm, seed=seed)
    check_equal(words, layout, kind, rounding, decay, steps=2)


@compiled
def test_threads_and_slices_do_not_change_a_bit(restored):
    words, layout = case(300, 400, (4,))
    gradient = torch.randn(300, 400)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state = [words.clone(), *states_of("8bit", 300, 400, False)]
        OP(state[0], gradient, *state[1:], *layout, *options())
        results.append(state)
    wide = [torch.cat((t, t), 1) for t in [words, *states_of("8bit", 300, 400, False)]]
    parts = [t[:, 400:] for t in wide]
    OP(parts[0], torch.cat((gradient, gradient), 1)[:, 400:], *parts[1:], *layout, *options())
    assert torch.equal(wide[0][:, :400], words)
    for other in (*results[1:], parts):
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("seed", [0, (1 << 64) - 5])
def test_update_goes_through_it_and_gives_what_pieces_give(seed, monkeypatch):
    def updated(weight, kind):
        weight.seed = seed
        step, generator = torch.tensor(0), torch.Generator().manual_seed(0)
        K, N = 96, 70
        first, second = torch.zeros(K, N), torch.zeros(K, N)
        if kind != "float32":
            first = BlockwiseMoment.zeros((K, N), True, 0)
            flips = weight.rounding == "inertia"
            second = BlockwiseMoment.zeros((K, N), flips, 1)
            if kind == "factored" and not flips:
                second = FactoredMoment.zeros((K, N))
        for _ in range(3):
            grad = torch.randn(K, N, generator=generator)
            MPQWeightParameter.update(weight, second, first, step, lr=1e-2, weight_decay=0.1, grad=grad)
        return weight.data

    def parameters():
        torch.manual_seed(0)
        words, (scales, zeros, _, index, _, _) = case(96, 70, (4,))
        about = {"requires_grad": False, "w_bit": 4, "group_size": 32, "layer_type": 1}
        yield MPQWeightParameter(words.clone(), scales=scales, zeros=zeros, asym=True, **about)
        yield MPQWeightParameter(words.clone(), scales=scales, g_idx=index.flip(0).int(), **about)
        points = pack_zero_points(torch.randint(1, 17, (3, 70)), 4)
        yield MPQWeightParameter(words.clone(), scales=scales, zeros=points, asym=True, **about)
        order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).int()
        yield MPQWeightParameter(words.clone(), scales=scales, q_perm=order, **{**about, "layer_type": 2})
        signs = SignWeightParameter(case(96, 70, (1,))[0], False)
        signs.a, signs.b = torch.rand(70), torch.randn(96)
        yield signs

    for kind in ("float32", "8bit", "factored"):
        got = [updated(weight, kind) for weight in parameters()]
        with monkeypatch.context() as patched:
            patched.setattr("hf_onebit.nn.packed_update._operator", lambda *args: None)
            expected = [updated(weight, kind) for weight in parameters()]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["none", "float32", "8bit", "factored"])
def test_opcheck(kind):
    words, layout = case(64, 40, (4,))
    state = states_of(kind, 64, 40, False)
    torch.library.opcheck(OP, (words, torch.randn(64, 40), *state, *layout, *options()))


NAMES = (
    ["words", "gradient", "exp_avg_l", "exp_avg_l_peaks", "exp_avg_s", "exp_avg_s_peaks", "scales", "zeros"]
    + ["input_scales", "group", "perm", "blocks", "rounding"]
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("words", torch.zeros(8, 40), "words must be torch.int32, got torch.float32"),
        ("words", torch.zeros(8, 41, dtype=torch.int32), r"words must have shape \(8, 40\), got \(8, 41\)"),
        ("words", torch.zeros(7, 40, dtype=torch.int32), "blocks"),
        ("gradient", torch.zeros(64), r"two dimensions.*and \(64,?\)"),
        ("gradient", torch.zeros(64, 40, dtype=torch.int32), "gradient must be float16.*got torch.int32"),
        ("exp_avg_l", None, "exp_avg_l_peaks came without exp_avg_l"),
        ("exp_avg_l", torch.zeros(64, 39, dtype=torch.int8), r"exp_avg_l must have shape \(64, 40\), got \(64, 39\)"),
        ("exp_avg_l", torch.zeros(64), r"exp_avg_l must have shape \(64, 40\), got \(64,\)"),
        ("exp_avg_l", torch.zeros(64, 40).double(), "exp_avg_l must be torch.float32, or torch.int8 .*torch.float64"),
        ("exp_avg_l", torch.zeros(64, 40), "exp_avg_l_peaks belong to a moment in eight bits"),
        ("exp_avg_l_peaks", None, "exp_avg_l in eight bits needs exp_avg_l_peaks"),
        ("exp_avg_s_peaks", torch.zeros(2, 40), r"exp_avg_s_peaks must have shape \(1, 40\), got \(2, 40\)"),
        ("exp_avg_s_peaks", torch.zeros(1, 40).half(), "exp_avg_s_peaks must be torch.float32, got torch.float16"),
        ("exp_avg_s", torch.zeros(64), "exp_avg_s_peaks must have shape"),
        ("scales", torch.zeros(40), r"scales must have shape \(0, 40\), got \(40,\)"),
        ("scales", torch.zeros(2, 40, dtype=torch.int32), "scales must be floating point, got torch.int32"),
        ("zeros", torch.zeros(1, 40), r"zeros must have shape \(2, 40\), got \(1, 40\)"),
        ("input_scales", torch.zeros(63), r"input_scales must have shape \(64,\), got \(63,\)"),
        ("group", torch.zeros(63).long(), r"group must have shape \(64,\), got \(63,\)"),
        ("group", torch.zeros(64).int(), "group must be torch.int64, got torch.int32"),
        ("perm", torch.zeros(64).int(), "perm must be torch.int64, got torch.int32"),
        ("blocks", [4, 64], "blocks must hold bits, rows and word rows of each block, got 2 numbers"),
        ("blocks", [9, 64, 18], "bits must be between 1 and 8, got 9"),
        ("blocks", [4, 64, 9], "a block of 64 rows of 4 bits takes 8 word rows, got 9|blocks reach"),
        ("blocks", [4, 32, 4], "blocks have 32 rows and 4 word rows, expected 64 and 8"),
        ("blocks", [4, -1, 0], "blocks reach beyond 64 rows"),
        ("rounding", "up", "rounding must be nearest, stochastic or inertia, got up"),
        ("rounding", "inertia", "inertia flips codes of one bit"),
    ],
)
def test_what_does_not_fit_is_refused(name, value, message):
    words, layout = case(64, 40, (4,))
    arguments = dict(
        zip(NAMES, [words, torch.randn(64, 40), *states_of("8bit", 64, 40, False), *layout, "nearest"], strict=True)
    )
    arguments[name] = value
    before = words.clone()
    for call in (OP, twin):
        with pytest.raises(RuntimeError, match=f"packed_step: .*({message})"):
            call(*arguments.values(), *options()[1:])
    assert torch.equal(words, before)


@compiled
def test_what_only_the_kernel_refuses():
    words, layout = case(64, 40, (4,))
    gradient, state = torch.randn(64, 40), states_of("8bit", 64, 40, False)
    with pytest.raises(RuntimeError, match="gradient must have its columns side by side"):
        OP(words, gradient.T.contiguous().T, *state, *layout, *options())
    for place, name, value in ((3, "group", 2), (3, "group", -1), (4, "perm", 64)):
        wrong = list(layout)
        wrong[place] = torch.zeros(64, dtype=torch.int64)
        wrong[place][5] = value
        with pytest.raises(RuntimeError, match=f"{name} has {value}, expected 0.."):
            OP(words, gradient, *state, *wrong, *options())


def test_steps_that_the_operator_does_not_do(monkeypatch):
    """Float64 arithmetic, states of other dtypes, transposed gradients, squares beyond float32: by PyTorch."""

    def refuse(*args):
        raise AssertionError("the operator was called")

    words, (scales, zeros, _, _, _, _) = case(96, 70, (4,))
    about = {"requires_grad": False, "w_bit": 4, "group_size": 32, "layer_type": 1, "asym": True}
    monkeypatch.setattr("hf_onebit.nn.packed_update.torch.ops.hf_onebit.packed_step", refuse, raising=False)
    grad = torch.randn(96, 70)
    for options_ in (
        {"dtype": torch.float64, "grad": grad},
        {"grad": grad, "exp_avg_s": torch.zeros(96, 70).half()},
        {"grad": grad.T.contiguous().T},
        {"grad": grad * 1e25},
    ):
        weight = MPQWeightParameter(words.clone(), scales=scales, zeros=zeros, **about)
        MPQWeightParameter.update(weight, lr=1e-2, **options_)
        # A gradient whose squares are infinite is divided by their root.
        assert torch.equal(weight.data, words) == (float(options_["grad"].abs().max()) > 1e20)

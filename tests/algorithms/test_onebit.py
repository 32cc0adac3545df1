"""`Onebit` and `OnebitResult`: fields, validation, selection, results, Hessians and error metrics."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_onebit.algorithms import Onebit, OnebitResult
from hf_onebit.algorithms.closed_form import closed_form_planes, importance_from_hessian
from hf_onebit.algorithms.onebit import accumulate_hessian

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLAGS = [(balance, weigh) for balance in (True, False) for weigh in (True, False)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(n: int, m: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer of n outputs and m inputs, Gaussian weights of size 0.05."""
    layer = nn.Linear(m, n, dtype=dtype)
    layer.weight.data.copy_(randn(n, m, seed=seed) * 0.05)
    return layer


def conv1d(n: int, m: int, seed: int = 0) -> Conv1D:
    layer = Conv1D(n, m)
    layer.weight.data.copy_(randn(n, m, seed=seed).T * 0.05)
    return layer


class Tree(nn.Module):
    """A model whose names collide in all the ways that the filters must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "up": nn.Linear(8, 16), "norm": nn.LayerNorm(8)}) for _ in range(2)
        )
        self.per_layer_model_projection = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"lm_head": nn.Linear(8, 8), "conv": Conv1D(8, 8)})
        self.lm_head = nn.Linear(8, 32)


def selected(**options: object) -> list[str]:
    quantizer = Onebit(**options)
    quantizer.setup(Tree())
    return list(quantizer.module_to_name.values())


# --- fields ----------------------------------------------------------------------------------------------


def test_onebit_has_the_fields_and_defaults_of_its_page():
    """C1."""
    want = {
        "name": None,
        "num_layers": None,
        "calc_quant_error": False,
        "include_layer_names": None,
        "exclude_layer_names": ["lm_head"],
        "include_layer_keywords": None,
        "exclude_layer_keywords": ["per_layer_model_projection"],
        "target_layer_types": (nn.Linear,),
        "hessian_dtype": torch.float32,
        "module_to_name": {},
        "results": {},
        "flag_calibration": True,
        "flag_hessian": True,
        "flag_xtx": False,
        "iters": 10,
        "use_importance_scaling": True,
        "use_balancing": True,
        "balance_iters": 40,
        "balance_alpha": 1.0,
    }
    assert [field.name for field in dataclasses.fields(Onebit)] == list(want)
    assert vars(Onebit()) == want
    assert vars(Onebit(**want)) == want
    for key in ("exclude_layer_names", "exclude_layer_keywords", "module_to_name", "results"):
        assert getattr(Onebit(), key) is not getattr(Onebit(), key)


def test_result_has_the_fields_of_its_page_all_none():
    """C3."""
    names = [
        "dequantized_weight",
        "quantization_time",
        "output_squared_error",
        "mean_output_squared_error",
        "weight_squared_error",
        "mean_weight_squared_error",
        "relative_output_squared_error",
        "relative_weight_squared_error",
        "iters",
        "use_importance_scaling",
        "use_balancing",
        "balance_iters",
        "balance_alpha",
        "a",
        "b",
        "sign",
    ]
    assert [field.name for field in dataclasses.fields(OnebitResult)] == names
    assert vars(OnebitResult()) == dict.fromkeys(names)


# --- validation ------------------------------------------------------------------------------------------

ACCEPTED = [
    {"iters": 0},
    {"iters": 100},
    {"balance_iters": 1},
    {"balance_alpha": 1e-10},
    {"balance_alpha": 100},
    {"balance_iters": 0, "use_balancing": False},
    {"balance_alpha": 0.0, "use_balancing": False},
    {"num_layers": 1},
    {"name": "mine"},
    {"hessian_dtype": torch.float64},
    {"exclude_layer_names": None, "exclude_layer_keywords": None},
]
REFUSED = [
    {"iters": -1},
    {"iters": 1.5},
    {"iters": "3"},
    {"iters": True},
    {"iters": None},
    {"balance_iters": 0},
    {"balance_iters": -1},
    {"balance_iters": True},
    {"balance_alpha": 0},
    {"balance_alpha": -1.0},
    {"balance_alpha": math.nan},
    {"balance_alpha": math.inf},
    {"balance_alpha": True},
    {"balance_alpha": "1"},
    {"use_balancing": "no"},
    {"use_importance_scaling": 1},
    {"calc_quant_error": None},
    {"flag_calibration": 0},
    {"flag_hessian": "yes"},
    {"flag_xtx": 1},
    {"num_layers": 0},
    {"num_layers": True},
    {"num_layers": 1.0},
    {"name": 3},
    {"include_layer_names": "lm_head"},
    {"exclude_layer_keywords": [1]},
    {"target_layer_types": ()},
    {"target_layer_types": nn.Linear},
    {"target_layer_types": ("Linear",)},
    {"hessian_dtype": torch.float16},
    {"hessian_dtype": "float32"},
]


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_accepted(options):
    """C2, C3: setup validates."""
    quantizer = Onebit(**options)
    quantizer.validate_params()
    quantizer.setup(Tree())
    assert quantizer.module_to_name


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_refused_by_setup_and_by_a_direct_call(options):
    """C2, C3."""
    [(key, value)] = options.items()
    quantizer = Onebit(**options)
    calls = (
        quantizer.validate_params,
        lambda: quantizer.setup(Tree()),
        lambda: quantizer.quantize_layer(linear(4, 4)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=key) as error:
            call()
        assert repr(value) in str(error.value)


def test_all_problems_come_in_one_message():
    quantizer = Onebit(iters=-1, balance_iters=0, balance_alpha=math.nan, flag_xtx=2, num_layers=0)
    with pytest.raises(ValueError, match="iters") as error:
        quantizer.validate_params()
    for key in ("iters", "balance_iters", "balance_alpha", "flag_xtx", "num_layers"):
        assert f"{key} must be" in str(error.value)


# --- selection -------------------------------------------------------------------------------------------

BLOCKS = ["layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up"]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [*BLOCKS, "inner.lm_head"]),  # exclude_layer_names is exact: inner.lm_head stays
        ({"exclude_layer_names": None}, [*BLOCKS, "inner.lm_head", "lm_head"]),
        ({"exclude_layer_keywords": None}, [*BLOCKS, "per_layer_model_projection", "inner.lm_head"]),
        ({"exclude_layer_keywords": ["layers", "head"]}, ["per_layer_model_projection"]),
        ({"exclude_layer_names": ["layers.0.q", "head"]}, [*BLOCKS[1:], "inner.lm_head", "lm_head"]),
        ({"include_layer_names": ["layers.0.q", "lm_head"]}, ["layers.0.q"]),  # exclusion comes later
        ({"include_layer_keywords": [".q", "0.up"]}, ["layers.0.q", "layers.0.up", "layers.1.q"]),
        ({"include_layer_names": BLOCKS[:2], "include_layer_keywords": ["up"]}, ["layers.0.up"]),
        ({"target_layer_types": (Conv1D,)}, ["inner.conv"]),
        ({"target_layer_types": (nn.Linear, Conv1D)}, [*BLOCKS, "inner.lm_head", "inner.conv"]),
        ({"num_layers": 2}, BLOCKS[:2]),
        ({"num_layers": 5}, [*BLOCKS, "inner.lm_head"]),
        ({"num_layers": 1, "include_layer_keywords": ["1."]}, ["layers.1.q"]),  # the cap comes last
    ],
    ids=str,
)
def test_selection(options, want):
    """C4."""
    assert selected(**options) == want


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_layer_types": (nn.Conv2d,)}, r"Tree holds no module of target_layer_types \(Conv2d\)"),
        ({"include_layer_names": ["q"]}, r"include_layer_names=\['q'\] removes all 7.*'layers.0.q'"),
        ({"include_layer_names": []}, "include_layer_names"),
        ({"include_layer_names": ["lm_head"], "include_layer_keywords": ["q"]}, "include_layer_keywords"),
        ({"include_layer_names": ["lm_head"]}, r"exclude_layer_names=\['lm_head'\] removes all 1"),
        ({"exclude_layer_keywords": [""]}, "exclude_layer_keywords"),
        ({"num_layers": 6}, "num_layers=6.*only 5 layers"),
    ],
    ids=str,
)
def test_an_empty_selection_says_which_filter_did_it(options, match):
    with pytest.raises(ValueError, match=match):
        selected(**options)


def test_setup_again_starts_afresh():
    quantizer = Onebit()
    quantizer.setup(Tree())
    second = Tree()
    quantizer.num_layers = 1
    quantizer.setup(second)
    assert quantizer.module_to_name == {second.layers[0]["q"]: "layers.0.q"}


# --- one layer -------------------------------------------------------------------------------------------


def hessian_of(m: int, seed: int = 7) -> torch.Tensor:
    X = randn(64, m, seed=seed) * randn(m, seed=seed + 1).exp()
    return 2 / 64 * X.T @ X


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("use_balancing", "use_importance_scaling"), FLAGS)
def test_result(use_balancing, use_importance_scaling, dtype):
    """C3, C5: what is stored is what it says, to the bit."""
    module = linear(11, 19, dtype=dtype)
    before = module.weight.detach().clone()
    quantizer = Onebit(
        iters=7,
        use_balancing=use_balancing,
        use_importance_scaling=use_importance_scaling,
        balance_iters=30,
        balance_alpha=2.0,
    )
    result = quantizer.quantize_layer(module, hessian=hessian_of(19))
    for tensor, shape in (
        (result.dequantized_weight, (11, 19)),
        (result.a, (11,)),
        (result.b, (19,)),
        (result.sign, (11, 19)),
    ):
        assert (tensor.dtype, tensor.device.type, tensor.shape) == (torch.float16, "cpu", shape)
    assert torch.equal(result.sign, torch.where(before >= 0, 1.0, -1.0).half())
    want = result.a.float()[:, None] * result.sign.float() * result.b.float()[None, :]
    assert torch.equal(result.dequantized_weight, want.half())
    options = (result.iters, result.use_importance_scaling, result.use_balancing)
    assert options == (7, use_importance_scaling, use_balancing)
    assert (result.balance_iters, result.balance_alpha) == (30, 2.0)
    assert 0 < result.quantization_time < 60
    assert result.weight_squared_error is None
    assert result.output_squared_error is None
    assert torch.equal(module.weight, before)
    assert quantizer.results == {}


@pytest.mark.parametrize(("use_balancing", "use_importance_scaling"), FLAGS)
def test_weight_error_of_fresh_layers(use_balancing, use_importance_scaling):
    """C6, without a Hessian, as a quantization with no calibration data would be."""
    uniform = nn.Linear(96, 64, dtype=torch.float16)
    with torch.no_grad():
        draw = torch.rand(64, 96, generator=torch.Generator().manual_seed(1))
        uniform.weight.copy_((draw * 2 - 1) / math.sqrt(96))
    quantizer = Onebit(
        use_balancing=use_balancing, use_importance_scaling=use_importance_scaling, calc_quant_error=True
    )
    assert quantizer.quantize_layer(linear(64, 96)).relative_weight_squared_error <= 0.37
    assert quantizer.quantize_layer(uniform).relative_weight_squared_error <= 0.26


@pytest.mark.parametrize(("use_balancing", "use_importance_scaling"), FLAGS)
def test_rank_one_layer_is_exact(use_balancing, use_importance_scaling):
    """C8: up to fp16."""
    module = nn.Linear(30, 20)
    u, v = randn(20, seed=1).exp() * 0.1, randn(30, seed=2).exp() * 0.1
    S = torch.where(randn(20, 30, seed=3) >= 0, 1.0, -1.0)
    module.weight.data = u[:, None] * S * v
    quantizer = Onebit(
        use_balancing=use_balancing, use_importance_scaling=use_importance_scaling, calc_quant_error=True
    )
    result = quantizer.quantize_layer(module, hessian=hessian_of(30))
    assert torch.equal(result.sign.float(), S)
    assert result.relative_weight_squared_error < 1e-5


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 33), m=st.integers(1, 33), seed=st.integers(0, 99), transposed=st.booleans())
def test_odd_shapes_and_conv1d(n, m, seed, transposed):
    """C5, C12: a Conv1D gives the transposed weight and otherwise the same as the Linear it stands for."""
    want = Onebit().quantize_layer(linear(n, m, seed))
    module = conv1d(n, m, seed) if transposed else linear(n, m, seed)
    got = Onebit().quantize_layer(module)
    assert got.dequantized_weight.shape == module.weight.shape
    assert got.dequantized_weight.is_contiguous()
    dense = got.dequantized_weight.T if transposed else got.dequantized_weight
    assert torch.equal(dense, (got.a.float()[:, None] * got.sign.float() * got.b.float()).half())
    assert torch.equal(got.sign, want.sign)
    torch.testing.assert_close(dense, want.dequantized_weight, rtol=3e-3, atol=1e-6)


def test_hessian_weighs_only_where_asked():
    """C11, and importance with balancing on."""
    module, H = linear(24, 32), hessian_of(32)
    for use_balancing in (True, False):
        plain = Onebit(use_balancing=use_balancing).quantize_layer(module)
        off = Onebit(use_balancing=use_balancing, use_importance_scaling=False)
        assert torch.equal(off.quantize_layer(module, hessian=H).a, plain.a)
        weighted = Onebit(use_balancing=use_balancing).quantize_layer(module, hessian=H)
        assert not torch.allclose(weighted.a, plain.a, rtol=1e-2)
        [(_, a, b)] = closed_form_planes(
            module.weight, 1, importance=importance_from_hessian(H), use_balancing=use_balancing
        )
        assert torch.equal(weighted.a, a)
        assert torch.equal(weighted.b, b)
        # Only the diagonal, and not its scale; the identity weighs nothing.
        for same in (H * 8, torch.diag(H.diagonal())):
            again = Onebit(use_balancing=use_balancing).quantize_layer(module, hessian=same)
            assert torch.equal(again.dequantized_weight, weighted.dequantized_weight)
        identity = Onebit(use_balancing=use_balancing).quantize_layer(module, hessian=torch.eye(32))
        assert torch.equal(identity.dequantized_weight, plain.dequantized_weight)


def test_input_takes_no_part():
    module, X = linear(24, 32), randn(3, 5, 32) * randn(32, seed=1).exp()
    plain = Onebit().quantize_layer(module)
    for given_input in (X, (X,), (X, "mask")):
        result = Onebit().quantize_layer(module, given_input)
        assert torch.equal(result.dequantized_weight, plain.dequantized_weight)


@pytest.mark.parametrize("use_balancing", [True, False])
def test_edge_weights_are_finite(use_balancing):
    """C12."""
    H = hessian_of(13)
    H[4] = H[:, 4] = 0
    for spoil in ("row", "column", "all"):
        module = linear(9, 13)
        module.weight.data[{"row": 2, "column": (slice(None), 5), "all": slice(None)}[spoil]] = 0
        result = Onebit(use_balancing=use_balancing, calc_quant_error=True).quantize_layer(module, hessian=H)
        assert torch.isfinite(result.dequantized_weight).all()
        assert torch.equal(result.dequantized_weight == 0, (module.weight == 0) & (module.weight.abs() < 1))
        assert (result.relative_weight_squared_error is None) == (spoil == "all")
        assert (result.relative_output_squared_error is None) == (spoil == "all")


def test_deterministic():
    """C13."""
    module, H = linear(30, 40), hessian_of(40)
    state = torch.get_rng_state()
    first, second = (Onebit().quantize_layer(module, hessian=H) for _ in range(2))
    for key in ("dequantized_weight", "a", "b", "sign"):
        assert torch.equal(getattr(first, key), getattr(second, key))
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_that_cannot_be_quantized_are_named():
    model = Tree()
    quantizer = Onebit()
    quantizer.setup(model)
    module = model.layers[1]["up"]
    name = r"'layers\.1\.up'"

    def refuses(match: str, **arguments: object) -> None:
        with pytest.raises(ValueError, match=match):
            quantizer.quantize_layer(module, **arguments)

    refuses(rf"{name}.*\(16, 16\), expected \(in, in\) = \(8, 8\)", hessian=torch.eye(16))
    refuses(rf"{name}.*importance holds NaN", hessian=torch.eye(8) * math.nan)
    refuses(rf"{name}.*\(rows, 8\).*\(3, 9\)", input=torch.ones(3, 9))
    refuses(rf"{name}.*torch.int64", input=torch.ones(3, 8, dtype=torch.int64))
    refuses(rf"{name}.*NoneType", input=(None,))
    module.weight.data[3, 3] = math.nan
    refuses(rf"{name}.*1 NaN and 0 infinite of 128.*exclude_layer_names")
    module.weight.data = torch.full((16, 8), 1e-13)
    refuses(rf"{name}.*fp16 cannot hold.*exclude_layer_names")
    module.weight.data = torch.full((16, 8), 1e5)
    refuses(rf"{name}.*1e\+05.*65504.*exclude_layer_names")
    module.weight = nn.Parameter(torch.ones(16, 8, dtype=torch.int32), requires_grad=False)
    refuses(rf"{name}.*quantized already")
    with pytest.raises(ValueError, match=r"LayerNorm.*nn\.Linear"):
        quantizer.quantize_layer(model.layers[0]["norm"])


# --- Hessian ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(21, 6), (3, 7, 6)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("hessian_dtype", [torch.float32, torch.float64])
def test_hessian_is_the_formula(shape, dtype, hessian_dtype):
    """C15."""
    X = randn(*shape).to(dtype)
    rows = X.double().reshape(-1, 6)
    want = 2 / 21 * rows.T @ rows
    for module in (linear(4, 6), conv1d(4, 6)):
        for given_input in (X, (X,)):
            H = Onebit(hessian_dtype=hessian_dtype).calculate_hessian(module, given_input)
            assert H.dtype == hessian_dtype
            torch.testing.assert_close(H.double(), want, rtol=1e-5, atol=1e-6)
            if hessian_dtype == torch.float64:
                torch.testing.assert_close(H, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_hessian_leaves_padding_out(mask_dtype):
    """C15: of the sum and of the count."""
    X = randn(3, 5, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]]).to(mask_dtype)
    kept = torch.cat([X[0], X[1, 2:], X[2, :1]])
    X[mask == 0] = math.nan  # whatever padding holds
    H = Onebit().calculate_hessian(linear(4, 6), X, mask)
    torch.testing.assert_close(H, 2 / 9 * kept.T @ kept, rtol=1e-5, atol=1e-6)


def test_hessian_of_no_rows_is_zero_and_harmless():
    module = linear(4, 6)
    plain = Onebit().quantize_layer(module)
    for X, mask in ((torch.ones(0, 6), None), (torch.ones(2, 3, 6), torch.zeros(2, 3))):
        H = Onebit().calculate_hessian(module, X, mask)
        assert torch.equal(H, torch.zeros(6, 6))
        result = Onebit().quantize_layer(module, hessian=H)
        assert torch.equal(result.dequantized_weight, plain.dequantized_weight)


@pytest.mark.parametrize("splits", [[50], [1, 49], [10, 0, 15, 25], [1] * 50], ids=str)
def test_hessian_does_not_depend_on_how_rows_arrive(splits, monkeypatch):
    """C15."""
    monkeypatch.setattr("hf_onebit.algorithms.onebit._ROWS_AT_A_TIME", 8)
    X = randn(50, 6)
    H, seen = torch.zeros(6, 6, dtype=torch.float64), 0
    for rows in X.split(splits):
        seen = accumulate_hessian(H, seen, rows)
    assert seen == 50
    torch.testing.assert_close(H, 2 / 50 * X.double().T @ X.double(), rtol=1e-12, atol=1e-13)
    whole = Onebit(hessian_dtype=torch.float64).calculate_hessian(linear(4, 6), X)
    torch.testing.assert_close(H, whole, rtol=1e-12, atol=1e-13)


def test_hessian_refuses():
    quantizer, module = Onebit(), linear(4, 6)
    with pytest.raises(ValueError, match=r"\(3, 4\), expected the input's \(3, 5\)"):
        quantizer.calculate_hessian(module, torch.ones(3, 5, 6), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"\(rows, 6\)"):
        quantizer.calculate_hessian(module, torch.ones(6))
    with pytest.raises(ValueError, match="positional"):
        quantizer.calculate_hessian(module, ())
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantizer.calculate_hessian(module, torch.full((2, 6), math.inf))


# --- metrics ---------------------------------------------------------------------------------------------

METRICS = (
    "weight_squared_error",
    "mean_weight_squared_error",
    "relative_weight_squared_error",
    "output_squared_error",
    "mean_output_squared_error",
    "relative_output_squared_error",
)


def brute_force(W: torch.Tensor, dequantized: torch.Tensor, X: torch.Tensor) -> list[float]:
    """The six formulas, entry by entry in fp64; W (out, in)."""
    W, D = W.double(), W.double() - dequantized.double()
    rows = [row for batch in X.double().reshape(-1, 1, W.shape[1]) for row in batch]
    error = sum(float(((D @ x) ** 2).sum()) for x in rows)
    energy = sum(float(((W @ x) ** 2).sum()) for x in rows)
    weight = float((D**2).sum())
    return [
        weight,
        weight / W.numel(),
        weight / float((W**2).sum()),
        error,
        error / (W.shape[0] * len(rows)),
        error / energy,
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(23, 10), (3, 7, 10)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("make", [linear, conv1d], ids=["Linear", "Conv1D"])
def test_metrics_against_brute_force(make, shape, dtype, monkeypatch):
    """C14."""
    monkeypatch.setattr("hf_onebit.algorithms.onebit._ROWS_AT_A_TIME", 5)
    module = make(6, 10).to(dtype)
    X = randn(*shape).to(dtype)
    result = Onebit(calc_quant_error=True).quantize_layer(module, (X,))
    W, dequantized = module.weight.detach(), result.dequantized_weight
    if make is conv1d:
        W, dequantized = W.T, dequantized.T
    want = brute_force(W, dequantized, X)
    assert [getattr(result, key) for key in METRICS] == pytest.approx(want, rel=1e-9)
    # The bias takes no part: it is the same on both sides.
    module.bias.data.fill_(100)
    again = Onebit(calc_quant_error=True).quantize_layer(module, (X,))
    assert again.relative_output_squared_error == result.relative_output_squared_error


def test_output_error_from_the_hessian_is_that_from_the_input():
    """C14: tr(D H Dᵀ) / tr(W H Wᵀ)."""
    module, X = linear(12, 10), randn(40, 10) @ randn(10, 10, seed=1)
    quantizer = Onebit(calc_quant_error=True, hessian_dtype=torch.float64, use_importance_scaling=False)
    H = quantizer.calculate_hessian(module, X)
    from_input, from_hessian = (
        quantizer.quantize_layer(module, X),
        quantizer.quantize_layer(module, hessian=H),
    )
    want = pytest.approx(from_input.relative_output_squared_error, rel=1e-6)
    assert from_hessian.relative_output_squared_error == want
    assert from_hessian.output_squared_error is None
    assert from_hessian.mean_output_squared_error is None
    assert from_hessian.weight_squared_error == from_input.weight_squared_error


def test_metrics_without_input_or_energy():
    quantizer = Onebit(calc_quant_error=True)
    result = quantizer.quantize_layer(linear(4, 6))
    assert result.weight_squared_error > 0
    assert [getattr(result, key) for key in METRICS[3:]] == [None] * 3
    zero = linear(4, 6)
    zero.weight.data.zero_()
    result = quantizer.quantize_layer(zero, torch.ones(3, 6))
    assert [getattr(result, key) for key in METRICS] == [0, 0, None, 0, 0, None]
    result = quantizer.quantize_layer(linear(4, 6), torch.zeros(3, 6))
    assert [getattr(result, key) for key in METRICS[3:]] == [0, 0, None]


# --- as a hook -------------------------------------------------------------------------------------------


def test_quantize_as_a_forward_hook():
    """C4: results under the full name; the forward pass is not changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    X = randn(2, 4, 6)
    want = model(X)
    quantizer = Onebit(calc_quant_error=True, use_balancing=False)
    quantizer.setup(model)
    assert quantizer.name is None
    hooks = [module.register_forward_hook(quantizer.quantize) for module in quantizer.module_to_name]
    assert torch.equal(model(X), want)
    for hook in hooks:
        hook.remove()
    assert list(quantizer.results) == ["0", "2"]
    for name, given_input in (("0", X), ("2", model[:2](X))):
        module = model.get_submodule(name)
        H = quantizer.calculate_hessian(module, given_input)
        direct = quantizer.quantize_layer(module, given_input, H)
        got = quantizer.results[name]
        assert torch.equal(got.dequantized_weight, direct.dequantized_weight)
        assert got.output_squared_error == direct.output_squared_error > 0
        assert not torch.equal(got.a, Onebit(use_balancing=False).quantize_layer(module).a)


def test_quantize_computes_no_hessian_when_told_so_or_given_one():
    module, X = linear(8, 6), randn(9, 6) * randn(6, seed=1).exp()
    model = nn.ModuleDict({"layer": module})
    plain = Onebit().quantize_layer(module)
    quantizer = Onebit(flag_hessian=False)
    quantizer.setup(model)
    quantizer.quantize(module, (X,), None)
    assert torch.equal(quantizer.results["layer"].a, plain.a)
    quantizer = Onebit()
    quantizer.setup(model)
    quantizer.quantize(module, (X,), None, torch.eye(6))
    assert torch.equal(quantizer.results["layer"].a, plain.a)
    quantizer.quantize(module, None)
    assert torch.equal(quantizer.results["layer"].a, plain.a)
    quantizer.quantize(module, (X,))
    assert not torch.equal(quantizer.results["layer"].a, plain.a)


def test_quantize_wants_setup_first():
    with pytest.raises(ValueError, match=r"call setup\(model\)"):
        Onebit().quantize(linear(4, 6), torch.ones(2, 6))

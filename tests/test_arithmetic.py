"""In which dtype large products are computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from products import Products
from tiny import tiny_ids, tiny_llama, tiny_tokenizer

from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.arithmetic import autocast_dtype, product_dtype, without_slow_products
from hf_onebit.texts.self_text import written_by_model


@pytest.mark.parametrize(
    ("capability", "dtype"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32), ("DEFAULT", torch.float32)]
)
def test_bfloat16_where_the_processor_multiplies_it(
    capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu = torch.device("cpu")
    assert product_dtype(cpu) == dtype
    assert autocast_dtype(cpu) == (dtype if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_where_a_gpu_does_not_emulate_it(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert product_dtype(torch.device("cuda:1")) == (torch.bfloat16 if supported else torch.float32)
    assert product_dtype(torch.device("xpu")) == torch.bfloat16


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without AVX-512."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


CPU = torch.device("cpu")
PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": torch.nn.functional.linear,
    "linear, bias by name": lambda x, w, bias: torch.nn.functional.linear(x, w, bias=bias),
    "matmul": lambda x, w, bias: torch.matmul(x, w.T),
    "@": lambda x, w, bias: x @ w.T,
    "addmm": lambda x, w, bias: torch.addmm(bias, x, w.T),
    "bmm": lambda x, w, bias: torch.bmm(x[None], w.T[None])[0],
    "method": lambda x, w, bias: x.mm(w.T),
}


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slow_products_are_done_in_float32(name: str, dtype: torch.dtype) -> None:
    x, w, bias = (torch.randn(size).to(dtype).requires_grad_() for size in ((5, 40), (8, 40), (8,)))
    with without_slow_products(CPU), Products() as products:
        y = PRODUCTS[name](x, w, bias)
    assert products.dtypes == {torch.float32}
    exact = PRODUCTS[name](*(t.detach().double() for t in (x, w, bias)))
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype)) or float((y.double() - exact).abs().max()) < 0.05
    with Products() as products:
        y.sum().backward()
    assert products.dtypes == {torch.float32}
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.usefixtures("slow")
def test_other_products_are_left_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        x, w = torch.randn(5, 40).to(dtype), torch.randn(8, 40).to(dtype)
        with without_slow_products(CPU), Products() as products:
            y = x @ w.T
        assert torch.equal(y, x @ w.T)
        assert products.dtypes == {dtype}
    with without_slow_products(CPU), pytest.raises(RuntimeError, match="dtype"):
        torch.randn(5, 40) @ torch.randn(40, 8).bfloat16()
    x = torch.randn(5, 40).bfloat16()
    out = x.new_empty(5, 5)
    with without_slow_products(CPU):
        assert torch.mm(x, x.T, out=out) is out
    assert torch.equal(out, x @ x.T)


@pytest.mark.usefixtures("slow")
def test_compiled_models_are_traced_through_it() -> None:
    """The casts are in the graph, which is one."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    x, w = torch.randn(5, 40).bfloat16(), torch.randn(8, 40).bfloat16()
    compiled = torch.compile(lambda x: torch.nn.functional.linear(x, w), backend=backend, fullgraph=True)
    with without_slow_products(CPU):
        y = compiled(x)
    assert len(graphs) == 1
    assert graphs[0].count(".float()") == 2
    assert torch.equal(y, (x.float() @ w.float().T).bfloat16())


def test_nothing_changes_where_bfloat16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    x = torch.randn(5, 40).bfloat16()
    with without_slow_products(CPU), Products() as products:
        assert torch.equal(x @ x.T, torch.mm(x, x.T))
    assert products.dtypes == {torch.bfloat16}


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("preset", ["closed", "fast"])
def test_no_slow_product_is_left_in_a_quantization(preset: str) -> None:
    """Also with attention that multiplies by itself, and where the model writes its own text."""
    model = tiny_llama().bfloat16()
    model.set_attn_implementation("eager")
    tokenizer = tiny_tokenizer()
    written = written_by_model(model, tokenizer, 64)
    assert written
    rows = [{"input_ids": tiny_ids(1, 32, seed)} for seed in range(8)]
    config = OneBitConfig(preset=preset, dataset=rows, calibration_tokens=256)
    with Products() as products:
        written_by_model(model, tokenizer, 64)
        OneBitQuantizer(config).quantize_model(model, tokenizer)
    assert torch.bfloat16 not in products.dtypes
    assert torch.float32 in products.dtypes

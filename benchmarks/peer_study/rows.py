"""Every row: which library at how many bits, with which of its options."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of its folder and its entry in the JSON.
        peer: whose it is: a key of `adapters.ADAPTERS`, or "llama" for llama.cpp; each may have a Python of its own.
        title: what the table says.
        bits: of one code, by its name; the table is ordered by them.
        options: of the peer's adapter.
    """

    name: str
    peer: str
    title: str
    bits: int
    options: dict[str, Any] = field(default_factory=dict)


GROUP = 64
# llama.cpp's types, by the bits that their names say.
LLAMA = {8: ("Q8_0",), 4: ("Q4_1", "Q4_0", "Q4_K_M"), 3: ("Q3_K_M",), 2: ("Q2_K",)}


def _rows_of(bits: int) -> list[Row]:
    group = {"bits": bits, "group_size": GROUP}
    rows = [
        Row(f"ours-{bits}", "ours", "ours, closed, no data", bits, group),
        Row(f"hqq-{bits}", "hqq", f"HQQ, g{GROUP}", bits, group),
        Row(f"gptq-{bits}", "gptq", f"GPTQ (gptqmodel), g{GROUP}, 16384 tokens", bits, group),
        Row(f"quanto-{bits}", "quanto", "optimum-quanto, its own groups", bits, {"bits": bits}),
    ]
    if bits == 8:
        rows.append(Row("bnb-8", "bnb", "bitsandbytes int8, rows", bits, {"bits": 8}))
        rows.append(Row("torchao-8", "torchao", "torchao int8 weight-only, rows", bits, {"bits": 8}))
    else:
        if bits == 4:
            rows.append(Row("bnb-4", "bnb", "bitsandbytes nf4, g64", bits, {"bits": 4}))
            rows.append(Row("bnb-4-dq", "bnb", "bitsandbytes nf4, g64, double", bits, {"bits": 4, "double": True}))
            rows.append(Row("torchao-4", "torchao", f"torchao int4 weight-only, g{GROUP}", bits, group))
        intx = {**group, "intx": True}
        rows.append(Row(f"torchao-intx-{bits}", "torchao", f"torchao int{bits} (intx), g{GROUP}", bits, intx))
    rows += [Row(f"llama-{t.lower()}", "llama", f"llama.cpp {t}", bits, {"type": t}) for t in LLAMA[bits]]
    return rows


_FLOAT = Row("float", "float", "float (bf16)", 16)
ROWS = {row.name: row for row in (_FLOAT, *(row for bits in (8, 4, 3, 2) for row in _rows_of(bits)))}

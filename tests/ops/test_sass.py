"""What docs say of the kernels' instructions, registers and shared memory, against committed and fresh listings."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from compiled_kernels import LISTINGS, SASS, STATIC, count, instructions, loop, measure, require_triton

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
FIGURES = json.loads((SASS / "static.json").read_text(encoding="utf-8"))
ROWS = {figures["row"]: figures for figures in FIGURES["kernels"]}


@pytest.mark.parametrize("file", LISTINGS)
def test_committed_listings(file):
    """At most 1.6 instructions a one-bit weight, counted here; they are those of the table; no local memory."""
    text, figures = (SASS / file).read_text(encoding="utf-8"), ROWS[LISTINGS[file]]
    found = instructions(text)
    weights = 16 * 32 if figures["counted"] == "kernel" else 64 * 16 * 32 // 32  # of one of the threads
    assert weights == figures["weights_of_a_thread"]
    assert len(found) / weights <= 1.6
    assert len(found) == figures["instructions"]
    names = count(text)
    assert names["IMMA"] == 32 if figures["kernel"] == "few_rows" else names["HMMA"] >= 32
    assert not {"LDL", "STL"} & set(names)
    if figures["counted"] == "loop":
        assert loop(text)[0] == text.splitlines()[2]  # the label follows the two lines about it


def test_the_table_is_that_of_the_file():
    """Registers, shared memory and instructions of each row of docs/kernels.md."""
    text = DOCS.read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    table = {line[0]: line[2:5] for line in lines if len(line) == 6}
    assert set(table) == set(ROWS) == set(STATIC)
    for row, (registers, shared, share) in table.items():
        figures = ROWS[row]
        assert int(registers) == figures["registers"], row
        size = figures["shared_bytes"]
        assert shared == (f"{size / 1024:.0f} KiB" if size >= 1024 else f"{size} B"), row
        a_weight = figures["instructions"] / figures["weights_of_a_thread"]
        assert share == (f"{a_weight:.2f}" if a_weight < 10 else f"{a_weight:.0f}"), row
        assert figures["stack_bytes"] == 0
    said = re.search(r"compile it with Triton (\d+\.\d+)", " ".join(text.split()))
    assert said
    assert FIGURES["triton"].startswith(said[1])


@pytest.mark.parametrize("row", STATIC)
def test_a_fresh_compile_gives_the_committed_figures(row, tmp_path):
    """By the same Triton, which names its own assembler."""
    require_triton()
    if version("triton") != FIGURES["triton"]:
        pytest.skip(f"the figures are of Triton {FIGURES['triton']}, this is {version('triton')}")
    assert measure(row, tmp_path)[0] == ROWS[row]


def test_a_listing_without_a_product_has_no_loop():
    text = ".L_x_0:\n        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;\n"
    text += "        /*0010*/              @!P0 BRA `(.L_x_0) ;\n"
    assert [name for name, _ in instructions(text)] == ["IADD3", "BRA"]
    with pytest.raises(ValueError, match="multiplies by tensor cores"):
        loop(text)

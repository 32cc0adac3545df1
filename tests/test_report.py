"""Tables, summaries, cards and plots: what they say, and what they must not make up."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_onebit.report import (
    coverage_line,
    format_table,
    layer_summary,
    measured_section,
    model_card,
    plot_drift,
    plot_layer_errors,
    plot_quality,
    plot_roofline,
    plot_tuning,
    write_report,
)


def layer(weight_error: float, output_error: float | None = None) -> dict[str, Any]:
    return {
        "in_features": 576,
        "out_features": 192,
        "planes": 1,
        "bits_per_weight": 1.11,
        "relative_weight_error": weight_error,
        "relative_output_error": output_error,
        "seconds": 0.5,
    }


def report(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "method": "onebit",
        "preset": "balanced",
        "planes": 1,
        "layers": {f"model.layers.{i}.mlp.up_proj": layer(0.6 - i / 100, 0.1 + i / 100) for i in range(8)},
        "skipped": {
            "lm_head": {"reason": "output head", "weights": 28_000_000},
            "model.a.dt": {"reason": "has fewer than 32 inputs", "weights": 100},
            "model.b.dt": {"reason": "has fewer than 32 inputs", "weights": 100},
            "model.c.dt": {"reason": "has fewer than 32 inputs", "weights": 100},
        },
        "coverage": 0.9996,
        "linear_bpw": 1.0462,
        "file_bpw": 4.2,
        "file_bytes": 70_600_000,
        "float_bytes": 538_100_000,
        "total_weights": 134_515_008,
        "seconds": 754.4,
        "peak_memory_mb": 1210.3,
        "calibration": {"source": "calibration.txt", "tokens": 65536, "sha256": "ab" * 32},
        "seed": 7,
        "command": "hf-onebit quantize some/model -o out --preset balanced",
        "versions": {"hf_onebit": "0.1.0", "torch": "2.13.0"},
    }
    return base | changes


BARE = report(
    preset=None,
    layers={},
    skipped={},
    file_bpw=None,
    file_bytes=None,
    float_bytes=None,
    peak_memory_mb=None,
    calibration=None,
    command=None,
)


# ----------------------------------------------------------------------------------------------------- tables


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    text = format_table(["name", "bits", "note"], [("a", 1.0462, "x"), ("long name", 12, None)])
    assert text.splitlines() == [
        "name        bits  note",
        "---------  -----  ----",
        "a          1.046  x",
        "long name     12  –",
    ]


def test_a_markdown_table_keeps_bars_and_line_ends_inside_their_cells() -> None:
    text = format_table(["a|b", "n"], [("x | y\nz", 1)], markdown=True)
    assert text == "| a\\|b | n |\n| --- | ---: |\n| x \\| y z | 1 |"


@pytest.mark.parametrize("cell", ["1.5", "-3", "1,234", "12.5%", "3.2 GB", "2.1×", 7, 0.25, "1e-05"])
def test_what_counts_as_a_number(cell: object) -> None:
    assert "---:" in format_table(["x"], [[cell], [None]], markdown=True)


@pytest.mark.parametrize("cells", [["1 plane"], ["", "2"], ["4 x 4"], [None], []])
def test_what_does_not_count_as_a_number(cells: list[object]) -> None:
    assert "---:" not in format_table(["x"], [[cell] for cell in cells], markdown=True)


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells, expected 2"):
        format_table(["a", "b"], [(1, 2), (3,)])
    with pytest.raises(ValueError, match="headers is empty"):
        format_table([], [])


# ---------------------------------------------------------------------------------------------------- summary


def test_the_coverage_line_counts_layers_and_never_rounds_up_to_all() -> None:
    assert coverage_line(report()) == (
        "Packed 8 of 12 linear layers: 99.9% of their weights (output head apart), at 1.046 bits per weight."
    )
    assert "100.0% of their weights" in coverage_line(report(coverage=1.0))
    assert "41.7% of their weights" in coverage_line(report(coverage=0.4167))


def test_the_summary_says_what_users_ask_for() -> None:
    text = layer_summary(report(), next_command="hf-onebit eval out")
    for line in (
        "method           onebit, preset balanced, 1 plane",
        "bits per weight  1.046 in the packed layers, 4.200 over the whole file",
        "size             538.1 MB before, 70.6 MB after (7.6 times smaller)",
        "time             12 min 34 s",
        "peak memory      1.2 GB",
        "calibration      calibration.txt, 65536 tokens, sha256 abababababab",
    ):
        assert line in text.splitlines()
    assert text.startswith(coverage_line(report()))
    assert text.endswith("Next: hf-onebit eval out")


def test_skipped_layers_are_grouped_by_reason_the_largest_first() -> None:
    lines = layer_summary(report()).splitlines()
    start = lines.index("Kept in floating point:")
    assert lines[start + 3].split() == ["output", "head", "1", "28000000", "lm_head"]
    assert lines[start + 4].split()[-7:] == ["3", "300", "model.a.dt,", "model.b.dt", "and", "1", "more"]


def test_the_five_worst_layers_are_ranked_by_output_error() -> None:
    lines = layer_summary(report()).splitlines()
    worst = [line.split()[0] for line in lines if line.startswith("model.layers.")]
    assert worst == [f"model.layers.{i}.mlp.up_proj" for i in (7, 6, 5, 4, 3)]


def test_without_output_errors_the_weight_errors_rank() -> None:
    layers = {f"l{i}": layer(0.1 * i) for i in range(1, 8)}
    lines = layer_summary(report(layers=layers)).splitlines()
    rows = [line.split() for line in lines if line.startswith("l") and line[1].isdigit()]
    assert [row[0] for row in rows] == ["l7", "l6", "l5", "l4", "l3"]
    assert {row[-1] for row in rows} == {"–"}


def test_a_summary_of_a_report_that_knows_little_makes_nothing_up() -> None:
    text = layer_summary(BARE)
    for absent in (
        "None",
        "nan",
        "whole file",
        "before",
        "peak memory",
        "Kept in",
        "Largest",
        "Next",
        "preset",
    ):
        assert absent not in text
    assert "calibration      none: the method saw the weights alone" in text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (59.4, "59.4 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min"), (7380, "2 h 3 min")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert f"time             {shown}" in layer_summary(report(seconds=seconds)).splitlines()


@pytest.mark.parametrize(
    ("count", "shown"), [(999, "999 B"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (3_210_000_000, "3.2 GB")]
)
def test_sizes_without_a_float_size(count: int, shown: str) -> None:
    assert f"size             {shown} on disk" in layer_summary(report(float_bytes=None, file_bytes=count)).splitlines()


# ------------------------------------------------------------------------------------------------- model card

PROVENANCE = {"base_model": "some/model", "base_model_license": "apache-2.0"}


def test_the_head_of_a_card_is_what_the_hub_reads() -> None:
    card = ModelCard(model_card(report(provenance=PROVENANCE, repo_id="me/model-onebit")))
    assert card.data.to_dict() == {
        "base_model": "some/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["hf_onebit", "onebit", "1-bit"],
    }


@pytest.mark.parametrize(
    ("planes", "tag", "words"),
    [
        ((1, 1), "1-bit", "About one bit per weight costs"),
        ((2, 2), "2-bit", "2.09 bits per weight cost"),
        ((1, 2), "mixed-precision", "2.09 bits per weight cost"),
    ],
)
def test_a_card_says_how_many_planes_there_are(planes: tuple[int, int], tag: str, words: str) -> None:
    info = report(provenance=PROVENANCE, onebit_bpw=2.09)
    info["layers"] = {f"layer.{i}": {**next(iter(info["layers"].values())), "planes": n} for i, n in enumerate(planes)}
    card = ModelCard(model_card(info))
    assert card.data.tags == ["hf_onebit", "onebit", tag]
    assert words in card.text


def test_an_unknown_licence_is_left_out_and_said_to_be_unknown() -> None:
    card = ModelCard(model_card(report(provenance={"base_model": "some/model"})))
    assert "license" not in card.data.to_dict()
    assert "licence of the base model is not known" in card.text


def test_the_body_of_a_card_tells_how_to_load_and_reproduce() -> None:
    text = model_card(report(provenance=PROVENANCE, repo_id="me/model-onebit"))
    assert "import hf_onebit" in text
    assert 'AutoModelForCausalLM.from_pretrained("me/model-onebit")' in text
    assert "```bash\nhf-onebit quantize some/model -o out --preset balanced\n```" in text
    assert "ab" * 32 in text
    assert "| seed | 7 |" in text
    assert "| version of torch | 2.13.0 |" in text
    assert coverage_line(report()) in text
    assert "[some/model](https://huggingface.co/some/model)" in text


def test_the_code_of_a_card_is_python() -> None:
    text = model_card(report(provenance=PROVENANCE))
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert code.startswith("import hf_onebit")


def test_a_card_shows_measured_numbers_or_says_that_there_are_none() -> None:
    assert "Not evaluated." in model_card(report())
    evaluation = {
        "perplexity": 31.25,
        "nll": 3.44,
        "reference_perplexity": 23.6,
        "kl": 0.31,
        "top1": 0.75,
        "tokens": 8184,
        "context": 1024,
        "windows": 8,
        "data": "alice.txt",
        "sha256": "cd" * 32,
        "reference": "float32, from a 4-bit file",
    }
    text = model_card(report(evaluation=evaluation))
    assert "Not evaluated" not in text
    for row in (
        "| perplexity | 31.25 |",
        "| perplexity of the reference | 23.6 |",
        "| same most probable token as the reference | 0.75 |",
        "| text | alice.txt |",
        "| reference | float32, from a 4-bit file |",
    ):
        assert row in text


def test_a_folder_on_disk_is_no_base_model_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    text = model_card(report(command=None, provenance={"base_model": str(folder)}))
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert str(tmp_path) not in text
    assert "`my-model`" in text


def test_what_the_provenance_says_comes_before_what_the_report_says() -> None:
    text = model_card(report(provenance={"command": "other command", "seed": None}))
    assert "other command" in text
    assert "hf-onebit quantize" not in text.split("## Measured")[0]
    assert "| seed | 7 |" in text


def test_a_card_can_be_written_without_a_report() -> None:
    text = model_card({"provenance": {}})
    assert "None" not in text
    assert "import hf_onebit" in text
    assert "Not evaluated." in text


def test_a_report_survives_json() -> None:
    info = report(provenance=PROVENANCE)
    assert model_card(json.loads(json.dumps(info))) == model_card(info)


# ------------------------------------------------------------------------------------------------------- plot


@pytest.mark.parametrize("errors", [(0.3, 0.2), (0.3, None)])
def test_the_plot_has_a_bar_for_every_layer(
    errors: tuple[float, float | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    save = figure_module.Figure.savefig
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    layers = {f"model.{i}.{kind}": layer(*errors) for i in range(3) for kind in ("q_proj", "up_proj")}
    plot_layer_errors(report(layers=layers), tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    assert [bar.get_height() for bar in axes.patches] == [errors[1] or errors[0]] * 6
    assert axes.get_ylabel() == f"relative error of the {'outputs' if errors[1] else 'weights'}"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["q_proj", "up_proj"]


def test_a_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no packed layer"):
        plot_layer_errors(BARE, tmp_path / "errors.png")


FIT: dict[str, Any] = {
    "drift": {"model.layers.0": 0.1, "model.layers.1": 0.25},
    "blocks": {
        f"model.layers.{i}": {
            "start": 0.5,
            "log": [{"epoch": 1, "loss_heldout": 0.4}, {"epoch": 2, "loss_heldout": 0.3}],
        }
        for i in range(2)
    },
    "distillation": {
        "kl_before": 3.0,
        "kl_after": 1.5,
        "tokens": 200,
        "log": [{"tokens": 100, "kl_heldout": None}, {"tokens": 200, "kl_heldout": 1.5}],
    },
}
EVALUATIONS = [
    {"model": f"out-{planes}", "data": data, "linear_bpw": 1.05 * planes, "perplexity": 90.0 / planes, "context": 1024,
     "reference_perplexity": 24.0, "kl": 1.2 / planes}
    for planes in (2, 1)
    for data in ("a.txt", "b.txt")
]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that were saved."""
    figure_module = pytest.importorskip("matplotlib.figure")
    figures: list[Any] = []
    save = figure_module.Figure.savefig
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    return figures


def test_the_drift_has_a_point_for_every_block(tmp_path: Path, drawn: list[Any]) -> None:
    plot_drift(report(fit=FIT), tmp_path / "drift.svg")
    (line,) = drawn[0].axes[0].get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [0.1, 0.25])
    with pytest.raises(ValueError, match=r"no fit\.drift"):
        plot_drift(report(fit=None), tmp_path / "drift.svg")


def test_tuning_curves_begin_at_the_start_and_leave_out_what_went_astray(tmp_path: Path, drawn: list[Any]) -> None:
    plot_tuning(report(fit=FIT), tmp_path / "tuning.svg")
    blocks, distillation = drawn[0].axes
    assert [list(line.get_ydata()) for line in blocks.get_lines()] == [[0.5, 0.4, 0.3]] * 2
    (line,) = distillation.get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 200], [3.0, 1.5])
    with pytest.raises(ValueError, match="no tuning log"):
        plot_tuning(report(), tmp_path / "tuning.svg")


def test_quality_is_drawn_over_bits_with_the_float_model_beside_it(tmp_path: Path, drawn: list[Any]) -> None:
    plot_quality(EVALUATIONS, tmp_path / "quality.svg")
    perplexity, kl = drawn[0].axes
    curves = [line for line in perplexity.get_lines() if line.get_marker() == "o"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in curves] == [([1.05, 2.1], [90.0, 45.0])] * 2
    assert len(perplexity.get_lines()) == 4  # and two dashed ones
    assert [list(line.get_ydata()) for line in kl.get_lines()] == [[1.2, 0.6]] * 2
    with pytest.raises(ValueError, match="no evaluation of a packed model"):
        plot_quality([{"perplexity": 3.0, "linear_bpw": None}], tmp_path / "quality.svg")


def test_a_report_is_written_with_the_plots_that_it_has_figures_for(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    full = report(fit=FIT, evaluations=[*EVALUATIONS, {"perplexity": float("inf")}])
    files, notes = write_report(full, tmp_path / "report")
    names = ["report.json", "layer_errors.svg", "drift.svg", "tuning.svg", "quality.svg"]
    assert (files, notes) == ([str(tmp_path / "report" / name) for name in names], [])
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(names)
    read = json.loads((tmp_path / "report" / "report.json").read_text())
    assert read["evaluations"][-1] == {"perplexity": None}
    assert list(read["layers"]) == list(full["layers"])
    files, _ = write_report(report(fit=None), tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["layer_errors.svg", "report.json"]


def test_without_matplotlib_the_report_is_written_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    files, notes = write_report(report(fit=FIT), tmp_path)
    assert files == [str(tmp_path / "report.json")]
    assert "hf_onebit[plots]" in notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_card_has_a_table_for_each_text() -> None:
    text = measured_section(EVALUATIONS)
    assert text.startswith("## Measured\n\n| measure | value |")
    assert text.count("| measure | value |") == 4
    assert text in model_card(report(evaluation=EVALUATIONS))


def bench_result(**contenders: float) -> dict[str, Any]:
    """Figures of a layer of 4096x4096 with one and four rows: weights/s of each contender, reading at 8 GB/s."""
    entries = []
    for batch in (4, 1):
        found = {
            name: {
                "weights_per_s": rate / batch,
                "bits_per_weight": 16.0,
                "gb_per_s": None,
                "seconds": 3.0,
                "cpu_seconds": 1.5,
            }
            for name, rate in contenders.items()
        }
        read = {
            "read": {
                "weights_per_s": None,
                "bits_per_weight": None,
                "gb_per_s": 8.0 / batch,
                "seconds": 2.0,
                "cpu_seconds": 2.0,
            }
        }
        entries.append({"shape": [4096, 4096], "batch": batch, "mode": "stream", "contenders": found | read})
    return {"threads": 1, "layers": entries}


def test_the_roofline_has_a_line_and_a_limit_for_every_contender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    save = figure_module.Figure.savefig
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    plot_roofline([bench_result(packed=3e9, bf16=1e9)], tmp_path / "roofline.svg")
    assert "<svg" in (tmp_path / "roofline.svg").read_text()
    (axes,) = drawn[0].axes
    packed, limit, bf16, _ = axes.get_lines()
    assert list(packed.get_xdata()) == [1, 4]
    assert list(packed.get_ydata()) == [6e9, 6e9]  # it had the processor for half of the time
    assert list(limit.get_ydata()) == [4e9, 16e9]  # 8 GB/s of 2 bytes each
    assert list(bf16.get_ydata()) == [2e9, 2e9]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["packed", "bf16"]


def test_a_roofline_without_the_layer_or_the_bandwidth_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = bench_result(packed=3e9)
    with pytest.raises(ValueError, match="hf-onebit bench --shape 64x64"):
        plot_roofline([result], tmp_path / "roofline.svg", shape=(64, 64))
    for entry in result["layers"]:
        del entry["contenders"]["read"]
    with pytest.raises(ValueError, match="no bandwidth"):
        plot_roofline([result], tmp_path / "roofline.svg")


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot in (lambda: plot_layer_errors(report(), "errors.png"), lambda: plot_roofline([bench_result()], "r.png")):
        with pytest.raises(ImportError, match=r"pip install \"hf_onebit\[plots\]\""):
            plot()

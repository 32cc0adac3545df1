"""The peers of mpq: rows on a tiny model, those that cannot run, what is kept between runs, and the joint table."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_float, tiny_llama, tiny_tokenizer

from hf_onebit import evaluation, loading

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SIZES = {"tokens": 256, "context": 128, "calibration_tokens": 1024, "new_tokens": 4, "rounds": 1, "timeout": 120}


@pytest.fixture(scope="module", autouse=True)
def peer_study() -> Iterator[None]:
    """`peer_study` can be imported."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from ladder_study.protocol import Places

    folder = tmp_path_factory.mktemp("peers")
    model = tiny_llama(layers=1, hidden=64, intermediate=128, positions=2048).to(torch.bfloat16)
    save_float(model, folder / "tiny", tiny_tokenizer())
    for name in ("wikitext-2/test.txt", "mixed/calibration.txt"):
        file = folder / "data" / name
        file.parent.mkdir(parents=True)
        file.write_text(f"{name}: all happy families are alike. " * 60)
    return Places(folder / "tiny", folder / "data", folder / "work")


@pytest.fixture(scope="module")
def measured(places: Any) -> tuple[Path, dict[str, Any]]:
    """The JSON of a run with the float model, a row of ours and one of a library that is not there."""
    from peer_study.running import Study, run

    file = places.work / "peers.json"
    places.work.mkdir()
    run(Study(places, **SIZES), ["float", "ours-4", "hqq-4", "llama-q4_1"], file, say=lambda _: None)
    return file, json.loads(file.read_text())


def test_rows_are_scored_as_every_model_is(places: Any, measured: tuple[Path, dict[str, Any]]) -> None:
    rows = measured[1]["rows"]
    tokenizer = loading.load_tokenizer(str(places.model))
    windows = evaluation.token_windows((places.data / "wikitext-2/test.txt").read_text(), tokenizer, 128, 256)
    for name, model in (
        ("float", loading.load_float(str(places.model), dtype=torch.bfloat16)),
        ("ours-4", loading.load(places.work / "ours-4" / "saved")),
    ):
        row = rows[name]
        expected = evaluation.perplexity(model, windows)
        assert row["reason"] is None
        assert row["perplexity"] == pytest.approx(expected["perplexity"], rel=2e-2)  # another run, other threads
        assert row["tokens"] == expected["tokens"]
        assert row["decode"]["tokens_per_second"] > 0
        assert row["load_mb"] >= 0
    assert rows["float"]["decode"]["by_bf16"] == 1.0
    assert rows["ours-4"]["linear_bpw"] == pytest.approx(4.5)
    assert rows["ours-4"]["quantize_seconds"] > 0
    assert rows["ours-4"]["perplexity"] != rows["float"]["perplexity"]


def test_what_cannot_run_says_why(measured: tuple[Path, dict[str, Any]]) -> None:
    from peer_study.tables import details

    rows = measured[1]["rows"]
    assert rows["llama-q4_1"]["reason"] == "no GGUF was named with --gguf"
    assert rows["hqq-4"]["perplexity"] is None
    assert "hqq" in rows["hqq-4"]["reason"]
    assert f"`hqq-4` has no figures: {rows['hqq-4']['reason']}." in details(measured[1], None)


def test_a_run_goes_on_where_it_was(
    places: Any, measured: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peer_study import running

    file, before = measured
    said: list[str] = []
    monkeypatch.setattr(running, "_stage", None)  # nothing may be run
    running.run(running.Study(places, **SIZES), ["float", "ours-4"], file, say=said.append)
    assert said == ["float: in peers.json already", "ours-4: in peers.json already"]
    assert json.loads(file.read_text()) == before
    with pytest.raises(ValueError, match="rows of another text"):
        running.run(running.Study(places, **{**SIZES, "tokens": 128}), ["float"], file)


def test_a_stage_that_does_not_end_is_a_sentence(places: Any, tmp_path: Path) -> None:
    from peer_study.rows import ROWS
    from peer_study.running import Study, _stage

    study = Study(places, timeout=0.2)
    assert _stage(study, ROWS["ours-4"], "make", {}, tmp_path / "out.json") == "not done within 0 s of the clock"
    study = Study(places, pythons={"hqq": str(tmp_path / "none")})
    assert "does not start" in str(_stage(study, ROWS["hqq-4"], "make", {}, tmp_path / "out.json"))
    study = Study(places, pythons={"hqq": "/bin/false"})
    assert _stage(study, ROWS["hqq-4"], "make", {}, tmp_path / "out.json") == "its process ended with status 1"


class Halves:
    """A library whose layers have no forward pass here, and whose weights are half of what they were."""

    @staticmethod
    def layer(weight: torch.Tensor) -> torch.nn.Module:
        class Half(torch.nn.Module):
            codes = weight / 2

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                raise NotImplementedError("no kernel for the CPU")

        return Half()


def test_a_library_without_a_forward_pass_is_evaluated_dequantized(places: Any) -> None:
    from peer_study import adapters, child

    class Adapter(adapters.Adapter):
        def dequantize(self, module: Any) -> torch.Tensor:
            return module.codes

    source = str(places.model)
    model, twin = adapters.load_bf16(source), adapters.load_bf16(source)
    for name in adapters.linear_names(twin):
        parent, _, leaf = name.rpartition(".")
        weight = twin.get_submodule(name).weight
        setattr(model.get_submodule(parent), leaf, Halves.layer(weight.data))
        weight.data = weight.data / 2
    windows = [list(range(100)), list(range(50, 150))]
    found: dict[str, Any] = {"notes": []}
    child.score(Adapter({}), model, {"model": source, "windows": windows, "dequantized": False}, found)
    assert found["dequantized"]
    assert "NotImplementedError: no kernel for the CPU" in found["notes"][0]
    expected = evaluation.perplexity(twin, [torch.tensor(ids) for ids in windows])
    assert found["perplexity"] == expected["perplexity"]


def test_bits_count_every_tensor_that_a_layer_keeps() -> None:
    from peer_study.adapters import Adapter, Hqq, Torchao, tensors_of

    layer = torch.nn.Linear(64, 32, bias=True)
    layer.weight = torch.nn.Parameter(torch.zeros(32, 64, dtype=torch.int8), requires_grad=False)
    layer.register_buffer("scale", torch.zeros(32, dtype=torch.float16))
    stored = 32 * 64 * 8 + 32 * 16
    assert Adapter({}).layer_bits(layer) == stored  # the bias is not the weight's
    assert Torchao({"bits": 3, "intx": True}).layer_bits(layer) == stored - 32 * 64 * 5
    assert Torchao({"bits": 8}).layer_bits(layer) == stored
    hqq = torch.nn.Module()
    hqq.W_q = torch.zeros(10, dtype=torch.uint8)
    hqq.meta = {"scale": torch.zeros(4, dtype=torch.float16), "zero": torch.zeros(4), "nbits": 4}
    assert Hqq({"bits": 4}).layer_bits(hqq) == 80 + 64 + 128
    assert tensors_of("neither") == []


OURS = {
    "runs": [
        {"run": "4", "linear_bpw": 4.5, "perplexity": 11.0, "ratio": 1.1, "seconds": 5.0},
        {"run": "4:seed=1", "linear_bpw": 4.5, "perplexity": 13.0, "ratio": 1.3, "seconds": 5.0},
        {"run": "2:preset=balanced", "linear_bpw": 2.5, "perplexity": 15.0, "ratio": 1.5, "seconds": 50.0},
    ]
}


def peers_content() -> dict[str, Any]:
    def row(peer: str, title: str, bits: int, bpw: float, perplexity: float, **more: Any) -> dict[str, Any]:
        return {"peer": peer, "title": title, "bits": bits, "reason": None, "version": "v 1", "linear_bpw": bpw,
                "perplexity": perplexity, "decode": {"tokens_per_second": 9.0, "by_bf16": 2.0 + bits}, "load_mb": 7.0,
                "quantize_seconds": 1.0, "saved": True, "dequantized": False, "notes": ["n"], **more}  # fmt: skip

    rows = {
        "float": row("float", "float (bf16)", 16, 16.0, 10.0),
        "ours-4": row("ours", "ours, closed, no data", 4, 4.5, 11.2),
        "ours-2": row("ours", "ours, closed, no data", 2, 2.5, 90.0),
        "hqq-4": row("hqq", "HQQ", 4, 4.5, 12.0, saved=False, dequantized=True),
        "llama-q4_1": row("llama", "Q4_1", 4, 5.0, 10.0),
        "hqq-2": row("hqq", "HQQ", 2, 2.5, 14.0),
        "quanto-3": {**row("quanto", "quanto", 3, 0.0, 0.0), "reason": "no 3 bits"},
    }
    return {"protocol": {}, "rows": rows}


def test_our_presets_join_the_table() -> None:
    from peer_study.tables import joint_rows, quality, standing

    content = peers_content()
    rows = joint_rows(content, OURS)
    assert [(row["bits"], row["title"]) for row in rows] == [
        (16, "float (bf16)"), (4, "Q4_1"), (4, "ours, closed, no data"), (4, "HQQ"), (2, "HQQ"), (2, "ours, balanced"),
        (2, "ours, closed, no data"),
    ]  # fmt: skip
    assert rows[2]["perplexity"] == 11.0  # mpq.py's, not the one measured beside the peers
    assert rows[2]["decode"]["by_bf16"] == 6.0  # which has the speed of the format
    assert [row["multiple"] for row in rows] == [1.0, 1.0, 1.1, 1.2, 1.4, 1.5, 9.0]
    table = quality(content, OURS)
    assert "| 4 | HQQ (evaluated dequantized) | 4.500 | 12.000 | 1.200 | 6.00 | 7 * | 1 |" in table
    assert "| 2 | **ours, balanced** | 2.500 | 15.000 | 1.500 | 4.00 | 7 | 50 |" in table
    text = standing(content, OURS)
    assert "4 bits: ours, closed, no data at 4.500 bits, 11.000, at or below the best peer of no more bits: HQQ" in text
    assert "2 bits: ours, balanced at 2.500 bits, 15.000, **above** the best peer of no more bits: HQQ at 2.500" in text
    assert "11.200" in quality(content, None)


def test_peers_that_are_ahead_are_told_with_the_reason() -> None:
    from peer_study.reasons import REASONS
    from peer_study.rows import ROWS
    from peer_study.tables import ahead

    assert set(REASONS) <= set(ROWS)
    lines = ahead(peers_content(), OURS).splitlines()[2:]
    reason = REASONS["llama-q4_1"]
    assert lines == [
        f"| 4 | Q4_1 | 5.000 | 10.000 | all | 4 bits, closed, no data at 4.500 bits, 11.000 | {reason} |",
        "| 2 | HQQ | 2.500 | 14.000 | all | 2 bits, balanced at 2.500 bits, 15.000 | not explained yet |",
    ]


def test_targets_say_what_is_not_met() -> None:
    from peer_study.tables import targets

    speed = {"threads": 2, "model": {"model": "m", "rivals": {
        name: {"decode_tokens_per_s": rate} for name, rate in (("packed", 30.0), ("packed 2g64", 29.0), ("bf16", 10.0))
    }}}  # fmt: skip
    assert targets(OURS, speed).splitlines()[2:] == [
        "| 4 bits, the same without any text | ≤ 1.06 × float | 1.1000 | **not met** | "
        "ours, closed, no data: no text |",
        "| 2 bits, calibrated, blocks tuned | ≤ 1.7 × float | 1.5000 | met | ours, balanced: a text |",
        "| decoding at 4 bits | ≥ 2 × bf16 | 3.00 | met | m, 2 threads |",
        "| decoding at 2 bits | faster than at 4 bits | 2.90 × bf16 | **not met** | m, 2 threads |",
    ]


def test_the_command_line(
    measured: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mpq_peers import main

    page = tmp_path / "page.md"
    page.write_text((DOCS / "mpq_results.md").read_text())
    output = ["--output", str(measured[0])]
    table = [*output, "table", "--page", str(page), "--ours", str(tmp_path / "none.json")]
    assert main(table) == 0
    assert f"| {measured[1]['rows']['ours-4']['perplexity']:.3f} |" in page.read_text()
    assert main([*table, "--check"]) == 0
    page.write_text(page.read_text().replace("| float (bf16) |", "| float |"))
    assert main([*table, "--check"]) == 1
    assert main([*output, "list"]) == 0
    shown = capsys.readouterr().out
    assert "ours-4           ours     done" in shown
    assert "hqq-4            hqq      no figures" in shown
    assert "hqq-2            hqq      to do" in shown
    places = ["--model", "m", "--data", "d", "--work", "w"]
    assert main(["run", "nothing", *places]) == 2
    with pytest.raises(SystemExit):
        main(["run", *places, "--python", "nobody=x"])
    assert "expected PEER=FILE" in capsys.readouterr().err


def test_pages_without_their_markers_are_refused() -> None:
    from peer_study.tables import NAMES, NOTHING, fill

    with pytest.raises(ValueError, match="expected one for each"):
        fill("<!-- peers: quality -->\n<!-- /peers -->\n", {"rows": {}}, None)
    page = "".join(f"<!-- peers: {name} -->\nold\n<!-- /peers -->\n" for name in NAMES)
    assert fill(page, {"rows": {}}, None).count(NOTHING) == len(NAMES)


def test_the_committed_page_is_what_the_committed_json_says() -> None:
    """So that nobody types a number."""
    from peer_study.rows import ROWS
    from peer_study.running import load
    from peer_study.tables import fill

    page = (DOCS / "mpq_results.md").read_text(encoding="utf-8")
    peers, ours, speed = (load(DOCS / "results" / f"{name}.json") for name in ("mpq_peers", "mpq", "bench_model_mpq"))
    assert fill(page, peers, ours, speed) == page
    assert "not explained yet" not in page
    assert set(peers["rows"]) <= set(ROWS)
    for row in peers["rows"].values():
        assert (row["perplexity"] is None) == (row["reason"] is not None)

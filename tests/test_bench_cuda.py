"""``hf-onebit bench --device cuda`` without a GPU: what it refuses, its figures by a stand-in clock, its tables."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import first_column, section

from hf_onebit import bench, cli, ops
from hf_onebit.bench import cuda, cuda_clock, cuda_layers, cuda_tables
from hf_onebit.bench.cuda_layers import kind_of, peers_of
from hf_onebit.ops import gpu

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = sorted((ROOT / "docs" / "results").glob("bench_cuda_*.json"))
SMALL = ["--shape", "24x64", "32x128", "--batch", "1", "5"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were two, and Triton."""
    monkeypatch.setattr(gpu, "obstacle", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def stand_in(gpus: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU in the place of a GPU, with a clock that counts; the rows of what was timed."""
    rows: list[int] = []

    def graph(calls: Any, x: torch.Tensor, milliseconds: float) -> float:
        assert len(calls) == 3
        assert [call(x).shape[0] for call in calls] == [len(x)] * 3
        rows.append(len(x))
        return 10.0 * len(rows)

    monkeypatch.setattr(cuda, "_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(cuda, "peers_of", lambda names: peers_of(names or []))  # whatever is installed here
    monkeypatch.setattr(cuda_layers, "_count", lambda one, l2: 3)
    for name, answer in {
        "triton_version": lambda: "9.9",
        "device_name": lambda device: "A stand-in",
        "l2_bytes": lambda device: 1 << 20,
        "bandwidth": lambda device: 2e9,
        "graph_microseconds": graph,
        "eager_microseconds": lambda calls, x, milliseconds: milliseconds,
        "kernel_microseconds": lambda calls, x: {"multiply": 1.5},
    }.items():
        monkeypatch.setattr(cuda_clock, name, answer)
    return rows


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a call ends with, status 2, with --json too."""
    said = set()
    for more in ((), ("--json",)):
        assert cli.main(["bench", *arguments, *more]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        said.add(err)
    (line,) = said
    assert line.count("\n") == 1
    return line


# ------------------------------------------------------------------------------------------------------------ refusals


def test_without_a_gpu_or_triton(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    start = "hf-onebit: error: --device cuda: "
    unused = f"{start}the GPU kernels are not in use: "
    assert refusal(capsys, "--device", "cuda") == f"{unused}this torch is built for the CPU only\n"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert refusal(capsys, "--device", "cuda") == f"{unused}triton is not installed; install it: pip install triton\n"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(capsys, "--device", "cuda") == f"{start}torch finds no GPU here\n"
    monkeypatch.setenv("HF_ONEBIT_TRITON", "off")
    assert refusal(capsys, "--device", "cuda") == f"{unused}HF_ONEBIT_TRITON=off\n"
    with pytest.raises(RuntimeError, match="cuda: the GPU kernels are not in use"):
        cuda.run(shapes=["64x64"])


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cuda:-1", "cuda:2", "CUDA", ""])
def test_devices_that_are_not_there(device: str, gpus: None, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "there are 2 GPUs here, counted from 0" if device == "cuda:2" else "expected cpu, cuda or cuda:N"
    assert refusal(capsys, f"--device={device}") == f"hf-onebit: error: --device {device}: {expected}\n"


@pytest.mark.parametrize(
    "option",
    [["--threads", "1"], ["--model", "llama-0.8b"], ["--isa", "scalar"], ["--mode", "hot"], ["--rounds", "15"],
     ["--working-set", "1.1"], ["--prompt", "128"], ["--new-tokens", "32"], ["--gguf", "q1_0"]],
)  # fmt: skip
def test_options_of_the_cpu_cannot_stand_beside_it(
    option: list[str], gpus: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not with their defaults either: they would not be what is timed."""
    said = refusal(capsys, *option, "--device", "cuda")
    assert said == f"hf-onebit: error: --device cuda: {option[0]} cannot stand beside it\n"


def test_options_of_a_gpu_cannot_stand_beside_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "--profile", "--milliseconds", "3")
    assert said == "hf-onebit: error: --device cpu: --profile, --milliseconds cannot stand beside it\n"
    assert refusal(capsys, "--device", "cpu", "--profile").endswith("--profile cannot stand beside it\n")


def test_values_that_a_gpu_does_not_take(
    gpus: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(capsys, "--device", "cuda:1", "--dtype", "float32")
    assert said.endswith("--device cuda:1: --dtype is float32, expected float16 or bfloat16\n")
    monkeypatch.setattr(cuda_layers, "missing", lambda kind: "gemlite is not installed" if "gem" in kind else "")
    for option, value, message in (
        ("--packed", "2.5g64", "packed is '2.5g64': expected one width for the whole layer"),
        ("--packed", "1q", "packed is '1q': expected \"1p\""),
        ("--against", "ggml", "against is 'ggml', expected float, gemlite1, "),
        ("--against", "bnb4,gemlite4", "against names 'gemlite4', but gemlite is not installed"),
        ("--shape", "64", "shape is '64'"),
        ("--batch", "0", "batch is 0, expected at least 1"),
        ("--milliseconds", "0", "milliseconds is 0.0, expected a number above 0"),
        ("--json", str(tmp_path / "no" / "file.json"), "cannot write"),
    ):
        assert cli.main(["bench", "--device", "cuda", option, value]) == (1 if option == "--json" else 2)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="dtype is 'float32', expected float16, bfloat16"):
        cuda.run(dtypes=["float32"])


# ------------------------------------------------------------------------------------------------------------- options


def test_defaults_are_the_shapes_of_large_models(
    gpus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def run(**options: Any) -> dict[str, Any]:
        asked.update(options)
        return json.loads(COMMITTED[0].read_text(encoding="utf-8"))

    monkeypatch.setattr(cuda, "run", run)
    assert cli.main(["bench", "--device", "cuda:1"]) == 0
    assert {asked.pop(key) for key in ("shapes", "batches", "packed", "against", "dtypes")} == {None}
    assert (asked["device"], asked["milliseconds"], asked["profile"]) == ("cuda:1", 20.0, False)
    assert cuda.SHAPES == ("4096x4096", "11008x4096", "28672x8192")
    assert cuda.BATCHES == bench.BATCHES == (1, 4, 16, 64, 512)
    assert [kind_of(name) for name in cuda.PACKED] == ["onebit", "onebit2", "mpq4", "mpq2"]
    assert [kind_of(name) for name in ("3g128", "8g-1")] == ["mpq3g128", "mpq8g-1"]
    arguments = ["--packed", "1p,3g32", "--against", "bnb4", "--dtype", "bfloat16", "--milliseconds", "2", "--profile"]
    assert cli.main(["bench", "--device", "cuda", *SMALL, *arguments]) == 0
    assert (asked["shapes"], asked["batches"]) == (["24x64", "32x128"], [1, 5])
    assert (asked["packed"], asked["against"], asked["dtypes"]) == (["1p", "3g32"], ["bnb4"], ["bfloat16"])
    assert (asked["milliseconds"], asked["profile"]) == (2.0, True)
    capsys.readouterr()


def test_other_libraries_are_timed_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_layers, "missing", lambda kind: "" if kind.startswith("gemlite") else "not installed")
    assert peers_of(None) == ["gemlite1", "gemlite2", "gemlite4"]
    assert peers_of(["float"]) == []
    assert peers_of(["gemlite4", "float"]) == ["gemlite4"]


# --------------------------------------------------------------------------------------------------------- the figures


def test_every_contender_is_checked_and_timed(
    stand_in: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "onebit dtype=torch.float16 planes=1"
    monkeypatch.setattr(gpu, "_examined", {("cpu", wrong): "is off by 1", ("cuda:1", wrong): "is off by 2"})
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--device", "cuda", *SMALL, "--profile", "--json", str(file)]) == 0
    shown = capsys.readouterr()
    result = json.loads(file.read_text(encoding="utf-8"))
    assert (result["device"], result["triton"], result["refused"]) == ("A stand-in", "9.9", {wrong: "is off by 1"})
    rows = result["results"]
    kinds = ["float", "onebit", "onebit2", "mpq4", "mpq2"]
    assert [(row["shape"], row["dtype"], row["kind"], row["rows"]) for row in rows] == [
        (shape, dtype, kind, count)
        for shape in ("24x64", "32x128")
        for dtype in ("float16", "bfloat16")
        for kind in kinds
        for count in (1, 5)
    ]
    assert stand_in == [row["rows"] for row in rows]
    # The clock counts by tens: of a shape and dtype, float is timed first.
    first, second, third = rows[0], rows[2], rows[5]
    assert (first["graph_us"], first["float_over_packed"]) == (10.0, 1.0)
    assert (second["graph_us"], second["float_over_packed"]) == (30.0, 10 / 30)
    assert third["float_over_packed"] == 20 / 60
    assert {row["eager_us"] for row in rows} == {20.0}
    # 24x64 signs and their float16 scales, x and y, at 2 GB/s.
    assert second["floor_us"] == pytest.approx((24 * 64 / 8 + 2 * (24 + 64) + 2 * 64 + 2 * 24) / 2e9 * 1e6)
    assert all(0 < row["error"] < 1e-2 for row in rows)
    documented = first_column(section("bench"), "key on a GPU")
    assert set(result) == {key.split(".")[0] for key in documented if "[]" not in key} | {"results"}
    in_rows = {key.removeprefix("results[].") for key in documented if key.startswith("results[].")}
    assert all(set(row) == in_rows - {"not_timed"} for row in rows)
    assert shown.out.count("24x64") == 20
    assert f"REFUSED, so that plain torch was timed: {wrong}: is off by 1" in shown.out
    assert "24x64 float16 onebit, 1 rows: graph 30.00 µs (0.33x float), eager 20.00 µs" in shown.err
    assert "multiply: 1.50 µs" in shown.err
    assert shown.out.rstrip("\n") == cuda_tables.as_text(result)


def test_a_layer_of_ours_that_is_wrong_ends_the_run(
    stand_in: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.mpq_linear
    monkeypatch.setattr(ops, "mpq_linear", lambda *arguments: right(*arguments) * 1.1)
    assert cli.main(["bench", "--device", "cuda", *SMALL, "--dtype", "float16", "--json"]) == 1
    shown = capsys.readouterr()
    message = "24x64 float16 mpq4, 1 rows: off by 1.0e-01 of the result's norm, allowed 2e-03: not timed"
    assert json.loads(shown.out) == {"error": message}
    assert len(stand_in) == 3 * 2  # float, and the two of signs


@pytest.mark.parametrize("fault", ["none", "wrong", "cannot be made", "does not run"])
def test_a_layer_of_another_library_that_is_wrong_is_left_out(
    fault: str, stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def peer(kind: str, out: int, in_: int, *about: Any) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        if fault == "cannot be made":
            raise RuntimeError("no layer of one bit")
        W = torch.randn(out, in_)

        def call(x: torch.Tensor) -> torch.Tensor:
            if fault == "does not run" and len(x) > 1:
                raise TypeError("one row only")
            return (x.float() @ W.T).to(x.dtype) * (2 if fault == "wrong" else 1)

        return call, W

    monkeypatch.setattr(cuda_layers, "missing", lambda kind: "")
    monkeypatch.setattr(cuda_layers, "peer", peer)
    result = cuda.run(
        shapes=["24x64"], batches=[1, 5], packed=["1p"], against=["gemlite1"], dtypes=["float16"], milliseconds=1
    )
    ours, theirs = result["results"][:4], result["results"][4:]
    assert [row["kind"] for row in ours] == ["float", "float", "onebit", "onebit"]
    assert all("not_timed" not in row for row in ours)
    said = [(row["rows"], row.get("not_timed")) for row in theirs]
    off = "WrongResult: off by 1.0e+00 of the result's norm, allowed 2e-03: not timed"
    assert (
        said
        == {
            "none": [(1, None), (5, None)],
            "wrong": [(1, off), (5, off)],
            "cannot be made": [(None, "RuntimeError: no layer of one bit")],
            "does not run": [(1, None), (5, "TypeError: one row only")],
        }[fault]
    )
    text = cuda_tables.as_text(result)
    assert text.count("skipped: 24x64 float16 gemlite1") == sum(why is not None for _, why in said)
    assert ("skipped: 24x64 float16 gemlite1: RuntimeError: no layer of one bit" in text) == (fault == "cannot be made")


def test_a_run_that_is_cut_off_is_not_lost(
    stand_in: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = cuda_clock.graph_microseconds

    def graph(*arguments: Any) -> float:
        if len(stand_in) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(cuda_clock, "graph_microseconds", graph)
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--device", "cuda", *SMALL, "--json", str(file)]) == 130
    result = json.loads(file.read_text(encoding="utf-8"))
    assert len(result["results"]) == 3
    assert result["command"].startswith("hf-onebit bench --device cuda --shape 24x64")
    assert "A stand-in" in cuda_tables.as_text(result)
    capsys.readouterr()


# -------------------------------------------------------------------------------------------- committed files, a script


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.name)
def test_the_table_of_a_committed_file(file: Path) -> None:
    result = json.loads(file.read_text(encoding="utf-8"))
    text = cuda_tables.as_text(result)
    assert text.startswith(f"{result['device']}, torch {result['torch']}, triton {result['triton']}, ")
    assert ("usual plans" in text.splitlines()[0]) is not result["autotune"]
    shown = [line.split() for line in text.splitlines()]
    for row in result["results"]:
        if "not_timed" not in row:
            cells = [row["shape"], row["dtype"], row["kind"], str(row["rows"]), f"{row['graph_us']:.2f}"]
            assert cells in [line[:5] for line in shown]
    assert text.count("skipped: ") == sum("not_timed" in row for row in result["results"])


def test_there_are_committed_files() -> None:
    assert [file.name for file in COMMITTED][:1] == ["bench_cuda_h100.json"]


def test_the_script_that_times_plans_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ONEBIT_TRITON", "off")
    monkeypatch.setattr(sys, "argv", ["sweep_cuda.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / "sweep_cuda.py"), run_name="__main__")
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "sweep_cuda.py: error: the GPU kernels are not in use: HF_ONEBIT_TRITON=off\n"

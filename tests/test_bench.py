"""``hf-onebit bench``: what it times computes what it should, and what it says is what it measured."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_float, tiny_gpt2, tiny_llama

import hf_onebit
from hf_onebit import bench, cli, loading
from hf_onebit.bench import ggml as ggml_module
from hf_onebit.bench import gguf_file, layers, rounds
from hf_onebit.bench import llama as llama_module
from hf_onebit.bench import model as model_module
from hf_onebit.bench.ggml import Ggml, GgmlDot
from hf_onebit.bench.layers import Dense, Packed, Reference, WrongResult, measure
from hf_onebit.bench.rounds import Contender, Threads, median_ratio, time_rounds
from hf_onebit.choices import Choice, name_of
from hf_onebit.nn.replace import entry_of, packed_layers
from hf_onebit.ops import cpu

needs_kernels = pytest.mark.skipif(cpu.isa() is None, reason="no compiled kernels")
needs_llama = pytest.mark.skipif(
    cpu.isa() is None or importlib.util.find_spec("llama_cpp") is None, reason="no llama-cpp-python, or no kernels"
)
# Of a LlamaConfig.
TINY_SIZES = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2}
TINY_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def packed_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama whose layers fill blocks of 256 weights."""
    folder = tmp_path_factory.mktemp("bench") / "packed"
    model = tiny_llama(hidden=256, intermediate=256, layers=1).to(torch.bfloat16)
    quantizer = hf_onebit.OneBitQuantizer()
    quantizer.save(quantizer.quantize_model(model), folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- rounds


def test_every_contender_runs_once_a_round_and_shared_weights_are_taken_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "_repeats", lambda contender: 2)
    calls: list[tuple[str, list[int]]] = []

    def contender(name: str, copies: int, weights: str) -> Contender:
        return Contender(name, lambda chosen: calls.append((name, list(chosen))), copies, weights)

    times = time_rounds([contender("a", 5, "w"), contender("b", 5, "w"), contender("c", 1, "c")], rounds=2)
    assert {name: (len(each.wall), len(each.cpu)) for name, each in times.items()} == dict.fromkeys("abc", (2, 2))
    # "c" is hot: one pass before each timing. The second round begins with the next contender.
    assert calls == [
        ("a", [0, 1]), ("b", [2, 3]), ("c", [0]), ("c", [0, 0]),
        ("b", [4, 0]), ("c", [0]), ("c", [0, 0]), ("a", [1, 2]),
    ]  # fmt: skip


def test_time_without_the_processor_is_told_apart() -> None:
    (times,) = time_rounds([Contender("sleeper", lambda chosen: time.sleep(0.02), 1, "w")], rounds=3).values()
    assert min(times.wall) >= 0.02
    assert min(times.cpu) < 0.01


def test_a_ratio_is_taken_within_rounds() -> None:
    assert median_ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0


@pytest.mark.parametrize(("count", "size", "unit"), [(1, 100, 64), (2, 100, 64), (3, 7, 1), (8, 3, 1), (2, 64, 64)])
def test_threads_cover_the_range_once(count: int, size: int, unit: int) -> None:
    ranges: list[tuple[int, int]] = []
    Threads(count).split(size, unit, lambda begin, end: ranges.append((begin, end)))
    assert sorted(n for begin, end in ranges for n in range(begin, end)) == list(range(size))
    assert len(ranges) <= count
    assert all(begin % unit == 0 for begin, _ in ranges)


def test_an_error_of_a_thread_is_raised() -> None:
    def body(begin: int, end: int) -> None:
        if begin:
            raise ValueError("of the second thread")

    with pytest.raises(ValueError, match="of the second thread"):
        Threads(2).split(2, 1, body)


# ------------------------------------------------------------------------------------------------------------- layers


def rivals_of(shape: tuple[int, int], working_set: int = 0) -> list[Any]:
    packed = Packed(*shape, working_set, torch.bfloat16)
    dense = [Dense("bf16", *shape, working_set, torch.bfloat16), Dense("fp32", *shape, working_set, torch.float32)]
    return [packed, *dense, Reference(packed)]


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("shape", [(64, 96), (33, 130)])
def test_all_contenders_are_right(shape: tuple[int, int], batch: int) -> None:
    x = torch.randn(batch, shape[1])
    for rival in rivals_of(shape):
        run, result = rival.prepare(x)
        assert rival.check(result(), x) <= rival.allowed
        run([0])


class Wrong(Dense):
    """A layer with one wrong weight of ten thousand."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.right = self.tensors[0].clone()
        self.tensors[0][3, 5] += 0.5

    def expected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wrong, self.tensors = self.tensors, [self.right]
        try:
            return super().expected(x)
        finally:
            self.tensors = wrong


def test_a_wrong_contender_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    timed: list[str] = []
    monkeypatch.setattr(layers, "time_rounds", lambda *arguments: timed.append("timed"))
    with pytest.raises(WrongResult, match=r"bf16 computes a wrong product of \(2, 100\)"):
        measure([rivals_of((100, 100))[0], Wrong("bf16", 100, 100, 0, torch.bfloat16)], 2, 1, Threads(1))
    assert not timed
    monkeypatch.setattr(bench, "Dense", Wrong)
    arguments = ["bench", "--shape", "100x100", "--batch", "2", "--against", "bf16", "--rounds", "1", "--mode", "hot"]
    assert cli.main(arguments) == 1
    assert "wrong product" in capsys.readouterr().err


def test_results_that_are_no_numbers_or_of_another_shape_are_wrong() -> None:
    packed = rivals_of((40, 64))[0]
    x = torch.randn(2, 64)
    y = packed.prepare(x)[1]()
    for wrong in (torch.full_like(y, torch.nan), y[:, 1:]):
        with pytest.raises(WrongResult):
            packed.check(wrong, x)


@needs_kernels
def test_figures_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"packed": [1e-3, 3e-3, 2e-3], "bf16": [4e-3, 6e-3, 8e-3], "read": [1e-3, 1e-3, 2e-3]}
    times = {name: rounds.Times(wall, wall[::-1]) for name, wall in seconds.items()}
    monkeypatch.setattr(layers, "time_rounds", lambda contenders, rounds: times)
    found = measure(rivals_of((64, 96))[:2], 1, 3, Threads(1))
    assert list(found) == ["packed", "bf16", "read"]
    assert found["bf16"]["seconds"] == 6e-3
    assert found["bf16"]["seconds_min"] == 4e-3
    assert found["bf16"]["times_packed"] == 4
    assert found["packed"]["times_read"] == 1
    assert (found["read"]["cpu_seconds"], found["packed"]["cpu_times_read"]) == (1e-3, 1)
    assert found["packed"]["gb_per_s"] == pytest.approx(64 * 96 / 8 / 2e-3 / 1e9)
    assert found["read"]["gb_per_s"] == pytest.approx(64 * 96 / 8 / 1e-3 / 1e9)
    assert found["bf16"]["weights_per_s"] == pytest.approx(64 * 96 / 6e-3)
    assert found["packed"]["bits_per_weight"] == pytest.approx(1 + 16 * (64 + 96) / (64 * 96))


def test_streaming_walks_through_the_working_set() -> None:
    packed, bf16, *_ = rivals_of((64, 96), working_set=100_000)
    assert len(packed.tensors) == 100_000 // (64 * 96 // 8)
    assert len(bf16.tensors) == 100_000 // (64 * 96 * 2)
    assert len({tensor.data_ptr() for tensor in packed.tensors}) == len(packed.tensors)
    assert all(torch.equal(tensor, packed.tensors[0]) for tensor in packed.tensors)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="expected OUTxIN"):
        bench.run(shapes=["4096"])
    with pytest.raises(ValueError, match="against is 'onnx'"):
        bench.run(shapes=["64x64"], against=["onnx"])
    with pytest.raises(ValueError, match="rounds is 0"):
        bench.run(shapes=["64x64"], rounds=0)
    with pytest.raises(ValueError, match="batch is -1"):
        bench.run(shapes=["64x64"], batches=[4, -1])
    with pytest.raises(ValueError, match="new_tokens is 1"):
        bench.run(model="llama-0.8b", new_tokens=1)
    with pytest.raises(ValueError, match="gguf is 'q9'"):
        bench.run(model="llama-0.8b", gguf=["q9"])
    with pytest.raises(ValueError, match="packed is '4g7': expected"):
        bench.run(model="llama-0.8b", packed=["4g7"])
    with pytest.raises(ValueError, match="none of them twice"):
        bench.run(model="llama-0.8b", packed=["1p", "1p"])
    with pytest.raises(ValueError, match="is packed already"):
        bench.run(model="folder", packed=["4g64"])


def test_options_of_a_model_want_one(capsys: pytest.CaptureFixture[str]) -> None:
    """They would change nothing about layers."""
    given = ["--packed", "4g64", "--gguf", "q4_0", "--prompt", "5", "--new-tokens", "3"]
    for option in range(0, len(given), 2):
        assert cli.main(["bench", "--shape", "64x64", *given[option : option + 2]]) == 2
        said = f"hf-onebit: error: {given[option]}: for whole models, name one with --model\n"
        assert capsys.readouterr().err == said


@needs_kernels
def test_the_instruction_set_is_the_asked_one_and_restored() -> None:
    before = cpu.isa()
    result = bench.run(shapes=["64x64"], batches=[1], modes=["hot"], against=[], isa="scalar", rounds=1)
    assert result["isa"] == "scalar"
    assert cpu.isa() == before


# --------------------------------------------------------------------------------------------------------------- ggml


@needs_llama
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", list(ggml_module.TYPES))
def test_ggml_is_right(kind: str, threads: int) -> None:
    x = torch.randn(5, 512)
    rival = GgmlDot(Ggml(), kind, 70, 512, 3 * 10**5, Threads(threads))
    run, result = rival.prepare(x)
    assert 0 < rival.check(result(), x) <= rival.allowed
    run([0, 1])
    assert rival.bits_per_weight == {"q1_0": 1.125, "tq2_0": 2.0625, "q4_0": 4.5}[kind]


@needs_llama
def test_a_wrong_product_of_ggml_is_seen() -> None:
    rival = GgmlDot(Ggml(), "q4_0", 64, 512, 0, Threads(1))
    x = torch.randn(1, 512)
    result = rival.prepare(x)[1]
    rival.tensors[0][7] = rival.tensors[0][8]
    with pytest.raises(WrongResult, match="ggml q4_0"):
        rival.check(result(), x)


@needs_llama
def test_a_type_of_another_name_or_with_larger_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml = Ggml()
    assert ggml.obstacle("q1_0", 96) == "96 inputs are no multiple of its block of 128"
    assert ggml.obstacle("q1_0", 128) is None
    monkeypatch.setitem(ggml_module.TYPES, "q1_0", 2)
    assert str(ggml.obstacle("q1_0", 128)).endswith("is q4_0, expected q1_0")


def test_without_llama_cpp_that_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ggml_module, "library_folder", lambda: None)
    arguments = ["bench", "--shape", "64x128", "--batch", "1", "--rounds", "1", "--mode", "hot"]
    assert cli.main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert "skipped: ggml: " in printed.err
    (entry,) = result["skipped"]
    assert entry["contender"] == "ggml"
    if cpu.isa() is not None:
        assert "llama-cpp-python is not installed" in entry["reason"]
    assert set(result["layers"][0]["contenders"]) - {"read"} == {"packed", "bf16"}


# -------------------------------------------------------------------------------------------------------------- model


def test_a_model_without_rivals(packed_llama: Path) -> None:
    found = bench.bench_model(str(packed_llama), against=[], prompt_tokens=5, new_tokens=3, rounds=2)
    assert list(found["rivals"]) == ["packed"]
    packed = found["rivals"]["packed"]
    assert packed["decode_by_packed"] == 1
    assert packed["cosine"] is None
    assert packed["head"] == "bfloat16"
    assert found["tensor_bytes"] <= 1.05 * found["packed_file_bytes"]


def test_a_twin_with_other_logits_ends_the_run(packed_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(folder: str, **options: Any) -> Any:
        model = loading.load(folder, **options)
        if options.get("dequantize"):
            torch.nn.init.normal_(model.model.layers[0].mlp.down_proj.weight)
        return model

    monkeypatch.setattr(model_module, "loading", type("Loading", (), {"load": staticmethod(other)}))
    with pytest.raises(WrongResult, match="logits of packed"):
        bench.bench_model(str(packed_llama), against=["bf16"], prompt_tokens=5, new_tokens=3, rounds=1)


@needs_llama
def test_llama_cpp_runs_the_same_model(packed_llama: Path) -> None:
    found = bench.bench_model(
        str(packed_llama), against=["ggml"], gguf=["f16", "q1_0"], prompt_tokens=7, new_tokens=3, rounds=1
    )
    assert list(found["rivals"]) == ["packed", "llama.cpp f16", "llama.cpp q1_0"]
    assert found["rivals"]["llama.cpp f16"]["cosine"] > 0.999
    assert found["rivals"]["llama.cpp q1_0"]["bytes"] < found["rivals"]["llama.cpp f16"]["bytes"]
    assert not found["skipped"]


@needs_llama
def test_a_file_that_llama_cpp_refuses_and_its_death_are_sentences(packed_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"not a model")
    with pytest.raises(RuntimeError, match=r"llama\.cpp cannot load"):
        llama_module.LlamaProcess(tmp_path / "no.gguf", 8, 1)
    model = loading.load(packed_llama, dequantize=True)
    gguf_file.write(model, tmp_path / "model.gguf", Ggml(), "f16", "f16")
    llama = llama_module.LlamaProcess(tmp_path / "model.gguf", 8, 1)
    llama._process.kill()
    with pytest.raises(RuntimeError, match="was ended by signal 9"):
        llama.generate(torch.tensor([[1, 2]]), 2)


def test_models_that_no_file_is_written_for_are_refused() -> None:
    refused = gguf_file.obstacle(tiny_gpt2().config, Any, "f16")
    assert refused is not None
    assert "'gpt2'" in refused


def test_the_random_model_is_a_packed_checkpoint(tmp_path: Path) -> None:
    model_module.write_random_llama(str(tmp_path / "random"), TINY_SIZES)
    assert cli.main(["verify", str(tmp_path / "random")]) == 0
    model = loading.load(tmp_path / "random")
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("choice", ["2p", "4g64", "3g-1"])
def test_the_random_model_can_be_packed_otherwise(tmp_path: Path, choice: str) -> None:
    model_module.write_random_llama(str(tmp_path / "random"), TINY_SIZES, Choice.parse(choice))
    assert cli.main(["verify", str(tmp_path / "random")]) == 0
    model = loading.load(tmp_path / "random")
    inside = [layer for name, layer in packed_layers(model).items() if name != "lm_head"]
    assert len(inside) == 14
    assert {name_of(entry_of(layer)) for layer in inside} == {choice}


def test_formats_of_the_random_model_are_timed_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_module.RANDOM_MODELS, "tiny", TINY_SIZES)
    result = bench.run(
        model="tiny", packed=["4g64", "2g64", "1p"], against=["bf16"], rounds=1, prompt_tokens=2, new_tokens=2
    )
    rivals = result["model"]["rivals"]
    assert list(rivals) == ["packed", "packed 2g64", "packed 1p", "bf16"]
    assert [rivals[name]["linear"] for name in rivals] == ["4g64, packed", "2g64, packed", "1p, packed", "bf16"]
    assert rivals["packed"]["decode_by_packed"] == 1
    assert all(rival["cosine"] > 0.98 for rival in rivals.values())
    assert rivals["packed 1p"]["bytes"] < rivals["packed 2g64"]["bytes"] < rivals["packed"]["bytes"]
    assert "packed 2g64" in bench.as_text(result)


def test_a_float_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_float(tiny_llama(), tmp_path / "float")
    assert cli.main(["bench", "--model", str(folder), "--rounds", "1"]) == 1
    assert "this is a float model" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- file


@pytest.mark.parametrize(("threads", "share", "said"), [(1, 0.5, True), (1, 0.97, False), (2, 0.5, False)])
def test_a_busy_machine_is_said(threads: int, share: float, said: bool) -> None:
    with torch.inference_mode():
        found = measure(rivals_of((64, 96))[:2], 1, 1, Threads(1))
    for figures in found.values():
        figures["cpu_seconds"] = share * figures["seconds"]
    result = {**bench.about_machine(threads), "model": None, "skipped": []}
    result["layers"] = [{"shape": [64, 96], "batch": 1, "mode": "hot", "contenders": found}]
    assert ("The machine was busy" in bench.as_text(result)) == said


def test_json_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--shape", "64x96", "--batch", "1", "2", "--rounds", "2", "--against", "bf16,fp32,reference"]
    file = tmp_path / "bench.json"
    assert cli.main([*arguments, "--working-set", "0.0001", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert [(entry["mode"], entry["batch"]) for entry in result["layers"]] == [
        ("hot", 1), ("hot", 2), ("stream", 1), ("stream", 2)
    ]  # fmt: skip
    assert set(result["layers"][0]["contenders"]) - {"read"} == {"packed", "bf16", "fp32", "reference"}
    assert result["model"] is None
    assert result["command"].startswith("hf-onebit bench --shape 64x96")
    assert "64x96" in printed
    assert not printed.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4096"], "shape is '4096', expected OUTxIN"),
        (["--against", "onnx"], "against is 'onnx', expected bf16"),
        (["--batch", "0"], "batch is 0, expected at least 1"),
        (["--threads", "-1"], "threads is -1, expected at least 1"),
        (["--isa", "z80"], "isa is 'z80': "),
        (["--model", "llama-0.8b", "--new-tokens", "1"], "new_tokens is 1, expected at least 2"),
        (["--model", "llama-0.8b", "--gguf", "q9"], "gguf is 'q9'"),
        (["--model", "folder", "--packed", "4g64"], "'folder' is packed already"),
    ],
)
def test_wrong_values_are_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--json", str(tmp_path / "nowhere" / "bench.json")]) == 1
    assert "a folder that exists" in capsys.readouterr().err

"""The quantizer from end to end: what it packs, what it reports, what it saves."""

import copy
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import (
    CAUSAL,
    tiny_bert,
    tiny_gpt2,
    tiny_ids,
    tiny_llama,
    tiny_llama_ragged,
    tiny_qwen3_moe,
    tiny_t5,
    tiny_tokenizer,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

import hf_onebit
from hf_onebit import OneBitConfig, OneBitQuantizer, load_quantized_model
from hf_onebit.calibration import load_calibration
from hf_onebit.nn import find_layers, packed_layers
from hf_onebit.nn.replace import float_weight
from hf_onebit.progress import Progress, logger
from hf_onebit.rungs.walk import walk
from hf_onebit.storage.verification import verify

TEXT = ["The little boat drifted down the river until the sun had set behind the hills. " * 4, "Then it was night."]


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs, with nothing said before."""
    hf_logging.warning_once.cache_clear()
    root = logging.getLogger("transformers")
    before = root.propagate, root.level
    root.propagate = True
    caplog.set_level(logging.INFO, logger="transformers")
    yield caplog
    root.propagate = before[0]
    root.setLevel(before[1])


def packed_tensors(model: Any) -> dict[str, Tensor]:
    layers = packed_layers(model)
    return {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] in layers}


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert [key for key, tensor in one.items() if not torch.equal(tensor, other[key])] == []


# ----------------------------------------------------------------------------------------------------- configs


def test_the_quantizers_dict_round_trips_without_the_data() -> None:
    config = OneBitConfig(planes=2, iters=3, use_balancing=False, modules_to_not_convert=["lm_head", "größe"])
    config.dataset, config.tokenizer = TEXT, tiny_tokenizer()
    quantizer = OneBitQuantizer(config)
    described = json.loads(json.dumps(quantizer.to_dict()))
    assert not {"dataset", "tokenizer", "seed", "calibration_tokens", "dequantize"} & set(described)
    assert OneBitQuantizer.from_dict(described).to_dict() == described
    assert described["planes"] == 2
    assert described["modules_to_not_convert"] == ["lm_head", "größe"]


def test_options_are_those_of_the_config() -> None:
    assert OneBitQuantizer(planes=2, seed=5).config.seed == 5
    assert OneBitQuantizer().to_dict() == OneBitConfig().to_dict()


def test_one_config_serves_many_models() -> None:
    config = OneBitConfig(dataset=TEXT, tokenizer=tiny_tokenizer())
    before = dict(vars(config))
    first = OneBitQuantizer(config).quantize_model(tiny_llama())
    second = OneBitQuantizer(config).quantize_model(tiny_gpt2())
    assert vars(config) == before
    assert len(first.config.quantization_config.modules) == 14
    assert set(second.config.quantization_config.modules) == set(packed_layers(second))
    assert first.config.quantization_config.dataset is None


def test_one_config_object_loads_two_models(float_dir: Callable[..., Path]) -> None:
    config = OneBitConfig()
    for model in (tiny_llama(), tiny_llama(layers=1)):
        loaded = AutoModelForCausalLM.from_pretrained(float_dir(model), quantization_config=config)
        assert set(loaded.config.quantization_config.modules) == set(packed_layers(loaded))
    assert config.modules is None


# ------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "mamba"])
def test_quantizing_in_memory_and_while_loading_give_the_same_bits(
    name: str, planes: int, float_dir: Callable[..., Path]
) -> None:
    model = CAUSAL[name]()
    loaded = AutoModelForCausalLM.from_pretrained(
        float_dir(model), quantization_config=OneBitConfig(planes=planes), dtype=torch.float32
    )
    quantizer = OneBitQuantizer(planes=planes)
    quantizer.quantize_model(model)
    assert list(packed_layers(loaded)) == list(packed_layers(model))
    assert_same_tensors(dict(loaded.state_dict()), dict(model.state_dict()))
    assert loaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    report = loaded.hf_quantizer.report
    mine = quantizer.report
    assert mine is not None
    for key in ("coverage", "linear_bpw", "skipped", "total_weights", "planes", "calibration"):
        assert report[key] == mine[key], key
    for layer, record in mine["layers"].items():
        assert report["layers"][layer]["relative_weight_error"] == record["relative_weight_error"]


def mean_error(report: dict[str, Any] | None) -> float:
    assert report is not None
    errors = [record["relative_output_error"] for record in report["layers"].values()]
    return sum(errors) / len(errors)


def test_importance_lowers_the_error_of_the_outputs() -> None:
    # Inputs of very different size, as in trained models; with equal ones there is nothing to weigh.
    def model() -> Any:
        made = tiny_llama()
        with torch.no_grad():
            for norm in (m for name, m in made.named_modules() if name.endswith("layernorm")):
                norm.weight.copy_(torch.logspace(-1, 1, 64))
        return made

    results = {}
    for importance in (True, False):
        quantizer = OneBitQuantizer(
            dataset=TEXT, tokenizer=tiny_tokenizer(), use_balancing=False, use_importance_scaling=importance
        )
        results[importance] = packed_tensors(quantizer.quantize_model(model())), mean_error(quantizer.report)
    data_free = packed_tensors(OneBitQuantizer(use_balancing=False).quantize_model(model()))
    assert_same_tensors(results[False][0], data_free)  # data without importance only measures
    assert any(not torch.equal(tensor, data_free[key]) for key, tensor in results[True][0].items())
    assert results[True][1] < 0.98 * results[False][1]


def test_the_tokenizer_argument_goes_before_the_configs() -> None:
    config = OneBitConfig(dataset=TEXT, tokenizer=3)
    quantizer = OneBitQuantizer(config)
    quantizer.quantize_model(tiny_llama(), tiny_tokenizer())
    assert quantizer.report is not None
    assert quantizer.report["calibration"]["source"] == "2 strings"


def test_sequences_are_no_longer_than_the_models_positions() -> None:
    quantizer = OneBitQuantizer(dataset=["x" * 700], calibration_context=1024)
    quantizer.quantize_model(tiny_gpt2(), tiny_tokenizer())  # 128 positions
    assert quantizer.report is not None
    assert quantizer.report["calibration"]["tokens"] == 5 * 128


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_kept(training: bool) -> None:
    model = tiny_llama().train(training)
    OneBitQuantizer(dataset=TEXT).quantize_model(model, tiny_tokenizer())
    assert {module.training for module in model.modules()} == {training}


def test_dropout_does_not_disturb_the_statistics() -> None:
    def packed(training: bool) -> dict[str, Tensor]:
        model = tiny_gpt2().train(training)  # with dropout of 0.1
        OneBitQuantizer(dataset=TEXT, use_balancing=False).quantize_model(model, tiny_tokenizer())
        return packed_tensors(model)

    assert_same_tensors(packed(True), packed(False))


@pytest.mark.parametrize("make", [tiny_t5, tiny_bert])
def test_models_that_are_not_causal(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    quantizer = OneBitQuantizer(dataset=TEXT)
    quantizer.save(quantizer.quantize_model(model, tiny_tokenizer()), tmp_path / "packed")
    inputs = {"input_ids": tiny_ids()} | ({"decoder_input_ids": tiny_ids(seed=1)} if make is tiny_t5 else {})
    again = hf_onebit.load(tmp_path / "packed")
    assert type(again) is type(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


# ------------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A calibrated checkpoint of `tiny_llama(bias=True)` and its report."""
    folder = tmp_path_factory.mktemp("calibrated") / "packed"
    quantizer = OneBitQuantizer(dataset=TEXT, planes=2)
    model = quantizer.quantize_model(tiny_llama(bias=True), tiny_tokenizer())
    quantizer.save(model, folder, tokenizer=tiny_tokenizer())
    assert quantizer.report is not None
    return folder, quantizer.report


def test_reported_errors_are_those_of_the_saved_file(calibrated: tuple[Path, dict[str, Any]]) -> None:
    folder, report = calibrated
    model, hessians = tiny_llama(bias=True), {}
    names = list(report["layers"])
    walk(model, names, load_calibration(TEXT, tiny_tokenizer(), context=128).batches, lambda _, h: hessians.update(h))
    for name, layer in packed_layers(hf_onebit.load(folder)).items():
        W = float_weight(model.get_submodule(name)).double()
        delta = layer.dequantize().double() - W
        H = hessians[name].double()
        record = report["layers"][name]
        weight_error = float(delta.square().sum() / W.square().sum())
        output_error = float(torch.trace(delta @ H @ delta.T) / torch.trace(W @ H @ W.T))
        assert record["relative_weight_error"] == pytest.approx(weight_error, rel=1e-5)
        assert record["relative_output_error"] == pytest.approx(output_error, rel=1e-5)


def test_the_report_is_complete_json(calibrated: tuple[Path, dict[str, Any]]) -> None:
    _, report = calibrated
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report) >= {
        "method", "preset", "planes", "layers", "skipped", "coverage", "linear_bpw", "file_bpw", "file_bytes",
        "float_bytes", "total_weights", "seconds", "peak_memory_mb", "calibration", "seed", "command", "versions",
    }  # fmt: skip
    assert (report["method"], report["preset"], report["planes"]) == ("onebit", "closed", 2)
    assert list(report["layers"]) == list(find_layers(tiny_llama(bias=True)).selected)
    assert set(next(iter(report["layers"].values()))) == {
        "in_features", "out_features", "planes", "bits_per_weight", "relative_weight_error", "relative_output_error",
        "seconds",
    }  # fmt: skip
    assert report["skipped"] == {"lm_head": {"reason": "output head", "weights": 288 * 64}}
    assert report["coverage"] == 1.0  # the output head does not count
    assert report["calibration"].keys() == {"source", "tokens", "sha256"}
    assert report["versions"]["torch"] == torch.__version__
    assert 0 <= report["seconds"] < 600
    assert report["float_bytes"] >= 4 * report["total_weights"]


@pytest.mark.parametrize("planes", [1, 2])
def test_bits_per_weight_of_the_linear_layers_by_hand(planes: int) -> None:
    quantizer = OneBitQuantizer(planes=planes)
    quantizer.quantize_model(tiny_llama_ragged(layers=1, heads=4, kv_heads=2))
    # hidden 72 (3 words), intermediate 104 (4 words), keys and values 36 outputs
    sizes = [(72, 72), (72, 36), (72, 36), (72, 72), (72, 104), (72, 104), (104, 72)]
    bits = sum(planes * (32 * -(-i // 32) * o + 16 * (i + o)) for i, o in sizes)
    assert quantizer.report is not None
    assert quantizer.report["linear_bpw"] == pytest.approx(bits / sum(i * o for i, o in sizes), rel=1e-12)
    assert len(quantizer.report["layers"]) == 7


def test_biases_count_into_the_bits(calibrated: tuple[Path, dict[str, Any]]) -> None:
    record = calibrated[1]["layers"]["model.layers.0.self_attn.k_proj"]
    assert record["bits_per_weight"] == (2 * (64 * 32 + 16 * (64 + 32)) + 32 * 32) / (64 * 32)  # float32 bias


def test_low_coverage_is_warned_of(messages: pytest.LogCaptureFixture) -> None:
    quantizer = OneBitQuantizer(modules_to_not_convert=["lm_head", ".*experts"])
    quantizer.quantize_model(tiny_qwen3_moe())
    assert quantizer.report is not None
    assert quantizer.report["coverage"] < 0.9
    experts = 2 * 4 * 3 * 64 * 48
    skipped = quantizer.report["skipped"]
    assert sum(s["weights"] for name, s in skipped.items() if "experts" in name) == experts
    warnings = [
        r.getMessage()
        for r in messages.records
        if r.levelno >= logging.WARNING and "stays in floating" in r.getMessage()
    ]
    assert len(warnings) == 1
    assert "listed in modules_to_not_convert" in warnings[0]
    assert f"{100 * quantizer.report['coverage']:.0f}" in warnings[0]


def test_full_coverage_is_no_warning(messages: pytest.LogCaptureFixture) -> None:
    OneBitQuantizer(dataset=TEXT, calibration_tokens=16).quantize_model(tiny_llama(), tiny_tokenizer())
    ours = [record for record in messages.records if record.name == logger.name]
    assert ours[0].getMessage().startswith("Estimate: ")  # at the level of progress
    assert [record.levelno for record in ours[1:]] == [logging.INFO]


@pytest.mark.parametrize("loading", [True, False])
def test_that_one_bit_without_data_is_noise_is_said_once(
    loading: bool, llama_dir: Path, messages: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        if loading:
            AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=OneBitConfig())
        else:
            OneBitQuantizer().quantize_model(tiny_llama())
    said = [r.getMessage() for r in messages.records if "expect noise" in r.getMessage()]
    assert len(said) == 1
    assert "hf-onebit eval DIR --data FILE --against MODEL" in said[0]


# ------------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("given", ["folder", "model"])
def test_quantize_and_save_in_one_call(given: str, llama_dir: Path, tmp_path: Path) -> None:
    source: Any = llama_dir if given == "folder" else tiny_llama()
    quantizer = OneBitQuantizer.from_pretrained(source)
    options = {} if given == "folder" else {"tokenizer": tiny_tokenizer()}
    model = quantizer.quantize(tmp_path / "packed", provenance={"base_model": "someone/tiny"}, **options)
    assert verify(tmp_path / "packed") == {"ok": True, "checksums": "match", "tensors": 49, "problems": []}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert_same_tensors(dict(again.state_dict()), dict(model.state_dict()))
    expected = OneBitQuantizer().quantize_model(tiny_llama())
    assert_same_tensors(packed_tensors(again), packed_tensors(expected))
    assert torch.equal(again(tiny_ids()).logits, expected(tiny_ids()).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed")
    assert tokenizer("hello").input_ids == tiny_tokenizer()("hello").input_ids
    assert quantizer.report is not None
    assert quantizer.report["file_bytes"] == (tmp_path / "packed" / "model.safetensors").stat().st_size
    side = json.loads((tmp_path / "packed" / "hf_onebit.json").read_text())
    assert side["provenance"]["base_model"] == "someone/tiny"
    card = ModelCard.load(tmp_path / "packed" / "README.md")
    assert card.data.base_model == "someone/tiny"
    assert card.data.license is None
    assert "licence of the base model is not known" in card.text


def test_a_folder_is_quantized_while_it_loads(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the float model was in memory as a whole")

    monkeypatch.setattr(OneBitQuantizer, "quantize_model", never)
    quantizer = OneBitQuantizer.from_pretrained(llama_dir)
    assert len(packed_layers(quantizer.quantize(tmp_path / "packed"))) == 14
    assert quantizer.report is not None
    assert quantizer.report["total_weights"] == sum(p.numel() for p in tiny_llama().parameters())


def test_the_licence_on_the_card_is_the_base_models(float_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = float_dir(tiny_llama())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    OneBitQuantizer.from_pretrained(folder).quantize(tmp_path / "packed")
    assert ModelCard.load(tmp_path / "packed" / "README.md").data.license == "mit"
    side = json.loads((tmp_path / "packed" / "hf_onebit.json").read_text())
    assert side["provenance"] == {"source": folder.name, "base_model": None, "base_model_license": "mit"}
    assert str(folder) not in json.dumps(side)


@pytest.mark.parametrize("named", [True, False])
def test_from_pretrained_calibrates_after_the_load(named: bool, llama_dir: Path, tmp_path: Path) -> None:
    tokenizer: Any = str(llama_dir) if named else tiny_tokenizer()
    config = OneBitConfig(dataset=TEXT, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=config)
    quantizer = OneBitQuantizer(dataset=TEXT)
    expected = quantizer.quantize_model(tiny_llama(), tiny_tokenizer())
    assert_same_tensors(packed_tensors(model), packed_tensors(expected))
    assert model.hf_quantizer.report["calibration"] == quantizer.report["calibration"]  # type: ignore[index]
    model.save_pretrained(tmp_path / "packed")
    stored = (tmp_path / "packed" / "config.json").read_text()
    assert "dataset" not in stored
    assert "tokenizer" not in stored
    assert "little boat" not in stored
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(tiny_ids()).logits, expected(tiny_ids()).logits)
    assert copy.deepcopy(model)(tiny_ids()).logits.equal(expected(tiny_ids()).logits)


def test_quantize_takes_data_of_its_own(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[0])
    quantizer = OneBitQuantizer.from_pretrained(llama_dir)
    quantizer.quantize(tmp_path / "packed", dataset=tmp_path / "text.txt")  # with the folder's own tokenizer
    assert quantizer.report is not None
    assert quantizer.report["calibration"]["source"] == "text.txt"
    side = json.loads((tmp_path / "packed" / "hf_onebit.json").read_text())
    assert side["report"]["calibration"] == quantizer.report["calibration"]


def test_a_dataset_given_to_one_call_is_of_that_call(llama_dir: Path, tmp_path: Path) -> None:
    quantizer = OneBitQuantizer.from_pretrained(llama_dir, dataset=TEXT, calibration_tokens=64)
    seen = []
    for number, dataset in enumerate((None, [text[::-1] for text in TEXT], None)):
        quantizer.quantize(tmp_path / str(number), dataset=dataset)
        assert quantizer.report is not None
        seen.append(quantizer.report["calibration"]["sha256"])
    assert seen[0] == seen[2] != seen[1]
    assert quantizer.config.dataset is TEXT


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loading_into_an_empty_model(dtype: Any, calibrated: tuple[Path, dict[str, Any]]) -> None:
    config = AutoConfig.from_pretrained(calibrated[0])
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    model = load_quantized_model(empty, calibrated[0], dtype=dtype)
    assert type(model) is type(empty)
    assert not any(p.is_meta for p in model.parameters())
    assert_same_tensors(
        {k: v for k, v in packed_tensors(model).items() if not k.endswith("bias")},
        {k: v for k, v in packed_tensors(hf_onebit.load(calibrated[0])).items() if not k.endswith("bias")},
    )
    assert model.model.norm.weight.dtype == (dtype or torch.float32)
    assert torch.isfinite(model(tiny_ids()).logits).all()


# ---------------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("enabled", "terminal"), [(True, True), (False, True), (True, False)])
def test_the_bar_obeys_the_switch_and_the_terminal(
    enabled: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(hf_logging, "_tqdm_active", enabled)
    with Progress(2, "Quantizing") as progress:
        progress.step("layer", err="0.1")
        progress.step("other")
    assert ("Quantizing" in stream.getvalue()) is (enabled and terminal)

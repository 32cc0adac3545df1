"""What lies beside a float model: its tokenizer reads the calibration text, and its processor goes along."""

import json
from pathlib import Path

import pytest
import transformers
from tiny import make, tiny_llama, tiny_tokenizer

from hf_onebit import OneBitConfig, OneBitQuantizer, cli
from hf_onebit.sources import processor_files, writes_text

TEXT = ["The little boat drifted down the river until the sun had set behind the hills. " * 20]


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def text_config() -> OneBitConfig:
    return OneBitConfig(preset="closed", dataset=TEXT, calibration_context=32)


def test_text_is_read_by_the_tokenizer_beside_the_model(llama_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_dir)
    quantizer = OneBitQuantizer(text_config())
    quantizer.quantize_model(model)
    assert quantizer.report is not None
    assert quantizer.report["calibration"]["tokens"] > 0
    named = OneBitQuantizer(text_config())
    named.quantize_model(tiny_llama(), tiny_tokenizer())
    assert named.report is not None
    assert quantizer.report["calibration"]["sha256"] == named.report["calibration"]["sha256"]


def test_and_while_it_loads(llama_dir: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=text_config())
    assert model.hf_quantizer.report["calibration"]["tokens"] > 0


def test_without_any_tokenizer_the_remedy_is_named() -> None:
    with pytest.raises(ValueError, match="copy the tokenizer's files into the model's folder"):
        OneBitQuantizer(text_config()).quantize_model(tiny_llama())


def test_nor_while_it_loads(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="needs a tokenizer: pass tokenizer"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "alone", quantization_config=text_config())


def test_a_path_is_no_model() -> None:
    with pytest.raises(TypeError, match="quantize_model got model='folder', expected a torch module"):
        OneBitQuantizer().quantize_model("folder")  # type: ignore[arg-type]


@pytest.fixture
def vit_dir(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    make(transformers.ViTForImageClassification, config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_an_image_processor_goes_along(vit_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", str(vit_dir), "-o", str(tmp_path / "packed"), "--preset", "closed"]
    assert cli.main(arguments) == 0
    assert "hf-onebit eval" not in capsys.readouterr().out  # it has no perplexity
    written = json.loads((tmp_path / "packed" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert written == json.loads((vit_dir / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert "preprocessor_config.json" in json.loads((tmp_path / "packed" / "hf_onebit.json").read_text())["files"]
    assert cli.main(["verify", str(tmp_path / "packed")]) == 0
    assert cli.main(arguments) == 0  # and over itself


def test_a_processor_goes_along_block_by_block(llama_dir: Path, tmp_path: Path) -> None:
    (llama_dir / "processor_config.json").write_text("{}\n", encoding="utf-8")
    arguments = ["quantize", str(llama_dir), "-o", str(tmp_path / "packed"), "--preset", "closed", "--low-memory"]
    assert cli.main(arguments) == 0
    assert (tmp_path / "packed" / "processor_config.json").read_text(encoding="utf-8") == "{}\n"


def test_what_writes_text(llama_dir: Path, vit_dir: Path) -> None:
    assert writes_text(transformers.AutoConfig.from_pretrained(llama_dir))
    assert not writes_text(transformers.AutoConfig.from_pretrained(vit_dir))
    assert not writes_text(transformers.T5Config(architectures=["T5ForConditionalGeneration"]))
    assert processor_files(llama_dir) == []
    assert [file.name for file in processor_files(vit_dir)] == ["preprocessor_config.json"]
    assert processor_files("model.gguf") == []

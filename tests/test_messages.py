"""What ``quantize`` says of short texts, of sizes, of names it does not find, and by which options."""

from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from tiny import tiny_ids, tiny_llama, tiny_tokenizer

from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer, sources
from hf_onebit.bits.budget import plan_budget
from hf_onebit.byte_sizes import shown_size
from hf_onebit.cli import main
from hf_onebit.conducting.calibrating import calibration_of
from hf_onebit.progress import Progress, logger
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.report.summary import layer_summary

WORDS = "The little boat drifted down the river until the sun had set behind the hills. "


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(logger, "warning", lines.append)
    return lines


# ------------------------------------------------------------------------------------------------- short texts


def given(dataset: Any, **options: Any) -> Any:
    quantizer = OneBitQuantizer(dataset=dataset, **{"preset": "closed", "calibration_context": 32} | options)
    return calibration_of(quantizer, tiny_llama(), tiny_tokenizer())


def rows(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": tiny_ids(1, 32, seed)} for seed in range(count)]


@pytest.mark.parametrize(
    ("dataset", "options", "line"),
    [
        ([WORDS], {"calibration_tokens": 9999}, "gives {tokens} tokens, and 9999 were asked for"),
        (rows(3), {"calibration_tokens": 128}, "gives 96 tokens, and 128 were asked for"),
        (rows(3), {}, "gives 96 tokens, and 16384 are what preset 'closed' is made for"),
        (rows(460), {}, "gives 14720 tokens, and 16384 are"),
        (rows(470), {}, None),  # less than a tenth is missing
        (rows(3), {"calibration_tokens": 100}, None),  # of a longer text it would be no more
        (rows(4), {"calibration_tokens": 100}, None),
        ([WORDS * 9], {"calibration_tokens": 20}, None),
        ([{"input_ids": tiny_ids(1, 30)}, {"input_ids": tiny_ids(1, 100)}], {"calibration_tokens": 110}, None),
    ],
)
def test_a_text_shorter_than_wanted_is_pointed_out(
    dataset: Any, options: dict[str, Any], line: str | None, said: list[str]
) -> None:
    data = given(dataset, **options)
    if line is None:
        assert said == []
    else:
        assert len(said) == 1
        assert line.format(tokens=data.tokens) in said[0]
        assert said[0].endswith("all of them are used (calibration_tokens=, --calibration-tokens)")


def test_the_command_says_it_once(llama_dir: Any, tmp_path: Any, said: list[str]) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 3, encoding="utf-8")
    arguments = ["--preset", "closed", "--calibration", str(tmp_path / "text.txt"), "--calibration-tokens", "5000"]
    assert main(["quantize", str(llama_dir), "-o", str(tmp_path / "packed"), *arguments]) == 0
    assert len([line for line in said if "The calibration text (text.txt) gives" in line]) == 1


# --------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("count", "shown"),
    [(12, "12 B"), (167_098, "167.1 kB"), (184_610, "184.6 kB"), (6.04e7, "60.4 MB"), (2.44e9, "2.4 GB")],
)
def test_sizes(count: float, shown: str) -> None:
    assert shown_size(count) == shown


def test_a_range_of_sizes_can_be_told_apart() -> None:
    model, config = tiny_llama(), OneBitConfig(target_size=1000, dataset=rows(1))
    with pytest.raises(ValueError, match=r"is 1000 bytes \(1\.0 kB\), .* bytes \(1\d\d\.\d kB to [12]\d\d\.\d kB\): "):
        plan_budget(model, plan_layers(model, config), config)


def test_a_small_divergence_keeps_its_digits() -> None:
    quantizer = OneBitQuantizer(preset="closed")
    quantizer.quantize_model(tiny_llama(layers=1))
    log = {"kl_before": 0.0012345, "kl_after": 0.000067891, "tokens": 143360}
    summary = layer_summary({**(quantizer.report or {}), "fit": {"distillation": log}})
    assert "held-out KL 0.00123 before, 6.79e-05 after 143360 tokens" in summary


def test_a_step_without_a_name(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_onebit.progress._LINE_EVERY_S", -1.0)
    with Progress(3, "Writing 8 texts", "token") as progress:
        progress.step("")
        progress.step("")
        progress.step("model.layers.0")
    assert said[0].startswith("Writing 8 texts: 2/3 tokens, about ")
    assert said[1].startswith("Writing 8 texts model.layers.0: 3/3 tokens, about ")


# ----------------------------------------------------------------------------------------------------- names


def failure(name: str) -> str:
    with pytest.raises(OSError, match="There is no model") as caught:
        sources.read_model_config(name)
    return str(caught.value)


@pytest.mark.parametrize("name", ["nosuch", "owner/nosuch"])
def test_a_model_that_is_nowhere_is_named_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = f"There is no model '{name}': no local folder has that name, and the hub cannot be reached"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert failure(name) == f"{expected} (HF_HUB_OFFLINE is set), nor is it in the hub's local cache"
    monkeypatch.delenv("HF_HUB_OFFLINE")  # the hub's library has read it already
    assert failure(name) == f"{expected}, nor is it in the hub's local cache"


def test_what_the_hub_says_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: BaseException) -> None:
        def load(*args: Any, **options: Any) -> None:
            raise OSError("several\nlines") from error

        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", load)

    class Response:
        def __init__(self) -> None:
            self.headers: dict[str, str] = {}
            self.request = None

    fails(RepositoryNotFoundError("404", response=Response()))  # type: ignore[arg-type]
    assert failure("a/b").endswith("and the hub has no model of that name, or none for this account")
    fails(LocalEntryNotFoundError("not cached"))
    assert "cannot be reached" in failure("a/b")
    fails(PermissionError("config.json"))  # anything else is as Transformers has it
    with pytest.raises(OSError, match="several\nlines"):
        sources.read_model_config("a/b")


def test_the_command_names_the_model(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "nosuch", "-o", str(tmp_path / "o")]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("hf-onebit: error: There is no model 'nosuch': no local folder")


# --------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--target-bpw", "8", "--calibration", "TEXT"], "--planes 2"),
        (["--target-bpw", "1.5", "--preset", "closed"], "--planes-per-layer NAME=2"),
        (["--low-memory"], "--no-low-memory"),
        (["--lm-head-bits", "auto"], "--method mpq --bits auto --target-size SIZE"),
        (["--planes", "2", "--target-bpw", "1.5"], "--planes-per-layer NAME=2"),
        (["--method", "mpq", "--bits", "auto"], "--target-bpw X, --target-size 60MB"),
        (["--method", "mpq", "--target-bpw", "3"], "--bits auto"),
        (["--method", "mpq", "--search", "min-max"], "--preset closed"),
        (["--method", "mpq", "--bits", "auto", "--target-size", "1kB", "--preset", "closed"], "--lm-head-bits auto"),
        (["--method", "mpq", "--bits", "auto", "--target-bpw", "99", "--preset", "closed"], "--choices"),
        (["--skip", "lm_head", "--lm-head-bits", "8"], "--skip"),
        (["--skip", "model", "--skip", "lm_head"], "--skip"),
    ],
)
def test_remedies_are_options_too(
    arguments: list[str], flag: str, llama_dir: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 9, encoding="utf-8")
    words = [str(tmp_path / "text.txt") if word == "TEXT" else word for word in arguments]
    assert main(["quantize", str(llama_dir), "-o", str(tmp_path / "o"), *words]) in (1, 2)
    assert f"{flag}" in capsys.readouterr().err.split("hf-onebit: error:")[1]


# --------------------------------------------------------------------------------------- what is distilled


@pytest.mark.parametrize(
    "make",
    [
        lambda: MPQQuantizer(bits=2, group_size=32, preset="fast", dataset=rows(12)),
        lambda: MPQQuantizer(bits="auto", target_bpw=2.4, choices=["1p", "4g32"], preset="fast", dataset=rows(12)),
    ],
    ids=["mpq", "both"],
)
def test_mpq_is_distilled_alone_and_beside_signs(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_onebit.rungs import recipes

    monkeypatch.setitem(recipes.MPQ_RECIPES, "fast", recipes._of_codes(rounds=1, steps=4, learning_rate=0.01))
    quantizer = make()
    quantizer.quantize_model(tiny_llama(layers=2), tiny_tokenizer())
    report = quantizer.report or {}
    if isinstance(quantizer.config.bits, str):
        assert {layer["choice"] for layer in report["allocation"]["layers"].values()} == {"1p", "4g32"}
    distillation = report["fit"]["distillation"]
    assert distillation["steps"] == 4
    assert distillation["kl_after"] <= distillation["kl_before"]
    assert isinstance(quantizer.config, MPQConfig)

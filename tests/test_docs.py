"""Whatever the documentation shows is run: its Python, the examples, the options and JSON keys it lists, its links."""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from foreign import write_gptq
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_onebit
from hf_onebit import MPQConfig, OneBitConfig, cli
from hf_onebit.commands import demo
from hf_onebit.config import CALIBRATION_TOKENS, PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CLI = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMANDS = ("quantize", "eval", "inspect", "verify", "report", "bench", "doctor", "import", "export-gguf", "demo")
# Words enough for a few sequences of 64 tokens; the tiny tokenizer makes one token a byte.
TEXT = "The boat drifted down the river, and nobody on the bank looked up. " * 40
OTHER_TEXT = "Rain fell on the roofs of the town for seven days without an end. " * 20


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed tiny_llama() as our own save leaves it; read only."""
    folder = tmp_path_factory.mktemp("docs") / "packed"
    tokenizer = tiny_tokenizer()
    quantizer = hf_onebit.OneBitQuantizer(dataset=TEXT.split(". "), calibration_context=64)
    model = quantizer.quantize_model(tiny_llama(), tokenizer)
    quantizer.save(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with the two texts that the documentation speaks of."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "other.txt").write_text(OTHER_TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------------------- Python that is shown


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """(line of the first statement, source) of each ```python block."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: match.start(1)].count("\n"), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_python_blocks_run(
    page: str, llama_dir: Path, packed_dir: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[str] = []
    for cls in (PreTrainedModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(cls, "push_to_hub", lambda self, repo_id, **options: pushed.append(repo_id))
    monkeypatch.setenv("HF_ONEBIT_CACHE", str(workplace / "cache"))
    names: dict[str, Any] = {"name": str(llama_dir), "folder": str(packed_dir)}
    if page == "README.md":  # its one block begins where these are loaded already, as the text below it says
        names["float_model"] = AutoModelForCausalLM.from_pretrained(llama_dir)
        names["tokenizer"] = AutoTokenizer.from_pretrained(llama_dir)
    blocks = python_blocks(ROOT / page)
    assert blocks
    for line, source in blocks:
        # Blank lines first, so that a traceback names the line of the page.
        exec(compile("\n" * line + source, str(ROOT / page), "exec"), names)
    source = "\n".join(source for _, source in blocks)
    assert len(pushed) == source.count(".push_to_hub(")
    assert (workplace / "model-float" / "config.json").is_file() == ("model-float" in source)


def test_examples_run(llama_dir: Path, workplace: Path) -> None:
    def run(script: str, *arguments: object) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, f"{script}: {done.stderr}"
        return done.stdout

    plain = {"quantize_on_load.py", "calibrate.py", "evaluate.py", "generate.py"}
    assert {file.name for file in EXAMPLES} == plain | {"lora_on_packed.py", "recover_one_bit.py"}  # with PEFT's tests
    assert "14 layers packed" in run("quantize_on_load.py", llama_dir, "-o", "on-load", "--planes", "2")
    assert "Packed 14 of 15" in run("calibrate.py", llama_dir, "text.txt", "-o", "calibrated", "--tokens", "512")
    shown = run("evaluate.py", "calibrated", llama_dir, "other.txt", "--context", "64", "--tokens", "256")
    for key in ("perplexity", "reference_perplexity", "kl", "top1", "tensor_bytes"):
        assert re.search(rf"^{key} ", shown, re.MULTILINE), key
    plain = run("generate.py", "on-load", "The boat", "--new-tokens", "4")
    cached = run("generate.py", "on-load", "The boat", "--new-tokens", "4", "--cache")
    assert plain.startswith("The boat")
    assert cached.startswith("The boat")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_every_function_of_an_example_says_what_it_does(file: Path) -> None:
    functions = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    assert [n.name for n in functions if not ast.get_docstring(n)] == []


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_stay_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) < 70


# ------------------------------------------------------------------------------------------------------- docs/cli.md


def section(command: str) -> str:
    """The part of docs/cli.md about one command."""
    found = re.search(rf"^## {command}$(.*?)(?=^## |\Z)", CLI, re.MULTILINE | re.DOTALL)
    assert found, f"docs/cli.md has no section {command!r}"
    return found[1]


def first_column(text: str, header: str) -> list[str]:
    """The words in backticks of the first column of the tables with that header."""
    words: list[str] = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            inside = False
        elif cells[0] == header:
            inside = True
        elif inside:
            words += re.findall(r"`([^`]+)`", cells[0])
    return words


def parsers() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_every_command_is_documented() -> None:
    assert set(parsers()) == set(COMMANDS)
    assert set(first_column(CLI, "command")) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_those_of_the_parser(command: str) -> None:
    documented = {word.split()[0]: word for word in first_column(section(command), "option")}
    real: dict[str, argparse.Action] = {}
    for action in parsers()[command]._actions:
        if not isinstance(action, argparse._HelpAction):
            real |= dict.fromkeys(action.option_strings or [str(action.metavar)], action)
    assert set(documented) == set(real)
    for word, action in real.items():
        if action.option_strings and action.metavar:
            assert documented[word] == f"{word} {action.metavar}"


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_defaults_are_those_of_the_parser(command: str) -> None:
    for line in section(command).splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        options = re.findall(r"`(--[a-z-]+)", cells[0]) if cells else []
        action = parsers()[command]._option_string_actions.get(options[0]) if options else None
        if action is None:
            continue
        if action.required:
            assert cells[1] == "required", line
        elif isinstance(action.default, (int, str)) and not isinstance(action.default, bool):
            assert cells[1].strip("`") == str(action.default), line
        else:  # what stands for None is said in words
            assert not cells[1].isdigit(), line


def test_options_named_anywhere_exist() -> None:
    known = {option for parser in parsers().values() for option in parser._option_string_actions}
    known |= set(cli.build_parser()._option_string_actions)
    for page in (ROOT / "docs/cli.md", ROOT / "README.md", ROOT / "docs/quickstart.md"):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page.name}: {sorted(named - known)}"


def test_command_lines_parse() -> None:
    """Each `hf-onebit ...` line of a block of shell is one that the parser takes."""
    seen = 0
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                words = line.partition("#")[0].split()
                if words[:1] and "=" in words[0]:
                    words = words[1:]
                if words[:1] == ["hf-onebit"] and words[1] in COMMANDS:
                    cli.build_parser().parse_args(words[1:])
                    seen += 1
    assert seen > 10


MAPS = (
    "layers",
    "embeddings",
    "skipped",
    "packages",
    "optional",
    "devices",
    "kernels",
    "versions",
    "contenders",
    "rivals",
    "tensors",
    "types",
)
OPAQUE = ("provenance", "fit")


def keys_of(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a JSON object, with NAME for names that are data and [] for the entries of a list."""
    for key, item in value.items():
        name = f"{prefix}{key}"
        if key in MAPS and isinstance(item, dict):
            assert item, f"{name} is empty: the test sees none of its keys"
            for entry in item.values():
                yield from keys_of(entry, f"{name}.NAME.") if isinstance(entry, dict) else [f"{name}.NAME"]
        elif isinstance(item, dict) and key not in OPAQUE:
            yield from keys_of(item, f"{name}.")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            for entry in item:
                yield from keys_of(entry, f"{name}[].")
        else:
            yield name


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], int]:
    capsys.readouterr()
    status = cli.main([*map(str, arguments), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result, dict)
    return result, status


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "demo"])
def test_json_keys_are_the_documented_ones(
    command: str, llama_dir: Path, packed_dir: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = ["--lm-head-bits", 4, "--embedding-bits", 8, "--skip", "down_proj"]
    if command == "inspect":
        run_json(capsys, "quantize", llama_dir, "-o", "heads", *heads, "--preset", "closed")
    if command == "report":
        run_json(capsys, "quantize", llama_dir, "-o", "packed", "--preset", "closed")
        scored = ["--data", "other.txt", "--against", llama_dir, "--context", 64, "--tokens", 128]
        run_json(capsys, "eval", "packed", *scored, "--write-card")
    if command == "import":
        write_gptq(tiny_llama(layers=1), workplace / "gptq")
    if command == "export-gguf":
        run_json(capsys, "quantize", llama_dir, "-o", "four-bits", "--method", "mpq", "--preset", "closed")
    arguments: dict[str, list[object]] = {
        "quantize": [llama_dir, "-o", "out", *heads, "--calibration", "text.txt", "--calibration-context", 64,
                     "--preset", "closed"],
        "eval": [packed_dir, "--data", "other.txt", "--against", llama_dir, "--context", 64, "--tokens", 128],
        "inspect": ["heads"],
        "verify": [packed_dir],
        "import": ["gptq", "-o", "imported"],
        "export-gguf": ["four-bits", "-o", "model.gguf"],
        "report": ["packed"],
        # Neither the layer's 96 inputs nor the model's 64 fill a block of q1_0, so both lists of skips have entries.
        "bench": ["--shape", "64x96", "--batch", 2, "--rounds", 1, "--mode", "hot", "--model", packed_dir,
                  "--prompt", 8, "--new-tokens", 4, "--gguf", "q1_0,f16"],
        "doctor": [],
    }  # fmt: skip
    result, status = run_json(capsys, command, *arguments[command])
    assert status == 0
    assert set(keys_of(result)) == set(first_column(section(command), "key"))


def test_json_of_eval_and_quantize_without_the_optional_inputs(
    llama_dir: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = run_json(capsys, "eval", llama_dir, "--data", "other.txt", "--context", 64, "--tokens", 128)
    documented = {key.split(".")[0] for key in first_column(section("eval"), "key")}
    assert set(result) == documented - {"reference_perplexity"}
    nulls = {"against", "kl", "top1", "linear_bpw", "file_bpw", "file_bytes", "coverage", "layers"}
    assert {key for key, value in result.items() if value is None} == nulls
    result, _ = run_json(capsys, "quantize", llama_dir, "-o", "out", "--preset", "closed")
    assert result["calibration"] is None
    assert {layer["relative_output_error"] for layer in result["layers"].values()} == {None}


def test_the_demo(llama_dir: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The keys are those of docs/cli.md, and the preset is the default."""
    texts = ["--data", "other.txt", "--calibration", "text.txt", "--tokens", 128, "--context", 64]
    result, status = run_json(capsys, "demo", "--model", llama_dir, "-o", "out", *texts)
    assert status == 0
    names = ("float", "onebit", "onebit_cached")
    assert {re.sub(rf"^({'|'.join(names)})\.", "NAME.", key) for key in keys_of(result)} == set(
        first_column(section("demo"), "key")
    )
    assert result["preset"] == "fast"
    assert result["calibration"]["source"] == "text.txt"
    assert result["onebit"]["sample"].startswith("The little boat")
    command = f"hf-onebit demo --model {llama_dir} -o out --data other.txt --calibration text.txt"
    provenance = json.loads(Path("out/onebit/hf_onebit.json").read_text(encoding="utf-8"))["provenance"]
    assert provenance["command"].startswith(command)
    assert command in Path("out/onebit/README.md").read_text(encoding="utf-8")


def test_the_keys_of_the_config_are_the_stored_ones() -> None:
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    rows = text.partition("| key | type | `onebit` | `mpq` | meaning |\n")[2].partition("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    for column, config in ((2, OneBitConfig), (3, MPQConfig)):
        found = {key: row[4] for row in cells if row[column] for key in re.findall(r"`(\w+)`", row[0])}
        assert set(found) == {*config.stored, *config.stored_if_set}
        assert {key for key, meaning in found.items() if "absent" in meaning} == set(config.stored_if_set)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/cli.md"])
def test_presets_are_named_with_their_tokens(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for preset in PRESETS:
        assert f"`{preset}`" in text, preset
        assert str(CALIBRATION_TOKENS[preset]) in text, preset


def test_exit_statuses_are_the_documented_ones(
    packed_dir: Path, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dict(re.findall(r"^\| (\d+) \| (.*) \|$", CLI, re.MULTILINE))
    assert set(found) == {"0", "1", "2", "130"}
    result, status = run_json(capsys, "verify", "nowhere")
    assert (status, list(result)) == (1, ["error"])
    (workplace / "config.json").write_text("{}", encoding="utf-8")
    result, status = run_json(capsys, "verify", ".")
    assert (status, result["ok"]) == (1, False)
    assert cli.main([]) == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify"])
    assert stop.value.code == 2

    def interrupt(folder: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_onebit.storage.verification.verify", interrupt)
    assert cli.main(["verify", str(packed_dir)]) == 130


def test_traceback_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ONEBIT_TRACEBACK", raising=False)
    assert cli.main(["verify", "nowhere"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("HF_ONEBIT_TRACEBACK", "1")
    assert cli.main(["verify", "nowhere"]) == 1
    assert "Traceback" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- every page


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=page_id)
def test_no_paths_of_a_machine(page: Path) -> None:
    found = re.findall(r"(?<![\w.])/(?:work|root|tmp|home)/\S*", page.read_text(encoding="utf-8"))
    assert not found


def test_the_readme_is_short_and_has_its_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    table = re.search(r"<!-- demo table -->\n(.*?)<!-- /demo table -->", text, re.DOTALL)
    assert table
    figures = dict.fromkeys(("file_bytes", "linear_bpw", "file_bpw", "perplexity"), 1.0)
    figures |= dict.fromkeys(("tokens_per_second", "tensor_bytes", "peak_memory_mb"), 1.0)
    rows = {key: {**figures, "sample": ""} for key in ("float", "onebit", "onebit_cached")}
    rest = dict.fromkeys(("tokens", "text", "context", "preset", "model", "onebit_folder", "float_folder"), "")
    printed = demo.as_text({**rows, **rest, "kl": 0.0, "top1": 0.0, "seconds": 0.0, "calibration": None})
    for title in [cell.strip() for cell in table[1].strip().splitlines()[0].split("|")[2:-1]]:
        assert title in printed
    assert re.findall(r"^\| (\S[^|]*?) \|", table[1], re.MULTILINE)[-3:] == [
        "float (bf16)",
        "one bit, packed",
        "one bit, signs cached",
    ]


def test_the_map_of_the_house_names_every_file() -> None:
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    package = ROOT / "hf_onebit"
    files = [str(file.relative_to(package)) for file in package.rglob("*.py") if file.parent.name != "optimum_register"]
    missing = [name for name in files if f"`{name}`" not in text and not name.endswith("/__init__.py")]
    assert not missing, f"docs/design.md has no row for {missing}"
    named = re.findall(r"^\| `([^`]+\.py)`", text, re.MULTILINE)
    assert set(named) <= set(files)

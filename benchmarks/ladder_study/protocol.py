"""One protocol for every row: texts, windows, and the float model's answers, computed once and kept on disk."""

import hashlib
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_onebit import __version__, evaluation, loading
from hf_onebit.arithmetic import without_slow_products
from hf_onebit.calibration import read_text
from hf_onebit.digests import sha256_of_file


@dataclass(frozen=True)
class Text:
    """A text to score: file below the data folder, tokens a window, tokens to keep (None for all), what it is."""

    file: str
    context: int
    tokens: int | None
    title: str


TEXTS = {
    "test": Text("wikitext-2/test.txt", 2048, None, "WikiText-2 test, whole, context 2048"),
    "test_8k": Text("wikitext-2/test.txt", 1024, 8192, "WikiText-2 test, first 8 x 1024 tokens"),
    "alice": Text("mixed/alice.txt", 2048, None, "Alice in Wonderland, whole, context 2048; out of domain"),
    "slice": Text("wikitext-2/test.txt", 1024, 16384, "WikiText-2 test, first 16 x 1024 tokens"),
    "alice_8k": Text("mixed/alice.txt", 1024, 8192, "Alice in Wonderland, first 8 x 1024 tokens; out of domain"),
}
# The ablation's rows are scored on these, all other rows on the others; the float model on all.
ABLATION_TEXTS = ("slice", "alice_8k")
CALIBRATION = "mixed/calibration.txt"


@dataclass(frozen=True)
class Places:
    """Folders of one study: the float model, the texts, and what runs leave behind.

    `gguf` is the file that the float model was dequantized from, `onecomp` a Python that has OneComp; each may be None.
    """

    model: Path
    data: Path
    work: Path
    gguf: Path | None = None
    onecomp: Path | None = None

    def of(self, row: str) -> Path:
        """The row's own folder, made where it is not there yet."""
        folder = self.work / row
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class CannotRun(Exception):
    """A row that cannot be made here, and why: a result too."""


def evaluate(model: Any, places: Places, text: str) -> dict[str, Any]:
    """Score a model, None for the float model itself, on one of `TEXTS` beside the float model.

    Args:
        model: whatever has logits, in any form that `hf_onebit.evaluation` takes.
        places: the study's folders.
        text: key of `TEXTS`.

    Returns:
        what `evaluation.compare` returns; `multiple`, the perplexity over the float model's; name and digest of the
        text. Of the float model against itself KL is 0 and agreement 1 without a computation.
    """
    spec = TEXTS[text]
    file = places.data / spec.file
    tokenizer = loading.load_tokenizer(str(places.model))
    windows = evaluation.token_windows(read_text(file), tokenizer, spec.context, spec.tokens)
    reference = float_answers(places, text, windows)
    if model is None:
        found = dict(evaluation.perplexity(reference, windows))
        found |= {"reference_perplexity": found["perplexity"], "kl": 0.0, "top1": 1.0}
    else:
        found = dict(evaluation.compare(model, reference, windows))
    found["multiple"] = found["perplexity"] / found["reference_perplexity"]
    return {**found, "file": file.name, "sha256": sha256_of_file(file), "context": spec.context}


class FloatAnswers(nn.Module):
    """The float model's logits from its last hidden states, which are a hundredth of their size and were kept.

    It has of a Transformers model what `hf_onebit.evaluation` asks for.
    """

    def __init__(self, model: Any, file: Path) -> None:
        super().__init__()
        self.head, self.config = model.get_output_embeddings(), model.config
        self.file = file

    def can_generate(self) -> bool:
        """As the model it stands for."""
        return True

    def get_input_embeddings(self) -> Any:
        """Only asked for its device."""
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """Logits of one window, (1, tokens, vocabulary), in the model's dtype."""
        from transformers.modeling_outputs import CausalLMOutput

        with safe_open(self.file, framework="pt") as kept:
            hidden = kept.get_tensor(digest(input_ids))
        return CausalLMOutput(logits=self.head(hidden))


def float_answers(places: Places, text: str, windows: list[Tensor]) -> Any:
    """The float model for these windows: its kept hidden states, made first where they are not there."""
    model = loading.load_float(str(places.model)).eval()
    names = hashlib.sha256("".join(digest(w) for w in windows).encode()).hexdigest()[:12]
    file = places.of("float") / f"{text}-{names}.safetensors"
    if not file.is_file():
        kept = {}
        # In the arithmetic of `evaluation`, which the head's product of these will have too.
        with torch.no_grad(), without_slow_products(model.device):
            for number, window in enumerate(windows):
                ids = window[None].to(torch.int64)
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                if number == 0 and not _is_head_of(model, ids, hidden):
                    return model  # its logits are more than a product with its head: they are computed every time
                kept[digest(ids)] = hidden
        partial = file.with_suffix(".partial")
        save_file(kept, partial)
        partial.replace(file)
    return FloatAnswers(model, file)


def _is_head_of(model: Any, ids: Tensor, hidden: Tensor) -> bool:
    return torch.equal(model.get_output_embeddings()(hidden), model(input_ids=ids, use_cache=False).logits)


def digest(ids: Tensor) -> str:
    """A name for a window."""
    return hashlib.sha256(ids.reshape(-1).to(torch.int64).numpy().tobytes()).hexdigest()[:32]


def surroundings() -> dict[str, Any]:
    """Processor, threads and versions."""
    packages = ("torch", "transformers", "llama-cpp-python")
    versions = {"python": platform.python_version(), "hf_onebit": __version__}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"device": cpu_name(), "threads": torch.get_num_threads(), "versions": versions}


def cpu_name() -> str:
    """What the system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def identity(places: Places) -> dict[str, Any]:
    """Name and digest of the float model's weights."""
    files = sorted(places.model.glob("*.safetensors"))
    return {"name": places.model.resolve().name, "sha256": {file.name: sha256_of_file(file) for file in files}}

"""llama.cpp's rows: files and scores as the study of one bit makes them, decoding in the process that measures."""

import time
from pathlib import Path
from typing import Any

import torch


def make_llama_row(spec: dict[str, Any], gguf: Path, work: Path, windows: list[Any]) -> dict[str, Any]:
    """Quantize the GGUF, read its bits from its header, and score it; runs in the parent, llama.cpp in children.

    Raises:
        ladder_study.protocol.CannotRun: llama.cpp refuses, with its own words.
    """
    from importlib import metadata

    from ladder_study.llama import LlamaLogits, make_llama
    from ladder_study.protocol import Places

    from hf_onebit import evaluation

    places = Places(Path(spec["model"]), work, work, gguf)
    made = make_llama(places, spec["name"], 0, spec["options"]["type"])
    llama = LlamaLogits(places, spec["name"], max(len(window) for window in windows))
    try:
        model: Any = llama
        scored = evaluation.perplexity(model, windows)
    finally:
        llama.close()
    return {
        "version": f"llama-cpp-python {metadata.version('llama-cpp-python')}",
        "quantize_seconds": made["minutes"] * 60,
        "linear_bpw": made["linear_bpw"],
        "saved": True,
        "dequantized": False,
        "perplexity": scored["perplexity"],
        "tokens": scored["tokens"],
        "notes": made["notes"],
    }


class LlamaRow:
    """A GGUF in this process, with llama.cpp's own layouts where they work.

    Attributes:
        load_mb: by how much the process grew at most while it loaded, 10^6 bytes; the cache of its context included.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        from hf_onebit.bench.llama import LlamaCpp

        from .memory import reset_peak, resident

        torch.set_num_threads(1)
        file = Path(spec["folder"]) / "model.gguf"
        reset_peak()
        before = resident("VmRSS:")
        tokens = len(spec["prompt"]) + spec["new_tokens"]
        self._llama = LlamaCpp(file, tokens, 1, repack=spec["repack"])
        self._llama.logits(spec["prompt"])  # the file is mapped: memory counts once it is read
        self.load_mb = (resident("VmHWM:") - before) / 1e6

    def decode(self, prompt: list[int], new_tokens: int) -> float:
        """Processor's seconds from the first new token to the last, greedy."""
        llama = self._llama
        llama._forget()
        token = int(llama._decode(prompt).argmax())
        start = time.process_time()
        for _ in range(new_tokens - 1):
            token = int(llama._decode([token]).argmax())
        return time.process_time() - start

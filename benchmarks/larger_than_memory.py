"""A float checkpoint quantized in a process that may not take more memory than a cap; tests run it too.

    larger_than_memory.py make FOLDER HIDDEN INTERMEDIATE LAYERS VOCABULARY   write a random float32 Llama
    larger_than_memory.py FOLDER OUT CAP_BYTES JSON_OPTIONS...                quantize it under RLIMIT_DATA

The figures of docs/large_models.md: make large 1024 2816 45 16000, then large out 1200000000 '{}'. Options are those of
the config, and ``method``; ``rows``: [sequences, tokens of each] stands for random calibration data.

Every page that the process may write to alone counts, also those that it never touches, and what exceeds the cap fails;
"+BYTES" is a cap of so many above what importing took. The last line printed is a JSON object: what was ``imported``,
the ``limit``, and of each of the ``runs`` the largest anonymous resident memory (``peak``) and ``data``, in bytes.
"""

import json
import re
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any


def make(folder: Path, hidden: int, intermediate: int, layers: int, vocabulary: int) -> None:
    import torch
    import transformers

    from hf_onebit.interchange.shards import ShardWriter

    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, 1 << 60, {"format": "pt"}) as writer:
        for name, parameter in model.named_parameters():
            value = torch.ones(parameter.shape)
            writer.add(name, value if value.dim() == 1 else value.normal_(std=0.02, generator=generator))
        writer.finish()


def status(key: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def quantize(folder: Path, out: Path, method: str, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    import hf_onebit

    if "rows" in options:
        generator = torch.Generator().manual_seed(0)
        vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        count, length = options.pop("rows")
        options["dataset"] = [
            {"input_ids": torch.randint(vocabulary, (1, length), generator=generator)} for _ in range(count)
        ]
        options["calibration_tokens"] = count * length
    peak, data, over = [0], [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], status("RssAnon"))
            data[0] = max(data[0], status("VmData"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.perf_counter()
    cls = hf_onebit.MPQQuantizer if method == "mpq" else hf_onebit.OneBitQuantizer
    quantizer = cls.from_pretrained(folder, **options)
    failed = None
    try:
        quantizer.quantize(out, load=False)
    except (RuntimeError, MemoryError, OSError) as error:
        failed = f"{type(error).__name__}: {error}"
    finally:
        over.set()
        thread.join()
    report = quantizer.report or {}
    return {
        "failed": failed,
        "peak": peak[0],
        "data": data[0],
        "seconds": time.perf_counter() - start,
        "files": report.get("file_bytes"),
        "layers": len(report.get("layers", ())),
        "fit": bool(report.get("fit")),
        "preflight": report.get("preflight"),
    }


def main() -> None:
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), *map(int, sys.argv[3:]))
        return
    folder, out, cap = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401  what is imported takes memory too

    import hf_onebit  # noqa: F401

    torch.set_num_threads(1)
    imported = {"anonymous": status("RssAnon"), "data": status("VmData")}
    limit = int(cap) + (imported["data"] if cap.startswith("+") else 0)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    runs = [quantize(folder, out, run.pop("method", "onebit"), run) for run in map(json.loads, sys.argv[4:])]
    float_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(json.dumps({"imported": imported, "limit": limit, "float_bytes": float_bytes, "runs": runs}))


if __name__ == "__main__":
    main()

"""How far packed models are from their float model at each position of a long window: KL and perplexity by position.

A model that was only ever calibrated on short sequences may lose more the further it reads. Windows are taken evenly
from all of the text, and each starts a sequence of its own.

    python benchmarks/positions.py --float FLOAT --text wikitext-2/test.txt -o positions.json PACKED ...
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_onebit import loading
from hf_onebit.storage.checkpoint import read_side_file

EDGES = (0, 64, 128, 256, 512, 1024, 1536, 2048)


def main(arguments: list[str] | None = None) -> int:
    """Score the models in turn, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", nargs="+", help="packed folders")
    parser.add_argument("--float", dest="reference", required=True, help="their float model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--context", type=int, default=EDGES[-1], help=f"tokens of each (default {EDGES[-1]})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tokenizer = loading.load_tokenizer(options.reference)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    windows = spread(ids, options.windows, options.context)
    reference = loading.load_any(options.reference, dtype=torch.bfloat16).eval()
    edges = [edge for edge in EDGES if edge < options.context] + [options.context]
    result: dict[str, Any] = {"text": options.text.name, "windows": len(windows), "context": options.context}
    result["models"] = []
    for folder in options.models:
        found = by_position(reference, loading.load(folder).eval(), windows, edges)
        report = (read_side_file(folder) or {}).get("report", {})
        about = {key: report.get(key) for key in ("preset", "planes", "seed")}
        result["models"].append({**about, "positions": found})
        for row in found:
            print(
                f"{folder}  {row['from']:5d} to {row['to']:5d}: KL {row['kl']:.3f}, x {row['multiple']:.3f}", flush=True
            )
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def spread(ids: Tensor, count: int, context: int) -> list[Tensor]:
    """Windows at even distances."""
    last = len(ids) - context
    if last < 0:
        raise ValueError(f"the text has {len(ids)} tokens: expected at least {context}")
    return [ids[start : start + context] for start in (last * n // max(1, count - 1) for n in range(count))]


@torch.inference_mode()
def by_position(reference: Any, model: Any, windows: list[Tensor], edges: list[int]) -> list[dict[str, float]]:
    """Of each range of positions: KL(float || packed), the float model's perplexity, and the packed one's over it."""
    length = len(windows[0]) - 1
    kl, float_nll, packed_nll = (torch.zeros(length, dtype=torch.float64) for _ in range(3))
    for window in windows:
        p, q = (m(window[None]).logits[0, :-1].float().log_softmax(-1) for m in (reference, model))
        kl += (p.exp() * (p - q)).sum(-1) / len(windows)
        token = window[1:, None]
        float_nll -= p.gather(1, token)[:, 0] / len(windows)
        packed_nll -= q.gather(1, token)[:, 0] / len(windows)
    found = []
    for first, end in itertools.pairwise(edges):
        part = slice(first, min(end, length))
        lost = float((packed_nll - float_nll)[part].mean())
        found.append({"from": first, "to": end, "kl": float(kl[part].mean()), "multiple": math.exp(lost),
                      "float_perplexity": math.exp(float(float_nll[part].mean()))})  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())

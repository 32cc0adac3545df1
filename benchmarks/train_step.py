"""Times a training step of LoRA on packed layers beside one on bfloat16 layers, of real shapes.

The contenders are decoder blocks of one Llama configuration (SmolLM2-135M's by default) with the same adapters:
bfloat16 base, and packed ones. Correctness first: the adapters' gradients on a packed base, in float32 and in bfloat16,
are compared with those on a float32 base of the very weights that the packed one stands for, and a figure outside its
bound ends the run. Then every contender makes one step (forward, backward, AdamW on the adapters) a round, in turn, so
that whatever else the machine does hits all alike; figures are medians over rounds of ratios within one round.

    python benchmarks/train_step.py --threads 1 --json steps.json
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
import warnings
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_onebit import ops
from hf_onebit.bench.rounds import median_ratio
from hf_onebit.nn import dequantize_layers, packed_layers, replace_layers
from hf_onebit.nn.replace import TableEntry

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
ENTRIES = {
    "onebit": TableEntry(planes=1),
    "mpq 4 bit": TableEntry("mpq", bits=4, group_size=64, symmetric=False),
    "mpq 2 bit": TableEntry("mpq", bits=2, group_size=64, symmetric=False),
}
# ‖gradient - exact‖ / ‖exact‖ of all adapters together. In bfloat16 a few roundings of 2⁻⁹ a layer; few tokens with
# random weights leave small gradients, which they hit harder.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.2}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks (default 4)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of one sequence (default 512)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--hidden", type=int, help="another width, the others in proportion")
    parser.add_argument("--base", nargs="+", choices=ENTRIES, default=["onebit", "mpq 4 bit"])
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in backward")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shape = dict(SHAPE)
    if options.hidden:
        shape |= {"hidden_size": options.hidden, "intermediate_size": options.hidden * 8 // 3}
    models = {"bf16": model_of(shape, options)}
    for name in options.base:
        models[name] = model_of(shape, options, ENTRIES[name])
    errors = {name: gradient_errors(models[name], options) for name in options.base}
    for name, error in errors.items():
        shown = ", ".join(f"{value:.1e} in {dtype}" for dtype, value in error.items())
        print(f"{name}: gradients of the adapters differ from those on its float twin by {shown}")
        if not all(error[dtype] < bound for dtype, bound in BOUNDS.items()):
            print(f"{name}: beyond {BOUNDS}", file=sys.stderr)
            return 1
    times = measure(models, options)
    ratios = {name: median_ratio(times[name], times["bf16"]) for name in models}
    weights = sum(p.numel() for n, p in models["bf16"].named_parameters() if "base_layer" in n)
    print(f"{options.batch} x {options.tokens} tokens, {options.layers} blocks, {weights / 1e6:.1f} M adapted weights")
    for name, ratio in ratios.items():
        print(f"{name:>10}: {statistics.median(times[name]) * 1e3:8.1f} ms a step, {ratio:.2f} of bf16's")
    if options.json:
        about = {"torch": torch.__version__, "platform": platform.platform(), "isa": ops.cpu.isa(), **vars(options)}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**about, "shape": shape, "errors": errors, "ratios": ratios, "seconds": times}, file, indent=1)
    return 0


def model_of(shape: dict[str, int], options: argparse.Namespace, entry: TableEntry | None = None) -> Any:
    """Blocks with adapters, in bfloat16; no embedding or head of the real size, which no contender changes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=options.layers, **shape)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    if entry is not None:
        names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
        replace_layers(model, dict.fromkeys(names, entry))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = LoraConfig(r=options.rank, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, kind)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted.train()


def batch_of(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (options.batch, options.tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def gradients(model: Any, options: argparse.Namespace) -> torch.Tensor:
    model(**batch_of(options)).loss.backward()
    found = torch.cat([p.grad.flatten().float() for name, p in model.named_parameters() if "lora_" in name])
    model.zero_grad()
    return found


def gradient_errors(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """Relative, beside the float32 twin of the packed model, by the dtype of the activations."""
    wide = copy.deepcopy(model).float()
    twin = copy.deepcopy(wide)
    assert packed_layers(twin)
    dequantize_layers(twin, torch.float32)
    exact = gradients(twin, options)
    found = {"float32": gradients(wide, options), "bfloat16": gradients(model, options)}
    return {dtype: float((gradient - exact).norm() / exact.norm()) for dtype, gradient in found.items()}


def measure(models: dict[str, Any], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    batch = batch_of(options)
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        for name, model in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(options.rounds + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            model(**batch).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if number:  # the first warms up
                times[name].append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    sys.exit(main())

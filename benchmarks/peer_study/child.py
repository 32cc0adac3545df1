"""One row in the Python of its peer: ``python -m peer_study.child make|measure SPEC OUT``.

SPEC is JSON that the parent wrote; OUT is written after each figure, so that what a crash leaves undone is known.
Times are of the processor: with one thread they are what an idle core's clock would show, on a shared one too.
"""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import ADAPTERS, Adapter, CannotRun, linear_names, load_bf16
from .memory import reset_peak, resident

Found = dict[str, Any]


def make(spec: Found, found: Found, write: Callable[[], None]) -> None:
    """Quantize, count bits, and save where the library can."""
    adapter = ADAPTERS[spec["peer"]](spec["options"])
    found["version"] = adapter.version()
    names = linear_names(load_bf16(spec["model"]))
    model, found["quantize_seconds"] = adapter.quantize(spec["model"], spec["calibration"])
    found["linear_bpw"] = bits_per_weight(adapter, model, spec["model"], names)
    found["saved"] = False
    if adapter.saves:
        folder = Path(spec["folder"])
        try:
            adapter.save(model, folder)
            found["saved"] = True
        except Exception as reason:  # of whatever kind: it is the library's
            found["notes"] = [f"cannot save: {one_line(reason)}"]
    write()


def bits_per_weight(adapter: Adapter, model: Any, source: str, names: list[str]) -> float:
    """Of the linear layers, as the library keeps them, scales and zeros and tables included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    weights = sum(twin.get_submodule(name).weight.numel() for name in names)
    inner = getattr(model, "model", model) if adapter.package == "gptqmodel" else model
    return sum(adapter.layer_bits(inner.get_submodule(name)) for name in names) / weights


def measure(spec: Found, found: Found, write: Callable[[], None]) -> None:
    """Load, score, and decode in turn with the bf16 model."""
    if spec["peer"] == "llama":
        from .llama import LlamaRow

        llama = LlamaRow(spec)
        found["load_mb"] = llama.load_mb
        write()
        time_decoding(spec, found, llama.decode)
        write()
        return
    adapter = ADAPTERS[spec["peer"]](spec["options"])
    prepare(adapter, spec)
    reset_peak()
    before = resident("VmRSS:")
    if spec["saved"]:
        model = adapter.load(spec["folder"])
    else:
        model, _ = adapter.quantize(spec["model"], spec["calibration"])
    model = getattr(model, "model", model) if adapter.package == "gptqmodel" and not spec["saved"] else model
    model.eval()
    with contextlib.suppress(Exception), torch.no_grad():  # what fails here is named where it is scored
        model(input_ids=torch.tensor([spec["prompt"][:1]]), use_cache=False)  # a mapped file counts once it is read
    found["load_mb"] = (resident("VmHWM:") - before) / 1e6
    write()
    if "perplexity" not in found:
        score(adapter, model, spec, found)
        write()
    if "decode" not in found:
        decode = None if spec["peer"] == "float" else decoder(model)
        time_decoding(spec, found, decode)
        write()


def prepare(adapter: Adapter, spec: Found) -> None:
    """Import what loading will import, so that memory counts the model alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec["model"]))
    adapter.version()
    modules = {"gptqmodel": "gptqmodel", "hqq": "hqq.models.hf.base", "bitsandbytes": "bitsandbytes",
               "optimum-quanto": "optimum.quanto", "torchao": "torchao.quantization"}  # fmt: skip
    if adapter.package in modules:
        __import__(modules[adapter.package])


def score(adapter: Adapter, model: Any, spec: Found, found: Found) -> None:
    """Perplexity of the model as it is, or of the float model with its weights where it cannot compute here."""
    from hf_onebit import evaluation

    windows = [torch.tensor(ids) for ids in spec["windows"]]
    dequantized = spec["dequantized"]
    if not dequantized:
        try:
            with torch.no_grad():
                model(input_ids=windows[0][None, :64], use_cache=False)
        except Exception as reason:  # of whatever kind: it is the library's
            found["notes"].append(f"its own forward fails on this CPU: {one_line(reason)}")
            dequantized = True
    subject = model
    if dequantized:
        subject = load_bf16(spec["model"])
        for name in linear_names(subject):
            weight = adapter.dequantize(model.get_submodule(name))
            subject.get_submodule(name).weight.data = weight.detach().to(torch.bfloat16).contiguous()
    found["dequantized"] = dequantized
    scored = evaluation.perplexity(subject, windows)
    found["perplexity"], found["tokens"] = scored["perplexity"], scored["tokens"]


class _Clock:
    """A streamer for `generate` that notes the processor's time at the prompt and at each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        self.times.append(time.process_time())

    def end(self) -> None:
        """Nothing to flush."""


def decoder(model: Any) -> Callable[[list[int], int], float]:
    """Greedy decoding of a Transformers model: (prompt, new tokens) -> seconds from the first new token to the last."""

    def decode(prompt: list[int], new_tokens: int) -> float:
        clock, ids = _Clock(), torch.tensor([prompt])
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, use_cache=True,
                           min_new_tokens=new_tokens, max_new_tokens=new_tokens, streamer=clock)  # fmt: skip
        return clock.times[-1] - clock.times[1]

    return decode


def time_decoding(spec: Found, found: Found, decode: Callable[[list[int], int], float] | None) -> None:
    """Tokens per second of the processor, beside bf16 in the same rounds; None is the bf16 model itself.

    Raises:
        CannotRun: it does not decode.
    """
    rival, prompt, new = decoder(load_bf16(spec["model"])), spec["prompt"], spec["new_tokens"]
    mine, theirs = [], []
    for number in range(spec["rounds"] + 1):
        try:
            taken = decode(prompt, new) if decode else None
        except Exception as reason:  # of whatever kind: it is the library's
            raise CannotRun(f"does not decode on this CPU: {one_line(reason)}") from reason
        other = rival(prompt, new)
        if number:  # the first warms up
            theirs.append(other)
            mine.append(other if taken is None else taken)
    speed = (new - 1) / statistics.median(mine)
    ratio = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
    found["decode"] = {"tokens_per_second": speed, "by_bf16": ratio}


def one_line(reason: BaseException) -> str:
    """An exception in at most 300 characters."""
    said = " ".join(str(reason).split())
    return f"{type(reason).__name__}: {said}"[:300]


def main(stage: str, spec_file: str, out_file: str) -> int:
    """Run a stage; status 3 with `reason` in OUT where the row cannot run."""
    torch.set_num_threads(1)
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    out = Path(out_file)
    found: Found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    found.setdefault("notes", [])
    found.pop("reason", None)

    def write() -> None:
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(found), encoding="utf-8")
        os.replace(partial, out)

    try:
        {"make": make, "measure": measure}[stage](spec, found, write)
    except Exception as reason:  # of whatever kind: it is the library's
        found["reason"] = str(reason) if isinstance(reason, CannotRun) else one_line(reason)
        write()
        if not isinstance(reason, (CannotRun, ImportError)):
            import traceback

            traceback.print_exc()
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

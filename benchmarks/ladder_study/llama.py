"""llama.cpp's own types, through llama-cpp-python: quantized from the GGUF that the float model came from.

Everything of llama.cpp runs in processes of its own, which is this file as a program: a crash there is a sentence here.
The scores are the study's: logits of every token of every window are handed over in a file.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# GGUF's names of a block's layers, by Transformers'.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
IMPORTANCE_TOKENS = 16384
LOGITS = "logits.f32"


def make_llama(places: Any, name: str, seed: int, kind: str) -> dict[str, Any]:
    """A GGUF of llama.cpp's type ``kind``.

    Raises:
        CannotRun: llama.cpp refuses, with its own words; there is no llama-cpp-python; or no GGUF was named.
    """
    from .protocol import CannotRun

    if places.gguf is None:
        raise RuntimeError(f"{name}: name the GGUF file that the float model came from: --gguf FILE")
    target = places.of(name) / "model.gguf"
    importance, data, minutes = None, None, 0.0
    if kind.startswith("IQ"):
        importance = places.of(name) / "importance.npz"
        data, minutes = write_importance(places, importance, seed)
    said = quantize_apart(places.gguf, target, kind, importance)
    if "error" in said:
        raise CannotRun(said["error"])
    stored = stored_in(target)
    notes = [
        "layers stored as " + ", ".join(f"{number} {kind}" for kind, number in stored["linear_types"].items()),
        f"embedding and head (one matrix) as {stored['embedding_type']}",
        "quantized from the 4-bit GGUF that the float model was dequantized from: the same weights before bfloat16",
    ]
    if importance is not None:
        notes.append("importance matrix of our own making: mean squares of the layers' inputs on the calibration text")
    return {
        "linear_bpw": stored["linear_bpw"],
        "file_bpw": stored["file_bpw"],
        "file_bytes": stored["bytes"],
        "calibration": data,
        "minutes": minutes + said["seconds"] / 60,
        "command": None,
        "notes": notes,
    }


def quantize_apart(source: Path, target: Path, kind: str, importance: Path | None) -> dict[str, Any]:
    """`quantize` in a process of its own: its answer, or {"error": what it said}."""
    return _child(["quantize", str(source), str(target), kind, str(importance or "")])


def write_importance(places: Any, file: Path, seed: int) -> tuple[dict[str, Any], float]:
    """`importance_of` the calibration text, in a file; the text it is from, and minutes."""
    import time

    from hf_onebit import loading

    from .making import calibration, described

    model = loading.load_float(str(places.model)).eval()
    data = calibration(places, IMPORTANCE_TOKENS, seed)
    start = time.perf_counter()
    np.savez(file, **importance_of(model, data.batches))
    return described(data), (time.perf_counter() - start) / 60


def importance_of(model: Any, batches: Any) -> dict[str, Any]:
    """Mean squares of each layer's inputs, float32 (in,), by GGUF's names."""
    from hf_onebit.rungs.walk import walk

    from .making import linear_names

    found: dict[str, Any] = {}

    def visit(_block: str, statistics: Any) -> None:
        for layer, hessian in statistics.items():
            if hessian is not None:
                found[gguf_name(layer)] = hessian.diagonal().float().numpy()

    walk(model, linear_names(model), batches, visit)
    return found


def gguf_name(name: str) -> str:
    """The weight of one of Llama's layers, as GGUF names it.

    >>> gguf_name("model.layers.3.mlp.down_proj")
    'blk.3.ffn_down.weight'
    """
    number, _, rest = name.partition("layers.")[2].partition(".")
    return f"blk.{number}.{NAMES[rest]}.weight"


def stored_in(file: Path) -> dict[str, Any]:
    """Bits per weight, bytes of all tensors and types, from a GGUF's header."""
    import gguf

    tensors = gguf.GGUFReader(file).tensors
    linear = [t for t in tensors if t.name.split(".")[-2] in NAMES.values()]
    size, weights = sum(int(t.n_bytes) for t in tensors), sum(int(t.n_elements) for t in tensors)
    return {
        "linear_bpw": 8 * sum(int(t.n_bytes) for t in linear) / sum(int(t.n_elements) for t in linear),
        "file_bpw": 8 * size / weights,
        "bytes": size,
        "linear_types": dict(Counter(t.tensor_type.name for t in linear)),
        "embedding_type": next(t.tensor_type.name for t in tensors if t.name == "token_embd.weight"),
    }


class LlamaLogits:
    """A GGUF file that answers as a model of Transformers would, as far as `hf_onebit.evaluation` asks.

    Args:
        places, name: whose file; the process dies with this object's `close`.
        context: the longest window.
    """

    training = False

    def __init__(self, places: Any, name: str, context: int) -> None:
        from transformers import AutoConfig

        self.config = AutoConfig.from_pretrained(places.model)
        self.file = places.of(name) / LOGITS
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve", str(places.of(name) / "model.gguf"), str(self.file), str(context)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def can_generate(self) -> bool:
        """It is a causal language model."""
        return True

    def get_input_embeddings(self) -> Any:
        """Something whose ``weight.device`` is the CPU."""
        import torch

        return torch.nn.Embedding(1, 1)

    def modules(self) -> Iterator["LlamaLogits"]:
        """Itself, as of any module; there are no others."""
        yield self

    def eval(self) -> "LlamaLogits":
        """Always so."""
        return self

    def train(self, mode: bool = True) -> "LlamaLogits":
        """Never so."""
        return self

    def __call__(self, input_ids: Any, **_: Any) -> Any:
        """Logits of one window, (1, tokens, vocabulary) float32."""
        import torch
        from transformers.modeling_outputs import CausalLMOutput

        ids = input_ids[0].tolist()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(ids) + "\n")
        self.process.stdin.flush()
        shape = (1, len(ids), self._answer()["vocabulary"])
        return CausalLMOutput(logits=torch.from_numpy(np.fromfile(self.file, dtype=np.float32).reshape(shape)))

    def close(self) -> None:
        """End the process and remove its file."""
        self.process.communicate()
        self.file.unlink(missing_ok=True)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"llama.cpp ended: {self.process.wait()}"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def _child(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout.strip():
        return {"error": f"the process of llama.cpp ended with status {done.returncode}"}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


# -------------------------------------------------------------------------------------- the other side: a program


def _quiet(api: Any) -> tuple[list[str], Any]:
    """llama.cpp's log from here on, and what must live as long as that is wanted."""
    lines: list[str] = []
    keep = api.llama_log_callback(lambda _level, text, _data: lines.append(text.decode(errors="replace")))
    api.llama_log_set(keep, ctypes.c_void_p(0))
    return lines, keep


def quantize(source: str, target: str, kind: str, importance: str) -> dict[str, Any]:
    """One file of one type."""
    import time

    import llama_cpp as api

    lines, _keep = _quiet(api)
    ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if ftype is None:
        return {"error": f"this build of llama.cpp does not know the type {kind}"}
    options = api.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = ftype, True, os.cpu_count() or 1
    arrays = {}
    if importance:
        arrays = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in np.load(importance).items()}
        table = (api.llama_model_imatrix_data * (len(arrays) + 1))()  # ends with a name that is null
        for entry, (name, values) in zip(table, arrays.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        options.imatrix = table
    start = time.perf_counter()
    status = api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
    if status:
        said = [line.strip() for line in "".join(lines).splitlines() if "failed" in line or "not divisible" in line]
        return {
            "error": "llama.cpp: " + (" ".join(said[-1].split()) if said else f"llama_model_quantize gave {status}")
        }
    return {"seconds": time.perf_counter() - start}


def serve(model: str, output: str, context: int) -> None:
    """Write the logits of each list of ids on standard input to ``output``."""
    import llama_cpp as api

    _lines, _keep = _quiet(api)
    api.llama_backend_init()
    options = api.llama_model_default_params()
    options.n_gpu_layers, options.use_extra_bufts = 0, False  # with its own layouts, q4_0 crashed on AMX
    loaded = api.llama_model_load_from_file(model.encode(), options)
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = context
    settings.n_ubatch = min(context, 512)  # its default, and a tenth faster than a window at once
    settings.n_threads = settings.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    state = api.llama_init_from_model(loaded, settings) if loaded else None
    if not state:
        print(json.dumps({"error": f"llama.cpp cannot load {Path(model).name}"}), flush=True)
        return
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
    print(json.dumps({"vocabulary": vocabulary}), flush=True)
    batch = api.llama_batch_init(context, 0, 1)
    for line in sys.stdin:
        ids = json.loads(line)
        api.llama_memory_clear(api.llama_get_memory(state), True)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        status = api.llama_decode(state, batch)
        if status:
            print(json.dumps({"error": f"llama_decode gave {status}"}), flush=True)
            return
        np.ctypeslib.as_array(api.llama_get_logits(state), shape=(len(ids), vocabulary)).tofile(output)
        print(json.dumps({"vocabulary": vocabulary}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        print(json.dumps(quantize(*sys.argv[2:6])))
    else:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))

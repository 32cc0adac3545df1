"""llama.cpp through llama-cpp-python's low-level interface: prefill and greedy decoding of one sequence, timed.

It runs in a process of its own, which answers one line of JSON for each line that it is sent. So its memory is counted
apart from ours, its threads are its own, and a crash in there is a sentence here.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_onebit.evaluation import resident_bytes


class LlamaCpp:
    """A GGUF file in llama.cpp, with its defaults for the CPU.

    Args:
        path: the file.
        tokens: the longest sequence.
        threads: for prefill and decoding.
        repack: let it keep the types that it can in layouts of its own (its default): for AMX, or rows interleaved.

    Raises:
        ImportError: llama-cpp-python is not installed.
        RuntimeError: llama.cpp refuses the file.
    """

    def __init__(self, path: str | os.PathLike[str], tokens: int, threads: int, repack: bool = True) -> None:
        import llama_cpp

        self._api = llama_cpp
        # Kept, since C code calls it; llama.cpp tells every step of loading on standard error.
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers, options.use_extra_bufts = 0, repack
        self._model: Any = llama_cpp.llama_model_load_from_file(os.fspath(path).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {os.fspath(path)!r}, expected a GGUF file that it knows")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = tokens, tokens
        settings.n_threads = settings.n_threads_batch = threads
        self._context: Any = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {tokens} tokens for {os.fspath(path)!r}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def logits(self, ids: list[int]) -> list[float]:
        """Logits, one for each word of the vocabulary, after the tokens ``ids``."""
        self._forget()
        return [float(value) for value in self._decode(ids)]

    def generate(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        """Seconds from the prompt ``ids`` to the first new token, and from there to the last: greedy."""
        self._forget()
        start = time.perf_counter()
        token = int(self._decode(ids).argmax())
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = int(self._decode([token]).argmax())
        return first - start, time.perf_counter() - first

    def close(self) -> None:
        """Free its memory."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _decode(self, tokens: list[int]) -> np.ndarray[Any, Any]:
        """The logits after the last token; a view that the next call overwrites."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        status = self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode failed with status {status} at {len(tokens)} tokens")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, shape=(self._vocabulary,))


class LlamaProcess:
    """``LlamaCpp`` in a process of its own.

    Args:
        path, tokens, threads, repack: as there.

    Raises:
        ImportError: llama-cpp-python is not installed.
        RuntimeError: the process died, here or in any call; or llama.cpp refuses the file.
    """

    def __init__(self, path: str | os.PathLike[str], tokens: int, threads: int, repack: bool = True) -> None:
        package = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
        arguments = [os.fspath(path), str(tokens), str(threads), str(int(repack))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hf_onebit.bench.llama", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        answer = self._answer()
        self.resident: int | None = answer["resident"]

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (vocabulary,) after the tokens ``ids`` (1, tokens), float32."""
        return torch.tensor(self._ask({"logits": ids[0].tolist()})["logits"])

    def generate(self, ids: Tensor, new_tokens: int) -> tuple[float, float]:
        """Seconds from the prompt ``ids`` (1, tokens) to the first new token, and from there to the last: greedy."""
        prompt, rest = self._ask({"generate": ids[0].tolist(), "new_tokens": new_tokens})["seconds"]
        return prompt, rest

    def used_bytes(self) -> int | None:
        """How much memory its process holds more than before it loaded the model; None where that is not told."""
        now = self._ask({"resident": True})["resident"]
        return None if now is None or self.resident is None else int(now - self.resident)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the answer says how
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, said = self._process.communicate()
            status = self._process.returncode
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            last = said.strip().splitlines()[-1:] if status > 0 else []
            raise RuntimeError(" ".join([f"the process of llama.cpp {how}", *last]))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise (ImportError if answer["absent"] else RuntimeError)(answer["error"])
        return answer


def serve(path: str, tokens: int, threads: int, repack: bool) -> None:
    """Answer requests on standard input until it ends: the other side of ``LlamaProcess``."""

    def say(answer: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    try:
        # What the interpreter and the library hold is not the model's.
        import llama_cpp  # noqa: F401

        before = resident_bytes()
        llama = LlamaCpp(path, tokens, threads, repack)
    except (ImportError, RuntimeError) as error:
        say({"error": str(error), "absent": isinstance(error, ImportError)})
        return
    say({"resident": before})
    for line in sys.stdin:
        request = json.loads(line)
        if "logits" in request:
            say({"logits": llama.logits(request["logits"])})
        elif "generate" in request:
            say({"seconds": llama.generate(request["generate"], request["new_tokens"])})
        else:
            say({"resident": resident_bytes()})
    llama.close()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), bool(int(sys.argv[4])))

"""A process of its own around llama-cpp-python: one line of JSON in, one out.

{"logits": {file: token ids}}                last logits of each
{"tokens": {file: [texts]}}                  token ids of each text
"""

import ctypes
import json
import sys

import llama_cpp as api


def load(path: str, vocabulary_only: bool) -> object:
    options = api.llama_model_default_params()
    # Without layouts of its own, which crash with AMX in some builds.
    options.n_gpu_layers, options.vocab_only, options.use_extra_bufts = 0, vocabulary_only, False
    model = api.llama_model_load_from_file(path.encode(), options)
    assert model, f"llama.cpp refuses {path}"
    return model


def logits(path: str, ids: list[int]) -> list[float]:
    model = load(path, vocabulary_only=False)
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = 64, 64, 1, 1
    context = api.llama_init_from_model(model, settings)
    array = (ctypes.c_int32 * len(ids))(*ids)
    assert api.llama_decode(context, api.llama_batch_get_one(array, len(ids))) == 0
    count = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    pointer = api.llama_get_logits_ith(context, -1)
    result = [float(pointer[i]) for i in range(count)]
    api.llama_free(context)
    api.llama_model_free(model)
    return result


def tokens(path: str, texts: list[str]) -> list[list[int]]:
    model = load(path, vocabulary_only=True)
    vocabulary = api.llama_model_get_vocab(model)
    result = []
    for text in texts:
        raw = text.encode()
        array = (ctypes.c_int32 * (len(raw) + 8))()
        count = api.llama_tokenize(vocabulary, raw, len(raw), array, len(array), True, True)
        result.append(list(array[:count]))
    api.llama_model_free(model)
    return result


if __name__ == "__main__":
    silence = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(silence, ctypes.c_void_p(0))
    api.llama_backend_init()
    request = json.loads(sys.stdin.readline())
    if "logits" in request:
        answer = {path: logits(path, ids) for path, ids in request["logits"].items()}
    else:
        answer = {path: tokens(path, texts) for path, texts in request["tokens"].items()}
    print(json.dumps(answer))

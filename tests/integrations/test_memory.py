"""Quantizing while loading streams: memory stays near that of the packed model, whatever the float model weighs."""

import json
import subprocess
import sys
import textwrap

import pytest

MAKE = """
    import sys
    import torch, transformers
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1], max_shard_size="200MB")
"""
LOAD = """
    import json, sys, threading
    import torch, transformers
    import hf_onebit

    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    peak, stop = [0], threading.Event()
    def watch():
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    threading.Thread(target=watch, daemon=True).start()
    dtype = getattr(torch, sys.argv[2])
    config = hf_onebit.OneBitConfig(planes=int(sys.argv[3]))
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=dtype)
    stop.set()
    final = anonymous()
    largest = max(4 * layer.in_features * layer.out_features for layer in hf_onebit.nn.packed_layers(model).values())
    print(json.dumps({"peak": max(peak[0], final), "final": final, "largest": largest}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    subprocess.run([sys.executable, "-c", textwrap.dedent(MAKE), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(("dtype", "planes"), [("float32", 1), ("bfloat16", 2)])
def test_peak_memory_is_bounded_by_the_largest_layer(large, dtype, planes):
    command = [sys.executable, "-c", textwrap.dedent(LOAD), str(large), dtype, str(planes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sizes = json.loads(done.stdout.splitlines()[-1])
    float_bytes = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    allowed = 8 * sizes["largest"] + 64 * 2**20
    assert allowed < 0.6 * float_bytes  # else the bound would prove nothing
    assert sizes["peak"] - sizes["final"] <= allowed, sizes

"""Makes tests/golden/gptqmodel: two tiny checkpoints quantized and written by gptqmodel, and what it makes of them.

Run it where gptqmodel is installed (7.7.0 made what is committed), with tests/ on the path; it takes a minute::

    GPTQMODEL_CPU_WORKERS=2 CUDA_VISIBLE_DEVICES= PYTHONPATH=tests python tests/golden/make_gptqmodel.py

Each folder has config.json and model.safetensors as they were written, less a path of the machine, and
expected.safetensors: float16 weights that gptqmodel's own layer restores.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file
from tiny import tiny_llama, tiny_tokenizer

FOLDER = Path(__file__).parent / "gptqmodel"
KINDS = {
    "act_order": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    "v2": {"bits": 3, "group_size": 32, "desc_act": False, "sym": False, "format": "gptq_v2"},
}
SHOWN = ("self_attn.k_proj", "mlp.down_proj")


def main() -> None:
    text = "the quick brown fox jumps over the lazy dog and then some more words follow "
    texts = [2 * text + str(number) for number in range(64)]
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "float"
        tiny_llama(layers=1, tied=True).half().save_pretrained(source)
        tiny_tokenizer().save_pretrained(source)
        for kind, options in KINDS.items():
            written = Path(place) / kind
            model = GPTQModel.load(str(source), QuantizeConfig(**options), device="cpu", dtype=torch.float16)
            model.quantize(texts, batch_size=8)
            model.save(str(written))
            target = FOLDER / kind
            target.mkdir(parents=True, exist_ok=True)
            config = json.loads((written / "config.json").read_text())
            config["quantization_config"]["meta"].pop("offload_to_disk_path", None)
            (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            shutil.copyfile(written / "model.safetensors", target / "model.safetensors")
            loaded = GPTQModel.load(str(written), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
            block = loaded.model.model.layers[0]
            expected = {}
            for name in SHOWN:
                layer = block.get_submodule(name)
                # Through the layer itself: its outputs for the rows of an identity matrix are its weight.
                eye = torch.eye(layer.in_features, dtype=torch.float16)
                with torch.inference_mode():
                    expected[name] = layer(eye).T.contiguous().clone()
            save_file(expected, str(target / "expected.safetensors"))


if __name__ == "__main__":
    main()

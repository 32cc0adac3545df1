"""OneComp's Onebit, run by a Python of its own that has it installed: this file is also the program for that.

Not `onecomp.py`: as a program it has its own folder before all others on the path.

python3.12 -m venv onecomp && onecomp/bin/pip install "onecomp[cpu]"
python benchmarks/study.py run onecomp-balanced ... --onecomp onecomp/bin/python
"""

import json
import os
import subprocess
import sys
from typing import Any

SAMPLES, LENGTH = 16, 1024


def make_onecomp(places: Any, name: str, seed: int, balancing: bool) -> dict[str, Any]:
    """OneComp's Onebit at its defaults, balancing on (its default) or off; kept as a dequantized float folder.

    Raises:
        RuntimeError: no Python was named, or it failed, with the last line of what it said.
    """
    from hf_onebit import loading
    from hf_onebit.formats.onebit import bits_per_weight

    from .making import calibration, described, file_bits, linear_names, mean_bits
    from .rounding import DEQUANTIZED

    if places.onecomp is None:
        raise RuntimeError(f"{name}: name a Python (3.12 or 3.13) that has OneComp: --onecomp FILE")
    target = places.of(name) / "dequantized"
    rows = places.of(name) / "calibration.jsonl"
    # All of the file counts, and in one pass: it gets as much text as our closed form does.
    chosen, tokenizer = calibration(places, SAMPLES * LENGTH, seed), loading.load_tokenizer(str(places.model))
    texts = [tokenizer.decode(batch["input_ids"][0]) for batch in chosen.batches]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    command = [str(places.onecomp), __file__, str(places.model), str(target), str(rows), str(int(balancing)), str(seed)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # its packages are its own
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"OneComp ended with status {done.returncode}: {last}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    model = loading.load_float(str(places.model))
    names = linear_names(model)
    missing = sorted(set(names) - set(said["layers"]))
    bits = mean_bits(model, names, bits_per_weight)
    file_bpw, file_bytes = file_bits(model, names, bits)
    data = described(chosen)
    notes = [
        f"OneComp {said['version']}, Onebit at its defaults, balancing {'on' if balancing else 'off'}",
        DEQUANTIZED,
        "bits and bytes computed as of our format, which stores the same tensors; the rest at 16",
    ]
    if missing:
        notes.append(f"{len(missing)} of the layers that ours pack stay float, {missing[0]} among them")
    return {"linear_bpw": bits, "file_bpw": file_bpw, "file_bytes": file_bytes, "calibration": data,
            "minutes": said["seconds"] / 60, "command": None, "notes": notes}  # fmt: skip


def main(model: str, target: str, rows: str, balancing: bool, seed: int) -> None:
    """In OneComp's own Python: quantize, save dequantized, say what was done."""
    import time

    import onecomp
    from onecomp import CalibrationConfig, ModelConfig, Onebit, Runner

    config = ModelConfig(path=model, dtype="float32", device="cpu")
    quantizer = Onebit(use_balancing=balancing)
    data = CalibrationConfig(
        calibration_dataset=rows, max_length=LENGTH, num_calibration_samples=SAMPLES, strategy="concat_chunk", seed=seed
    )
    runner = Runner(model_config=config, quantizer=quantizer, calibration_config=data)
    start = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - start
    runner.save_dequantized_model(target)
    print(json.dumps({"version": onecomp.__version__, "layers": sorted(quantizer.results), "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "1", int(sys.argv[5]))

"""OneComp's Onebit, run by a Python of its own that has it installed: this file is also the program for that.

python3.12 -m venv onecomp && onecomp/bin/pip install "onecomp[cpu]"
python benchmarks/study.py run onecomp-balanced ... --onecomp onecomp/bin/python
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SAMPLES, LENGTH = 16, 1024


def make_onecomp(places: Any, name: str, seed: int, balancing: bool) -> dict[str, Any]:
    """OneComp's Onebit at its defaults, balancing on (its default) or off; kept as a dequantized float folder.

    Raises:
        CannotRun: it failed, with the last line of what it said.
    """
    from hf_onebit import loading
    from hf_onebit.formats.onebit import bits_per_weight

    from .making import file_bits, linear_names, mean_bits
    from .protocol import CALIBRATION, CannotRun
    from .rounding import DEQUANTIZED

    if places.onecomp is None:
        raise RuntimeError(f"{name}: name a Python (3.12 or 3.13) that has OneComp: --onecomp FILE")
    target = places.of(name) / "dequantized"
    rows = places.of(name) / "calibration.jsonl"
    rows.write_text(_documents((places.data / CALIBRATION).read_text(encoding="utf-8"), seed), encoding="utf-8")
    command = [str(places.onecomp), __file__, str(places.model), str(target), str(rows), str(int(balancing)), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CannotRun(f"OneComp ended with status {done.returncode}: {last}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    model = loading.load_float(str(places.model))
    names = linear_names(model)
    missing = sorted(set(names) - set(said["layers"]))
    bits = mean_bits(model, names, bits_per_weight)
    file_bpw, file_bytes = file_bits(model, names, bits)
    data = {"source": Path(CALIBRATION).name, "tokens": said["tokens"], "sha256": None}
    notes = [
        f"OneComp {said['version']}, Onebit at its defaults, balancing {'on' if balancing else 'off'}",
        DEQUANTIZED,
        "bits and bytes computed as of our format, which stores the same tensors; the rest at 16",
    ]
    if missing:
        notes.append(f"{len(missing)} of the layers that ours pack stay float, {missing[0]} among them")
    return {"linear_bpw": bits, "file_bpw": file_bpw, "file_bytes": file_bytes, "calibration": data,
            "minutes": said["seconds"] / 60, "command": None, "notes": notes}  # fmt: skip


def _documents(text: str, seed: int) -> str:
    """The pieces of the text, which two blank lines part, as JSON lines in an order of ``seed``."""
    import random

    pieces = [piece for piece in text.split("\n\n\n") if piece.strip()]
    random.Random(seed).shuffle(pieces)
    return "".join(json.dumps({"text": piece}) + "\n" for piece in pieces)


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
    said = {"version": onecomp.__version__, "layers": sorted(quantizer.results), "seconds": seconds}
    print(json.dumps({**said, "tokens": SAMPLES * LENGTH}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "1", int(sys.argv[5]))

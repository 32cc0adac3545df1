"""Draws docs/results/roofline.svg from the committed figures of `hf-onebit bench`.

python benchmarks/plot_roofline.py
python benchmarks/plot_roofline.py bench.json -o roofline.png
"""

import argparse
import json
import sys
from pathlib import Path

from hf_onebit.report import plot_roofline

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: docs/results/bench_layers_*.json")
    parser.add_argument("-o", "--output", default=RESULTS / "roofline.svg", help="default: docs/results/roofline.svg")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob("bench_layers_*.json"))
    if not files:
        parser.error(f"no bench_layers_*.json in {RESULTS}")
    plot_roofline([json.loads(file.read_text(encoding="utf-8")) for file in files], options.output)
    print(f"{options.output} from {', '.join(file.name for file in files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

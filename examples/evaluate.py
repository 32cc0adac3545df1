"""Compare a packed model with the float model it came from, on a text.

python examples/evaluate.py PACKED FLOAT examples/data/alice.txt
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_onebit  # noqa: F401  registers the method "onebit"
from hf_onebit.evaluation import compare, tensor_bytes, token_windows


def main() -> None:
    """Parse the arguments, evaluate, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", metavar="PACKED", help="packed model: a folder or a hub id")
    parser.add_argument("float", metavar="FLOAT", help="float model: a folder or a hub id")
    parser.add_argument("text", metavar="TEXT", help="text file that did not calibrate the packed model")
    parser.add_argument("--context", type=int, default=1024, help="tokens a window (default 1024)")
    parser.add_argument("--tokens", type=int, default=8192, help="score the first N tokens (default 8192)")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.float)
    windows = token_windows(Path(options.text).read_text("utf-8"), tokenizer, options.context, options.tokens)
    packed = AutoModelForCausalLM.from_pretrained(options.packed)
    reference = AutoModelForCausalLM.from_pretrained(options.float)
    for key, value in compare(packed, reference, windows).items():
        print(f"{key:<22}{value:,.4f}" if isinstance(value, float) else f"{key:<22}{value}")
    print(f"{'tensor_bytes':<22}{tensor_bytes(packed)} packed, {tensor_bytes(reference)} float")


if __name__ == "__main__":
    main()

"""Quantize a float model with calibration text, and save it packed.

python examples/calibrate.py MODEL examples/data/calibration.txt -o DIR
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.config import PRESETS
from hf_onebit.report import layer_summary


def main() -> None:
    """Parse the arguments, quantize, save, print what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="float model: a folder or a hub id")
    parser.add_argument("text", metavar="TEXT", help="text file to calibrate on")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder for the packed checkpoint")
    parser.add_argument(
        "--preset", choices=PRESETS, default="fast", help="which algorithms choose the bits (default fast)"
    )
    parser.add_argument("--tokens", type=int, help="tokens of the text to use (default: what the preset is made for)")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    config = OneBitConfig(preset=options.preset, dataset=options.text, calibration_tokens=options.tokens)
    quantizer = OneBitQuantizer(config)
    quantizer.quantize_model(model, tokenizer)
    quantizer.save(model, options.output, tokenizer=tokenizer)
    print(layer_summary(quantizer.report))


if __name__ == "__main__":
    main()

"""Quantize a float model with calibration text, and save it packed.

python examples/calibrate.py MODEL examples/data/calibration.txt -o DIR
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_onebit import OneBitConfig, OneBitQuantizer
from hf_onebit.report import layer_summary


def main() -> None:
    """Parse the arguments, quantize, save, print what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="float model: a folder or a hub id")
    parser.add_argument("text", metavar="TEXT", help="text file to calibrate on")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder for the packed checkpoint")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the text to use (default 16384)")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    quantizer = OneBitQuantizer(OneBitConfig(dataset=options.text, calibration_tokens=options.tokens))
    quantizer.quantize_model(model, tokenizer)
    quantizer.save(model, options.output, tokenizer=tokenizer)
    print(layer_summary(quantizer.report))


if __name__ == "__main__":
    main()

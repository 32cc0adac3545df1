"""Quantize a float model while it loads, without data, and save it packed.

python examples/quantize_on_load.py MODEL -o DIR
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_onebit
from hf_onebit import OneBitConfig


def main() -> None:
    """Parse the arguments, quantize, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="float model: a folder or a hub id")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder for the packed checkpoint")
    parser.add_argument("--planes", type=int, default=1, help="sign matrices per layer, 1 or 2 (default 1)")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = OneBitConfig(planes=options.planes)
    model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config)
    report = model.hf_quantizer.report
    hf_onebit.save(model, options.output, tokenizer=tokenizer, report=report)
    print(f"{len(report['layers'])} layers packed at {report['linear_bpw']:.3f} bits per weight: {options.output}")


if __name__ == "__main__":
    main()

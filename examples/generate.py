"""Generate text from a packed model.

python examples/generate.py PACKED "The little boat" --cache
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_onebit  # noqa: F401  registers the method "onebit"
from hf_onebit.nn import cache_dequantized


def main() -> None:
    """Parse the arguments, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", metavar="PACKED", help="packed model: a folder or a hub id")
    parser.add_argument("prompt", metavar="PROMPT", help="text to go on from")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to write (default 64)")
    parser.add_argument(
        "--cache", action="store_true", help="keep signs unpacked: faster without CPU kernels, more memory"
    )
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.packed)
    model = AutoModelForCausalLM.from_pretrained(options.packed)
    if options.cache:
        cache_dequantized(model)
    prompt = tokenizer(options.prompt, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=options.new_tokens, do_sample=False)
    print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()

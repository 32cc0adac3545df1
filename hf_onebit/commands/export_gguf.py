"""``hf-onebit export-gguf``: its arguments, the call, what is printed."""

from __future__ import annotations

import argparse

from hf_onebit.commands.options import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit export-gguf``."""
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the .gguf file to make or replace")
    parser.add_argument(
        "--fallback",
        choices=("f16", "bf16", "q8_0"),
        help="type of layers that no type of few bits holds (default: they are refused)",
    )
    parser.add_argument(
        "--no-vocabulary", action="store_true", help="leave the tokenizer out: llama.cpp then takes token ids only"
    )


def run(options: argparse.Namespace) -> Result:
    """``hf-onebit export-gguf``."""
    from hf_onebit.interchange.gguf_file import export_gguf
    from hf_onebit.report import format_table

    result = export_gguf(
        options.folder, options.output, fallback=options.fallback, vocabulary=not options.no_vocabulary
    )
    rows = [
        [
            name,
            tensor["type"],
            "exact" if tensor["exact"] else f"{tensor['max_error']:.1e}",
            "; ".join(filter(None, (tensor["folded"] and f"column scales in {tensor['folded']}", tensor["why"]))),
        ]
        for name, tensor in result["tensors"].items()
    ]
    print(format_table(["tensor", "type", "largest error", ""], rows))
    types = ", ".join(f"{count} {kind}" for kind, count in result["types"].items())
    print(f"\n{result['exact']} of {len(rows)} tensors exactly; {types}; {result['file_bytes']:,} bytes")
    return result, 0

"""Other libraries' quantization of one model at 8, 4, 3 and 2 bits beside ours, behind docs/mpq_results.md.

    python benchmarks/mpq_peers.py list
    python benchmarks/mpq_peers.py run --model FLOAT --data DATA --work WORK --gguf FILE --python hqq=hqq/bin/python
    python benchmarks/mpq_peers.py table

FLOAT is a float folder; DATA holds wikitext-2/test.txt and mixed/calibration.txt; WORK keeps what runs leave behind, so
that a run that was ended goes on where it was. A library that this Python lacks runs in the one that is named for it.
"""

import argparse
import sys
from pathlib import Path

from ladder_study.protocol import Places
from peer_study.rows import ROWS
from peer_study.running import Study, load, run
from peer_study.tables import fill
from result_pages import add_page_options, write_page

DOCS = Path(__file__).resolve().parents[1] / "docs"


def named_python(text: str) -> tuple[str, str]:
    """PEER=FILE.

    >>> named_python("hqq=/opt/hqq/bin/python")
    ('hqq', '/opt/hqq/bin/python')
    """
    peer, mark, file = text.partition("=")
    known = sorted({row.peer for row in ROWS.values()} - {"float", "ours", "llama"})
    if not mark or peer not in known:
        raise argparse.ArgumentTypeError(f"{text!r}: expected PEER=FILE, PEER being one of {', '.join(known)}")
    return peer, str(Path(file).absolute())


def main(arguments: list[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=DOCS / "results" / "mpq_peers.json", help="the rows' JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every row, and whether it is finished")
    make = commands.add_parser("run", help="make and measure rows")
    make.add_argument("rows", nargs="*", metavar="ROW", help="names that `list` prints; all by default")
    make.add_argument("--model", type=Path, required=True, help="float folder")
    make.add_argument("--data", type=Path, required=True, help="folder of the texts")
    make.add_argument("--work", type=Path, required=True, help="folder for what runs leave behind")
    make.add_argument("--gguf", type=Path, help="the GGUF that the float model was dequantized from")
    make.add_argument("--python", type=named_python, action="append", default=[], metavar="PEER=FILE",
                      help="the Python that has a peer installed; this one by default")  # fmt: skip
    make.add_argument("--timeout", type=float, default=3600, help="seconds of the clock for one stage of a row")
    make.add_argument("--again", action="store_true", help="measure rows that the JSON has already")
    make.add_argument("--tokens", type=int, default=8192, help="tokens to score")
    make.add_argument("--context", type=int, default=1024)
    make.add_argument("--calibration-tokens", type=int, default=16384)
    make.add_argument("--new-tokens", type=int, default=32)
    make.add_argument("--rounds", type=int, default=2, help="of decoding beside bf16")
    table = commands.add_parser("table", help="write the tables of docs/mpq_results.md")
    add_page_options(table, DOCS / "mpq_results.md")
    table.add_argument("--ours", type=Path, default=DOCS / "results" / "mpq.json", help="what benchmarks/mpq.py wrote")
    table.add_argument("--speed", type=Path, default=DOCS / "results" / "bench_model_mpq.json",
                       help="what hf-onebit bench wrote of a larger model")  # fmt: skip
    options = parser.parse_args(arguments)
    return {"list": show, "run": measure, "table": write_tables}[options.command](options)


def show(options: argparse.Namespace) -> int:
    """`list`."""
    rows = load(options.output)["rows"]
    for row in ROWS.values():
        status = "to do" if row.name not in rows else "no figures" if rows[row.name]["reason"] else "done"
        print(f"{row.name:<16} {row.peer:<8} {status:<11} {row.title}")
    return 0


def measure(options: argparse.Namespace) -> int:
    """`run`."""
    unknown = [name for name in options.rows if name not in ROWS]
    if unknown:
        print(f"no rows {', '.join(unknown)}: expected some of {', '.join(ROWS)}", file=sys.stderr)
        return 2
    model, data, work = (path.absolute() for path in (options.model, options.data, options.work))
    study = Study(
        Places(model, data, work, options.gguf and options.gguf.absolute()),
        dict(options.python),
        options.timeout,
        options.tokens,
        options.context,
        options.calibration_tokens,
        options.new_tokens,
        options.rounds,
    )
    run(study, options.rows or [*ROWS], options.output, options.again)
    return 0


def write_tables(options: argparse.Namespace) -> int:
    """`table`."""
    ours, speed = (load(file) if file.is_file() else None for file in (options.ours, options.speed))
    return write_page(options, lambda page: fill(page, load(options.output), ours, speed))


if __name__ == "__main__":
    sys.exit(main())

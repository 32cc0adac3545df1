"""The study behind docs/results.md, row by row; a row that was ended goes on where it was, a finished one is skipped.

    python benchmarks/study.py list
    python benchmarks/study.py run fast --model FLOAT --data DATA --work WORK
    python benchmarks/study.py table

FLOAT is a float folder. DATA holds wikitext-2/test.txt, mixed/calibration.txt and mixed/alice.txt. WORK may be
anywhere.
"""

import argparse
import sys
from pathlib import Path

from ladder_study.ours import NotBuilt
from ladder_study.protocol import TEXTS, Places
from ladder_study.rows import ROWS
from ladder_study.running import read, refuse_unbuilt, run_row
from ladder_study.tables import fill, load_rows
from result_pages import add_page_options, write_page

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(arguments: list[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--results", type=Path, default=DOCS / "results" / "study", help="folder of the rows' JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every row, and whether it is finished")
    run = commands.add_parser("run", help="make and score rows")
    run.add_argument("rows", nargs="+", metavar="ROW", choices=[*ROWS], help="names that `list` prints")
    run.add_argument("--model", type=Path, required=True, help="float folder")
    run.add_argument("--data", type=Path, required=True, help="folder of the texts")
    run.add_argument("--work", type=Path, required=True, help="folder for what runs leave behind")
    run.add_argument(
        "--gguf", type=Path, help="the GGUF that the float model was dequantized from, for llama.cpp's rows"
    )
    run.add_argument("--onecomp", type=Path, help="a Python that has OneComp, for its rows")
    run.add_argument("--texts", nargs="+", choices=[*TEXTS], default=[*TEXTS], help="score these only, for now")
    table = commands.add_parser("table", help="write the tables of docs/results.md")
    add_page_options(table, DOCS / "results.md")
    options = parser.parse_args(arguments)
    return {"list": show, "run": run_rows, "table": write_tables}[options.command](options)


def show(options: argparse.Namespace) -> int:
    """`list`."""
    for row in ROWS.values():
        file = options.results / f"{row.name}.json"
        status = read(file)["status"] if file.is_file() else "to do"
        try:
            refuse_unbuilt(row)
        except NotBuilt:
            status = "not built"
        print(f"{row.name:<22} {row.family:<9} {status:<11} {row.title}")
    return 0


def run_rows(options: argparse.Namespace) -> int:
    """`run`."""
    places = Places(
        *(path.absolute() for path in (options.model, options.data, options.work)),
        *(path and path.absolute() for path in (options.gguf, options.onecomp)),
    )
    status = 0
    for name in options.rows:
        try:
            run_row(ROWS[name], places, options.results, options.texts)
        except NotBuilt as reason:
            print(reason, file=sys.stderr)
            status = 1
    return status


def write_tables(options: argparse.Namespace) -> int:
    """`table`."""
    return write_page(options, lambda page: fill(page, load_rows(options.results)))


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tuning one model in several ways on the same tokens, behind docs/training.md; a finished row is skipped.

    python benchmarks/finetune.py list
    python benchmarks/finetune.py tune text-packed-4 --model FLOAT --data DATA --work WORK
    python benchmarks/finetune.py run text-packed-4 --model FLOAT --data DATA --work WORK --packed mpq4=DIR
    python benchmarks/finetune.py table
    python benchmarks/finetune.py plot

FLOAT is a float folder. DATA holds wikitext-2/valid.txt, which trains and tunes, and wikitext-2/test.txt, which
judges. WORK keeps the float model's answers. `--packed` names packed models that rows start from: mpq4, mpq2, onebit;
without it the first two are packed while they load. Rows of bitsandbytes run in the Python that `--python bnb=FILE`
names.
"""

import argparse
import sys
from pathlib import Path

from finetune_study.protocol import Study
from finetune_study.rows import ROWS
from finetune_study.running import CannotRun, elsewhere, run_row, tune_row
from finetune_study.tables import fill, load_rows
from ladder_study.protocol import Places
from result_pages import add_page_options, write_page

from hf_onebit.report import plot_curves

DOCS = Path(__file__).resolve().parents[1] / "docs"
SIZES = ("steps", "length", "heldout", "tuning", "tuning_steps", "evaluations", "blocks", "seed")


def named(text: str) -> tuple[str, str]:
    """NAME=PATH.

    >>> named("mpq4=packed")[0]
    'mpq4'
    """
    name, mark, path = text.partition("=")
    if not mark or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PATH")
    return name, str(Path(path).absolute())


def main(arguments: list[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--results", type=Path, default=DOCS / "results" / "finetune", help="folder of the rows' JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every row, and whether it is finished")
    for name, what in (("tune", "try learning rates of rows"), ("run", "train rows, or measure their memory")):
        command = commands.add_parser(name, help=what)
        command.add_argument("rows", nargs="+", metavar="ROW", choices=[*ROWS], help="names that `list` prints")
        command.add_argument("--model", type=Path, required=True, help="float folder")
        command.add_argument("--data", type=Path, required=True, help="folder of the texts")
        command.add_argument("--work", type=Path, required=True, help="folder for what runs leave behind")
        command.add_argument("--packed", type=named, action="append", default=[], metavar="NAME=DIR")
        command.add_argument("--python", type=named, action="append", default=[], metavar="PEER=FILE",
                             help="the Python that has a peer's library")  # fmt: skip
        command.add_argument("--timeout", type=float, default=7200, help="seconds of the clock for a row elsewhere")
        for size in SIZES:
            command.add_argument(f"--{size.replace('_', '-')}", type=int, default=getattr(Study, size))
    table = commands.add_parser("table", help="write the tables of docs/training.md")
    add_page_options(table, DOCS / "training.md")
    commands.add_parser("plot", help="draw the curves of the rows that were trained, beside their JSON")
    options = parser.parse_args(arguments)
    others = {"list": show, "table": write_tables, "plot": draw}
    if options.command in others:
        return others[options.command](options)
    return work(options, arguments or sys.argv[1:])


def show(options: argparse.Namespace) -> int:
    """`list`."""
    for row in ROWS.values():
        status = "done" if (options.results / f"{row.name}.json").is_file() else "to do"
        print(f"{row.name:<24} {row.family:<9} {status:<6} {row.title}")
    return 0


def work(options: argparse.Namespace, arguments: list[str]) -> int:
    """`tune` and `run`."""
    places = Places(*(path.absolute() for path in (options.model, options.data, options.work)))
    packed = {name: Path(path) for name, path in options.packed}
    study = Study(places, packed, **{size: getattr(options, size) for size in SIZES})
    pythons, status = dict(options.python), 0
    for name in options.rows:
        row = ROWS[name]
        try:
            python = pythons.get(row.peer)
            if python is not None and python != sys.executable:
                elsewhere(row, python, alone(arguments, options.command, name), options.timeout)
            else:
                (tune_row if options.command == "tune" else run_row)(row, study, options.results, say)
        except CannotRun as reason:
            say(f"{name}: cannot run: {reason}")
            status = 1
    return status


def draw(options: argparse.Namespace) -> int:
    """`plot`."""
    rows = load_rows(options.results)
    for family in dict.fromkeys(row["family"] for row in rows.values() if "curve" in row):
        curves = {name: [{**entry, "nll": entry["loss"]} for entry in row["curve"]]
                  for name, row in rows.items() if row["family"] == family}  # fmt: skip
        plot_curves(curves, options.results / f"{family}.svg")
        print(f"{family}.svg: {', '.join(curves)}")
    return 0


def alone(arguments: list[str], command: str, row: str) -> list[str]:
    """The same command line for one row, in whichever Python runs it.

    >>> alone(["run", "text-lora", "text-lora-nf4", "--python", "bnb=py", "--seed", "1"], "run", "text-lora-nf4")
    ['run', 'text-lora-nf4', '--seed', '1']
    """
    words = [word for word in arguments if word not in ROWS]
    while "--python" in words:
        place = words.index("--python")
        del words[place : place + 2]
    place = words.index(command) + 1
    return [*words[:place], row, *words[place:]]


def say(text: str) -> None:
    """At once, since rows take minutes."""
    print(text, flush=True)


def write_tables(options: argparse.Namespace) -> int:
    """`table`."""
    return write_page(options, lambda page: fill(page, load_rows(options.results)))


if __name__ == "__main__":
    sys.exit(main())

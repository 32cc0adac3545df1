"""``hf-onebit report``: its arguments, the call, what is printed."""

from __future__ import annotations

import argparse
import os

from hf_onebit.commands.options import Result, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hf-onebit report``."""
    parser.add_argument(
        "folder", metavar="DIR", nargs="+", help="a packed checkpoint; several are drawn beside one another"
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="folder to write to (default: report in DIR, if it is the only one)"
    )


def run(options: argparse.Namespace) -> Result:
    """``hf-onebit report``."""
    from hf_onebit.report import REPORT_FOLDER, write_report
    from hf_onebit.storage.checkpoint import SIDE_FILE, full_report, read_side_file

    reports = []
    for folder in options.folder:
        side = read_side_file(folder)
        if side is None or not side.get("report"):
            raise ValueError(f"{folder!r} has no {SIDE_FILE} with a report: expected a folder of hf-onebit quantize")
        reports.append(full_report(side))
    if len(reports) == 1:
        report, output = reports[0], options.output or os.path.join(options.folder[0], REPORT_FOLDER)
    else:
        report = {"evaluations": [e for found in reports for e in found.get("evaluations") or []]}
        if not report["evaluations"]:
            raise ValueError("none of these folders was evaluated: hf-onebit eval DIR --data FILE --write-card first")
        if options.output is None:  # the report in one of them is its own
            raise UsageError("several folders need one for what is drawn of all: -o DIR")
        output = options.output
    files, notes = write_report(report, output)
    print("\n".join([*files, *notes]))
    return {"files": files, "notes": notes, "evaluations": report.get("evaluations") or []}, 0

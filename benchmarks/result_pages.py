"""Documents whose tables are written from results: between ``<!-- MARKER: name -->`` and ``<!-- /MARKER -->``."""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path


def fill_page(page: str, marker: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with every table between its markers rendered anew.

    Args:
        page: Markdown with a pair of markers for each table.
        marker: what they begin with.
        tables: by name, what renders each.

    Raises:
        ValueError: a marker has an unknown name, or a table has no marker.
    """
    seen = re.findall(rf"^<!-- {marker}: (\w+) -->$", page, re.MULTILINE)
    if sorted(seen) != sorted(tables):
        raise ValueError(f"the page has markers for {sorted(seen)}, expected one for each of {sorted(tables)}")

    def render(match: re.Match[str]) -> str:
        return f"<!-- {marker}: {match[1]} -->\n{tables[match[1]]()}\n<!-- /{marker} -->"

    pair = rf"^<!-- {marker}: (\w+) -->\n.*?^<!-- /{marker} -->$"
    return re.sub(pair, render, page, flags=re.MULTILINE | re.DOTALL)


def add_page_options(parser: argparse.ArgumentParser, page: Path) -> None:
    """The options of `write_page`."""
    parser.add_argument("--page", type=Path, default=page)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page would change")


def write_page(options: argparse.Namespace, fill: Callable[[str], str]) -> int:
    """Fill a page, or with ``--check`` only tell whether it would change; the exit status."""
    before = options.page.read_text(encoding="utf-8")
    after = fill(before)
    if options.check:
        return int(before != after)
    options.page.write_text(after, encoding="utf-8")
    print(f"{options.page.name}: {'changed' if before != after else 'as it was'}")
    return 0

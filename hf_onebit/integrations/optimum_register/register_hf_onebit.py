"""``optimum-cli onebit quantize MODEL -o DIR``: our quantize command, found by Optimum's command line.

Optimum imports every file of the folder ``optimum/commands/register`` each time its command line starts, so
this one imports nothing of ours until the command runs. It is installed there from
``hf_onebit/integrations/optimum_register`` (pyproject.toml); neither folder may hold an ``__init__.py``, for both
belong to a name space that packages share.
"""

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class OneBitQuantizeCommand(BaseOptimumCLICommand):
    """Passes its arguments on to ``hf-onebit quantize``, whose options it therefore has, ``--help`` included."""

    COMMAND = CommandInfo(name="quantize", help="Quantize a model to one bit per weight.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare all further words as one list, so that only ``hf-onebit`` has to know its options."""
        # With no prefix character an option is a word like any other, and reaches ``hf-onebit`` in its place.
        parser.prefix_chars = ""
        parser.add_argument("words", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Run the command and end the process with its exit status."""
        from hf_onebit.cli import main

        assert self.args is not None  # Optimum makes this instance from the parsed arguments
        sys.exit(main(["quantize", *self.args.words]))


class OneBitCommand(BaseOptimumCLICommand):
    """The group ``onebit``; alone it prints its help."""

    COMMAND = CommandInfo(name="onebit", help="One-bit language models (hf_onebit).")
    SUBCOMMANDS = (
        CommandInfo(
            name=OneBitQuantizeCommand.COMMAND.name,
            help=OneBitQuantizeCommand.COMMAND.help,
            subcommand_class=OneBitQuantizeCommand,
        ),
    )


REGISTER_COMMANDS = [OneBitCommand]

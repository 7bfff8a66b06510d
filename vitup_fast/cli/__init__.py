"""The command line, ``vitup-fast``: features of image files, how good they are, what runs here, and how fast."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import InputError, MissingPackageError
from . import bench, eval, export, giga, info, train, tune, upsample
from .guards import enough_memory
from .upsample import SOME_FAILED as SOME_FAILED

USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
PASSED_ON = {"bench": bench, "tune": tune}  # they read their arguments themselves


class _Parser(argparse.ArgumentParser):
    """Answers a wrong command line in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and where help is, and exit with code 2."""
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0; 2 for a user's mistake or where nothing could be done; 3 if some images failed; 130 when
        interrupted, 143 when terminated.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if getattr(sys.stdout, "errors", None) == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know a file name's letters
    try:
        with enough_memory("vitup-fast"):
            code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USER_ERROR
    except (InputError, MissingPackageError, OSError) as error:
        print(f"vitup-fast: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        print("vitup-fast: interrupted; files written so far are complete.", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _run(arguments: list[str]) -> int:
    """Choose the subcommand and run it."""
    if arguments and arguments[0] in PASSED_ON:
        return PASSED_ON[arguments[0]].run(arguments[1:])
    args = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        return args.run(args)


def _parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = _Parser(prog="vitup-fast", description="Vision transformer features at any image coordinate.")
    parser.add_argument("--version", action="version", version=f"vitup-fast {__version__}")
    names = "{upsample,giga,train,eval,export,info,bench,tune}"
    commands = parser.add_subparsers(required=True, metavar=names, parser_class=_Parser)
    for command in (upsample, giga, train, eval, export, info, bench, tune):
        command.add_parser(commands)
    return parser

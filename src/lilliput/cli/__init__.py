"""The command line: one file a verb, imported when it is used, torch only where a verb needs it.

The surprising rule: the overview that ``lilliput --help`` prints is made from ``VERBS`` here.
The help of each verb is cyclopts' work, made from the verb's docstring, but listing the verbs
through it would import all of them, and cyclopts with rich alone takes a tenth of torch's time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import UnknownName

if TYPE_CHECKING:
    from cyclopts import App

VERBS = {
    "demo": ("demo:demo", "Train and compress a small network in under a minute."),
    "list": ("list_:list_entries", "List methods, architectures, tasks and recipes."),
    "show": ("show:show", "Explain a method, architecture, task, recipe or compressed file."),
    "init": ("init:init", "Write a commented recipe to start from."),
    "validate": ("validate:validate", "Check a recipe, and print what it resolves to."),
    "run": ("run:run", "Run a recipe, or go on with it where it was interrupted."),
    "profile": ("profile:profile", "Measure a network: size, work, memory, latency, sensitivity."),
    "export": ("export:export", "Write a network for other runtimes, integers as integers."),
    "report": ("report:report", "Write an HTML report of one run, or a comparison of several."),
    "doctor": ("doctor:doctor", "Check this machine: versions, packages, data sets, disk."),
}

EXIT_CODES = (
    "Exit codes: 0 done; 1 an error of the run, a file or the machine; 2 wrong usage or bad input; "
    "3 a condition under the recipe's 'expect' does not hold; 130 interrupted (Ctrl-C). Errors are "
    "one message on stderr, or with --json one object on stdout; LILLIPUT_TRACEBACK=1 adds the "
    "traceback."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: without the program's name; by default those of the process.

    Returns:
        The code, as ``EXIT_CODES`` explains.

    Example:
        >>> main(["init", "my_recipe.txt", "--json"])
        {
          "error": "InputError",
          "message": "my_recipe.txt should end in .yaml, so that a run takes it for a file."
        }
        2
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in ([], ["--help"], ["-h"]):
        print(overview())
        return 0
    _find_local_modules()
    try:
        return _dispatch(given)
    except (Exception, KeyboardInterrupt) as error:
        from ._failure import report_failure

        return report_failure(error, as_json="--json" in given)


def overview() -> str:
    """What ``lilliput --help`` prints."""
    import textwrap

    verbs = "\n".join(f"  {verb:<10}{summary}" for verb, (_, summary) in VERBS.items())
    codes = textwrap.fill(EXIT_CODES, 92)
    return (
        f"Lilliput {__version__} makes trained PyTorch models small and fast.\n\n"
        f"Usage: lilliput VERB ...\n\n{verbs}\n\n"
        "lilliput VERB --help explains a verb. Every verb takes --json.\n"
        f"To begin: lilliput demo, or lilliput init my.yaml and lilliput run my.yaml.\n\n{codes}"
    )


def _dispatch(arguments: list[str]) -> int:
    """Let cyclopts parse the arguments and call the verb, whose result is the exit code."""
    verb = arguments[0]
    if verb not in VERBS and not verb.startswith("-"):
        # cyclopts knows this error too, but imports every verb, and torch, to word it.
        raise UnknownName("verb", verb, VERBS)
    code = _app()(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    return code or 0  # None after --help and --version


def _app() -> App:
    from cyclopts import App, Parameter

    app = App(
        name="lilliput",
        help="Make trained PyTorch models small and fast.",
        help_epilogue=EXIT_CODES,
        # Markdown, the default, costs another 25 ms of imports.
        help_format="plaintext",
        version=__version__,
        default_parameter=Parameter(negative=""),
        suppress_keyboard_interrupt=False,
    )
    for verb, (home, _) in VERBS.items():
        app.command(f"{__name__}.{home}", name=verb)
    return app


def _find_local_modules() -> None:
    """Let ``package.module:function`` be found where the user is, last: it must shadow nothing."""
    here = os.getcwd()  # noqa: PTH109 - pathlib would cost its import
    if "" not in sys.path and here not in sys.path:
        sys.path.append(here)

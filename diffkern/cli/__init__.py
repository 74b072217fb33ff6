"""The command line. What a command needs is imported when it runs, not before."""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

_COMMANDS = {
    "info": "versions, devices, and which backend each op runs on here",
    "train": "train a U-Net on the digits, a folder of images or an .npz file",
    "sample": "draw images from a checkpoint",
    "evaluate": "bits/dim of a data set under a checkpoint",
    "bench": "time every op against eager PyTorch, torch.compile and diffusers",
}
_EXTRAS = {"bench": "bench"}  # what brings a command's packages; for the others it is "train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``diffkern COMMAND ...``; returns the exit status.

    0: done; 1: the input, a file or the machine was at fault (one message on stderr; with DIFFKERN_DEBUG=1 the
    exception goes through instead); 2: no such command; 130: Ctrl-C. Wrong flags end in SystemExit(2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from diffkern import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in _COMMANDS:
        print(f"diffkern: no command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    try:
        importlib.import_module(f"diffkern.cli.{name}").run(arguments)
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if os.environ.get("DIFFKERN_DEBUG") == "1":
            raise
        missing = isinstance(error, ModuleNotFoundError)
        hint = f'; pip install "diffkern[{_EXTRAS.get(name, "train")}]"' if missing else ""
        print(f"diffkern {name}: error: {error}{hint}", file=sys.stderr)
        return 1
    return 0


def _usage() -> str:
    commands = "\n".join(f"  {name:10}{what}" for name, what in _COMMANDS.items())
    return f"usage: diffkern COMMAND ...\n\n{commands}\n\ndiffkern COMMAND --help lists a command's flags."

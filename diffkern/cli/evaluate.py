"""``diffkern evaluate``: what a checkpoint is worth. Each evaluation is a module of its own, imported when it runs."""

import importlib

_EVALUATIONS = {"nll": "bits/dim of a data set: the variational bound, term by term"}


def run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    name, *rest = arguments
    if name not in _EVALUATIONS:
        raise ValueError(f"no evaluation {name!r}\n\n{_usage()}")
    importlib.import_module(f"diffkern.cli.evaluate_{name}").run(rest)


def _usage() -> str:
    evaluations = "\n".join(f"  {name:8}{what}" for name, what in _EVALUATIONS.items())
    return f"usage: diffkern evaluate EVALUATION ...\n\n{evaluations}\n\nEVALUATION --help lists the flags of one."

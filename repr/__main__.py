"""The command: ``repr-pretrain VERB ...``, or ``python -m repr VERB ...``; each verb is a program of its own, too."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from repr.cli import COMMAND, one_line_errors
from repr.completion import complete

# Verb -> its module, which is imported when it is called, and what it does.
VERBS = {
    "fit": ("repr.fit", "pretrain an encoder"),
    "evaluate": ("repr.evaluate.__main__", "measure any encoder by published protocols"),
    "export": ("repr.export.__main__", "write a trained encoder for another library"),
    "report": ("repr.report.__main__", "make the page of one or more runs"),
    "check": ("repr.check.__main__", "look at a data set before training on it"),
    "plan": ("repr.plan.__main__", "predict memory and traffic of a step on any number of GPUs"),
    "explain": ("repr.explain", "tell the value of an option, where it comes from and what it means"),
    "list": ("repr.listing", "what there is to choose: objectives, experiments, data, ..."),
    "completion": ("repr.completion", "print what makes a shell complete the command"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks
        complete({verb: module for verb, (module, _) in VERBS.items()})
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(usage())
        return
    with one_line_errors():
        if verb not in VERBS:
            from repr.config import nearest

            raise ValueError(f"there is no verb '{verb}'; {nearest(verb, VERBS)}")
    import_module(VERBS[verb][0]).main(rest)


def usage() -> str:
    """What ``--help`` prints."""
    verbs = "\n".join(f"  {verb:<12}{words}" for verb, (_, words) in VERBS.items())
    return (
        f"usage: {COMMAND} VERB ...\n\nPretrain image and image-text encoders.\n\nverbs:\n{verbs}\n\n"
        f"{COMMAND} VERB --help tells what a verb takes; python -m repr VERB is the same command."
    )


if __name__ == "__main__":
    main()

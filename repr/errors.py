"""What errors of other libraries say."""

from __future__ import annotations

import re


def first_line(error: BaseException) -> str:
    """The first line of the message, or the name of the class where there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def constructor_error(error: BaseException) -> tuple[BaseException, str]:
    """The error of a constructor that Hydra has called, and the section of the config that it was for.

    Any other error is given as it is, with ''. Hydra's class is known by its name, since an import of it takes time.
    """
    section = ""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        told = re.search(r"^full_key: (.+)$", str(error), re.MULTILINE)
        section = told[1] if told else section
        error = error.__cause__
    return error, section

"""Weights and tokenizers that other libraries fetch from a hub, and what to say where they cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from repr.errors import first_line

_HUB = ("huggingface_hub",)
_NETWORK = (*_HUB, "httpx", "httpx2", "httpcore", "requests", "urllib", "urllib3")


@contextmanager
def fetching(what: str) -> Iterator[None]:
    """Say in one line what another library has failed to fetch.

    Args:
        what: the option with its value, such as ``init_from=timm:resnet18``.

    Raises:
        ConnectionError: in the place of the library's error.
    """
    try:
        yield
    except Exception as error:
        if (fault := unfetched(error, what, _NETWORK)) is None:
            raise
        raise ConnectionError(fault) from error


def unfetched(error: BaseException, what: str, libraries: Sequence[str] = _HUB) -> str | None:
    """What to say of an error that comes from one of some libraries that fetch; None of any other."""
    cause: BaseException | None = error
    while cause is not None and type(cause).__module__.partition(".")[0] not in libraries:
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    reason = first_line(error).partition(". ")[0].rstrip(".")
    return (
        f"{what}: neither in the cache of this machine nor to be fetched ({reason}). Name a file or folder that is "
        "here, or fetch it once where there is a network and set HF_HUB_CACHE to that cache"
    )

"""Encoders that several parts of a flow share: what two of them ask for is computed once a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

METHODS = ("forward", "forward_features")


@contextmanager
def encoded_once(encoder: nn.Module, rows: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts, an encoder that is called a second time with one of ``rows`` gives what it gave before.

    Of a timm model the whole tokens or the map before pooling are kept, so that what is pooled of them and what is read
    from them come from one pass; of any other module its output is kept. A call with anything else, such as a picture
    of which patches are hidden, is made as ever. The encoder keeps its mode meanwhile.

    Args:
        encoder: any module.
        rows: the tensors (B, ...) that are recognised, by where they lie in memory.
    """
    memory = _Memory(encoder, rows)
    before = {name: vars(encoder)[name] for name in METHODS if name in vars(encoder)}
    vars(encoder).update(memory.methods, encode_run=memory.run)
    try:
        yield
    finally:
        for name in (*memory.methods, "encode_run"):
            del vars(encoder)[name]
        vars(encoder).update(before)


def encode_run(encoder: nn.Module, run: Sequence[Tensor]) -> Tensor:
    """Encode several views (B, 3, H, W) of one size together: (V * B, D), the rows of the first view first."""
    if (known := vars(encoder).get("encode_run")) is not None:
        return known(run)
    return encoder(run[0] if len(run) == 1 else torch.cat(list(run)))


class _Memory:
    """What an encoder has made of known rows, and methods for it that look there first."""

    def __init__(self, encoder: Any, rows: Sequence[Tensor]) -> None:
        self.encoder, self.known = encoder, {_place(x): x for x in rows}
        self.kept: dict[Any, Any] = {}
        # Of a batch with other rows BatchNorm makes something else.
        self.apart = not any(isinstance(part, _BatchNorm) and part.training for part in encoder.modules())
        self.pools = hasattr(encoder, "forward_head") and hasattr(encoder, "forward_features")
        self.originals = {name: getattr(encoder, name) for name in METHODS if hasattr(encoder, name)}
        self.methods: dict[str, Callable[..., Any]] = {"forward": self._forward}
        if self.pools:
            self.methods["forward_features"] = self._features

    def run(self, run: Sequence[Tensor]) -> Tensor:
        """See :func:`encode_run`."""
        if not all(self._knows(x) for x in run):
            return self.encoder(run[0] if len(run) == 1 else torch.cat(list(run)))
        return self._pooled(self._whole(run))

    def _forward(self, x: Tensor, *others: Any, **options: Any) -> Any:
        if others or options or not self._knows(x):
            return self.originals["forward"](x, *others, **options)
        return self._pooled(self._whole([x]))

    def _features(self, x: Tensor, *others: Any, **options: Any) -> Any:
        if others or options or not self._knows(x):
            return self.originals["forward_features"](x, *others, **options)
        return self._whole([x])

    def _knows(self, x: Any) -> bool:
        """Whether these are whole rows; a hook on a child makes something else of them, as where patches are hidden."""
        is_known = isinstance(x, Tensor) and _place(x) in self.known
        return is_known and not any(child._forward_hooks for child in self.encoder.children())

    def _pooled(self, whole: Tensor) -> Tensor:
        return self.encoder.forward_head(whole) if self.pools else whole

    def _whole(self, run: Sequence[Tensor]) -> Tensor:
        """Tokens or map of several views, the rows of the first one first; those that are kept are not made again."""
        encode = self.originals["forward_features" if self.pools else "forward"]
        groups = [[x] for x in run] if self.apart else [list(run)]
        keys = [(torch.is_grad_enabled(), *map(_place, group)) for group in groups]
        missing = [i for i, key in enumerate(keys) if key not in self.kept]
        if missing:
            rows = [x for i in missing for x in groups[i]]
            made = encode(rows[0] if len(rows) == 1 else torch.cat(rows))
            each = [made] if len(missing) == 1 else made.chunk(len(missing))  # a text tower may give a tuple
            for i, part in zip(missing, each, strict=True):
                self.kept[keys[i]] = part
        parts = [self.kept[key] for key in keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, which is known of fake ones, too; two views of the same rows have one place."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()

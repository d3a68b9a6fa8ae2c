"""Any weighted sum of objectives over shared encoders, each with its views and its time."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, cast

import torch
from omegaconf import open_dict
from torch import Tensor, nn
from torch.optim import Optimizer

from repr.batch import Batch, Embeddings, StepOutput, num_rows
from repr.config import ConfigError
from repr.distributed import world_size
from repr.drawing import Show
from repr.models.once import encoded_once
from repr.models.unreached import freeze_common, noted_forwards
from repr.objectives.base import Objective
from repr.objectives.parts import MakePart, borrow, built, by_part, counted, name_faults, stage_fault, terms_of, under
from repr.objectives.views import view_sizes
from repr.optim import Optim

SHARED = ("backbone", "text")


class Hybrid(Objective):
    """A weighted sum of objectives over one image encoder and one text tower; none of them knows of the others.

    Flow: each part gets its views of the batch and makes its step, as it would alone; its terms are named
    ``<part>.<term>``. A view that several parts send through a shared encoder whole, in the same step, is encoded once
    (:func:`repr.models.once.encoded_once`); what is masked, or is seen by a teacher, is encoded apart. What parts
    gather, and which views share BatchNorm statistics, is told by them.

    Outside of its stage a part is not computed. When a stage begins, the part's teacher becomes the student again; its
    heads have no gradient before, so they begin as they were initialised, and their learning rate rises from there
    over as many steps as at the start of the run. Steps and schedules of a part are those of its stage. Before training
    starts, and without a Trainer that tells how long the run is (``total_steps``), all parts are computed.

    One part is evaluated, exported and clustered by: ``main``. The heads of the others are thrown away then.

    Args:
        backbone: of all parts.
        parts: name -> what makes a part, called with ``backbone``, and with ``text`` if it takes that: a class such as
            ``ImageText``, or a ``functools.partial`` of it with options.
        text: text encoder of all parts that take one.
        main: the part that is evaluated; None: the first one with a text tower, or else the first.
        views: part -> positions of its views in the batch, in the order in which it takes them; a part that is not
            named takes all.
        texts: part -> which of the captions in ``batch["texts"]`` it reads; a part that is not named reads
            ``batch["text"]``.
        stages: part -> (from, to), shares of the run; a part that is not named is computed throughout.
        weights: part -> term -> weight, or ``<part>.<term>`` -> weight, instead of the part's own ``weights``.

    Raises:
        ConfigError: with all that is wrong with the parts.
    """

    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS

    def __init__(
        self,
        backbone: nn.Module,
        *,
        parts: Mapping[str, MakePart],
        text: nn.Module | None = None,
        main: str | None = None,
        views: Mapping[str, Sequence[int]] | None = None,
        texts: Mapping[str, int] | None = None,
        stages: Mapping[str, Sequence[float]] | None = None,
        weights: Mapping[str, Any] | None = None,
        optim: Optim | None = None,
    ) -> None:
        chosen = by_part(weights or {})
        told: dict[str, Any] = {"weights": chosen, "views": views, "texts": texts, "stages": stages}
        faults = list(name_faults(parts, told, main))
        faults += [f"stages.{name}={[*s]}: {fault}" for name, s in (stages or {}).items() if (fault := stage_fault(s))]
        shared: dict[str, nn.Module] = {"backbone": backbone} | ({} if text is None else {"text": text})
        made, missed, found = built(parts, shared, chosen)
        faults += found
        if faults:
            raise ConfigError(faults)
        flat = {f"{name}.{term}": weight for name, part in made.items() for term, weight in part.weights.items()}
        with noted_forwards(backbone):
            super().__init__(backbone, weights=flat, options={"parts": made}, optim=optim)
        if text is not None:
            self.text = text
        freeze_common(backbone, " + ".join(made), set.intersection(*missed.values()))
        self.parts = nn.ModuleDict(made)
        self.missed = {name: {f"backbone.{path}" for path in paths} for name, paths in missed.items()}
        # What each part calls the shared encoders, which are this module's alone.
        self.borrowed = {name: borrow(part, list(shared.values())) for name, part in made.items()}
        with_text = [name for name, part in made.items() if getattr(part, "text", None) is not None]
        self.main_name = main or next(iter([*with_text, *made]))
        if with_text and self.main_name not in with_text:
            raise ValueError(f"main={main} encodes no text, and {with_text[0]} does: set main to that")
        self.TERMS, self.PAIRWISE, self.STATISTICS = (
            tuple(f"{name}.{term}" for name, part in made.items() for term in getattr(part, kind))
            for kind in ("TERMS", "PAIRWISE", "STATISTICS")
        )
        modules = {path for path, _ in self.named_modules()}
        own = (f"parts.{name}{of}.{x}" for name in made for x in made[name].ENCODERS for of in ("", ".teacher"))
        self.ENCODERS = (*shared, *(path for path in own if path in modules))
        self.takes_hard_captions = any(part.takes_hard_captions for part in made.values())
        self.takes_texts = bool(texts) or any(part.takes_texts for part in made.values())
        self.EMBEDDINGS = made[self.main_name].EMBEDDINGS
        self.views = {name: tuple(which) for name, which in (views or {}).items()}
        self.texts, self.stages = dict(texts or {}), {name: tuple(s) for name, s in (stages or {}).items()}
        self._told = False  # how many pictures the image encoder sees

    # What the base asks for: of all parts, or of the main one ---------------------------------------------------------

    @classmethod
    def term_names(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """``<part>.<term>`` of all parts, of a config or as they are."""
        parts = (options.get("parts") or {}).items()
        return tuple(f"{name}.{term}" for name, part in parts for term in terms_of(part))

    @property
    def main(self) -> Any:
        """The part that is evaluated."""
        return self.parts[self.main_name]

    @property
    def meanings(self) -> dict[str, str]:
        """Those of the base, and of every part under its name."""
        told = super().meanings
        for name, part in self._parts():
            told |= {f"train/{name}.{key.removeprefix('train/')}": text for key, text in part.meanings.items()}
        return told

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Those of the parts."""
        return {
            f"{name}.{term}": level for name, part in self._parts() for term, level in part.chance(num_rows).items()
        }

    def negatives_fault(self) -> str | None:
        """None if one of the parts has its negatives in the batch."""
        faults = {name: part.negatives_fault() for name, part in self._parts()}
        told = "; ".join(f"of {name} {fault}" for name, fault in faults.items())
        return None if None in faults.values() else f"none has them: {told}"

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """What each part finds in its own views, positions of views that there are not, and terms of the base."""
        sizes, found = view_sizes(cfg), list(super().config_faults(cfg))
        if self.texts and (num := max(self.texts.values()) + 1) > cfg.data.get("num_texts", 0):
            found.append(f"objective.texts asks for {num} captions of a sample: set data.num_texts={num}")
        shared = {"backbone": "objective.backbone", "text": "objective.text", "optim": "optim"}
        for name, part in self._parts():
            node, weighed = cfg.objective.parts[name], name in by_part(cfg.objective.get("weights") or {})
            instead = shared | ({"weights": f"objective.weights.{name}"} if weighed else {})
            path = f"objective.parts.{name}."
            found += [f"{path}{key} has no effect: set {other}" for key, other in instead.items() if node.get(key)]
            which = self.views.get(name, range(len(sizes)))
            if missing := [view for view in which if not 0 <= view < len(sizes)]:
                found.append(f"objective.views.{name} names view {missing[0]}, and views has {len(sizes)}, from 0 on")
                continue
            with open_dict(own := cfg.copy()):
                own.views = {str(view): {"size": sizes[view]} for view in which}
                own.objective = node
                own.objective.backbone = cfg.objective.backbone
                if not part.takes_hard_captions:  # another part does
                    own.data.hard_captions = None
                if not part.takes_texts:
                    own.data.distorted_captions = None
            with warnings.catch_warnings():
                if name != self.main_name:
                    warnings.filterwarnings("ignore", ".*which is what is evaluated")
                found += [fault.replace("objective.", path) for fault in part.config_faults(own)]
        yield from dict.fromkeys(found)

    def embed(self, batch: Batch) -> Embeddings:
        """Embeddings of an evaluation batch, of the main part."""
        return self.main.embed(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Embeddings:
        """Likewise."""
        return self.main.predict_step(batch, batch_idx, dataloader_idx)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), of the main part."""
        return self.main.encode_image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D), of the main part."""
        return self.main.encode_text(tokens)

    def pictures(self, batch: Batch, show: Show) -> dict[str, Tensor]:
        """Those of every part, under its name."""
        shares = self._shares(batch, list(self.parts)).items()
        drawn = (under(name, cast(Objective, self.parts[name]).pictures(share, show)) for name, share in shares)
        return {key: picture for pictures in drawn for key, picture in pictures.items()}

    def evaluated(self) -> Objective:
        """The main part, with the encoders as its own."""
        for key in self.borrowed[self.main_name]:
            setattr(self.main, key, getattr(self.main, key))
        return self.main

    # Steps and stages -------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """The terms of the global batch, of the parts whose time it is."""
        shares = self._shares(batch, self.active())
        output, passes = StepOutput({}), dict[str, float]()
        with self._encoded_once(shares.values()):
            for name, share in shares.items():
                with counted(self.backbone, passes, name):
                    result = self._timed(name).step(share)
                output.terms |= under(name, result.terms)
                output.embeddings |= under(name, result.embeddings)
                output.logs |= under(name, result.logs)
                if output.scores is None:
                    output.scores, output.assignments = result.scores, result.assignments
        for name, part in self._parts():
            if name in shares and part.teacher is not None:
                output.logs[f"{name}.momentum"] = part.teacher.momentum_at(part.step_number, part.total_steps)
        self._tell({name: num / num_rows(batch) for name, num in passes.items()})
        return output

    def active(self) -> list[str]:
        """The parts whose time it is."""
        return [name for name in self.parts if self._time(name) is not None]

    def weights_now(self) -> dict[str, float]:
        """The weights of the parts whose time it is."""
        active = self.active()
        return {key: weight for key, weight in self.weights.items() if key.partition(".")[0] in active}

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the terms."""
        loss = super().total(terms)
        if world_size() == 1 or self._is_sharded() or not (idle := self._idle()):
            return loss
        # DDP waits for a gradient of every parameter; `on_before_optimizer_step` takes these away.
        return loss + 0.0 * torch.stack([p.flatten()[0].float() for p in idle]).sum()

    def finish_step(self, *, skipped: bool = False) -> None:
        """Count a step; targets and teachers of the parts follow. A part whose stage begins has its teacher anew."""
        for name in self.active():
            self._timed(name).finish_step(skipped=skipped)
        super().finish_step(skipped=skipped)
        for name, part in self._parts():
            if part.teacher is not None and self.total_steps and self._span(name)[0] == self.step_number:
                part.teacher.restart(part)

    def first_step(self, name: str, total_steps: int) -> int:
        """The step from which on a parameter is trained, by its name: with the stage of the part that it belongs to."""
        part = name.removeprefix("parts.").partition(".")[0] if name.startswith("parts.") else ""
        return self._span(part, total_steps)[0]

    def on_train_start(self) -> None:
        """As in the base; a new run starts with the teachers as the students are."""
        super().on_train_start()
        for _, part in self._parts():
            if part.teacher is not None and self.step_number == 0:
                part.teacher.restart(part)

    def setup(self, stage: str) -> None:
        """Let each part look at the data."""
        for _, part in self._parts():
            part.trainer = self.trainer
            part.setup(stage)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """As each part does; what no part trains now stays as it is, without decay."""
        for name in self.active():
            self._timed(name).on_before_optimizer_step(optimizer)
        for parameter in self._idle():
            parameter.grad = None

    def _parts(self) -> Iterator[tuple[str, Objective]]:
        return cast(Iterator[tuple[str, Objective]], iter(self.parts.items()))

    def _span(self, name: str, total_steps: int | None = None) -> tuple[int, int]:
        """The first step of a part, and the first after its last one."""
        total = total_steps or self.total_steps
        assert total is not None
        first, last = (int(share * total) for share in self.stages.get(name, (0, 1)))
        return first, last

    def _time(self, name: str) -> tuple[int, int | None] | None:
        """At which step of how many a part is; None outside of its stage. At the end of the run the last ones stay."""
        if self.total_steps is None:
            return self.step_number, None
        first, last = self._span(name)
        if not first <= self.step_number < (last if last < self.total_steps else self.step_number + 1):
            return None
        return self.step_number - first, last - first

    def _timed(self, name: str) -> Objective:
        """A part that knows at which step it is."""
        part, time = cast(Objective, self.parts[name]), self._time(name)
        assert time is not None
        part.step_number, part.total_steps = time
        return part

    def _idle(self) -> list[nn.Parameter]:
        """What is trainable and reached by no part whose time it is."""
        active = self.active()
        if len(active) == len(self.parts):
            return []
        missed = set.intersection(*(self.missed[name] for name in active)) if active else {"backbone"}
        used = tuple([f"parts.{name}." for name in active] + ["backbone."] * bool(active))
        if any(len(self.borrowed[name]) > 1 for name in active):
            used += ("text.",)
        return [
            p
            for name, p in self.named_parameters()
            if p.requires_grad and (name in missed or not name.startswith(used))
        ]

    def _shares(self, batch: Batch, names: Sequence[str]) -> dict[str, Batch]:
        """The batch as each part sees it; what two of them see is one tensor."""
        texts = batch["texts"].unbind(1) if self.texts and "texts" in batch else ()
        shares = {}
        for name in names:
            shares[name] = share = batch.copy()
            if name in self.views:
                which, views = self.views[name], batch["views"]
                if max(which) >= len(views):
                    raise ValueError(f"views.{name} names view {max(which)}, and the batch has {len(views)}, from 0 on")
                share["views"] = [views[view] for view in which]
                if "boxes" in batch:
                    share["boxes"] = batch["boxes"][:, which]
            if name in self.texts:
                if self.texts[name] >= len(texts):
                    raise ValueError(
                        f"texts.{name}={self.texts[name]}, and the batch has {len(texts)}: set data.num_texts"
                    )
                share["text"] = texts[self.texts[name]]
        return shares

    @contextmanager
    def _encoded_once(self, shares: Collection[Batch]) -> Iterator[None]:
        """What more than one part asks of a shared encoder is computed once."""
        with ExitStack() as stack:
            if len(shares) > 1:
                views = [view for share in shares for view in share.get("views", [])]
                stack.enter_context(encoded_once(self.backbone, views))
                if hasattr(self, "text"):
                    texts = [share["text"] for share in shares if "text" in share]
                    texts += [tokens for share in shares if "texts" in share for tokens in share["texts"].unbind(1)]
                    stack.enter_context(encoded_once(self.text, texts))
            yield

    def _tell(self, passes: Mapping[str, float]) -> None:
        """Say once how many pictures of each sample the shared image encoder sees in a step."""
        if self._told or not self.training or self._trainer is None:
            return
        self._told = True
        each = ", ".join(f"{name} {num:g}" for name, num in passes.items())
        self.print(f"The image encoder sees {sum(passes.values()):g} pictures of each sample in a step: {each}")

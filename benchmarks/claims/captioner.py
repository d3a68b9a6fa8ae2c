"""Does a captioner know which word belongs to which, where a contrast does not?

The same backbone, pictures, words, optimizer and steps; only the objective changes. Drawn pictures of two things in six
colours and six shapes, so that few of a batch have the same words, and two of an item differ in who has which place or
number. Both score two captions of a picture: by cosines, and by the likelihood that the decoder gives them.

The claim: a contrast can do with the words of a caption in any order (Yuksekgonul et al., 2023, arXiv 2210.01936), a
decoder cannot (Yu et al., 2022, arXiv 2205.01917; Tschannen et al., 2023, arXiv 2306.07915). The control: a decoder
that is shown the pictures of other questions must not be above chance, or it answers by the words alone.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from hydra.utils import instantiate

from benchmarks.claims.runs import Values, compared, composed, table, trained
from repr.data.colour import normalise
from repr.data.questions.compositional import compared as compared_texts
from repr.data.questions.compositional import questions
from repr.data.views import evaluation_view
from repr.fit import train as fit
from repr.metrics.captions import likelihood
from repr.metrics.features import Features

TITLE = "Contrast and captions on drawn compositions"
LIBRARIES = ("torch", "timm", "open_clip_torch")
SEEDS, LENGTH = (3, 1), (10, 1)
LONGER = 1.5  # a step of CoCa over one of CLIP
SMALL = ["data.train.colours=6", "data.train.shapes=6"]
SMALL += ["eval.knn=null", "eval.exhibits=null", "eval.ridge=null", "eval.geometry=null", "eval.retrieval=null"]
CONTRAST = ["experiment=clip_composition", "backbone=vit_emoji", "tokenizer=drawn", "text.vocab_size=37"]
CONTRAST += ["optim.lr=1e-3", *SMALL]
CAPTIONS = ["experiment=coca_composition", *SMALL]
CLIP, LONG_CLIP, COCA, LIGHT, CAPPA = (
    "CLIP", "CLIP, as many seconds", "CoCa", "CoCa, caption weight 0.5", "captions alone",
)  # fmt: skip
METHODS = {
    CLIP: CONTRAST,
    LONG_CLIP: CONTRAST,
    COCA: CAPTIONS,
    LIGHT: [*CAPTIONS, "objective.weights.caption=0.5"],
    CAPPA: [*CAPTIONS, "objective=cappa", "objective.parallel_fraction=0"],
}
KINDS = ("attribute", "relation", "count")
SHIFT = 7  # items further on that a blind decoder sees


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the text scores by cosine, by likelihood, and by that of the pictures of other questions."""
    epochs = round(epochs * LONGER) if method == LONG_CLIP else epochs
    with tempfile.TemporaryDirectory() as folder:
        cfg = composed(METHODS[method], seed, epochs, folder)
        run = fit(cfg)
    values = {f"{kind}, cosine": f"composition/text_score_{kind}" for kind in KINDS}
    values |= {f"{kind}, likelihood": f"composition/likelihood_text_score_{kind}" for kind in KINDS}
    found = {name: run.results[key][0] for name, key in values.items() if key in run.results}
    return found | (blind(run.objective, cfg) if hasattr(run.objective, "log_likelihood") else {})


@torch.no_grad()
def blind(objective: Any, cfg: Any) -> Values:
    """The scores by likelihood where each picture is that of an item of the same kind further on."""
    source, tokenizer = instantiate(cfg.data.eval.composition), instantiate(cfg.tokenizer)
    asked, kinds = questions(source), source.attributes["kind"]
    places, num = compared_texts(asked), len(source)
    other = torch.arange(num)
    for kind in KINDS:
        rows = torch.tensor([row for row in range(num) if kinds[row] == kind])
        other[rows] = rows.roll(2 * SHIFT)
    objective, parts = objective.eval(), []
    for rows in torch.arange(num).split(256):
        views = torch.stack([evaluation_view(source.image(row), cfg.data.image_size) for row in other[rows].tolist()])
        texts = [asked.texts[max(place, 0)] for place in places[rows].flatten().tolist()]
        tokens = tokenizer(texts).unflatten(0, (len(rows), -1)).to(objective.device)
        pixels = normalise(views, cfg.data.mean, cfg.data.std).to(objective.device)
        parts.append(objective.log_likelihood(pixels, tokens).cpu())
    names = [*KINDS, "order"]
    labels = torch.tensor([names.index(kinds[row]) for row in range(num)])
    query = Features(torch.arange(num), torch.zeros(num, 1), torch.zeros(num, 1), labels={"kind": labels})
    known: Any = {"candidates": asked.candidates, "items": asked.items, "attribute": "kind", "names": names}
    scores = likelihood(query, texts=places, values=torch.cat(parts), **known)
    return {f"{kind}, blind": scores[f"likelihood_text_score_{kind}"] for kind in KINDS}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of 41 steps with 256 pictures, "
        "`conf/experiment/coca_composition.yaml` (a ViT of four blocks on 16 patches, two layers of text, for captions "
        "two of a decoder, the words of the set) with six colours and six shapes. Share of 200 items of each kind, two "
        f"pictures with two captions, whose pictures pick their captions. `{LONG_CLIP}` has {LONGER} times the steps; "
        "`blind`: the pictures are those of other items. Captions alone are CapPa without parallel prediction."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(METHODS), options)
    for kind in KINDS:
        columns = [f"{kind}, {how}" for how in ("cosine", "likelihood", "blind")]
        yield [*table(runs, columns, chance=dict.fromkeys(columns, 0.25)), ""]
    lines = []
    for kind in KINDS:
        cosine, likely = f"{kind}, cosine", f"{kind}, likelihood"
        decoder = [{kind: values[likely]} for values in runs[COCA]]
        for method in (CLIP, LONG_CLIP):
            result = compared(decoder, [{kind: values[cosine]} for values in runs[method]], [kind])
            lines.append(f"- {kind}: the likelihood of CoCa is {result.word} the cosine of {method} ({result.told}).")
        result = compared(runs[COCA], runs[CLIP], [cosine])
        lines.append(f"- {kind}: the cosine of CoCa is {result.word} that of CLIP ({result.told}).")
    yield lines

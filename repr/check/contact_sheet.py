"""A picture of what the model will see: augmented training samples with their captions, and evaluation images."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, islice
from typing import NamedTuple, cast

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from repr.batch import evenly_spread
from repr.check.facts import row_facts
from repr.data.bad_rows import read_each
from repr.data.datamodule import DataModule
from repr.data.datasets import TrainDataset, draw_caption
from repr.data.samplers import EpochBatchSampler
from repr.data.sources.source import Source
from repr.data.views import Purpose, evaluation_view, stream
from repr.drawing import shown
from repr.seeds import uniform

Font = ImageFont.FreeTypeFont

WIDTH, MARGIN, GAP, SEAM = 1600, 20, 16, 3  # pixels: of the sheet, around it, between cells, between views
TARGET = 192  # a picture is enlarged by the whole number that brings it nearest to this side
CELL = 600  # a cell is at most so wide; more views go to a line below
TEXT, HEAD = 15, 20  # font sizes
CAPTION_LINES = 4
PAPER = "#f0f0f0"  # shows where a white picture ends
TRAIN_LINES, MAX_SETS = 4, 8  # lines of cells of the training set; evaluation sets that are shown
# Tried in turn where they are installed, since the font inside Pillow has nothing beyond ASCII.
FONTS = (
    "NotoSans-Regular.ttf", "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf", "msyh.ttc",
)  # fmt: skip


class Cell(NamedTuple):
    """One sample: its pictures (a view each), caption ('' for none) and key."""

    pictures: list[Image.Image]
    caption: str
    key: str


class Section(NamedTuple):
    """Cells under a title, so many a line."""

    title: str
    columns: int
    cells: list[Cell]


def contact_sheet(datamodule: DataModule, font_file: str | None = None) -> tuple[Image.Image, list[str]]:
    """Draw the sheet.

    The training samples are the first of the first batch of epoch 0 that can be read, exactly as the model gets them:
    worker half and device half of the views, only the normalisation undone.

    Args:
        datamodule: with a batch that its training set can fill.
        font_file: a TrueType font for the captions; None: one that the system has.

    Returns:
        The sheet, and remarks on what could not be shown.

    Raises:
        ValueError: no such font.
    """
    sides = [view.size for view in datamodule.views]
    scale, columns = _layout(sides)
    title = f"train: from the first batch of epoch 0, augmented, {' + '.join(map(str, sides))} pixels"
    sections = [Section(title, columns, train_cells(datamodule, columns * TRAIN_LINES, scale))]
    size = datamodule.image_size
    scale, columns = _layout([size])
    for name, source in islice(datamodule.eval.items(), MAX_SETS):
        title = f"{name}: evaluation, {size} pixels, not augmented"
        sections.append(Section(title, columns, evaluation_cells(source, size, columns, scale)))
    remarks = [f"{section.title.partition(':')[0]}: no row can be shown" for section in sections if not section.cells]
    font, lacking = choose_font([cell.caption + cell.key for part in sections for cell in part.cells], font_file)
    if lacking:
        remarks.append(
            f"contact sheet: the font lacks {len(lacking)} of the characters in its captions (such as "
            f"{' '.join(sorted(lacking)[:5])}); name a font that has them: --font FILE"
        )
    return _paint(sections, font), remarks


def train_cells(datamodule: DataModule, num: int, scale: int) -> list[Cell]:
    """The first samples of the first training batch that can be used."""
    loader = datamodule.train_dataloader()
    source, silent = datamodule.train, datamodule.tokenizer is None
    usable = (
        place
        for place in next(iter(cast(EpochBatchSampler, loader.batch_sampler)))
        if not (facts := row_facts(source, place.row)).fault and (facts.captions or silent)
    )
    places = list(islice(usable, num))
    if not places:
        return []
    batch = datamodule.on_after_batch_transfer(cast(TrainDataset, loader.dataset).__getitems__(places), 0)
    index = batch["index"].tolist()
    draws = uniform(stream(batch["seed"], Purpose.CAPTION), 1)[:, 0].tolist()
    captions = ["" if silent else draw_caption(source, *drawn) for drawn in zip(index, draws, strict=True)]
    views = [_pictures(shown(view, datamodule.mean, datamodule.std), scale) for view in batch["views"]]
    return [Cell([view[b] for view in views], captions[b], source.key(row)) for b, row in enumerate(index)]


def evaluation_cells(source: Source, image_size: int, num: int, scale: int) -> list[Cell]:
    """Evenly spread rows of an evaluation set, those that can be read, with their first caption."""

    def read(row: int) -> Cell | None:
        pixels = evaluation_view(source.image(row), image_size)[None]
        return Cell(_pictures(pixels, scale), next(iter(source.captions(row)), ""), source.key(row))

    cells = read_each(read, None, {}, evenly_spread(len(source), num).tolist())
    return [cell for cell in cells if cell is not None]


def _pictures(pixels: Tensor, scale: int) -> list[Image.Image]:
    """(B, 3, H, W) uint8 -> B pictures, every pixel a square of ``scale``."""
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).numpy()]


def choose_font(texts: Iterable[str], font_file: str | None) -> tuple[Font, set[str]]:
    """The font that can write the most of the texts, and the characters that it lacks.

    Raises:
        ValueError: ``font_file`` is no font.
    """
    wanted = {character for text in texts for character in text if character.isprintable()}
    if font_file is not None:
        try:
            fonts = [ImageFont.truetype(font_file, TEXT)]
        except OSError as error:
            raise ValueError(f"--font {font_file} is not a TrueType font ({error})") from error
    else:
        fonts = list(_fonts())
    lacking = [(font, {character for character in wanted if _lacks(font, character)}) for font in fonts]
    return min(lacking, key=lambda pair: len(pair[1]))  # of equals the first


def _fonts() -> Iterator[Font]:
    """Those of the system, then Pillow's own."""
    for name in FONTS:
        with suppress(OSError):  # not on this system
            yield ImageFont.truetype(name, TEXT)
    yield cast(Font, ImageFont.load_default(TEXT))


def _lacks(font: Font, character: str) -> bool:
    """Whether a font draws its box for unknown characters."""
    glyph, box = font.getmask(character), font.getmask("\U0010ffff")
    return glyph.size == box.size and bytes(glyph) == bytes(box)


# Painting -----------------------------------------------------------------------------------------------------------


def _joined(pictures: Sequence[Image.Image], gap: int, *, below: bool = False) -> Image.Image:
    """Pictures beside each other, or one below the other, so many pixels apart."""
    widths, heights = [picture.width for picture in pictures], [picture.height for picture in pictures]
    *starts, end = accumulate((length + gap for length in (heights if below else widths)), initial=0)
    size = (max(widths, default=0), end - gap) if below else (end - gap, max(heights, default=0))
    sheet = Image.new("RGB", size, PAPER)
    for picture, start in zip(pictures, starts, strict=True):
        sheet.paste(picture, (0, start) if below else (start, 0))
    return sheet


def _views(pictures: Sequence[Image.Image]) -> Image.Image:
    """The views of a sample beside each other, on a new line where a cell is full."""
    lines: list[list[Image.Image]] = [[]]
    for picture in pictures:
        if lines[-1] and sum(other.width + SEAM for other in lines[-1]) + picture.width > CELL:
            lines.append([])
        lines[-1].append(picture)
    return _joined([_joined(line, SEAM) for line in lines], SEAM, below=True)


def _layout(sides: Sequence[int]) -> tuple[int, int]:
    """By what views of these sides are enlarged, and how many cells of them fit beside each other."""
    scale = max(1, round(TARGET / max(sides)))
    width = _views([Image.new("RGB", (scale * side, scale * side)) for side in sides]).width
    return scale, max(1, (WIDTH - 2 * MARGIN + GAP) // (width + GAP))


def _paint(sections: Sequence[Section], font: Font) -> Image.Image:
    """All sections, one below the other."""
    strips = [strip for section in sections if section.cells for strip in _strips(section, font)]
    return ImageOps.expand(_joined(strips, 0, below=True), MARGIN, PAPER)


def _strips(section: Section, font: Font) -> Iterator[Image.Image]:
    """Title and lines of cells."""
    head = font.font_variant(size=HEAD)
    title = Image.new("RGB", (int(head.getlength(section.title)) + 1, 2 * HEAD), PAPER)
    ImageDraw.Draw(title).text((0, HEAD // 3), section.title, "black", head)
    yield title
    cells = [_paint_cell(cell, font) for cell in section.cells]
    for start in range(0, len(cells), section.columns):
        yield ImageOps.expand(_joined(cells[start : start + section.columns], GAP), (0, 0, 0, GAP), PAPER)


def _paint_cell(cell: Cell, font: Font) -> Image.Image:
    views = _views(cell.pictures)
    lines = [(line, "black") for line in wrap(cell.caption, views.width, CAPTION_LINES, font)]
    lines.append((shorten(cell.key, views.width, font), "#777777"))
    step = TEXT + 4
    below = Image.new("RGB", (views.width, 6 + step * len(lines)), PAPER)
    for number, (line, colour) in enumerate(lines):
        ImageDraw.Draw(below).text((0, 4 + step * number), line, colour, font)
    return _joined([views, below], 0, below=True)


def wrap(text: str, width: int, num_lines: int, font: Font) -> list[str]:
    """Lines of at most ``width`` pixels; what does not fit in ``num_lines`` is cut, with three dots."""
    lines, rest = list[str](), _printable(text)
    while rest and len(lines) < num_lines - 1:
        line = _fitting(rest, width, font)
        if len(line) < len(rest) and rest[len(line)] != " " and " " in line:
            line = line[: line.rindex(" ")]
        lines.append(line.rstrip())
        rest = rest[len(line) :].lstrip()
    if font.getlength(rest) > width:
        rest = _fitting(rest, width, font, "...") + "..."
    return [*lines, rest] if rest else lines


def shorten(text: str, width: int, font: Font) -> str:
    """A text of at most ``width`` pixels, its middle left out where it is longer."""
    text = _printable(text)
    if font.getlength(text) <= width:
        return text
    tail = _fitting(text[::-1], width * 2 // 3, font)[::-1]
    return _fitting(text, width, font, "..." + tail) + "..." + tail


def _fitting(text: str, width: int, font: Font, end: str = "") -> str:
    """The longest beginning of a text that, with ``end``, is at most ``width`` pixels; at least one character."""
    numbers = range(1, min(len(text), width) + 1)
    return text[: max(1, bisect_right(numbers, float(width), key=lambda num: font.getlength(text[:num] + end)))]


def _printable(text: str) -> str:
    """On one line, without characters that draw nothing."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())

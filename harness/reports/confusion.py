"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MAX_LABELS = 200
_PAPER, _INK, _ACCENT = (255, 255, 255), (29, 37, 48), np.array([31.0, 95.0, 191.0])
_WIDTH, _LARGEST_CELL, _FONT_SIZE, _GAP = 800, 48, 12, 6
_MAX_NAME = 160


def confusion_image(matrix: NDArray[np.int64], labels: Sequence[str]) -> NDArray[np.uint8]:
    """[H, W, 3]: lines are the labels of the rows, columns what they were called; darker is a larger share of the line.

    Names and numbers stand there as far as there is room. At most MAX_LABELS labels.
    """
    cell = max(4, min(_LARGEST_CELL, _WIDTH // len(labels)))
    font = ImageFont.load_default(_FONT_SIZE)
    has_names = cell >= _FONT_SIZE
    margin = _GAP + (min(_MAX_NAME, int(max(map(font.getlength, labels)))) + _GAP if has_names else 0)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    cells = np.kron(shares, np.ones((cell, cell)))[..., None]
    side = margin + cell * len(labels) + _GAP
    picture = np.full((side, side, 3), 255.0)
    picture[margin:-_GAP, margin:-_GAP] += cells * (_ACCENT - 255.0)
    image = Image.fromarray(picture.round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    if has_names:
        _write_names(image, labels, font, margin, cell)
    for line, column in zip(*np.nonzero(matrix), strict=True):
        text, middle = str(matrix[line, column]), (margin + (column + 0.5) * cell, margin + (line + 0.5) * cell)
        if font.getlength(text) + 4 <= cell:
            draw.text(middle, text, fill=_PAPER if shares[line, column] > 0.5 else _INK, font=font, anchor="mm")
    return np.asarray(image, dtype=np.uint8)


def _write_names(
    image: Image.Image,
    labels: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    margin: int,
    cell: int,
) -> None:
    """Left of the lines, and above the columns turned by a quarter."""
    for index, label in enumerate(labels):
        name = Image.new("RGB", (margin - 2 * _GAP, _FONT_SIZE + 2), _PAPER)
        ImageDraw.Draw(name).text((name.width, name.height / 2), label, fill=_INK, font=font, anchor="rm")
        start = margin + index * cell + (cell - name.height) // 2
        image.paste(name, (_GAP, start))
        image.paste(name.rotate(-90, expand=True), (start, _GAP))

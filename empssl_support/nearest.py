"""The images of a folder that are nearest to a query, in words and as a picture."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from empssl_support.cli import UsageError
from empssl_support.files import write_whole
from empssl_support.pictures import read_one

SIDE = 160  # of a picture on the sheet, in pixels
MARGIN = 8
LINE = 16  # of the words below a picture
COLUMNS = 6


class Neighbour(NamedTuple):
    file: str
    similarity: float  # the cosine of the two images' features, in [-1, 1]


def sheet_path(query: str, force: bool) -> Path:
    """Of `photos/cat.jpg`: `nearest-cat.png` in the current folder, which must not be there yet."""
    path = Path(f"nearest-{Path(query).stem}.png")
    if path.exists() and not force:
        raise UsageError(f"{path} is there already; move it, or overwrite it with --force.")
    return path


def neighbours(
    query: str, h_query: Tensor, h: Tensor, files: list[str], k: int = 10
) -> list[Neighbour]:
    """The k nearest by cosine, the nearest first; the query's own file is left out.

    h_query `(1, d)`, h `(N, d)`, of the N files. Raises `UsageError` where there is one
    file alone, or none but the query's.
    """
    here = Path(query).resolve()
    others = [j for j, file in enumerate(files) if Path(file).resolve() != here]
    if len(files) < 2 or not others:
        raise UsageError(f"There is one image to search in, {files[0]}; give a folder with more.")
    similarity = F.cosine_similarity(h[others].cpu(), h_query.cpu(), dim=1)  # (len(others),)
    best, nearest = similarity.topk(min(k, len(others)))
    return [
        Neighbour(files[others[j]], value)
        for j, value in zip(nearest.tolist(), best.tolist(), strict=True)
    ]


def draw_sheet(path: Path, query: str, found: list[Neighbour]) -> None:
    """A sheet of the query and what was found, the similarity below each."""
    cells = [(query, "query"), *((file, f"{value:.3f}") for file, value in found)]
    rows = -(-len(cells) // COLUMNS)
    width, height = SIDE + MARGIN, SIDE + LINE + MARGIN
    sheet = Image.new("RGB", (COLUMNS * width + MARGIN, rows * height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (file, words) in enumerate(cells):
        left = MARGIN + place % COLUMNS * width
        top = MARGIN + place // COLUMNS * height
        pixels = read_one(file, SIDE)  # (3, SIDE, SIDE)
        sheet.paste(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), (left, top))
        pen.text((left, top + SIDE + 2), words, fill="black")
    write_whole(path, lambda out: sheet.save(out, "png"))

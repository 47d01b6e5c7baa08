"""Pictures of a decision: the kept, the merged and the dropped visual tokens of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokensieve.errors import Refusal
from tokensieve.images import as_rgb

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tokensieve.reduction import Reduction

# Okabe and Ito's colours that stay apart for colour-blind readers and on photographs.
TINTS = ((86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0))
DIMMED = np.array([58.0, 64.0, 92.0])
KEPT_EDGE, CELL_EDGE = np.array([255.0, 209.0, 71.0]), np.array([12.0, 13.0, 16.0])


def overlay(image: Image.Image, reduction: Reduction, side: int = 480) -> Image.Image:
    """Draw one decision on its image: dropped cells dimmed, kept regions outlined, merged cells tinted per slot.

    An image that is kept whole stays as it is.

    Args:
        image: the model's view of the image (see :func:`as_seen`); it is stretched over the token grid.
        reduction: the decision for this image.
        side: longest side of the picture in px, approximately: cells are whole pixels.

    Raises:
        Refusal: the tokens form no grid, or the Reduction holds several images.
    """
    if reduction.whole:
        width, height = (max(1, round(full * side / max(image.size))) for full in image.size)
        return as_rgb(image).resize((width, height), Image.Resampling.LANCZOS)
    if reduction.grid is None:
        raise Refusal(f"no overlay: these {reduction.total} tokens form no grid")
    if reduction.anchors.ndim != 1:
        raise Refusal("overlay draws one image: index the batched Reduction first")
    rows, columns = reduction.grid
    cell = max(4, side // max(rows, columns))
    pixels = np.asarray(as_rgb(image).resize((columns * cell, rows * cell), Image.Resampling.LANCZOS), float)

    source = reduction.source.reshape(rows, columns).cpu().numpy()
    counts = np.append(reduction.counts.cpu().numpy(), 0)  # slot −1 of a dropped token indexes this last 0
    kept = source >= 0
    merged = counts[source] > 1

    grey = pixels.mean(-1, keepdims=True)
    dropped = 0.22 * pixels + 0.10 * grey + 0.68 * DIMMED
    tint = np.array(TINTS, float)[_colouring(source)]
    pixels = np.where(_enlarge(kept, cell)[..., None], pixels, dropped)
    pixels = np.where(_enlarge(merged, cell)[..., None], 0.76 * pixels + 0.24 * _enlarge(tint, cell), pixels)
    _edges(pixels, source, kept, merged, cell)
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    _mark_anchors(picture, reduction, merged, cell)
    return picture


def as_seen(image: Image.Image, processor: Any) -> Image.Image:
    """Return the model's view of ``image``: a centre crop if the image processor crops, else the whole image."""
    steps = getattr(processor, "image_processor", processor)
    edge, crop = _side(getattr(steps, "size", None)), getattr(steps, "crop_size", None)
    if not getattr(steps, "do_center_crop", False) or not crop or not edge:
        return image
    scale = min(image.size) / edge
    width, height = (min(full, scale * crop[name]) for full, name in zip(image.size, ("width", "height"), strict=True))
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.crop((round(left), round(top), round(left + width), round(top + height)))


def sheet(pictures: Sequence[tuple[str, Image.Image]], columns: int, gap: int = 12) -> Image.Image:
    """Join pictures with their captions above into one, in rows of ``columns``."""
    width, height = (max(picture.size[axis] for _, picture in pictures) for axis in (0, 1))
    size = max(12, width // 18)
    font = ImageFont.load_default(size=size)
    above = round(1.4 * size * max(caption.count("\n") + 1 for caption, _ in pictures))
    down, across = height + above + gap, width + gap
    page = Image.new("RGB", (columns * across + gap, -(-len(pictures) // columns) * down + gap), "white")
    draw = ImageDraw.Draw(page)
    for index, (caption, picture) in enumerate(pictures):
        x, y = gap + index % columns * across, gap + index // columns * down
        draw.text((x, y), caption, fill=(30, 32, 38), font=font)
        page.paste(picture, (x, y + above))
    return page


def _side(size: Any) -> int:
    """Return the shortest edge in px after the image processor's resize, 0 if unknown."""
    if not size:
        return 0
    return int(size.get("shortest_edge") or min(size.get("height", 0), size.get("width", 0)))


def _enlarge(cells: NDArray[Any], cell: int) -> NDArray[Any]:
    return cells.repeat(cell, 0).repeat(cell, 1)


def _colouring(source: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a tint index per cell; touching slots differ where possible (greedy, in slot order)."""
    slots = int(source.max(initial=-1)) + 1
    touching: list[set[int]] = [set() for _ in range(slots)]
    for a, b in ((source[1:], source[:-1]), (source[:, 1:], source[:, :-1])):
        for one, other in np.unique(np.stack([a.ravel(), b.ravel()], 1), axis=0):
            if one != other and min(one, other) >= 0:
                touching[one].add(int(other))
                touching[other].add(int(one))
    colours: list[int] = []
    for slot in range(slots):
        taken = {colours[other] for other in touching[slot] if other < slot}
        start = slot % len(TINTS)
        choices = [(start + step) % len(TINTS) for step in range(len(TINTS))]
        colours.append(next((c for c in choices if c not in taken), start))
    return np.array([*colours, 0])[source]  # slot −1 of a dropped cell indexes the last entry


def _edges(
    pixels: NDArray[Any], source: NDArray[np.int64], kept: NDArray[np.bool_], merged: NDArray[np.bool_], cell: int
) -> None:
    """Draw borders in place: bright on the dropped side of a kept-dropped edge, dark between slots of merged cells."""
    width = max(1, cell // 13)
    for axis in (0, 1):
        # one loop for both directions: the second works on transposed views of the same arrays
        slots, kept_cells, merged_cells, canvas = (np.swapaxes(a, 0, axis) for a in (source, kept, merged, pixels))
        for line, across in zip(*np.nonzero(slots[:-1] != slots[1:]), strict=True):
            first, second = kept_cells[line : line + 2, across]
            low = (line + 1) * cell
            band = slice(across * cell, (across + 1) * cell)
            if first and second:
                if merged_cells[line, across] or merged_cells[line + 1, across]:
                    canvas[low - width // 2 : low + max(1, width // 2), band] = CELL_EDGE
            else:
                side = slice(low, low + width) if first else slice(low - width, low)
                canvas[side, band] = KEPT_EDGE


def _mark_anchors(picture: Image.Image, reduction: Reduction, merged: NDArray[np.bool_], cell: int) -> None:
    """Draw a dot at the anchor of each merged slot."""
    draw, radius = ImageDraw.Draw(picture), max(1.5, cell / 9)
    columns = merged.shape[1]
    for anchor in reduction.anchors.tolist():
        row, column = divmod(anchor, columns)
        if merged[row, column]:
            x, y = (column + 0.5) * cell, (row + 0.5) * cell
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline=(20, 20, 24))

"""Make the pictures of ``concepts.md`` in ``docs/pictures``: the stages, the positions, and one scene by its tokens.

``python docs/make_concepts.py`` writes ``stages.svg``, ``positions.svg`` and ``tokens.png``. The picture of the scene
comes from the bundled model.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"
INK, GREY, LINE = "#1c2433", "#5b6472", "#9aa3b2"
KEPT, DROPPED, TEXT, PANEL = "#ffd147", "#e6e9ef", "#8fc3ea", "#f6f7fa"
STYLE = f"""text{{font:13px system-ui,sans-serif;fill:{INK}}}.head{{font-weight:600;font-size:15px}}
.small{{font-size:12px;fill:{GREY}}}.middle{{text-anchor:middle}}"""
KEPT_TOKENS = (2, 3, 7)  # of the nine tokens in the picture of positions


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return an SVG file with a white ground, so that it can be read in a dark page, too."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    ground = f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style>", ground, *parts, "</svg>\n"])


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" stroke="{LINE}"/>'


def text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{style}">{words}</text>'


def stages() -> str:
    """Return the way of an image's tokens through a model, and the number of them behind each stage."""
    steps = [
        ("Image", "pixels", "downsample", 0),
        ("Vision encoder", "one row per patch", "encoder stage: tome", 12),
        ("Projector", "visual tokens", "connector stage: vtc-cls", 12),
        ("LLM, first layers", "text and visual tokens", "", 5),
        ("LLM, later layers", "shorter again", "decoder stage: fastv", 3),
    ]
    parts = []
    for number, (name, holds, stage, rows) in enumerate(steps):
        x, last = 20 + 176 * number, number == len(steps) - 1
        parts += [box(x, 44, 156, 168, PANEL), text(x + 78, 68, name, "head middle")]
        parts += [text(x + 78, 88, holds, "small middle")]
        if number == 0:
            parts += [box(x + 33, 104, 90, 90, KEPT)]
            parts += [f'<path d="M{x + 33} {104 + 22.5 * i}h90" stroke="#fff" stroke-width="2"/>' for i in (1, 2, 3)]
            parts += [f'<path d="M{x + 33 + 22.5 * i} 104v90" stroke="#fff" stroke-width="2"/>' for i in (1, 2, 3)]
        parts += [box(x + 20, 104 + 7.5 * i, 116, 7.5, KEPT) for i in range(rows)]
        if number >= 3:  # the LLM holds the text as well
            parts += [box(x + 20, 104 + 7.5 * (rows + i), 116, 7.5, TEXT) for i in range(3)]
        if not last:
            parts += [f'<path d="M{x + 158} 128h14m-6 -5l6 5l-6 5" stroke="{INK}" fill="none" stroke-width="1.5"/>']
        if stage:
            parts += [text(x + 78, 236, stage, "middle")]
    note = "Yellow: visual tokens. Blue: text tokens, which always stay. A layer's KV cache holds what the layer holds."
    return svg(900, 290, "The stages at which visual tokens can leave", [*parts, text(20, 270, note, "small")])


def positions() -> str:
    """Return three prompts of nine visual tokens with their position ids: full, original and contiguous."""
    parts = []
    kept = [number in KEPT_TOKENS for number in range(9)]
    rows = [
        ("full", [True] * 9, list(range(1, 10)), 10),
        ('"original"', kept, list(range(1, 10)), 10),
        ('"contiguous"', kept, [1 + sum(kept[:number]) for number in range(9)], 4),
    ]
    for line, (name, stays, ids, text_start) in enumerate(rows):
        y = 56 + 62 * line
        parts.append(text(20, y + 22, name, "head"))
        for place in range(13):
            x = 150 + 44 * place
            visual = 1 <= place <= 9
            fill = (KEPT if stays[place - 1] else DROPPED) if visual else TEXT
            words = {0: "0", 10: str(text_start), 11: str(text_start + 1), 12: str(text_start + 2)}.get(place, "")
            if visual:
                words = str(ids[place - 1]) if stays[place - 1] else ""
            parts += [box(x, y, 40, 34, fill), text(x + 20, y + 22, words, "middle")]
    parts += [text(150, 36, "Position ids. Yellow: visual tokens that stay. Grey: dropped. Blue: text.", "small")]
    return svg(740, 240, "Position ids after tokens have left", parts)


def scene() -> None:
    """Write one scene of the benchmark: its tokens, those that a method keeps, and those that a pooling merges."""
    import torch

    import tokensieve
    from tokensieve.evaluate import load_data
    from tokensieve.evaluate.prompt import encode
    from tokensieve.reference import load
    from tokensieve.report.overlay import overlay, sheet

    model, processor = load()
    sample = load_data("reference", limit=1)[0]
    inputs = encode(processor, [sample])
    pictures = []
    for spec, caption in [
        ("full", "The image: 144 patches\nof 12 rows and 12 columns"),
        ("divprune(keep=36)", "Pruned: 36 tokens stay,\nthe others are gone"),
        ("pool(keep=36)", "Merged: 36 averages of\n4 tokens; the dot is a place"),
    ]:
        with tokensieve.attach(model, spec, processor=processor) as sieve, torch.inference_mode():
            model.generate(**inputs)
        picture = overlay(sample.open(), sieve.last[0][0], 288)
        if spec == "full":
            for place in range(0, 288, 24):  # the grid of the tokens
                picture.paste((255, 209, 71), (place, 0, place + 1, 288))
                picture.paste((255, 209, 71), (0, place, 288, place + 1))
        pictures.append((caption, picture))
    sheet(pictures, columns=3).save(FOLDER / "tokens.png", optimize=True)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "stages.svg").write_text(stages(), "utf-8")
    (FOLDER / "positions.svg").write_text(positions(), "utf-8")
    scene()

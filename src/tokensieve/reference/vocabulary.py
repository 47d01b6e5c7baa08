"""The closed vocabulary of the reference scenes: all names, colours, frames and words in scenes and answers."""

from __future__ import annotations

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 45),
    "orange": (255, 145, 30),
    "yellow": (245, 230, 50),
    "green": (50, 200, 70),
    "cyan": (60, 225, 235),
    "blue": (70, 105, 255),
    "purple": (160, 75, 235),
    "pink": (255, 130, 205),
    "white": (245, 245, 245),
}

DIGITS: tuple[str, ...] = tuple("0123456789")

ICONS: dict[str, str] = {
    "anchor": "⚓",
    "umbrella": "☂",
    "star": "★",
    "heart": "♥",
    "phone": "☎",
    "plane": "✈",
    "scissors": "✂",
    "letter": "✉",
    "sun": "☀",
    "cloud": "☁",
    "gear": "⚙",
    "flag": "⚑",
    "skull": "☠",
    "crown": "♔",
    "cup": "☕",
    "flower": "✿",
}

FRAMES: tuple[str, ...] = ("none", "square", "circle", "corners", "line")

# Words on signs, and the size in px of their ink in 10 px letters: fixed, so that layouts depend on no font library.
SIGNS: dict[str, tuple[int, int]] = {
    "exit": (21, 8), "open": (28, 7), "shop": (27, 10), "taxi": (21, 8), "bank": (28, 8), "cafe": (24, 8),
    "park": (26, 10), "stop": (25, 9), "bus": (20, 8), "city": (21, 10), "road": (26, 8), "sale": (23, 8),
    "gate": (26, 9), "milk": (23, 8), "fish": (20, 8), "zoo": (20, 5), "tea": (19, 7), "law": (19, 8),
    "gym": (24, 7), "post": (25, 9),
}  # fmt: skip

PLACES: tuple[str, ...] = ("top-left", "top-right", "bottom-left", "bottom-right")

NUMBERS: dict[int, str] = {3: "three", 4: "four", 5: "five", 6: "six"}

NAMES: tuple[str, ...] = (*DIGITS, *ICONS)

GRID = 12  # visual tokens per side of a scene
COLUMNS: tuple[str, ...] = tuple(f"x{number}" for number in range(GRID))
ROWS: tuple[str, ...] = tuple(f"y{number}" for number in range(GRID))

NOTHING = "nothing"  # the answer to a question about a thing that is not there

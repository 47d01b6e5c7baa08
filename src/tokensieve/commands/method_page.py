"""The parts of a method's docstring, for its page in the documentation and on the terminal."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from tokensieve.methods.registry import find

LABELS = re.compile(r"(Cost|Paper|Official code): +(.*)")
STAGES = {
    "encoder": "inside the vision encoder, or before it",
    "connector": "between the vision encoder and the language model (LLM)",
    "decoder": "before a layer of the LLM",
    "fusion": "inside a cross-modal encoder",
}


@dataclass(frozen=True)
class Docstring:
    """The parts of a docstring: paragraphs, the meaning of each argument, and labelled remarks."""

    text: tuple[str, ...]
    arguments: dict[str, str]
    remarks: dict[str, str]

    @classmethod
    def of(cls, thing: type) -> Docstring:
        """Read the docstring of a class."""
        paragraphs: list[str] = []
        arguments: dict[str, str] = {}
        remarks: dict[str, str] = {}
        for block in re.split(r"\n\s*\n", inspect.getdoc(thing) or ""):
            if re.match(r"(Args|Attributes):\n", block):
                for names, meaning in re.findall(r"^    (\w[\w, ]*): ((?:.|\n {5,})*)", block, re.M):
                    arguments |= {name.strip(): joined(meaning) for name in names.split(",")}
                continue
            lines, label = [""], ""
            for line in block.splitlines():
                match = LABELS.match(line)
                if match:
                    label = match[1]
                    remarks[label] = match[2]
                elif label:
                    remarks[label] += f" {line.strip()}"
                else:
                    lines.append(line)
            paragraphs += [joined("\n".join(lines))] if any(lines) else []
        return cls(tuple(paragraphs), arguments, remarks)


def joined(text: str) -> str:
    """Return a text in one line."""
    return " ".join(text.split())


def meaning_of(name: str, docstring: Docstring) -> str:
    """Return the meaning of a parameter; "as in" another method is looked up there."""
    text = docstring.arguments.get(name, "")
    other = re.fullmatch(r"as in ``([^`]+)``\.?", text)
    return meaning_of(name, Docstring.of(find(other[1]))) if other else text


def type_of(hint: Any) -> str:
    """Return an annotation as a reader writes it."""
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).replace("int | float | str", "int | float")  # budgets in words have a page of their own

"""Write the model card of the reference model. All its numbers are measured on the held-out test split."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokensieve.reference.benchmark import SCENES, Row, Shortcut, benchmark, hallucinated, shortcuts

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

SAMPLED = 8  # points of the training curve that the card shows


def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: Sequence[Row],
    image: bool = True,
    batch: int = 80,
) -> list[str]:
    """Return the model's answer to each row by greedy `generate`, with the image or from the text alone."""
    texts: list[str] = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        prompts = [_prompt(row, image) for row in part]
        images = {"images": [drawn.image for row in part for drawn in row.scenes]} if image else {}
        inputs = processor(text=prompts, padding=True, return_tensors="pt", **images)
        output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts += processor.tokenizer.batch_decode(output, skip_special_tokens=True)
    return texts


def _prompt(row: Row, image: bool) -> str:
    """Return the conversation up to the answer, as the chat template writes it."""
    turns = "".join(f"{question} ASSISTANT: {answer}</s>USER: " for question, answer in row.turns)
    pictures = "<image>\n" * len(row.scenes) if image else "\n"
    return f"USER: {pictures}{turns}{row.question} ASSISTANT:"


@dataclass(frozen=True)
class Share:
    """A share of right answers, with a 95 % Wilson interval."""

    right: int
    asked: int

    @property
    def interval(self) -> tuple[float, float]:
        """Return the lower and the upper end."""
        z, n, p = 1.96, self.asked, self.right / self.asked
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.right / self.asked:.3f} ({low:.3f}–{high:.3f})"


def shares(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, Share]:
    """Return the share of right answers per question type, and of `all`."""
    right: dict[str, list[bool]] = {}
    for row, answer in zip(rows, texts, strict=True):
        right.setdefault(row.type, []).append(answer in row.accepted)
        right.setdefault("all", []).append(answer in row.accepted)
    return {type: Share(sum(hits), len(hits)) for type, hits in right.items()}


def write_card(directory: Path, metrics: Path, notes: str = "") -> dict[str, Share]:
    """Evaluate the model in `directory` on the test split, and write its README.md; `metrics` is the training curve.

    Returns the shares of right answers per question type.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(directory, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    rows = benchmark()
    texts = answers(model, processor, rows)
    full, blind = shares(rows, texts), shares(rows, answers(model, processor, rows, image=False))
    curve = [json.loads(line) for line in metrics.read_text().splitlines()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = TEMPLATE.format(
        parameters=f"{parameters / 1e6:.2f}",
        overall=full["all"],
        rows=f"{len(rows):,}",
        table=_results(full, blind, shortcuts(rows)),
        hallucinated=_hallucinations(rows, texts),
        minutes=round(sum(_stage_ends(curve).values()) / 60),
        curve=_curve(curve, list(shortcuts(rows))),
        notes=notes.strip(),
    )
    (directory / "README.md").write_text(text)
    return full


def gate(directory: Path, split: str = "test", scenes: int = SCENES) -> str:
    """Return a table of all question types, published or not: accuracy, blind accuracy and the guessing rules."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(directory, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    rows = benchmark(split, scenes)
    texts = answers(model, processor, rows)
    blind = shares(rows, answers(model, processor, rows, image=False))
    return f"{_results(shares(rows, texts), blind, shortcuts(rows))}\n\n{_hallucinations(rows, texts)}"


def _hallucinations(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Return a paragraph about the questions with a false premise, if there are any."""
    if not any(row.type == "absent" for row in rows):
        return ""
    share = hallucinated(rows, texts)
    return f"Asked about a thing that is not there, it invents an answer in {share:.1%} of the cases (`absent`)."


def _results(full: dict[str, Share], blind: dict[str, Share], guesses: dict[Any, Shortcut]) -> str:
    lines = [
        "| type | accuracy (95 %) | no image | chance | majority | best shortcut | which |",
        "|---|---|---|---|---|---|---|",
    ]
    for type, guess in guesses.items():
        blind_share = blind[type].right / blind[type].asked
        cells = f"{blind_share:.3f} | {guess.chance:.3f} | {guess.majority:.3f} | {guess.best:.3f} | {guess.rule}"
        lines.append(f"| {type} | {full[type]} | {cells} |")
    lines.append(f"| **all** | **{full['all']}** | {blind['all'].right / blind['all'].asked:.3f} | | | | |")
    return "\n".join(lines)


def _stage_ends(curve: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of each stage; the clock of the curve runs through all stages."""
    ends: dict[str, float] = {}
    previous = 0.0
    for line in curve:
        ends[line["stage"]] = ends.get(line["stage"], 0.0) + line["seconds"] - previous
        previous = line["seconds"]
    return ends


def _curve(curve: list[dict[str, Any]], types: list[str]) -> str:
    """Return a table of a few lines of the metrics, with the last line of each stage."""
    selected = {round(number * (len(curve) - 1) / (SAMPLED - 1)) for number in range(SAMPLED)}
    selected |= {i for i, line in enumerate(curve) if i + 1 == len(curve) or curve[i + 1]["stage"] != line["stage"]}
    lines = [
        f"| stage | step | minutes | patch names | {' | '.join(types)} |",
        "|---|---|---|---|" + "---|" * len(types),
    ]
    for number in sorted(selected):
        line = curve[number]
        answers_questions = line["stage"] != "tower"
        values = " | ".join(f"{line[type]:.2f}" if answers_questions else "" for type in types)
        head = f"{line['stage']} | {line['step']} | {line['seconds'] / 60:.0f} | {line['patch shown']:.2f}"
        lines.append(f"| {head} | {values} |")
    return "\n".join(lines)


TEMPLATE = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
language: en
---

# llava-reference

A LLaVA-1.5 in miniature, really trained, for trying and testing visual-token reduction on any machine, offline, in
seconds. **It is an instrument, not an assistant**: it knows small scenes of handwritten digits, icons and signs, and
nothing else. On {rows} held-out questions it answers {overall} right.

## Architecture

The genuine classes of transformers: `LlavaForConditionalGeneration` with a `CLIPVisionModel` (6 layers, width 128, CLS
token, penultimate features, CLS dropped), the two-layer GELU projector and a `LlamaForCausalLM` (4 layers, width 128);
{parameters} M parameters. 120 px images in patches of 10 px: **144 visual tokens**. Word-level tokenizer, lower case;
prompt `USER: <image>\\n{{question}} ASSISTANT:`, and a second image or an earlier turn as the chat template writes it;
the answer is one word, or two for a point. Weights are stored in bfloat16 and load as float32.

## Data

Scenes are drawn by a seeded generator (`tokensieve.reference.scenes`) from what ordinary packages ship: handwritten
digits (scikit-learn, 1,797), photographs (scikit-image) as backgrounds and clutter, DejaVu glyphs (matplotlib) as icons
and letters. A scene has 6–9 objects with distinct names and colours, about half of the pairs an icon and a digit beside
each other, a thin frame round most, one sign with a word, and bright clutter that is never asked about. Objects cover
about four visual tokens each; some are faint, and faint ones are asked about more often. Training, validation and test
share no digit instance, no column of a photograph and no layout. Icons, fonts, colours and phrasings are the same in
all three: what is tested is new scenes, not new kinds of things.

## Results

Test split (`tokensieve.reference.benchmark`, pinned by hash), greedy `generate`, all 144 tokens. *Majority* always
gives the commonest answer; *best shortcut* is the best rule we know that sees the scene but not which thing is asked.
*No image* is this model given the text alone. Intervals treat questions as independent; questions of different types
share scenes.

{table}

{hallucinated}

Every question carries the boxes of what must be seen to answer it, so that comparisons can add an oracle row (the asked
objects' tokens first). Methods are compared with `tokensieve compare`; this card reports the unreduced model only.

## Recipe

`tokensieve.train.reference`, {minutes} minutes on two shared CPU cores (drawing the scenes not counted), bfloat16
autocast. Seventeen questions about an image, or four about two images, are packed into one sequence; half of them are
turned round so that the named thing comes last, which lets binding form where plain training stays at shortcuts.

1. `tower`: the CLS token lists names, words and colours (so CLS attention means something); a linear head reads from
   every patch what it shows, its colour and frame, and from a digit's patches which icon is beside it. Real CLIP has no
   such patch labels: they are what makes minutes of training enough. Position embeddings start with cosines of row and
   column, without which the tower did not learn what is beside what; a weak loss pulls the mean features of the places
   together, so that they say less about the place.
2. `reader`: tower frozen; projector and language model learn to answer. At first many questions see little beyond what
   they need, so that finding the right thing is learned among few before it is among many; then with token dropping.
3. `joint`: everything, with dropping: 144, 48 or 24 tokens, at random, objects first, or one question's objects first,
   under original and contiguous positions. `point` is learned under original positions only, as real models are that
   never saw renumbered ones.

Validation accuracy (natural phrasing, all tokens) on the way:

{curve}

{notes}

## Limits

- Nothing here says how a method fares on real photographs and open questions; it says whether an implementation works
  and how methods differ when small, faint, unnamed or numerous things matter.
- A weak loss (weight 0.05) pulls projected patches towards the word for what they show. It favours methods that compare
  patches with words; real LLaVA has no such loss. Another one (weight 0.1) has a head read from projected
  digits which icon is beside them.
- The CLS token was trained to list objects on dim backgrounds, so its attention is cleaner than a real CLIP's, which
  favours methods that rank patches by it.
- Token dropping was part of training, so reduced inputs cost this model less than one that never saw them.
- Pointing was never trained under renumbered positions, and a loss kept some of the place out of the features. Both
  make renumbering dearer for `point` than training without them would.
- Closed vocabulary: other words become `<unk>`. At most two images and two turns per prompt.
"""

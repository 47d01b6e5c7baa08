"""Recipes: one entry per benchmark and model, with every choice of the protocol that changes a published number.

The protocol is that of LLaVA-1.5's evaluation (arXiv:2310.03744), which the papers on token reduction follow. A new
recipe is one more :class:`Benchmark` below; published rows are in ``published.json``.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Literal, TypeAlias

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
NAMES_OF_PARTS = {"options": (), "hint_line": ("hint",), "context_line": ("hint",), "ocr": ("ocr_tokens",)}

Total: TypeAlias = Literal["mean", "f1", "pairs", "circular"]
"""The way from scored questions to the published number; see :mod:`tokensieve.reproduce.totals`."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as LLaVA-1.5's evaluation runs it.

    Attributes:
        title: name in the papers.
        dataset, config, split: place on the hub.
        questions: number of rows of the split.
        prompt: text of the user turn. A name in braces is a column of the data, or one of these parts: ``options``
            ("A. red" on lines of their own), ``hint_line`` and ``context_line`` (the column ``hint``, if it is not
            empty, on a line of its own, the second with "Context: " before it), ``ocr`` (the column ``ocr_tokens``).
        metric: a name in :data:`~tokensieve.evaluate.METRICS`.
        answer: column of the answer: a text, a list of annotators' answers, or the number of an option.
        options: columns of the options; one column may hold the list of them.
        images: config whose rows hold the images, and the column of the questions that names an image's ``id`` there.
        type: column of the category.
        group: column that joins the questions that are scored together.
        only: a column and its allowed values; other rows are left out.
        leave_out: text that is removed from questions.
        capitalise: begin the question with a capital, and continue in small letters.
        total, scale: the published number is the total, 0 … 1, times the scale.
        max_new_tokens: longest answer.
        judge: who scores the answers if no metric can; then the answers are written for the judge, and no number is
            printed.
        answer_file: form of the file for the judge: one JSON object by question id, or LLaVA's JSON lines.
        differs: the difference of this split to the published one; the published number then cannot be met or missed.
        note: a fact that a reader needs.
    """

    title: str
    dataset: str
    split: str
    questions: int
    prompt: str
    metric: str
    answer: str = "answer"
    config: str | None = None
    options: tuple[str, ...] = ()
    images: tuple[str, str] | None = None
    type: str = ""
    group: str = ""
    only: tuple[str, tuple[str, ...]] | None = None
    leave_out: str = ""
    capitalise: bool = False
    total: Total = "mean"
    scale: float = 100
    max_new_tokens: int = 128
    judge: str = ""
    answer_file: Literal["by id", "lines"] | None = None
    differs: str = ""
    note: str = ""

    @property
    def columns(self) -> list[str]:
        """The columns that the data must have."""
        named = [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name]
        wanted_parts = [column for name in named for column in NAMES_OF_PARTS.get(name, (name,))]
        image = "image" if self.images is None else self.images[1]
        extra = [self.type, self.group, self.only[0] if self.only else "", "question_id" if self.judge else ""]
        columns = [*wanted_parts, *self.options, self.answer, image, *extra]
        return list(dict.fromkeys(column for column in columns if column))


@dataclass(frozen=True)
class VisionModel:
    """A model of the papers.

    Attributes:
        title: name in the papers.
        hub: name of the checkpoint on the hub.
        layers, width, image_size: of the LLM and of the vision encoder, by which a local copy is recognised.
        system: system prompt.
        turn: the rest of the prompt; ``{text}`` is replaced.
        square: pad each image to a square with the mean colour before it is resized, instead of cropping it.
    """

    title: str
    hub: str
    layers: int
    width: int
    image_size: int = 336
    # the conversation vicuna_v1
    system: str = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    turn: str = "USER: <image>\n{text} ASSISTANT:"
    square: bool = True


MODELS = {
    "llava-1.5-7b": VisionModel("LLaVA-1.5-7B", "llava-hf/llava-1.5-7b-hf", layers=32, width=4096),
    "llava-1.5-13b": VisionModel("LLaVA-1.5-13B", "llava-hf/llava-1.5-13b-hf", layers=40, width=5120),
}

BENCHMARKS = {
    "gqa": Benchmark(
        title="GQA",
        dataset="lmms-lab-encoder/GQA",
        config="testdev_balanced_instructions",
        split="testdev",
        questions=12_578,
        prompt="{question}\n" + SHORT,
        metric="gqa",
        images=("testdev_balanced_images", "imageId"),
    ),
    "mmbench-en": Benchmark(
        title="MMBench",
        dataset="lmms-lab-encoder/MMBench",
        config="en",
        split="dev",
        questions=4_329,
        prompt="{hint_line}{question}\n{options}\n" + LETTER,
        metric="mmbench",
        options=("A", "B", "C", "D"),
        group="index",
        total="circular",
        max_new_tokens=1024,
        note="LLaVA used the dev file of July 2023 (4,377 rows of 1,176 questions) and MMBench's server, where a "
        "language model reads answers without a letter. LLaVA-1.5-13B's 4,377 answers are letters.",
    ),
    "mmbench-cn": Benchmark(
        title="MMBench-CN",
        dataset="lmms-lab-encoder/MMBench",
        config="cn",
        split="dev",
        questions=4_329,
        prompt="{hint_line}{question}\n{options}\n请直接回答选项字母。",
        metric="mmbench",
        options=("A", "B", "C", "D"),
        group="index",
        total="circular",
        max_new_tokens=1024,
        note="Scored by MMBench's server in the papers, where a language model reads answers without a letter.",
    ),
    "mme": Benchmark(
        title="MME perception",
        dataset="lmms-lab-encoder/MME",
        split="test",
        questions=2_114,
        prompt="{question}\n" + SHORT,
        metric="yes_no_prefix",
        type="category",
        group="question_id",
        only=("category", PERCEPTION),
        leave_out="Please answer yes or no.",
        total="pairs",
        scale=2_000,
    ),
    "mme-total": Benchmark(
        title="MME perception + cognition",
        dataset="lmms-lab-encoder/MME",
        split="test",
        questions=2_374,
        prompt="{question}\n" + SHORT,
        metric="yes_no_prefix",
        type="category",
        group="question_id",
        only=("category", PERCEPTION + COGNITION),
        leave_out="Please answer yes or no.",
        total="pairs",
        scale=2_800,
    ),
    "pope": Benchmark(
        title="POPE",
        dataset="lmms-lab-encoder/POPE",
        split="test",
        questions=9_000,
        prompt="{question}\n" + SHORT,
        metric="yes_no",
        type="category",
        total="f1",
        note="The mean of the F1 of random, popular and adversarial questions. LLaVA's random part has 2,910 of the "
        "3,000 questions.",
    ),
    "sqa": Benchmark(
        title="ScienceQA-IMG",
        dataset="lmms-lab-encoder/ScienceQA",
        config="ScienceQA-IMG",
        split="test",
        questions=2_017,
        prompt="{context_line}{question}\n{options}\n" + LETTER,
        metric="scienceqa",
        options=("choices",),
        max_new_tokens=1024,
        note="Papers print 66.8 to 70.2 for the same full model: look at the number relative to full.",
    ),
    "vqav2": Benchmark(
        title="VQAv2",
        dataset="lmms-lab-encoder/VQAv2",
        split="validation",
        questions=214_354,
        prompt="{question}\n" + SHORT,
        metric="vqa",
        answer="answers",
        differs="papers report test-dev, whose answers only the server of VQAv2 has; this is the validation split",
    ),
    "textvqa": Benchmark(
        title="TextVQA",
        dataset="lmms-lab-encoder/textvqa",
        split="validation",
        questions=5_000,
        prompt="{question}\nReference OCR token: {ocr}\n" + SHORT,
        metric="vqa",
        answer="answers",
        capitalise=True,
    ),
    "vizwiz": Benchmark(
        title="VizWiz",
        dataset="lmms-lab-encoder/VizWiz-VQA",
        split="val",
        questions=4_319,
        prompt="{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n" + SHORT,
        metric="vqa",
        answer="answers",
        capitalise=True,
        differs="papers report test, whose answers only the server of VizWiz has; this is the validation split",
    ),
    "seed": Benchmark(
        title="SEED-Bench (images)",
        dataset="lmms-lab-encoder/SEED-Bench",
        split="test",
        questions=14_233,
        prompt="{question}\n{options}\n" + LETTER,
        metric="letter",
        options=("choice_a", "choice_b", "choice_c", "choice_d"),
        only=("data_type", ("image",)),
    ),
    "mm-vet": Benchmark(
        title="MM-Vet",
        dataset="lmms-lab-encoder/MMVet",
        split="test",
        questions=218,
        prompt="{question}",
        metric="exact",
        max_new_tokens=1024,
        judge="GPT-4 (the evaluator of MM-Vet)",
        answer_file="by id",
    ),
    "llava-bench": Benchmark(
        title="LLaVA-Bench (In-the-Wild)",
        dataset="lmms-lab-encoder/llava-bench-in-the-wild",
        split="train",
        questions=60,
        prompt="{question}",
        metric="exact",
        answer="gpt_answer",
        max_new_tokens=1024,
        judge="GPT-4 (eval_gpt_review_bench.py of LLaVA)",
        answer_file="lines",
    ),
}

# Specs that repeat the authors' code where the defaults here differ from it; the methods' pages say how.
OFFICIAL = {
    "dart": "dart(exact=False)",
    "hired": "hired(official_tiles=True)",
    "holov": 'holov(overflow="truncate")',
    "sparsevlm": "sparsevlm(appended=True)",
}
# Codes that choose before the LLM renumber positions, and of those inside the LLM these.
RENUMBERED_INSIDE = ("mustdrop-llm", "pyramiddrop", "sparsevlm")

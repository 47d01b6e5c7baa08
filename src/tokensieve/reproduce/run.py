"""Run a recipe: the method, random selection and the full model on the benchmark, and the verdict on each number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokensieve.errors import Refusal
from tokensieve.evaluate import Processes, Results, Row
from tokensieve.evaluate.compare import Comparison
from tokensieve.evaluate.intervals import interval, paired_difference
from tokensieve.evaluate.journal import NAME
from tokensieve.evaluate.plan import Settings
from tokensieve.evaluate.rows import FULL
from tokensieve.evaluate.runner import Progress
from tokensieve.loading import LoadOptions
from tokensieve.reproduce.files import fetch
from tokensieve.reproduce.published import Published, Target
from tokensieve.reproduce.recipes import VisionModel
from tokensieve.reproduce.samples import Questions, questions
from tokensieve.reproduce.totals import units
from tokensieve.reproduce.verdict import Verdict, judge

REPORT = "reproduction.json"
RANDOM = "random"


@dataclass(frozen=True)
class Number:
    """The measured number of one row, in the units of the paper.

    Attributes:
        method: as in the name of the target; "full" and "random" beside it.
        tokens: visual tokens per question after the last stage, mean.
        value, low, high: with the 95 % interval.
        relative: per cent of the full model's, with the ends of the interval, paired by question; ``None`` for full.
    """

    method: str
    tokens: float
    value: float
    low: float
    high: float
    relative: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Reproduction:
    """The result of a recipe.

    Attributes:
        name: of the target.
        samples: questions, as the benchmark counts them in rows.
        numbers: full, the method, random.
        absolute, relative: verdicts with the published row that each is about.
        answer_files: files for the judge.
    """

    name: str
    samples: int
    numbers: tuple[Number, ...]
    absolute: tuple[tuple[Published, Verdict], ...]
    relative: tuple[tuple[Published, Verdict], ...]
    answer_files: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Write all fields as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")


def reproduce(
    target: Target,
    model: Any,
    processor: Any,
    *,
    output: Path,
    data: Path | None = None,
    limit: int | None = None,
    settings: Mapping[str, Any],
    loading: LoadOptions,
    progress: Progress | None = None,
) -> Reproduction:
    """Run a recipe and compare its numbers with the published ones. The same call continues an interrupted one.

    Args:
        model, processor: the model of the recipe, or another one; then no verdict is given.
        output: folder of the answers and results.
        data: folder of the benchmark's files; ``None`` fetches them.
        limit: largest number of rows.
        settings: further settings of the comparison, such as ``batch_size``.

    Raises:
        DataError: the data cannot be fetched or read.
        Refusal: as for :func:`~tokensieve.evaluate.compare`.
    """
    benchmark = target.benchmark
    data = fetch(benchmark) if data is None else data
    chosen = questions(benchmark, data, limit=limit, colour=padding(target.model, processor))
    options = Settings(
        metric=benchmark.metric,
        max_new_tokens=benchmark.max_new_tokens,
        positions="contiguous" if target.renumbers else "original",
        keep_means=target.keep_means,
        measure=False,
        referee=False,
        **settings,
    )
    methods = [] if target.method == FULL else [target.method, RANDOM]
    comparison = Comparison(model, processor, chosen.samples, options, None, loading, Processes.launched())
    results = comparison.run(methods, [] if target.tokens is None else [target.tokens], output, progress)
    obstacles = [*obstacles_of(target, model, processor), *_gaps(target, results)]
    done = _measured(target, chosen, results, obstacles)
    if benchmark.judge:
        files = _write_answers(target, chosen, results, output) if comparison.processes.first else ()
        done = replace(done, numbers=(), relative=(), answer_files=files)
    if comparison.processes.first:
        done.save(output / REPORT)
    return done


def padding(model: VisionModel, processor: Any) -> tuple[int, int, int] | None:
    """Return the colour that LLaVA pads with: the image processor's mean, cut to whole numbers."""
    mean = getattr(getattr(processor, "image_processor", None), "image_mean", None)
    if not model.square or mean is None:
        return None
    red, green, blue = (int(255 * share) for share in mean)
    return red, green, blue


def conversation(model: VisionModel, text: str) -> str:
    """Return the whole prompt of a question, as the papers' code writes it."""
    return f"{model.system} {model.turn.replace('{text}', text)}"


def obstacles_of(target: Target, model: Any, processor: Any) -> list[str]:
    """Return the differences to the published protocol that hold whatever the answers are, each in a few words."""
    expected, config = target.model, model.config
    llm = config.get_text_config()
    image_size = getattr(getattr(config, "vision_config", None), "image_size", None)
    size = llm.num_hidden_layers, llm.hidden_size, image_size
    obstacles = []
    if (config.model_type, *size) != ("llava", expected.layers, expected.width, expected.image_size):
        obstacles.append(f"this model is not {expected.title}")
    elif _rendered(processor) != conversation(expected, "Q"):
        obstacles.append("the processor's chat template writes another prompt than vicuna_v1")
    if target.benchmark.judge:
        obstacles.append(f"scored by {target.benchmark.judge}")
    if target.benchmark.differs:
        obstacles.append(target.benchmark.differs)
    return obstacles


def _rendered(processor: Any) -> str:
    content = [{"type": "image"}, {"type": "text", "text": "Q"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return str(text).removeprefix("<s>").strip()


def _gaps(target: Target, results: Results) -> list[str]:
    gaps = [f"{len(results.skipped)} questions have no readable image"] if results.skipped else []
    if target.benchmark.only is not None and target.benchmark.total == "pairs":
        present = {question.type for question in results.questions}
        if missing := [name for name in target.benchmark.only[1] if name not in present]:
            gaps.append(f"no question of {', '.join(missing)}")
    return gaps


def _measured(target: Target, chosen: Questions, results: Results, obstacles: Sequence[str]) -> Reproduction:
    """Return the numbers of all rows and the verdicts on the target's."""
    benchmark = target.benchmark
    values = [units(benchmark.total, np.array(scores), results.questions, chosen.groups) for scores in results.scores]
    full, clusters = values[0]
    numbers = []
    for row, (linearised, _) in zip(results.rows, values, strict=True):
        share = float(linearised.mean())
        low, high = (benchmark.scale * end for end in interval(linearised, clusters))
        number = Number(_plain(target, row), row.tokens_after, benchmark.scale * share, low, high)
        base = float(full.mean())
        if row.method != FULL and base > 0:
            gap = paired_difference(linearised, full, clusters)
            share, low, high = (100 * (1 + x / base) for x in (gap.difference, gap.low, gap.high))
            number = replace(number, relative=(share, low, high))
        numbers.append(number)
    measured = numbers[0] if target.method == FULL else numbers[1]
    absolute, relative = [], []
    for published in target.published:
        interval95 = measured.value, measured.low, measured.high
        absolute.append((published, judge(published.value, *interval95, obstacles, published.rounding)))
        if published.full and measured.relative is not None:
            share = 100 * published.value / published.full
            verdict = judge(share, *measured.relative, obstacles, published.relative_rounding)
            relative.append((published, verdict))
    return Reproduction(target.name, len(results.questions), tuple(numbers), tuple(absolute), tuple(relative))


def _plain(target: Target, row: Row) -> str:
    return target.name.split("/", 2)[2].rpartition("@")[0] if row.method == target.method != FULL else row.method


def _write_answers(target: Target, chosen: Questions, results: Results, output: Path) -> tuple[str, ...]:
    """Write one file for the judge per row, in the form that its program reads."""
    runs: dict[str, dict[str, str]] = {}
    for line in (output / NAME).read_text("utf-8").splitlines()[1:]:
        entry = json.loads(line)
        if "text" in entry:
            runs.setdefault(entry["run"], {})[entry["sample"].rpartition(" ")[0]] = entry["text"]
    texts = {sample.id: sample.question for sample in chosen.samples}
    written = []
    for number, (run, answers) in enumerate(runs.items()):
        rows = [(chosen.names[name], texts[name], answers[name]) for name in texts if name in answers]
        path = output / f"answers-{number}.json{'' if target.benchmark.answer_file == 'by id' else 'l'}"
        if target.benchmark.answer_file == "by id":
            content = json.dumps({name: answer for name, _, answer in rows}, indent=2, ensure_ascii=False)
        else:
            lines = [{"question_id": name, "prompt": text, "text": answer} for name, text, answer in rows]
            content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        path.write_text(content + "\n", "utf-8")
        written.append(f"{path} ({run})")
    if not written:
        raise Refusal(f"no answers in {output}")
    return tuple(written)

"""Write questions, their images and the task definitions that harnesses read, without a network."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from tokensieve.errors import OutputError, Refusal
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.metrics import METRICS, accepted_answers

QUESTIONS, IMAGES = "questions.jsonl", "images"
PLACEHOLDER = "<image>"  # of lm-eval, in the text of a question

FUNCTIONS = Template('''"""The questions of ../questions.jsonl, as the task in this folder reads them."""

from pathlib import Path

from PIL import Image

from tokensieve.evaluate.metrics import METRICS

FOLDER = Path(__file__).parent.parent


def images(doc):
    return [Image.open(FOLDER / name).convert("RGB") for name in doc["image"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def text_with_images(doc):
    return "$placeholder" * len(doc["image"]) + doc["question"]


def score(doc, results):
    return {"$metric": METRICS["$metric"](results[0], doc["answer"])}
''')

TASK = Template("""task: $name
dataset_path: json
dataset_kwargs:
  data_files:
    test: $data
test_split: test
output_type: generate_until
$fields
doc_to_target: "{{answer[0]}}"
process_results: !function functions.score
metric_list:
  - metric: $metric
    aggregation: mean
    higher_is_better: true
""")

FIELDS = {
    "lmms_eval": Template("""doc_to_visual: !function functions.images
doc_to_text: !function functions.text
generation_kwargs:
  max_new_tokens: $length
  temperature: 0
  do_sample: false
metadata:
  - version: 1.0"""),
    "lm_eval": Template("""doc_to_image: !function functions.images
doc_to_text: !function functions.text_with_images
generation_kwargs:
  max_gen_toks: $length
  temperature: 0.0
  do_sample: false
  until: []
metadata:
  version: 1.0"""),
}


def export(
    folder: Path,
    samples: Sequence[Sample],
    *,
    name: str = "tokensieve_bench",
    metric: str = "exact",
    prompt: str = "{question}",
    max_new_tokens: int = 16,
) -> None:
    """Write one data set for all harnesses; ``tokensieve compare --data folder/questions.jsonl`` reads it, too.

    ``questions.jsonl`` and ``images/`` hold the questions. ``lmms_eval/`` and ``lm_eval/`` hold a task for
    ``--include_path``, with the absolute path of the questions in it. ``vlmevalkit/`` holds a table for ``LMUData``.

    Args:
        folder: created if it is missing; earlier files of the same names are replaced.
        samples: the questions.
        name: of the task, and of VLMEvalKit's data set.
        metric: score of an answer, a key of :data:`~tokensieve.evaluate.metrics.METRICS`.
        prompt: text of the user turn; ``{question}`` is replaced.
        max_new_tokens: longest answer.

    Raises:
        Refusal: an unknown metric, a name that is no identifier, or a question that holds lm-eval's placeholder.
        DataError: an image cannot be read.
        OutputError: a file cannot be written.
    """
    if metric not in METRICS:
        raise Refusal(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    if not name.isidentifier():
        raise Refusal(f"a task's name is letters, digits and _; got {name!r}")
    for sample in samples:
        if sample.turns:
            raise Refusal(
                f"{sample.error_prefix}the harnesses ask single questions; got {len(sample.turns)} earlier turns"
            )
        if PLACEHOLDER in prompt + sample.text:
            raise Refusal(f"{sample.error_prefix}lm-eval puts an image where a text has {PLACEHOLDER}; leave it out")
    try:
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        rows = _rows(folder, samples, prompt)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / QUESTIONS).write_text("".join(lines), "utf-8")
        _write_tasks(folder, name=name, metric=metric, length=max_new_tokens)
        _write_table(folder, rows, name)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error


def _rows(folder: Path, samples: Sequence[Sample], prompt: str) -> list[dict[str, Any]]:
    """Return a row per sample in the form of ``--data``, and write each distinct image once, as PNG."""
    files: dict[Any, str] = {}
    rows = []
    for sample in samples:
        for number, picture in enumerate(sample.images):
            if picture not in files:
                files[picture] = f"{IMAGES}/{len(files):05}.png"
                sample.open(number).save(folder / files[picture])
        rows.append(
            {
                "id": sample.id,
                "image": [files[picture] for picture in sample.images],
                "question": prompt.replace("{question}", sample.text),
                "answer": list(accepted_answers(sample)),
                "type": sample.type,
            }
        )
    return rows


def _write_tasks(folder: Path, *, name: str, metric: str, length: int) -> None:
    data = json.dumps(str((folder / QUESTIONS).resolve()))  # a JSON string is a YAML string
    for harness, fields in FIELDS.items():
        (folder / harness).mkdir(exist_ok=True)
        task = TASK.substitute(name=name, data=data, metric=metric, fields=fields.substitute(length=length))
        (folder / harness / f"{name}.yaml").write_text(task, "utf-8")
        functions = FUNCTIONS.substitute(metric=metric, placeholder=PLACEHOLDER)
        (folder / harness / "functions.py").write_text(functions, "utf-8")


def _write_table(folder: Path, rows: Sequence[dict[str, Any]], name: str) -> None:
    """Write VLMEvalKit's table; it reads images at absolute paths as they are."""
    (folder / "vlmevalkit").mkdir(exist_ok=True)
    with (folder / "vlmevalkit" / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "id", "image_path", "question", "answer"])
        for number, row in enumerate(rows):
            paths = [str((folder / image).resolve()) for image in row["image"]]
            # one path, or a list as Python writes it
            table.writerow(
                [number, row["id"], paths if len(paths) > 1 else paths[0], row["question"], row["answer"][0]]
            )

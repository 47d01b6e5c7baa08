"""``tokensieve ask``: one question about one image, without and with a method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tokensieve.commands.arguments import BudgetScope, Json, Model, Repair, Separators, with_load_options
from tokensieve.commands.console import note, print_json
from tokensieve.commands.loading import inputs_of, note_foreign_images, trained_spec
from tokensieve.errors import OutputError, Refusal
from tokensieve.loading import LoadOptions, load_model

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokensieve.evaluate import Sample

METHOD = "vtc-cls"
FOLDER = Path("runs/ask")  # pictures of a bundled scene


@with_load_options()
def ask(
    loading: LoadOptions,
    image: Annotated[Path | None, typer.Argument(help="Image file.", show_default="a bundled scene")] = None,
    question: Annotated[
        str | None, typer.Argument(help="Question about it.", show_default="a question about the scene")
    ] = None,
    method: Annotated[str, typer.Option(help="Method spec, e.g. 'vtc-cls(first_layer=-2)'.")] = METHOD,
    keep: Annotated[
        str | None, typer.Option(help="Budget: tokens (36) or a share (0.25, 25%).", show_default="the method's own")
    ] = None,
    budget_scope: BudgetScope = "image",
    separators: Separators = "kept-lines",
    repair: Repair = None,
    overlay: Annotated[Path | None, typer.Option(help="Save a picture of the kept tokens.", show_default=False)] = None,
    model: Model = "reference",
    positions: Annotated[
        Literal["original", "contiguous"], typer.Option(help="Whether kept tokens keep their position ids.")
    ] = "original",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    json: Json = False,
) -> None:
    """Answer a question about an image, without and with a method.

    Without arguments: a question about a scene of the bundled benchmark, whose right answer is known. The scene and its
    kept tokens are saved in runs/ask.
    """
    from tokensieve.budget import parse_budget
    from tokensieve.engine import attach
    from tokensieve.engine.budget_scope import check_calibrated, check_scope
    from tokensieve.evaluate.answer import together
    from tokensieve.methods import parse
    from tokensieve.methods.spec import expand

    (method,), options = expand(
        [method], positions=positions, budget_scope=budget_scope, separators=separators, repair=repair
    )
    budget = {} if keep is None else {"keep": parse_budget(keep)}
    stages = parse(method, **budget)  # a bad spec is refused before a model is loaded
    check_scope(options["budget_scope"], stages)
    check_calibrated(stages)
    if overlay is not None:
        _check_overlay_path(overlay)
    sample = _scene() if image is None else _users_sample(image, question)
    vlm, processor = load_model(model, loading, classifiers=True)
    if method == METHOD and not vlm.can_generate():
        method = trained_spec(model, vlm)
    stages = parse(method, **budget)
    inputs = inputs_of(vlm, processor, [sample])
    before = _answer(vlm, processor, inputs, max_new_tokens)
    with attach(vlm, stages, processor=processor, **options) as sieve:
        after = _answer(vlm, processor, inputs, max_new_tokens)
    reduction = together(sieve.last[0])
    picture = sample.open()
    if image is None:
        image = _save(picture, FOLDER / "scene.png")
        overlay = overlay or (FOLDER / "kept.png" if reduction.grid else None)
    if overlay is not None:
        from tokensieve.report.overlay import as_seen
        from tokensieve.report.overlay import overlay as draw

        _save(draw(as_seen(picture, processor), reduction), overlay)
    name, right = " + ".join(map(str, stages)), next(iter(sample.answers), None)
    if json:
        answers = {"right_answer": right, "method": name, "answer_full": before, "answer": after}
        tokens = {"tokens_before": reduction.total, "tokens_after": reduction.slots, "notes": reduction.notes}
        pictures = {"image": str(image), "overlay": overlay and str(overlay)}
        print_json({"question": sample.question, **answers, **tokens, **pictures})
    else:
        given = [] if right is None else [("question", "", sample.question), ("right answer", "", right)]
        rows = [("full model", f"{reduction.total} tokens", before), (name, f"{reduction.slots} tokens", after)]
        width = max(len(name), len("right answer"))
        for label, count, text in (*given, *rows):
            typer.echo(f"{label:{width}}  {count:>12}  {text}")
        for remark in reduction.notes:
            note(f"note: {remark}")
        if right is not None:
            note(f"scene:   {image}")
        if overlay is not None:
            note(f"overlay: {overlay}")
    if right is None:
        note_foreign_images(model)


def _scene() -> Sample:
    """Return a question about a scene of the bundled benchmark."""
    from tokensieve.evaluate import Sample
    from tokensieve.reference.benchmark import benchmark

    row = benchmark(scenes=1)[0]
    return Sample("ask", lambda: row.image, row.question, (row.answer,))


def _users_sample(image: Path, question: str | None) -> Sample:
    """Return the user's question about the user's image."""
    from tokensieve.evaluate import Sample, open_image
    from tokensieve.evaluate.data import check_text

    if question is None or not question.strip():
        raise Refusal("the question is empty; ask something about the image")
    check_text(question, "the question")
    picture = open_image(image)
    return Sample("ask", lambda: picture, question, ())


def _check_overlay_path(path: Path) -> None:
    """Refuse, before a model is loaded, a path that no picture can be saved at."""
    from PIL import Image as pil

    formats = pil.registered_extensions()
    if formats.get(path.suffix.lower()) not in pil.SAVE:
        raise Refusal(f"cannot save a picture as {path}: name it .png, .jpg or .webp")
    if not path.parent.is_dir() and path.parent != FOLDER:
        raise Refusal(f"cannot save a picture as {path}: there is no folder {path.parent}")


def _save(picture: Image, path: Path) -> Path:
    try:
        if path.is_relative_to(FOLDER):
            FOLDER.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise OutputError(f"cannot save a picture as {path}: {error.strerror or error}") from error
    return path


def _answer(model: Any, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> str:
    import torch

    from tokensieve.evaluate import decode

    with torch.inference_mode():
        if not model.can_generate():
            return str(model.config.id2label[int(model(**inputs).logits.argmax())])
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return decode(processor, generated, inputs["input_ids"].shape[1])[0].strip()

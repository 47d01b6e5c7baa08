"""``tokensieve ask``: one question about one image, without and with a method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tokensieve.commands.arguments import BudgetScope, ImageFile, Json, Model
from tokensieve.commands.console import note, print_json
from tokensieve.commands.loading import inputs_of, load_model, trained_spec
from tokensieve.errors import Refusal

METHOD = "vtc-cls"


def ask(
    image: ImageFile,
    question: Annotated[str, typer.Argument(help="Question about it.", show_default=False)],
    method: Annotated[str, typer.Option(help="Method spec, e.g. 'vtc-cls(first_layer=-2)'.")] = METHOD,
    keep: Annotated[
        str | None, typer.Option(help="Budget: tokens (36) or a share (0.25, 25%).", show_default="the method's own")
    ] = None,
    budget_scope: BudgetScope = "image",
    overlay: Annotated[Path | None, typer.Option(help="Save a picture of the kept tokens.", show_default=False)] = None,
    model: Model = "reference",
    positions: Annotated[
        Literal["original", "contiguous"], typer.Option(help="Whether kept tokens keep their position ids.")
    ] = "original",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    json: Json = False,
) -> None:
    """Answer a question about an image, without and with a method."""
    from tokensieve.budget import parse_budget
    from tokensieve.engine import attach
    from tokensieve.engine.budget_scope import check_scope
    from tokensieve.evaluate import Sample, open_image
    from tokensieve.evaluate.answer import together
    from tokensieve.evaluate.data import check_text
    from tokensieve.methods import parse

    if not question.strip():
        raise Refusal("the question is empty; ask something about the image")
    check_text(question, "the question")
    budget = {} if keep is None else {"keep": parse_budget(keep)}
    check_scope(budget_scope, parse(method, **budget))  # a bad spec is refused before a model is loaded
    if overlay is not None:
        _check_overlay_path(overlay)
    picture = open_image(image)
    vlm, processor = load_model(model, classifiers=True)
    if method == METHOD and not vlm.can_generate():
        method = trained_spec(model, vlm)
    stages = parse(method, **budget)
    inputs = inputs_of(vlm, processor, [Sample("ask", lambda: picture, question, ())])
    before = _answer(vlm, processor, inputs, max_new_tokens)
    with attach(vlm, stages, positions=positions, processor=processor, budget_scope=budget_scope) as sieve:
        after = _answer(vlm, processor, inputs, max_new_tokens)
    reduction = together(sieve.last[0])
    if overlay is not None:
        from tokensieve.report.overlay import as_seen
        from tokensieve.report.overlay import overlay as draw

        draw(as_seen(picture, processor), reduction).save(overlay)
    name = " + ".join(map(str, stages))
    if json:
        answers = {"method": name, "answer_full": before, "answer": after}
        tokens = {"tokens_before": reduction.total, "tokens_after": reduction.slots, "notes": reduction.notes}
        print_json({"question": question, **answers, **tokens, "overlay": overlay and str(overlay)})
        return
    width = max(len(name), len("full model"))
    typer.echo(f"{'full model':{width}}  {reduction.total:5} tokens  {before}")
    typer.echo(f"{name:{width}}  {reduction.slots:5} tokens  {after}")
    for remark in reduction.notes:
        note(f"note: {remark}")
    if overlay is not None:
        note(f"overlay: {overlay}")


def _check_overlay_path(path: Path) -> None:
    """Refuse, before a model is loaded, a path that no picture can be saved at."""
    from PIL import Image

    formats = Image.registered_extensions()
    if formats.get(path.suffix.lower()) not in Image.SAVE:
        raise Refusal(f"cannot save a picture as {path}: name it .png, .jpg or .webp")
    if not path.parent.is_dir():
        raise Refusal(f"cannot save a picture as {path}: there is no folder {path.parent}")


def _answer(model: Any, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> str:
    import torch

    from tokensieve.evaluate import decode

    with torch.inference_mode():
        if not model.can_generate():
            return str(model.config.id2label[int(model(**inputs).logits.argmax())])
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return decode(processor, generated, inputs["input_ids"].shape[1])[0].strip()

"""``tokensieve check``: the equivalence checks (laws) on a model of the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokensieve.commands.arguments import BudgetScope, Json, Repair, Reselect, Separators, with_load_options
from tokensieve.commands.console import note, print_json, print_table, progress
from tokensieve.errors import Refusal
from tokensieve.loading import LoadOptions, load_model, to_model

if TYPE_CHECKING:
    from tokensieve.check import Verdict

# one of each kind: encoder attention, features only, text, merging, inside the LLM
METHODS = ("fastervlm", "divprune", "trsm", "visionzip(before_projector=False)", "fastv")
QUESTIONS = (
    ("what is in the image?", 1),
    ("how many things are in the first picture, and in which colour is the largest one in the other?", 2),
    ("is there a circle?", 1),
)
SIZES = ((448, 336), (336, 480), (400, 400), (512, 256))


@with_load_options()
def check(
    loading: LoadOptions,
    model: Annotated[str, typer.Argument(help="Folder or hub name; 'reference' is the bundled one.")] = "reference",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method spec; may be given several times.", show_default="one of each kind"),
    ] = None,
    keep: Annotated[str, typer.Option(help="Budget where a spec leaves it open: tokens or a share.")] = "25%",
    budget_scope: BudgetScope = "image",
    separators: Separators = "kept-lines",
    repair: Repair = None,
    reselect: Reselect = False,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights and few layers: only the config is used.")
    ] = False,
    json: Json = False,
) -> None:
    """Prove on your model that a method drops tokens and changes nothing else.

    Exit code 1 if a law is broken or a method crashes, 2 if all was refused or could not be checked.
    """
    import torch
    import transformers

    from tokensieve.budget import parse_budget
    from tokensieve.check import Laws
    from tokensieve.evaluate.plan import plan
    from tokensieve.methods.spec import expand

    specs, options = expand(
        list(method or METHODS), budget_scope=budget_scope, separators=separators, repair=repair, reselect=reselect
    )
    entries = plan(specs, [parse_budget(keep)], seeds=1, oracle=False)
    # the first entry is the unhooked model
    candidates = [run.stages for entry in entries[1:] or entries for run in entry.runs]
    vlm, processor = load_model(model, loading, random=random)
    torch.manual_seed(0)
    with progress() as report:
        report(0, len(candidates), "the unmodified model")
        laws = Laws(vlm, prompts(processor, vlm), len(QUESTIONS), processor, **options)
        verdicts: list[list[Verdict]] = []
        for done, stages in enumerate(candidates):
            report(done, len(candidates), " + ".join(map(str, stages)))
            verdicts.append(list(laws.check(stages)))
    precision = str(vlm.dtype).removeprefix("torch.")
    if json:
        about = {"model": model, "model_type": vlm.config.model_type, "dtype": precision, "random_weights": random}
        about["loading"] = loading.to_json()
        about |= options
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        noise = {"noise_floor": laws.floor, "allowed": laws.allowed}
        print_json({**about, **versions, **noise, "verdicts": [asdict(v) for row in verdicts for v in row]})
    else:
        print_table(("method", *(verdict.law for verdict in verdicts[0])), [_cells(row) for row in verdicts])
        for reason, where in _reasons(verdicts).items():
            typer.echo(f"{where}: {reason}")
        typer.echo(
            f"{vlm.config.model_type}, {precision}. Numbers: the largest difference of a logit; rounding alone makes "
            f"{laws.floor:.1e}, up to {laws.allowed:.1e} passes"
        )
    statuses = [verdict.status for row in verdicts for verdict in row]
    if broken := statuses.count("FAIL"):
        note(f"{broken} laws are broken")
        raise typer.Exit(1)
    if "pass" not in statuses:
        raise Refusal("nothing was checked: every law was refused, or could not be checked, for the reasons above")


def _cells(row: Sequence[Verdict]) -> list[str]:
    cells = [v.status if v.deviation is None else f"{v.status} {v.deviation:.1e}" for v in row]
    return [row[0].method, *("–" if cell == "skipped" else cell for cell in cells)]


def _reasons(verdicts: Sequence[Sequence[Verdict]]) -> Mapping[str, str]:
    """Return {reason: its methods and laws}, so that each reason is printed once."""
    laws_of: dict[str, dict[str, list[str]]] = {}
    for verdict in (v for row in verdicts for v in row if v.reason):
        laws_of.setdefault(verdict.reason, {}).setdefault(verdict.method, []).append(verdict.law)
    return {
        reason: "; ".join(f"{name} ({', '.join(laws)})" for name, laws in methods.items())
        for reason, methods in laws_of.items()
    }


def prompts(processor: Any, model: Any) -> Callable[[Sequence[int]], Mapping[str, Any]]:
    """Return a function from prompt numbers to one left-padded batch about drawn pictures, on the model's device."""
    from tokensieve.evaluate.prompt import left_padded_batch

    def batch(numbers: Sequence[int]) -> Mapping[str, Any]:
        pictures = [[_picture(number + offset) for offset in range(QUESTIONS[number][1])] for number in numbers]
        return to_model(model, left_padded_batch(processor, pictures, [QUESTIONS[number][0] for number in numbers]))

    return batch


def _picture(number: int) -> Any:
    """Draw a picture whose every region differs."""
    from PIL import Image, ImageDraw

    width, height = SIZES[number % len(SIZES)]
    gradients = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90)]
    channels = gradients[number % 3 :] + gradients[: number % 3]
    picture = Image.merge("RGB", channels).resize((width, height))
    draw = ImageDraw.Draw(picture)
    for i in range(6):
        x, y = (97 * (i + number)) % (width - 60), (61 * (i + 2 * number)) % (height - 60)
        shape = draw.ellipse if i % 2 else draw.rectangle
        shape((x, y, x + 30 + 5 * i, y + 60 - 5 * i), fill=tuple((85 * (i + c + number)) % 256 for c in range(3)))
    return picture

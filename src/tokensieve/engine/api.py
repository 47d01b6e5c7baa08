"""``attach``: read a method, and install its hooks on a live model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from tokensieve.budget import BudgetScope
from tokensieve.engine.budget_scope import check_calibrated, check_scope
from tokensieve.engine.fusion.families import is_fusion
from tokensieve.engine.fusion.handle import FusionSieve
from tokensieve.engine.handle import Sieve, install
from tokensieve.engine.handoff import Decisions
from tokensieve.engine.llm import LlmSieve
from tokensieve.engine.wrapped import unwrapped
from tokensieve.errors import Refusal
from tokensieve.methods import Method, Positions, Repair, parse
from tokensieve.methods.spec_file import is_spec_file, read_spec_file
from tokensieve.models.layout import Separators
from tokensieve.models.versions import warn_if_untested
from tokensieve.reduction import Reduction

ORDER = ("encoder", "connector", "decoder")


def attach(
    model: Any,
    method: str | Method | Sequence[Method] | Decisions,
    *,
    positions: Positions = "original",
    processor: Any = None,
    budget_scope: BudgetScope = "image",
    separators: Separators = "kept-lines",
    repair: Repair | None = None,
    reselect: bool = False,
    **parameters: Any,
) -> Sieve:
    """Make every later call of ``model`` drop visual tokens: ``generate`` and ``forward``, any batch.

    Hooks and reversible wrappers are installed. Weights, the model's config and the processor stay untouched, and
    ``detach()`` restores the model bit for bit.

    Args:
        model: a Hugging Face vision-language model of a family in ``tokensieve.models``; for a fusion method such as
            ``pumer`` a ViLT, BridgeTower or :mod:`METER <tokensieve.fusion.meter>` with any head on pooled tokens. A
            PEFT model may stand around it.
        method: a spec such as ``"vtc-cls"`` or ``"vtc-cls(keep=64)"``, a method object, a list of them (one per
            stage), the path of a spec file such as ``"best.json"`` (its options replace the defaults of the options
            below), or decisions `[sample][image]` as in ``sieve.last``. Decisions are
            replayed at the connector: for methods inside the LLM or the vision encoder this is a different computation
            with the same tokens.
        positions: "original" keeps the position ids of the remaining tokens; "contiguous" renumbers them, as most
            official codes do, at the cost of grounding.
        processor: the model's processor; its chat template separates the user's words, for text-informed methods.
        budget_scope: what ``keep`` counts. "image" (or "clip"): each image or video. "sample": all images of a sample
            together, shared out by size. "sample-score": the same, shared out by the number of the best tokens that
            each image holds. "tile": each tile of an image that the vision encoder receives in tiles. "frame": each
            frame of a video; the method then receives one frame at a time.
        separators: tokens of a reduced image that show no patch, such as the newlines of LLaVA-NeXT. "kept-lines" keeps
            those of lines that keep a token; "none" keeps none, as in vLLM, where the number of tokens must be known
            before the image is encoded.
        repair: "size" adds to the LLM's attention scores the log of the number of tokens that each visual token stands
            for, in prefill and decoding; "restore" also adds a bias of distance, as in RESTORE (arXiv:2606.01711).
            ``None`` adds nothing.
        reselect: decide anew in each later turn on a KV cache, by the new words. The answer is then that of a fresh
            prompt of the whole conversation, without a run of the vision encoder. A method that reads no words has the
            same tokens in any turn: it continues on its cache as without the option.
        parameters: values for parameters of a spec, e.g. ``keep=64``. ``keep="layers:64"`` is an average over the
            layers of the LLM; ``keep="average:64:gain:0.01"`` is one over the data, by a threshold that ``tokensieve
            calibrate average`` finds.

    Raises:
        Refusal: a ``ValueError``, for an unknown method or parameter, a model of unknown family, evidence that the
            model cannot give, or a model that has a method attached already.
    """
    if isinstance(method, str) and is_spec_file(method):
        options = read_spec_file(method).merged(
            positions=positions,
            separators=separators,
            budget_scope=budget_scope,
            repair=repair,
            reselect=reselect,
        )
        positions, separators, budget_scope, repair, reselect = (
            options[name] for name in ("positions", "separators", "budget_scope", "repair", "reselect")
        )
    if positions not in ("original", "contiguous"):
        raise Refusal(f"positions must be 'original' or 'contiguous'; got {positions!r}")
    if separators not in get_args(Separators):
        raise Refusal(f"separators must be 'kept-lines' or 'none'; got {separators!r}")
    if repair not in (None, *get_args(Repair)):
        raise Refusal(f"repair must be None, 'size' or 'restore'; got {repair!r}")
    if not isinstance(reselect, bool):
        raise Refusal(f"reselect must be True or False; got {reselect!r}")
    warn_if_untested()
    model = unwrapped(model)
    methods, replay = _read(method, parameters)
    check_scope(budget_scope, methods)
    check_calibrated(methods)
    unreduced = all(stage_method.keeps_everything for stage_method in methods) and replay is None
    if any(stage_method.info.stage == "fusion" for stage_method in methods) or (unreduced and is_fusion(model)):
        if repair is not None:
            raise Refusal(f"repair={repair!r} acts in the LLM, which a cross-modal encoder does not have; leave it out")
        if reselect:
            raise Refusal("reselect=True is for conversations, which a cross-modal encoder has none of; leave it out")
        return install(model, lambda: FusionSieve(model, methods, positions))
    return install(
        model,
        lambda: LlmSieve(model, methods, replay, positions, processor, budget_scope, separators, repair, reselect),
    )


def _read(
    method: str | Method | Sequence[Method] | Decisions, parameters: dict[str, Any]
) -> tuple[list[Method], Decisions | None]:
    """Return the methods by stage, or the decisions to replay."""
    if isinstance(method, str):
        methods = parse(method, **parameters)
    elif parameters:
        raise Refusal(f"{', '.join(parameters)} can only be given with a method's name; got {method!r}")
    elif isinstance(method, Method):
        methods = [method]
    elif _all(method, Method):
        methods = list(method)  # type: ignore[arg-type]
    elif _all(method, list) and all(not row or _all(row, Reduction) for row in method):
        decisions: Decisions = [list(row) for row in method]  # type: ignore[arg-type]
        for number, decision in enumerate(decision for row in decisions for decision in row):
            fault = decision.fault() if decision.anchors.ndim == 1 else "it is about a batch of images: index it"
            if fault is None and decision.added:
                fault = "its registers are rows of a net: attach the method"
            if fault is not None:
                raise Refusal(f"decision {number} cannot be replayed: {fault}")
        return [], decisions
    else:
        raise Refusal(
            "a method is a spec such as 'vtc-cls(keep=64)', a Method, a list of Methods, or decisions [sample][image]; "
            f"got {method!r}"
        )
    stages = [stage_method.info.stage for stage_method in methods]
    if len(set(stages)) < len(stages):
        raise Refusal(f"two methods of the same stage cannot be combined; got {', '.join(stages)}")
    if "fusion" in stages and len(stages) > 1:
        raise Refusal(f"a fusion method acts alone; got {', '.join(stages)}")
    if "fusion" not in stages and stages != sorted(stages, key=ORDER.index):
        raise Refusal(f"stages must stand in the order {', '.join(ORDER)}; got {', '.join(stages)}")
    return methods, None


def _all(items: Any, kind: type) -> bool:
    """Return whether these are items, at least one, and all of one kind."""
    return isinstance(items, Sequence) and len(items) > 0 and all(isinstance(item, kind) for item in items)

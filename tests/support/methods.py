"""The methods that the laws run on: lists from the registry, so that a new method needs no edit in the tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tokensieve
from tests.support.oracle import Decision
from tokensieve import MethodInfo, Reduction, list_methods
from tokensieve.methods import EncoderMethod, PixelMethod, TrainedMethod
from tokensieve.methods.compute import ComputeMethod
from tokensieve.methods.registers import RegisterMethod
from tokensieve.methods.registry import find
from tokensieve.methods.skip import SkipMethod

# 13 tokens: fewer than some images have, more than others (those stay whole); 0.3: a share of any
BUDGETS = (13, 0.3)
# connector methods with other parameters, beside the defaults that every method runs with
VARIANTS = (
    "vtc-cls(keep=5, first_layer=-2)",
    "vtc-cls(keep=0.5, over_layers='max')",
    "trsm(keep=5, query='prompt')",
    "random(keep=6, seed=3)",
    "idpruner(keep=6)",
    "idpruner(keep=0.3, balance=0.8)",
    "downsample(keep=0.5) + vtc-cls(keep=4)",
    "downsample(keep=13) + pool(keep=4)",
)
# connector methods that run with these specs instead, because their defaults are for larger images: most of them merge
# before the projector, or with weights that do not sum to 1. The first spec of a method drops tokens of any image
TUNED = (
    "visionzip(keep=9)",
    "visionzip(keep=9, combine='mean', before_projector=False)",
    "visionzip(keep=5, contextual=0)",
    "prumerge",
    "prumerge(keep=6, neighbours=4)",
    "prumerge(keep=1)",
    "prumerge(keep=6, before_projector=False)",
    "prumerge+",
    "prumerge+(keep=7)",
    "prumerge+(top=3, stride=4, offset=1)",
    "vispruner(keep=8)",
    "vispruner(keep=7, important=0.3, step=2, sinks=0.1)",
    "hired(keep=6)",
    "hired(keep=5, spatial=3)",
    "fopru(keep=6)",
    "fopru(keep=7, select='row')",
    "cdpruner(keep=6)",
    "scope(keep=6)",
    "mmtok(keep=6)",
    "holov(keep=6, windows=4)",
    "holov(keep=6, windows=4, rank='holistic')",
    "holov(keep=0.8, windows=4, overflow='truncate')",
    "par(keep=6, threshold=0.3)",
    "setok-cluster(threshold=9, fallback=3)",
    "setok-cluster(threshold=0.9)",
    "hiprune(keep=9, alpha=0.7)",
    "hiprune(keep=0.4, layer=0, official_borders=True)",
    "apet(keep=9, basis=4)",
    "apet(keep=7, basis=3, official_places=True)",
    "apet(keep=1)",
    "vscan(keep=9, window=2)",
    "zoo-prune(keep=6, directions=3)",
    "vscan(keep=12, window=3, layer=0, local=0.8)",
)
FIRST_TUNED = {spec.split("(")[0]: spec for spec in reversed(TUNED)}


def inside_encoder(info: MethodInfo) -> bool:
    return issubclass(find(info.name), EncoderMethod)


def by_pixels(info: MethodInfo) -> bool:
    return issubclass(find(info.name), PixelMethod)


def before_llm() -> list[MethodInfo]:
    """Methods for images that decide before the LLM, between vision encoder and LLM or about the image's size."""
    early = [info for info in list_methods() if info.stage in ("encoder", "connector")]
    images = [info for info in early if not info.needs.requests("video")]
    images = [info for info in images if not inside_encoder(info) and not by_pixels(info)]
    return [info for info in images if info.name not in FIRST_TUNED and not find(info.name).makes_rows]


def made_specs(family: str, keep: int | float = 9) -> list[str]:
    """Return every method whose net makes rows, for small images; none on a family with deepstack."""
    small = {"keep": keep, "threshold": 9.0, "fallback": 3}
    infos = [info for info in list_methods() if find(info.name).makes_rows and family != "qwen3-vl"]
    infos = [info for info in infos if not find(info.name).changes_text]  # tests/laws/test_prefusion.py
    plain = family in ("llava-clip", "llava-siglip")  # rows can pass beside the layers of a plain ViT
    infos = [info for info in infos if plain or not info.needs.requests("rows_beside")]
    return [_spec(info, small) for info in infos if keep == 9 or "keep" in info.parameters]


def connector_specs(family: str = "llava-clip") -> list[str]:
    """Return the specs of the connector laws on one family; what needs a [CLS] token runs where there is one."""
    default = [
        spec_of(info, keep)
        for info in before_llm()
        for keep in (BUDGETS if "keep" in info.parameters else BUDGETS[:1])
        if family == "llava-clip" or not info.needs.requests("cls_similarity")
    ]
    return [*default, *VARIANTS]


def whole_specs() -> list[str]:
    """Return every connector method that can keep all, with the budget to do so."""
    return ["full", *(spec_of(info, 1.0) for info in before_llm() if "keep" in info.parameters)]


def inside_specs(stage: str) -> list[str]:
    """Return a spec of every method inside the LLM ("decoder") or the vision encoder ("encoder"), for tiny models."""
    infos = [info for info in list_methods() if info.stage == stage]
    # these have laws of their own: tests/laws/test_registers.py, test_skip.py, test_compute.py
    infos = [info for info in infos if not issubclass(find(info.name), (RegisterMethod, SkipMethod, ComputeMethod))]
    return [small_spec(info) for info in infos if stage == "decoder" or inside_encoder(info)]


def small_spec(info: MethodInfo) -> str:
    """Return the method with its defaults, but layers and budgets that shallow models and small images have."""
    chosen: dict[str, Any] = {"keep": 0.4}
    chosen |= {"layers": (1, 3), "layer": 2} if info.stage == "decoder" else {"layers": (1, 2), "layer": 1}
    if info.parameters.get("counts") is not None:
        chosen["counts"] = (0.5, 0.25)
    return _spec(info, chosen)


def spec_of(info: MethodInfo, keep: int | float) -> str:
    """Return the method with this budget, if it has one; a trained method with an untrained net."""
    return _spec(info, {"keep": keep})


def _spec(info: MethodInfo, chosen: dict[str, Any]) -> str:
    chosen = chosen | ({"weights": "random"} if issubclass(find(info.name), TrainedMethod) else {})
    given = ", ".join(f"{name}={value!r}" for name, value in chosen.items() if name in info.parameters)
    return f"{info.name}({given})" if given else info.name


@dataclass
class Recording:
    """The calls of a method: (layer, features `[B, N, D]`, one Reduction for each of the B images)."""

    decisions: list[tuple[int, Tensor, list[Reduction]]] = field(default_factory=list)
    layer: int = -1

    def decision(self, layer: int, *forms: Tensor) -> Decision | None:
        """Return the decision in ``layer`` about the image whose features `[N, D]` are one of ``forms``, if any."""
        calls = [pair for number, *pair in self.decisions if number == layer and pair[0].shape[1] == len(forms[0])]
        images = [pair for features, reductions in calls for pair in zip(features, reductions, strict=True)]
        if not images:
            return None
        if not len(forms[0]):
            return images[0][1].matrix(), []
        distances = [min((rows - form).abs().max().item() for form in forms) for rows, _ in images]
        nearest = min(range(len(images)), key=distances.__getitem__)
        assert distances[nearest] <= 1e-3, "the method received other rows than those of the hand reference"
        return images[nearest][1].matrix(), images[nearest][1].kept.tolist()


@contextmanager
def recorded(layers: Any, spec: str) -> Iterator[Recording]:
    """Record what the method of ``spec`` receives and decides in each of ``layers``; to be entered before attaching."""
    cls, recording = find(spec.split("(")[0]), Recording()

    def enter(number: int) -> Any:
        return lambda *_: setattr(recording, "layer", number)

    def call(self: Any, image: Any) -> Reduction:
        out = original(self, image)
        recording.decisions.append((recording.layer, image.features.clone(), list(out)))
        return out

    original, own = cls.__call__, "__call__" in vars(cls)
    handles = [layer.register_forward_pre_hook(enter(number)) for number, layer in enumerate(layers)]
    cls.__call__ = call
    try:
        with torch.no_grad():
            yield recording
    finally:
        if own:
            cls.__call__ = original
        else:
            del cls.__call__
        for handle in handles:
            handle.remove()


def evidence(model: Any, inputs: dict[str, Tensor], needs: tokensieve.Needs, first: str = "") -> tuple[list, list]:
    """Attach a connector method with these ``needs`` after the spec ``first``, and run a prompt.

    Returns:
        What the method received, per group of equal images, and the decisions `[sample][image]`.
    """
    received: list = []

    @dataclass(frozen=True)
    class Spy(tokensieve.Method):
        """Keep all tokens but the last."""

        def reduce(self, image: Any) -> Reduction:
            received.append(image)
            return image.keep(torch.arange(image.total - 1).expand(len(image.features), -1))

    tokensieve.register("spy", paper="test", needs=needs)(Spy)
    with torch.no_grad(), tokensieve.attach(model, [*(tokensieve.parse(first) if first else ()), Spy()]) as sieve:
        model(**inputs)
    return received, sieve.last

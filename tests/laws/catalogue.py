"""The specs that go through the law matrix: every registered method, two budgets, the parameters that matter."""

from tokensieve import methods

# 13 tokens: fewer than some images have, more than others (those stay whole); 0.3: a share of any
BUDGETS = (13, 0.3)
VARIANTS = (
    "vtc-cls(keep=5, first_layer=-2)",
    "vtc-cls(keep=0.5, over_layers='max')",
    "trsm(keep=5, query='prompt')",
    "random(keep=6, seed=3)",
    "downsample(keep=0.5) + vtc-cls(keep=4)",
    "downsample(keep=13) + pool(keep=4)",
)


# these have laws of their own, with merges before the projector and weights that do not sum to 1 (tests/zoo)
ZOO = ("visionzip", "prumerge", "prumerge+", "vispruner", "hired", "fopru")
ZOO += ("cdpruner", "scope", "mmtok", "holov", "par", "setok-cluster")


def entering():
    """Methods that act before the LLM, in every family; others have laws of their own (tests/decoder, tests/fusion)."""
    before = [info for info in methods() if info.stage in ("encoder", "connector")]
    return [info for info in before if not info.needs.cls_similarity and info.name not in ZOO]


def specs() -> list[str]:
    plain = [
        f"{info.name}(keep={keep})" if "keep" in info.parameters else info.name
        for info in entering()
        for keep in (BUDGETS if "keep" in info.parameters else BUDGETS[:1])
    ]
    return [*plain, *VARIANTS]


def whole_specs() -> list[str]:
    """Every registered method, asked to keep all."""
    return [f"{info.name}(keep=1.0)" if "keep" in info.parameters else info.name for info in entering()]

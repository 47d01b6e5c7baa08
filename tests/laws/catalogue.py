"""The specs that go through the law matrix: every registered method, two budgets, the parameters that matter."""

from tokensieve import MethodInfo, list_methods

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

# these have laws of their own: merges before the projector and weights that do not sum to 1 (tests/zoo), and tokens
# that leave inside the vision tower (tests/encoder)
ZOO = ("visionzip", "prumerge", "prumerge+", "vispruner", "hired", "fopru")
ZOO += ("cdpruner", "scope", "mmtok", "holov", "par", "setok-cluster")
TOWER = ("tome", "illava-encoder", "mustdrop-encoder")


def here() -> list[MethodInfo]:
    """The methods of these laws: what acts before the LLM. tests/decoder, zoo, encoder, video have the others."""
    before = [info for info in list_methods() if info.stage in ("encoder", "connector")]
    before = [info for info in before if not info.needs.requests("video")]
    return [info for info in before if info.name not in ZOO + TOWER]


def specs(family: str = "llava-clip") -> list[str]:
    """What goes through the matrix on one family: all but methods that need a [CLS] token where there is none."""
    plain = [
        f"{info.name}(keep={keep})" if "keep" in info.parameters else info.name
        for info in here()
        for keep in (BUDGETS if "keep" in info.parameters else BUDGETS[:1])
        if family == "llava-clip" or not info.needs.cls_similarity
    ]
    return [*plain, *VARIANTS]


def whole_specs() -> list[str]:
    """Every method that can be asked to keep all."""
    return ["full", *(f"{info.name}(keep=1.0)" for info in here() if "keep" in info.parameters)]

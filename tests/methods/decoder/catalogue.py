"""The specs that go through the decoder laws, each with its rule by hand, for LLMs of `models.DEPTH` = 6 blocks."""

from tests.methods.decoder import rules
from tests.methods.decoder.rules import Rule


def share(keep):
    return lambda entered: [max(1, round(keep * entered))]


def down(*shares):
    return lambda entered: [max(1, int(s * entered)) for s in shares]


def geometric(keep, stages):
    """Shares that fall geometrically, rounded down; the last is the budget itself."""

    def counts(entered):
        last = max(1, round(keep * entered))
        return [max(last, int(entered * keep ** (s / stages) + 1e-9)) for s in range(1, stages)] + [last]

    return counts


def tokens(keep):
    return lambda entered: [keep]


RULES = {
    "fastv(layer=2, keep=0.4)": Rule([2], rules.fastv, share(0.4)),
    "fastv(layer=1, keep=13)": Rule([1], rules.fastv, tokens(13)),  # some images stay whole
    # the mean over 6 blocks is half: 2 full blocks, then a quarter
    "fastv(layer=2, average=0.5)": Rule([2], rules.fastv, share(0.25)),
    "window-fastv(layer=2, keep=0.4, windows=3)": Rule([2], rules.window_fastv(3), share(0.4)),
    "pyramiddrop(keep=0.2)": Rule([2, 3, 4], rules.pyramiddrop, geometric(0.2, 3)),
    "pyramiddrop(layers=(1, 4), counts=(0.5, 0.2))": Rule([1, 4], rules.pyramiddrop, down(0.5, 0.2)),
    "vtw(layer=3)": Rule([3], rules.vtw),
    "sparsevlm(layers=(2, 3), counts=(0.5, 0.25))": Rule([2, 3], rules.sparsevlm, down(0.5, 0.25)),
    "sparsevlm+(layers=(2, 4), counts=(0.5, 0.25))": Rule([2, 4], rules.sparsevlm_plus, down(0.5, 0.25)),
    "sparsevlm-rank(layers=(1, 3), scale=2.0, bias=1.0)": Rule([1, 3], rules.sparsevlm_rank(2.0, 1.0)),
    "mustdrop-llm(layers=(1, 3), together=0.8, single=2.0)": Rule([1, 3], rules.mustdrop(0.8, 2.0)),
    "dart(layer=2, keep=0.5, visual_pivots=2, text_pivots=3)": Rule([2], rules.dart(2, 3), share(0.5)),
    "topv(layer=2, keep=0.7)": Rule([2], rules.topv, share(0.7)),
    "text-correlation(layer=2, keep=0.4)": Rule([2], rules.text_correlation, share(0.4)),
    "illava-llm(layer=2, keep=0.4)": Rule([2], rules.illava, share(0.4)),
    "pool-decoder(layer=1, stride=3)": Rule([1], rules.pool(3)),
}
# a connector method, the rule inside, and the spec of both
COMPOSED = {
    "uniform(keep=9) + fastv(layer=2, keep=4)": Rule([2], rules.fastv, tokens(4)),
    "pool(keep=9) + illava-llm(layer=3, keep=0.5)": Rule([3], rules.illava, share(0.5)),
    "random(keep=0.7) + topv(layer=2, keep=0.6)": Rule([2], rules.topv, share(0.6)),
    "divprune(keep=12) + sparsevlm(layers=(1, 4), counts=(6, 2))": Rule([1, 4], rules.sparsevlm, lambda n: [6, 2]),
    "uniform(keep=10) + pyramiddrop(layers=(1, 3), counts=(6, 2))": Rule([1, 3], rules.pyramiddrop, lambda n: [6, 2]),
}
WHOLE = (
    "fastv(keep=1.0)", "window-fastv(keep=1.0)", "pyramiddrop(keep=1.0)", "sparsevlm(keep=1.0)", "sparsevlm+(keep=1.0)",
    "dart(keep=1.0)", "topv(keep=1.0)", "text-correlation(keep=1.0)", "illava-llm(keep=1.0)", "fastv(average=10_000)",
    "pool-decoder(stride=1)",
)  # fmt: skip

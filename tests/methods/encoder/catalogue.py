"""The specs that go through the laws inside the tower, each with its rule by hand, for 25 patches and 3 layers used.

Towers have 4 layers; features come from the third. The numbers that leave in each layer are written out.
"""

from tests.support.encoder_oracle import Rule, illava, mustdrop, tome

EVERY = [0, 1, 2]
RULES = {
    "tome(keep=5)": Rule(tome([7, 8, 5]), EVERY, proportional=True),  # no layer can merge more than half
    "tome(keep=0.5)": Rule(tome([4, 5, 4]), EVERY, proportional=True),
    "tome(keep=0.5, official_order=True)": Rule(tome([4, 5, 4], official=True), EVERY, proportional=True),
    "tome(r=4, prop_attn=False)": Rule(tome([4, 4, 4]), EVERY),
    "tome(keep=13, inflection=1.0)": Rule(tome([0, 4, 8]), EVERY, proportional=True),
    "illava-encoder(keep=0.4)": Rule(illava([8, 7]), [1, 2]),
    "illava-encoder(keep=6, layers=(0, 2), favour_attended=True)": Rule(illava([10, 9], favour=True), [0, 2]),
    "mustdrop-encoder(threshold=-1.0)": Rule(mustdrop(5, 3, -1.0), [0], behind=True),
    "mustdrop-encoder(threshold=0.45, window=2, layer=1)": Rule(mustdrop(5, 2, 0.45), [1], behind=True),
    "mustdrop-encoder(threshold=0.0125, window=2, layer=1)": Rule(mustdrop(5, 2, 0.0125), [1], behind=True),
}
FAMILIES = ("llava-clip", "llava-siglip")
# these keep different numbers of different images
ADAPTIVE = {
    "llava-clip": "mustdrop-encoder(threshold=0.45, window=2, layer=1)",
    "llava-siglip": "mustdrop-encoder(threshold=0.0125, window=2, layer=1)",
}

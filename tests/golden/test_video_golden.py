"""The video methods against the authors' code and against vLLM's own functions, at published sizes.

The inputs are drawn (``drawn.py``); ``make_video.py`` wrote the outputs.
"""

from tests.golden.make_video import rows_of
from tests.golden.vectors import cases, load
from tokensieve import parse
from tokensieve.tokens import ConnectorTokens


def decide(spec, case, **parameters):
    """Return the decision of one method about the video of a case."""
    rows = rows_of(case)
    (method,) = parse(spec, **parameters)
    return method(ConnectorTokens(rows.flatten(0, 1)[None], frames=len(rows)))[0]


def assert_kept(reduction, expected, case):
    """The same tokens stay. From bfloat16 tokens the official codes compute in bfloat16: a few tokens are others."""
    ours, theirs = set(reduction.kept.tolist()), set(expected["kept_indices"].tolist())
    if case.get("dtype", "float32") == "float32":
        assert ours == theirs
    else:
        assert len(ours & theirs) > 0.85 * len(theirs)


@cases("vllm_evs")
def test_evs_keeps_what_vllm_keeps(name):
    _, expected, case = load("vllm_evs", name)
    total, pruned = case["frames"] * case["size"], 1 - case["share"]
    keep = max(case["size"], int(total * (1 - pruned)))  # vLLM rounds down, and counts the first frame
    assert len(expected["kept_indices"]) == keep
    assert_kept(decide("evs", case, keep=keep), expected, case)


@cases("vllm_vidcom2")
def test_vidcom2_keeps_what_vllm_keeps(name):
    _, expected, case = load("vllm_vidcom2", name)
    reduction = decide("vidcom2", case, keep=1 - (1 - case["share"]))
    assert reduction.slots == len(expected["kept_indices"])
    assert_kept(reduction, expected, case)


@cases("vidcom2")
def test_vidcom2_keeps_what_the_official_code_keeps(name):
    _, expected, case = load("vidcom2", name)
    assert_kept(decide("vidcom2", case, keep=case["share"], exact=False), expected, case)


@cases("v_cast")
def test_v_cast_keeps_what_the_official_code_keeps(name):
    _, expected, case = load("v_cast", name)
    assert_kept(decide("v-cast", case, keep=case["share"]), expected, case)

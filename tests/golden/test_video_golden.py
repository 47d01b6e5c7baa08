"""The video methods against the authors' code and against vLLM's own functions, at published sizes.

The inputs are drawn (``drawn.py``); ``make_video.py`` wrote the outputs.
"""

from math import ceil

import torch

from tests.golden.drawn import bells
from tests.golden.make_video import attention_of, rows_of
from tests.golden.vectors import CLOSE, cases, load
from tokensieve import parse
from tokensieve.tokens import ByLayer, ConnectorTokens


def decide(spec, case, **parameters):
    """Return the decision of one method about the video of a case."""
    rows, attention = rows_of(case), ByLayer({0: attention_of(case).view(1, -1)})
    (method,) = parse(spec, **parameters)
    return method(ConnectorTokens(rows.flatten(0, 1)[None], frames=len(rows), cls_attention=attention))[0]


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


@cases("flashvid")
def test_flashvid_merges_as_the_official_code(name):
    _, expected, case = load("flashvid", name)
    keep = int(expected["tokens_of_a_frame"]) * case["frames"]
    parameters = {"keep": keep, "segments": case["segments"], "relevance": case["relevance"]}
    reduction = decide("flashvid", case, **parameters, official=True)
    theirs, numbers = expected["kept_indices"].long(), expected["numbers"]
    assert decide("flashvid", case, **parameters).slots == keep <= reduction.slots <= len(theirs)
    if name == "frames_alone":  # theirs clusters kept tokens again
        assert len(theirs.unique()) < len(theirs)
        return
    rows = reduction.apply(rows_of(case).flatten(0, 1))
    ours = torch.stack([rows.sum(-1), rows @ bells(case["seed"] + 3, case["width"])], -1)
    differ, frame = theirs[theirs != reduction.kept] // case["size"], theirs // case["size"]
    for other in differ.unique():  # of two mutual neighbours neither is denser: with two clusters noise decides there
        assert int((frame == other).sum()) - ceil(0.7 * keep / case["frames"]) == 2
    assert len(differ.unique()) <= case["frames"] // 4
    same = ~torch.isin(frame, differ)
    torch.testing.assert_close(ours[same], numbers[same], atol=2e-4, rtol=CLOSE["rtol"])  # sums of up to 96 numbers

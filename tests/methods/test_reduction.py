"""Reduction: a matrix with a memory. Everything derived from it is checked against the dense matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tokensieve
from tokensieve import Reduction, Refusal, VisualTokens
from tokensieve.reduction import Mixing
from tokensieve.tokens import ByLayer, ConnectorTokens, UserText
from tokensieve.tokens import given as evidence_of

settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def reductions(draw, total=None, scores=True):
    """One image: pure pruning or a mixing matrix in which every slot has an entry."""
    n = total or draw(st.integers(1, 12))
    anchors = torch.tensor(sorted(draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))))
    k, mixing = len(anchors), None
    if draw(st.booleans()):
        weight = st.floats(0.125, 2, width=16)
        more = draw(
            st.lists(
                st.tuples(st.integers(0, k - 1), st.integers(0, n - 1), weight), max_size=12, unique_by=lambda e: e[:2]
            )
        )
        entries = [(s, int(a), 0.5) for s, a in enumerate(anchors)]
        entries += [e for e in more if int(anchors[e[0]]) != e[1]]
        slot, source, value = zip(*entries, strict=True)
        mixing = Mixing(torch.tensor(slot), torch.tensor(source), torch.tensor(value))
    grid = (1, n) if draw(st.booleans()) else None
    ranked = torch.arange(n, dtype=torch.float32) if scores and draw(st.booleans()) else None
    notes = tuple(draw(st.lists(st.text(max_size=5), max_size=2)))
    return Reduction(n, anchors, mixing, scores=ranked, grid=grid, notes=notes)


@st.composite
def pairs(draw):
    first = draw(reductions())
    return first, draw(reductions(total=first.slots))


def same(a, b):
    assert (a.total, a.grid, a.notes) == (b.total, b.grid, b.notes)
    assert torch.equal(a.anchors, b.anchors)
    assert (a.mixing is None) == (b.mixing is None)
    assert torch.equal(a.matrix(), b.matrix())


@given(reductions(), dtypes)
def test_apply_is_the_matrix_product(reduction, dtype):
    rows = torch.randn(reduction.total, 3).to(dtype)
    out = reduction.apply(rows)
    assert out.dtype == dtype
    torch.testing.assert_close(out, (reduction.matrix() @ rows.float()).to(dtype))


@given(reductions())
def test_properties_that_follow_from_the_matrix(reduction):
    matrix = reduction.matrix()
    assert matrix.shape == (reduction.slots, reduction.total)
    assert torch.equal(reduction.counts, (matrix != 0).sum(-1))
    torch.testing.assert_close(reduction.weight_sums, matrix.sum(-1))
    assert reduction.whole == (reduction.mixing is None and reduction.slots == reduction.total)
    for token, slot in enumerate(reduction.source.tolist()):
        column = matrix[:, token]
        assert slot == -1 if not column.any() else column[slot] == column.max()


@given(pairs())
def test_stages_compose_by_multiplying(pair):
    first, then = pair
    both = then.after(first)
    torch.testing.assert_close(both.matrix(), then.matrix() @ first.matrix())
    assert torch.equal(both.anchors, first.anchors[then.anchors])
    assert both.total == first.total
    assert both.notes == first.notes + then.notes
    assert both.grid == first.grid or first.grid is None
    rows = torch.randn(first.total, 2)
    torch.testing.assert_close(both.apply(rows), then.apply(first.apply(rows)), atol=1e-5, rtol=1e-5)
    assert both.scores is None or both.scores.shape == (both.total,)


@given(reductions())
def test_the_identity_is_neutral(reduction):
    same(reduction.after(Reduction.identity(reduction.total)), reduction)
    same(Reduction.identity(reduction.slots).after(reduction), reduction)


@given(reductions())
def test_json_and_back(reduction):
    import json

    back = Reduction.from_json(json.loads(json.dumps(reduction.to_json())))
    same(back, reduction)
    assert back.scores is None


@given(reductions())
def test_safetensors_and_back(tmp_path_factory, reduction):
    path = tmp_path_factory.mktemp("reductions") / "one.safetensors"
    reduction.save(path)
    back = Reduction.load(path)
    same(back, reduction)
    assert (back.scores is None) == (reduction.scores is None)
    assert back.scores is None or torch.equal(back.scores, reduction.scores)


def test_another_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    refusals = {
        "text": "text.safetensors is not a file of Reduction.save: not in the safetensors format",
        "other": "other.safetensors is not a file of Reduction.save: it holds other tensors",
        "none": r"none.safetensors cannot be read \(No such file",
    }
    for name, message in refusals.items():
        with pytest.raises(Refusal, match=message) as caught:
            Reduction.load(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)


PRUNED = {"total": 6, "anchors": [0, 2]}
MERGED = PRUNED | {"mixing": {"slot": [0, 1, 1], "source": [0, 2, 1], "weight": [1.0, 0.5, 0.5]}}
WRONG = {
    "anchors must be distinct": PRUNED | {"anchors": [2, 2]},
    "anchors must ascend": PRUNED | {"anchors": [3, 2]},
    "anchors must be from 0 to 5; got 0 to 6": PRUNED | {"anchors": [0, 6]},
    "anchors must be from 0 to 5; got -1 to 2": PRUNED | {"anchors": [-1, 2]},
    "slot must be from 0 to 1; got 0 to 2": MERGED
    | {"anchors": [0, 3], "mixing": MERGED["mixing"] | {"slot": [0, 1, 2]}},
    "source must be from 0 to 5; got 0 to 9": MERGED | {"mixing": MERGED["mixing"] | {"source": [0, 2, 9]}},
    "weight must have shape [3]; got [2]": MERGED | {"mixing": MERGED["mixing"] | {"weight": [1.0, 1.0]}},
    "valid must have shape [2]; got [3]": PRUNED | {"valid": [True, True, True]},
    "KeyError: 'anchors'": {"total": 6},
    "KeyError: 'slot'": PRUNED | {"mixing": {"source": [0]}},
    "TypeError": [1, 2],
}


@pytest.mark.parametrize("message", WRONG)
def test_json_that_is_no_reduction_is_refused(message):
    with pytest.raises(Refusal, match=r"this is not the JSON of Reduction.to_json") as caught:
        Reduction.from_json(WRONG[message])
    assert message in str(caught.value) or isinstance(WRONG[message], list)


def test_a_file_with_wrong_tensors_is_refused(tmp_path):
    file, meta = tmp_path / "wrong.safetensors", {"total": "6", "grid": "null", "notes": "[]"}
    for anchors, changed, message in (
        ([2, 2], {}, "anchors must be distinct"),
        ([0, 7], {}, "anchors must be from 0 to 5; got 0 to 7"),
        ([0, 2], {"notes": "["}, "JSONDecodeError"),
        ([0, 2], {"total": "many"}, "ValueError"),
    ):
        save_file({"anchors": torch.tensor(anchors)}, file, metadata=meta | changed)
        with pytest.raises(Refusal, match=rf"wrong.safetensors is not a file of Reduction.save: .*{message}"):
            Reduction.load(file)


def test_wrong_decisions_are_not_replayed():
    for decision, message in (
        (Reduction(6, torch.tensor([1, 1])), "decision 0 cannot be replayed: anchors must be distinct"),
        (Reduction(6, torch.tensor([[1, 2]])), r"decision 0 cannot be replayed: it is about a batch of images"),
    ):
        with pytest.raises(Refusal, match=message):
            tokensieve.attach(torch.nn.Linear(1, 1), [[decision]])


def test_the_representation_counts_tokens():
    anchors = torch.tensor([0, 2])
    mixing = Mixing(torch.tensor([0, 1, 1]), torch.tensor([0, 2, 1]), torch.tensor([1.0, 0.5, 0.5]))
    assert repr(Reduction.identity(4)) == "Reduction(4 of 4 tokens, all kept)"
    assert repr(Reduction(6, anchors, grid=(2, 3))) == "Reduction(2 of 6 tokens, pruned, grid 2 × 3)"
    assert repr(Reduction(6, anchors, mixing)) == "Reduction(2 of 6 tokens, merged)"
    ragged = Reduction(6, anchors.expand(3, 2), valid=torch.ones(3, 2, dtype=torch.bool))
    assert repr(ragged) == "Reduction(3 images of up to 2 of 6 tokens, pruned)"


def test_a_batch_is_its_images():
    tokens, scores = VisualTokens(torch.randn(3, 6, 2), grid=(2, 3), notes=("a",)), torch.randn(3, 6)
    batch = tokens.keep(torch.tensor([[4, 0], [1, 5], [3, 2]]), scores)
    assert len(list(batch)) == 3
    assert batch.kept.tolist() == [[0, 4], [1, 5], [2, 3]]
    for i, one in enumerate(batch):
        assert torch.equal(one.matrix(), batch.matrix()[i])
        assert torch.equal(one.source, batch.source[i])
        assert torch.equal(one.scores, scores[i])
        assert torch.equal(one.apply(tokens.features[i]), batch.apply(tokens.features)[i])
        assert (one.grid, one.notes) == ((2, 3), ("a",))


def test_padded_slots_of_an_adaptive_batch_disappear():
    """Where a method keeps a different number per image, padding repeats a kept anchor and `valid` is False there."""
    anchors, valid = torch.tensor([[0, 2, 5], [3, 3, 4]]), torch.tensor([[True] * 3, [False, True, True]])
    batch = Reduction(6, anchors, valid=valid)
    assert not batch.whole
    assert batch[0].kept.tolist() == [0, 2, 5]
    assert batch[1].kept.tolist() == [3, 4]
    assert batch[1].valid is None
    assert batch.counts.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch.source[1].tolist() == [-1, -1, -1, 1, 2, -1]
    assert batch[1].source.tolist() == [-1, -1, -1, 0, 1, -1]


@pytest.mark.parametrize("padding_first", [True, False])
def test_padded_slots_that_merge_disappear_too(padding_first):
    """The entries of a mixing matrix must follow their slots when padding is removed."""
    anchors, valid = torch.tensor([[1, 1, 4]]), torch.tensor([[False, True, True]])
    slot = torch.tensor([[1, 1, 2, 0]])
    if not padding_first:
        anchors, valid, slot = (
            torch.tensor([[1, 4, 4]]),
            torch.tensor([[True, True, False]]),
            torch.tensor([[0, 0, 1, 2]]),
        )
    mixing = Mixing(slot, torch.tensor([[0, 1, 4, 0]]), torch.tensor([[0.5, 0.5, 1.0, 0.0]]))
    one = Reduction(6, anchors, mixing, valid=valid)[0]
    assert one.kept.tolist() == [1, 4]
    expected = torch.zeros(2, 6)
    expected[0, :2], expected[1, 4] = 0.5, 1.0
    assert torch.equal(one.matrix(), expected)
    rows = torch.randn(6, 2)
    torch.testing.assert_close(one.apply(rows), expected @ rows)


def test_invalid_reductions_are_refused():
    one, batch = Reduction(4, torch.tensor([0, 2])), Reduction(4, torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match="this Reduction is for 4 tokens; got 3 rows"):
        one.apply(torch.randn(3, 2))
    with pytest.raises(ValueError, match="2 tokens leave the first, the second expects 4"):
        one.after(one)
    with pytest.raises(ValueError, match="index the batched ones first"):
        Reduction.identity(2).after(batch)
    with pytest.raises(TypeError, match="holds one image"):
        one[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": torch.zeros(2, 3)}, r"features must be \[B, N, D\]"),
        ({"grid": (2, 2)}, "a grid of 2x2 does not hold 3 tokens"),
        ({"cls_attention": ByLayer({0: torch.zeros(2, 2)})}, r"cls_attention must start with \[2, 3\]; got \[2, 2\]"),
        ({"user_text": UserText(torch.zeros(1, 4, 5), torch.ones(1, 4))}, r"user_text must be of 2 images; got 1"),
    ],
)
def test_evidence_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        ConnectorTokens(**{"features": torch.zeros(2, 3, 5), **fields})


def test_the_mask_of_the_users_words_is_checked():
    with pytest.raises(ValueError, match=r"mask must be \[2, 4\]; got shape \[2, 3\]"):
        UserText(torch.zeros(2, 4, 5), torch.ones(2, 3))


def test_missing_evidence_is_named():
    tokens = ConnectorTokens(torch.zeros(1, 3, 2), cls_attention=ByLayer({1: torch.zeros(1, 3)}, 4))
    for read in (lambda: tokens.cls_attention[-2], lambda: tokens.cls_attention.stack(-2)):
        with pytest.raises(KeyError, match=r"no evidence of encoder layer -?2; requested: \[1\] of 4"):
            read()
    with pytest.raises(ValueError, match="the encoder has layers 0 to 3; got 4"):
        tokens.cls_attention.stack(4)
    with pytest.raises(TypeError, match="request it in the method's needs"):
        evidence_of(tokens.user_text)


def test_every_tensor_moves_to_a_device():
    mixing = Mixing(torch.tensor([0, 1]), torch.tensor([0, 2]), torch.ones(2))
    one = Reduction(3, torch.tensor([0, 2]), mixing, torch.ones(2, dtype=torch.bool), torch.ones(3)).to("meta")
    parts = (one.anchors, one.valid, one.scores, one.mixing.slot, one.mixing.source, one.mixing.weight)
    assert all(tensor.is_meta for tensor in parts)
    assert Reduction.identity(3).to("meta").anchors.is_meta


def test_replayed_decisions_follow_the_prompt_to_its_device():
    from tokensieve.engine.connector.prefill import _replayed

    (loaded,) = _replayed([[Reduction(3, torch.tensor([0, 2]))]], [[3]], torch.device("meta"))
    assert loaded.anchors.is_meta

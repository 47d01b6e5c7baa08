"""The laws of rows that read beside the vision encoder's layers, against one joint forward with a mask by hand."""

from dataclasses import replace

import pytest
import torch

import tokensieve
from tests.support import models, prompts
from tests.support.oracle import NOISE
from tokensieve import Refusal
from tokensieve.methods import ModelShape
from tokensieve.methods.vistog import Grouping, VisToG

SPEC = "vistog(keep=6, weights='random')"
CELLS = [(family, attention) for family in ("llava-clip", "llava-siglip") for attention in ("sdpa", "eager")]


def inputs(family, kind="mixed"):
    return prompts.collate(family, prompts.batch(family, kind))


@pytest.fixture
def received(monkeypatch):
    """What the method receives, call by call."""
    seen, reduce = [], VisToG.reduce

    def recording(self, image):
        seen.append(image)
        return reduce(self, image)

    monkeypatch.setattr(VisToG, "reduce", recording)
    return seen


@torch.no_grad()
def by_hand(tower, pixels, rows, layers):
    """Run patches and rows as one sequence: patches do not see the rows, a row sees patches and earlier rows."""
    patches = tower.embeddings(pixels)
    joined = torch.cat([patches, rows.expand(len(patches), -1, -1)], 1)
    joined = tower.pre_layrnorm(joined) if hasattr(tower, "pre_layrnorm") else joined
    count, total = patches.shape[1], joined.shape[1]
    seen = torch.ones(total, total, dtype=torch.bool).tril()
    seen[:count] = torch.arange(total) < count
    mask = torch.zeros(1, 1, total, total).masked_fill(~seen, torch.finfo(torch.float32).min)
    for layer in tower.encoder.layers[:layers]:
        joined = layer(joined, attention_mask=mask)
    return joined[:, count:]


@pytest.mark.parametrize(("family", "attention"), CELLS)
def test_rows_pass_as_in_one_sequence_that_hides_them(family, attention, received, deviation):
    model, batch = models.tiny_model(family, attention), inputs(family)
    reference = models.unhooked(family, attention)
    with torch.no_grad(), tokensieve.attach(model, SPEC) as sieve:
        model(**batch)
        rows = sieve.nets["connector"].rows_beside
    tower = reference.get_encoder(modality="image")
    layers = range(len(tower.encoder.layers) + 1)[reference.config.vision_feature_layer]
    expected = by_hand(tower, batch["pixel_values"], rows, layers)
    passed = torch.cat([image.rows_beside for image in received])
    assert passed.shape == expected.shape
    assert float((passed - rows).abs().max()) > 0.1  # the layers have changed them
    assert deviation("of rows beside the encoder", passed, expected) <= NOISE


@pytest.mark.parametrize(("family", "attention"), CELLS)
def test_the_patches_stay_bit_identical(family, attention):
    model, batch = models.tiny_model(family, attention), inputs(family)
    before = models.footprint(model)
    with torch.no_grad():
        whole = model.base_model.get_image_features(batch["pixel_values"]).pooler_output
        with tokensieve.attach(model, SPEC):
            beside = model.base_model.get_image_features(batch["pixel_values"]).pooler_output
    assert all(map(torch.equal, whole, beside))
    assert models.footprint(model) == before


def test_the_first_rows_do_not_depend_on_later_ones(received):
    model, batch = models.tiny_model("llava-clip"), inputs("llava-clip")
    with torch.no_grad(), tokensieve.attach(model, SPEC) as sieve:
        model(**batch)
        sieve.nets["connector"].rows_beside[4:] += 1
        model(**batch)
    half = len(received) // 2
    for image, changed in zip(received[:half], received[half:], strict=True):
        assert torch.equal(image.rows_beside[:, :4], changed.rows_beside[:, :4])
        assert not torch.allclose(image.rows_beside[:, 4:], changed.rows_beside[:, 4:])


def test_the_gradient_reaches_the_rows_through_the_frozen_encoder():
    model, batch = models.build("llava-clip").requires_grad_(False), inputs("llava-clip")
    with tokensieve.attach(model, "vistog(keep=6, weights='random', nested=False)") as sieve:
        net = sieve.nets["connector"].train().requires_grad_(True)
        model(**batch, labels=batch["input_ids"]).loss.backward()
    reached = net.rows_beside.grad.abs().amax(-1)
    assert bool((reached[:6] > 1e-9).all())
    assert not bool(reached[6:].any())  # not kept, and no earlier row attends to them
    assert all(weight.grad is not None for weight in net.parameters())
    assert all(weight.grad is None for weight in model.parameters())


def test_the_teacher_of_a_training_has_no_rows(received):
    model, batch = models.tiny_model("llava-clip"), inputs("llava-clip")
    with torch.no_grad():
        whole = model(**batch).logits
        with tokensieve.attach(model, SPEC) as sieve, sieve.paused():
            assert torch.equal(model(**batch).logits, whole)
    assert not received


@pytest.mark.parametrize(
    ("family", "spec", "message"),
    [
        ("qwen2.5-vl", SPEC, "supported in LLaVA with CLIP or SigLIP; got"),
        ("llava-clip", f"tome + {SPEC}", "vistog reads all patches in the vision encoder, inside which tome"),
    ],
)
def test_encoders_without_such_layers_are_refused(family, spec, message):
    model = models.tiny_model(family)
    before = models.footprint(model)
    with pytest.raises(Refusal, match=message) as caught:
        tokensieve.attach(model, spec)
    assert "\n" not in str(caught.value)
    assert models.footprint(model) == before


def test_more_tokens_than_rows_are_refused():
    model, batch = models.tiny_model("llava-clip"), inputs("llava-clip")
    with torch.no_grad(), tokensieve.attach(model, SPEC) as sieve:
        net = sieve.nets["connector"]
        net.rows_beside = torch.nn.Parameter(net.rows_beside[:5])
        with pytest.raises(Refusal, match="this net has 5 semantic tokens; keep asks for 6 tokens"):
            model(**batch)


def test_features_of_several_layers_are_refused(monkeypatch):
    """Side by side, they are wider than the rows of a layer."""
    wider = lambda self, shape: Grouping(replace(shape, patch_width=2 * shape.patch_width))  # noqa: E731
    monkeypatch.setattr(VisToG, "make_net", wider)
    with pytest.raises(Refusal, match="vistog needs one layer of the vision encoder, of width"):
        tokensieve.attach(models.tiny_model("llava-clip"), SPEC)


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_at_first_each_group_is_a_mean_of_patches(training):
    """The frozen projector has seen no other rows. A group without a patch is the mean of those that fit it."""
    net = Grouping(ModelShape("llava", 4, 2, patch_width=8)).train(training)
    groups, patches = torch.randn(2, 6, 8), torch.randn(2, 4, 8)
    rows, shares = net(groups, patches)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 6))
    torch.testing.assert_close(rows, shares @ patches)
    assert len(shares[0].unique(dim=0)) > 1
    net.residual.fill_(1.0)
    torch.testing.assert_close(net.eval()(groups, patches)[0], net(groups, patches)[1] @ patches + groups)

"""ZOO-Prune by its definition: there is no authors' code to compare with."""

import pytest
import torch

from tests.support import families, models, prompts
from tests.support.methods import evidence
from tokensieve import Needs, Refusal, parse
from tokensieve.ops import normalise
from tokensieve.tokens import ConnectorTokens


def zoo_prune(**parameters):
    (method,) = parse("zoo-prune", **parameters)
    return method


def test_the_sensitivity_of_a_quadratic_projector_is_the_length_of_the_row():
    """P(v) = v²/2 in every channel: the difference over 2h is exactly v·u, and every u has entries of ±1."""
    patches = torch.randn(2, 30, 16)
    image = ConnectorTokens(patches, patches=patches, project=lambda rows: rows.square() / 2)
    for seed in (0, 1):
        torch.testing.assert_close(zoo_prune(seed=seed).sensitivity(image), patches.norm(dim=-1), atol=1e-4, rtol=1e-4)


def test_directions_follow_from_the_seed_alone():
    patches, weight = torch.randn(2, 30, 16), torch.randn(16, 8)

    def image(rows):
        return ConnectorTokens(rows @ weight, patches=rows, project=lambda moved: (moved @ weight).relu())

    first, again, other = (zoo_prune(seed=s).sensitivity(image(patches)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    torch.testing.assert_close(zoo_prune(seed=3).sensitivity(image(patches[1:])), first[1:])


@pytest.mark.parametrize("keep", [1, 2, 12, 29])
def test_the_choice_is_greedy(keep):
    patches = torch.randn(1, 30, 16)
    patches[0, 20:] = patches[0, :10]  # an equal of a kept row is at distance 0 and comes last
    image = ConnectorTokens(patches, patches=patches, project=lambda rows: rows.square() / 2)
    sensitivity, rows = zoo_prune().sensitivity(image)[0], normalise(patches[0])
    chosen = [int(sensitivity.argmax())]
    while len(chosen) < keep:
        distance = (1 - rows @ rows[chosen].T).amin(-1)
        gain = (sensitivity * distance.clamp(min=0).where(distance > 1e-5, 0)).index_fill(0, torch.tensor(chosen), -1)
        chosen.append(int(gain.argmax()))
    kept = zoo_prune(keep=keep)(image)[0].kept.tolist()
    assert len(set(kept)) == keep
    if keep <= 12:
        assert kept == sorted(chosen)


@pytest.mark.parametrize("name", families.CORE)
def test_the_projector_is_that_of_the_model(name):
    """Run on the patches, it makes the features."""
    inputs = prompts.collate(name, prompts.batch(name, "two-images"))
    received, _ = evidence(models.tiny_model(name), inputs, Needs(patches=True, project=True))
    for image in received:
        rows = image.project(image.patches.flatten(0, 1)).view(image.features.shape)
        torch.testing.assert_close(rows, image.features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan")])
def test_a_step_of_no_length_is_refused(step):
    with pytest.raises(Refusal, match="step must be above 0; got"):
        zoo_prune(step=step)

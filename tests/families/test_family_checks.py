"""``check.Laws`` (what ``tokensieve check`` runs) on every family: its oracle hides tokens and knows no model."""

import pytest
import torch

from tests.families.test_matrix import METHODS, supported
from tests.support import families, models, prompts
from tokensieve.check import LAWS, Laws
from tokensieve.check.oracle import merged
from tokensieve.reduction import Mixing, Reduction

SKIPPED = {
    "gemma3": "sliding window",
    "aya-vision": "sliding window",
    "cohere2-vision": "sliding window",
    "qwen3.5": "linear attention",
}
OWN_MASKS = ("gemma3", "paligemma", "aya-vision", "cohere2-vision")  # not one causal mask for all blocks


@pytest.mark.parametrize("name", families.FAMILIES)
def test_check_passes_on_every_family(name):
    samples = prompts.batch(name, "one-and-two")
    laws = Laws(models.tiny_model(name), lambda numbers: prompts.collate(name, [samples[i] for i in numbers]))
    kind = "merging" if "merging" in supported(name) else "features"
    found = {verdict.law: verdict for verdict in laws.check(METHODS[kind])}
    for law in LAWS:
        hidden = law in ("oracle", "continuation")
        assert found[law].status == ("skipped" if hidden and name in SKIPPED else "pass"), found[law]
        assert not hidden or SKIPPED.get(name, "") in found[law].reason
    if name in OWN_MASKS:  # what leaves inside counts in a window like what is hidden: the oracle can tell
        for verdict in laws.check(METHODS["inside"]):
            assert verdict.status == "pass", verdict


def test_the_oracle_of_merging_gives_back_a_wrapped_encode_function():
    model = models.build("llava-clip")
    wrapped = model.model.get_image_features  # a bound method on the instance, as another library's wrapper would be
    model.model.get_image_features = wrapped
    mixing = Mixing(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.full((2,), 0.5))
    with merged(model, [[Reduction(2, torch.tensor([0]), mixing)]]):
        assert model.model.get_image_features is not wrapped
    assert vars(model.model)["get_image_features"] is wrapped

"""Images in tiles: views, separator tokens, shares of a budget; and unknown families."""

import inspect
import re
from dataclasses import dataclass

import pytest
import torch
import transformers

import tokensieve
from tests.support import families, models, prompts
from tokensieve import Method, Reduction
from tokensieve.budget import share_out
from tokensieve.engine.handoff import EncoderOutputs
from tokensieve.models import TokenLayout, family_of
from tokensieve.models import families as known_families
from tokensieve.ops import attention_from_cls, attention_received
from tokensieve.tokens import ByLayer, ConnectorTokens, Tiles

GENERATE = {"max_new_tokens": 1, **prompts.GREEDY}


@dataclass
class Tower:
    model_type: str


def _config(kind, tower):
    config = transformers.PretrainedConfig()
    config.model_type, config.vision_config = kind, Tower(tower)
    return config


def run(name, samples, spec, **more):
    """Logits after the prompt, and the decisions."""
    model = models.tiny_model(name)
    with tokensieve.attach(model, spec, **more) as sieve:
        out = model.generate(**prompts.collate(name, samples), **GENERATE)
    return out.logits[0], sieve.last


def internvl(*tiles):
    """A prompt of InternVL with an image of so many tiles each."""
    images = []
    for number, count in enumerate(tiles):
        generator = torch.Generator().manual_seed(number)
        drawn = [families.FAMILIES["internvl"].draw((), generator) for _ in range(count)]
        pixels = {"pixel_values": torch.cat([image.inputs["pixel_values"] for image in drawn])}
        images.append(families.Image(pixels, [families.START, *[families.IMAGE] * 16 * count, families.END]))
    ids = [families.BOS, 7, *(i for image in images for i in [*image.ids, 8, 9])]
    return families.Sample(ids, images)


# -- structure rows -------------------------------------------------------------------------------------------------


def newlines_of(grid, base):
    """Places of the newlines after the rows of ``grid``, behind ``base`` tokens."""
    return [base + row * (grid[1] + 1) + grid[1] for row in range(grid[0])]


@pytest.mark.parametrize("spec", ["uniform(keep=9)", "vtc-cls(keep=3)", "fastv(layer=1, keep=4)", "divprune(keep=0.2)"])
def test_a_newline_stays_if_its_row_keeps_a_patch_and_methods_never_see_one(spec):
    name = "llava-next"
    _, decisions = run(name, prompts.batch(name, "one-and-two"), spec)
    for sample, row in zip(prompts.batch(name, "one-and-two"), decisions, strict=True):
        for image, decision in zip(sample.images, row, strict=True):
            kept, places = set(decision.kept.tolist()), set(image.newlines)
            width = image.newlines[1] - image.newlines[0] - 1
            expected = {place for place in places if kept & set(range(place - width, place))}
            assert kept & places == expected
            patches = image.tokens - len(places)
            keep = {"uniform(keep=9)": 9, "vtc-cls(keep=3)": 3, "fastv(layer=1, keep=4)": 4}
            assert len(kept - places) == keep.get(spec, round(0.2 * patches))


def test_the_layouts_of_llava_next_are_those_of_its_packing():
    name = "llava-next"
    model, (sample,) = models.tiny_model(name), prompts.batch(name, "single")
    inputs = {"pixel_values": sample.images[0].inputs["pixel_values"], "image_sizes": torch.tensor([[56, 84]])}
    with tokensieve.attach(model, "full"):
        encoded = model.model.get_image_features(**inputs, return_dict=True)
    (layout,) = EncoderOutputs.of(encoded).layouts
    assert layout.views == ((4, 4), (4, 6))
    assert layout.separator.nonzero().squeeze(-1).tolist() == newlines_of((4, 6), 16)
    rows = model.model.multi_modal_projector(
        model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[-2][:, 1:]
    )
    assert torch.equal(encoded.pooler_output[0][layout.patch_index], rows.flatten(0, 1)[layout.units])
    assert torch.equal(encoded.pooler_output[0][layout.separator], model.model.image_newline.expand(4, -1))


def test_merges_are_lifted_over_structure_rows():
    """Two views of 4 tokens, a newline after each pair: the whole's matrix has the parts' as its blocks."""
    places = torch.tensor([0, 1, 3, 4, 6, 7, 9, 10])
    line = torch.arange(4).repeat_interleave(3)
    shape = TokenLayout(12, ((2, 2), (2, 2)), line=line, patch_index=places)
    image = tokensieve.VisualTokens(torch.randn(1, 4, 3), grid=(2, 2))
    slot, source = torch.tensor([[0, 0, 0]]), torch.tensor([[0, 1, 2]])
    merged = image.merge(torch.tensor([[1]]), slot, source, torch.tensor([[0.5, 0.25, 0.25]]))[0]
    kept = image.keep(torch.tensor([[2, 3]]))[0]
    lifted = shape.merge_parts([merged, kept])
    assert lifted.anchors.tolist() == [1, 2, 9, 10, 11]  # of the first view only its first line keeps a token
    expected = torch.zeros(5, 12)
    expected[0, [0, 1, 3]] = torch.tensor([0.5, 0.25, 0.25])
    expected[[1, 2, 3, 4], [2, 9, 10, 11]] = 1
    assert torch.equal(lifted.matrix(), expected)
    assert shape.merge_parts([Reduction.identity(4), Reduction.identity(4)]).whole


def test_newlines_are_left_alone_by_merges_before_the_projector():
    name, seen = "llava-next", {}
    model, (sample,) = models.tiny_model(name), prompts.batch(name, "single")

    def watch(module, args, kwargs):
        seen.setdefault("rows", kwargs["mm_encoder_outputs"]["image"].pooler_output[0])

    with tokensieve.attach(model, "visionzip(keep=8)") as sieve:
        hook = model.model.register_forward_pre_hook(watch, with_kwargs=True)
        model.generate(**prompts.collate(name, [sample]), **GENERATE)
        hook.remove()
        ((decision,),) = sieve.last
    newlines = torch.isin(decision.anchors, torch.tensor(sample.images[0].newlines))
    assert not decision.projected
    assert int(newlines.sum()) >= 1
    assert torch.equal(seen["rows"][newlines], model.model.image_newline.expand(int(newlines.sum()), -1))
    assert not torch.isin(seen["rows"][~newlines], model.model.image_newline).any()


# -- views and budgets ----------------------------------------------------------------------------------------------


def test_budgets_are_shared_out_exactly():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = (
            torch.randint(1, 40, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator)
        ).tolist()
        keep = int(torch.randint(1, 150, (), generator=generator))
        shares = share_out(keep, sizes)
        assert all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))
        assert sum(shares) == max(len(sizes), min(keep, sum(sizes)))
        exact = [keep * size / sum(sizes) for size in sizes]
        if keep < sum(sizes) and min(exact) >= 2:
            assert all(abs(share - e) < 2 for share, e in zip(shares, exact, strict=True))
    assert share_out(0.5, [4, 4, 8]) == [2, 2, 4]
    assert share_out(2, [9, 9, 9]) == [1, 1, 1]


def test_tiles_side_by_side_are_one_image():
    sample = internvl(3, 1)
    _, ((first, second),) = run("internvl", [sample], "vtc-cls(keep=5)")
    assert (first.total, first.slots, first.grid) == (48, 5, None)
    assert (second.total, second.slots, second.grid) == (16, 5, (4, 4))


def test_methods_that_need_a_grid_act_view_by_view():
    _, ((first, second),) = run("internvl", [internvl(3, 1)], "pool(keep=12)")
    assert first.slots == 12
    assert [int((first.anchors // 16 == tile).sum()) for tile in range(3)] == [4, 4, 4]
    assert second.slots == 12
    tile_of = torch.arange(48) // 16
    assert torch.equal(tile_of[first.anchors][:, None].expand(-1, 48)[first.matrix() > 0],
                       tile_of.expand(12, -1)[first.matrix() > 0])  # fmt: skip
    _, ((mosaic,),) = run("llava-next", prompts.batch("llava-next", "single"), "pool(keep=20)")
    assert len(set(mosaic.kept.tolist()) - set(newlines_of((4, 6), 16))) <= 20


def test_a_budget_for_each_tile():
    _, ((first, second),) = run("internvl", [internvl(3, 1)], "divprune(keep=2)", budget_scope="tile")
    assert first.slots == 6
    assert [int((first.anchors // 16 == tile).sum()) for tile in range(3)] == [2, 2, 2]
    assert second.slots == 2


@pytest.mark.parametrize("spec", ["vtc-cls(keep=10)", "pool(keep=10)", "fastv(layer=1, keep=10)"])
def test_a_budget_for_each_sample(spec):
    batch = [internvl(3, 1), internvl(1)]
    _, ((first, second), (alone,)) = run("internvl", batch, spec, budget_scope="sample")
    assert second.slots < first.slots
    assert alone.slots == 10 if "pool" not in spec else alone.slots <= 10
    if "pool" not in spec:
        assert first.slots + second.slots == 10
    logits, decisions = run("internvl", batch, spec, budget_scope="sample")
    for row, sample in enumerate(batch):
        own, ((*mine,),) = run("internvl", [sample], spec, budget_scope="sample")
        assert torch.allclose(own[0], logits[row], atol=1e-4)
        assert [r.kept.tolist() for r in mine] == [r.kept.tolist() for r in decisions[row]]


SCOPES = {
    "unknown": ("vtc-cls", "photo", "budget_scope must be one of 'image', 'sample', 'sample-score', 'tile'"),
    "encoder": ("downsample", "sample", "budget_scope='sample' is not for methods that act in the encoder"),
    "tiles inside the LLM": ("fastv", "tile", "budget_scope='tile' is not for methods that act in the decoder"),
    "another budget": (
        "fastv(layer=1, average=0.5)",
        "sample",
        "fastv(keep=0.5, average=0.5, layer=1) has other budgets",
    ),
    "fusion": ("pumer", "sample", "is not for methods that act in the fusion"),
}


@pytest.mark.parametrize("case", SCOPES)
def test_scopes_that_a_budget_cannot_have(case):
    spec, scope, message = SCOPES[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        tokensieve.attach(models.tiny_model("internvl"), spec, budget_scope=scope)


def test_models_that_stack_equal_images_are_handed_one_tensor():
    """InternVL's features are a tensor; uneven images of a batch still reach it as one."""
    seen = []
    model = models.tiny_model("internvl")
    with tokensieve.attach(model, "random(keep=0.3)", budget_scope="sample"):
        hook = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["mm_encoder_outputs"]["image"].pooler_output),
            with_kwargs=True,
        )
        model.generate(**prompts.collate("internvl", [internvl(3, 1)]), **GENERATE)
        hook.remove()
    assert isinstance(seen[0], torch.Tensor)
    assert seen[0].shape == (1, round(0.3 * 64), 64)


# -- reading the encoder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_attention_is_read_under_the_mask(kind):
    """Two packed images: each as if it were alone."""
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 2, 7, 4, generator=g), torch.randn(1, 2, 7, 4, generator=g)
    image = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    mask = (image[:, None] == image)[None, None]
    if kind == "additive":
        mask = torch.zeros(1, 1, 7, 7).masked_fill(~mask, torch.finfo(torch.float32).min)
    together = attention_received(query, key, 0.5, mask)
    alone = [attention_received(query[:, :, image == i], key[:, :, image == i], 0.5) for i in (0, 1)]
    assert torch.allclose(together, torch.cat(alone, -1), atol=1e-6)
    first = attention_from_cls(query[:, :, :3], key[:, :, :3], 0.5)
    assert torch.allclose(attention_from_cls(query, key, 0.5, mask)[:, :3], first, atol=1e-6)


def test_an_image_that_is_resampled_after_the_encoder():
    """LLaVA-OneVision shrinks large mosaics: features can be chosen among, attention belongs to none of them."""
    name = "llava-onevision"
    model, (sample,) = models.build(name), prompts.batch(name, "single")
    pixels = torch.randn(1, 5, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[112, 112]])}
    model.config.vision_aspect_ratio = "anyres_max_2"  # of at most 2 tiles: 8 x 8 patches become 5 x 5
    ids = torch.tensor([[*sample.ids[:3], *[families.IMAGE] * (16 + 5 * 6), 7, 8]])
    with tokensieve.attach(model, "divprune(keep=5)") as sieve:
        model.generate(input_ids=ids, **inputs, **GENERATE)
    kept = set(sieve.last[0][0].kept.tolist())
    assert len(kept - set(newlines_of((5, 5), 16))) == 5
    with (
        tokensieve.attach(model, "vtc-cls(keep=5)"),
        pytest.raises(ValueError, match="resamples an image of this size"),
    ):
        model.generate(input_ids=ids, **inputs, **GENERATE)


def test_the_encode_function_is_wrapped_on_the_instance_and_given_back():
    model = models.tiny_model("llava-next")
    before = inspect.signature(model.model.get_image_features)
    with tokensieve.attach(model, "uniform(keep=5)"):
        assert inspect.signature(model.model.get_image_features) == before
        assert "get_image_features" in vars(model.model)
    assert "get_image_features" not in vars(model.model)
    own = model.model.get_image_features
    model.model.get_image_features = own
    with tokensieve.attach(model, "uniform(keep=5)"):
        pass
    assert vars(model.model).pop("get_image_features") is own


# -- families -------------------------------------------------------------------------------------------------------


def test_every_file_is_a_family():
    found = known_families()
    assert {"llava", "qwen-vl", "llava-next", "internvl"} <= {family.name for family in found}
    types = {kind for family in found for kind in family.model_types}
    assert all(sum(family.describes(_config(kind, "clip")) for family in found) == 1 for kind in types)
    assert all(family.title and family.stages for family in found)


@pytest.fixture
def unknown(monkeypatch):
    """A model of a known shape under an unknown name."""

    def make(name):
        model = models.tiny_model(name)
        monkeypatch.setattr(type(model.config), "model_type", "novel_vlm")
        return model

    return make


@pytest.mark.parametrize("spec", ["divprune(keep=5)", "vtc-cls(keep=5)", "trsm(keep=5)", "fastv(layer=1, keep=5)"])
def test_an_unknown_family_of_the_same_shape(unknown, spec):
    expected, decided = run("vipllava", prompts.batch("vipllava", "one-and-two"), spec)
    assert "untested" in family_of(unknown("vipllava")).title
    got, again = run("vipllava", prompts.batch("vipllava", "one-and-two"), spec)
    assert torch.equal(got, expected)
    assert [[r.kept.tolist() for r in row] for row in again] == [[r.kept.tolist() for r in row] for row in decided]


def test_evidence_that_an_unknown_family_cannot_give_is_refused(unknown):
    model = unknown("vipllava")
    inputs = prompts.collate("vipllava", prompts.batch("vipllava", "single"))
    with tokensieve.attach(model, "pool(keep=4)"), pytest.raises(ValueError, match="needs tokens on a grid"):
        model.generate(**inputs, **GENERATE)
    with tokensieve.attach(model, "uniform(keep=4)"), pytest.raises(ValueError, match="speaker has a value per token"):
        model(**inputs, speaker=torch.zeros_like(inputs["input_ids"]))


def test_an_unknown_llm_whose_layers_are_not_found(unknown, monkeypatch):
    model, samples = unknown("vipllava"), prompts.batch("vipllava", "one-and-two")
    expected = run("vipllava", samples, "divprune(keep=5)")
    monkeypatch.setattr(model, "get_decoder", torch.nn.Identity)
    with pytest.raises(ValueError, match="the layers of its Identity cannot be found"):
        tokensieve.attach(model, "fastv")
    with tokensieve.attach(model, "divprune(keep=5)") as sieve:
        out = model.generate(**prompts.collate("vipllava", samples), **GENERATE)
        assert torch.equal(out.logits[0], expected[0])
        assert sieve.tokens == [[[5] * 3 for _ in sample.images] for sample in samples]


@pytest.mark.parametrize("name", ["internvl", "llava-next"])
def test_methods_that_need_one_grid_refuse_tiles(name):
    samples = [internvl(3)] if name == "internvl" else prompts.batch(name, "single")
    with pytest.raises(ValueError, match="an image that is seen in several tiles does not have: take a method that"):
        run(name, samples, "topv(layer=1, keep=4)")


def test_an_unknown_llm_with_another_mask(unknown):
    model = unknown("paligemma")
    inputs = prompts.collate("paligemma", prompts.batch("paligemma", "single"))
    with tokensieve.attach(model, "fastv(layer=1, keep=4)"), pytest.raises(ValueError, match="mask is another one"):
        model.generate(**inputs, **GENERATE)
    with tokensieve.attach(model, "uniform(keep=4)"):
        model.generate(**inputs, **GENERATE)


@pytest.mark.parametrize("kind", ["mllama", "blip-2", "instructblip"])
def test_families_that_are_refused(kind):
    @dataclass
    class Config:
        model_type: str = kind

    class Stub(torch.nn.Module):
        config = Config()

    with pytest.raises(ValueError, match=r"is not supported: (its LLM reads images by cross|a Q-Former hands its LLM)"):
        tokensieve.attach(Stub(), "full")


def test_a_plugin_whose_parameters_cannot_be_hashed(registry):
    @tokensieve.register("listed", paper="none")
    @dataclass(frozen=True)
    class Listed(Method):
        """Keep these."""

        places: tuple = ()

        def reduce(self, image):
            return image.keep(torch.tensor(self.places).expand(len(image.features), -1))

    _, decisions = run("internvl", [internvl(1, 1)], [Listed(places=[0, 3])])
    assert [r.kept.tolist() for r in decisions[0]] == [[0, 3]] * 2


# -- tiles of a mosaic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision", "llava-next-video"])
@torch.no_grad()
def test_each_token_has_the_number_of_its_tile(name, registry):
    """The model's own packing, of rows that hold their tile's number, gives the numbers that the method receives."""
    received = []

    @tokensieve.register("spy", paper="none")
    @dataclass(frozen=True)
    class Spy(Method):
        keep: int = 5

        def reduce(self, image):
            received.extend((image.tiles.count, image.tiles.views, numbers) for numbers in image.tiles.number)
            return image.keep(torch.arange(5).expand(len(image.features), -1))

    model, samples = models.tiny_model(name), [prompts.batch(name, "one-and-two")[0]]
    inputs = prompts.collate(name, samples)
    run(name, samples, "spy")
    assert received
    base = model.model
    for (tiles, views, tile), size in zip(received, inputs["image_sizes"], strict=True):
        height, width = views[0]
        numbers = torch.arange(1.0, tiles + 2)[:, None, None].expand(-1, height * width, 2)
        more = {"vision_aspect_ratio": "anyres_max_9"} if name == "llava-onevision" else {}
        more |= {} if name == "llava-onevision" else {"vision_feature_select_strategy": "full"}
        packed, _ = base.pack_image_features([numbers], size[None], image_newline=torch.zeros(2), **more)
        rows = packed[0][:, 0]
        assert torch.equal(rows[rows > 0] - 1, tile.float())
        assert views[1][0] * views[1][1] == len(tile) - height * width


def test_hired_shares_out_over_the_tiles_of_a_mosaic():
    """By hand: where the whole image's salient patches lie in an unpadded mosaic of two tiles, five and three wide."""
    scores = torch.zeros(1, 16 + 4 * 8)
    first = torch.zeros_like(scores)
    first[0, [0, 1, 5, 11, 14]] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])  # columns 0, 1, 1, 3, 2 of four
    column = torch.arange(4 * 8) % 8
    tile = torch.cat([torch.zeros(16, dtype=torch.long), torch.where(column < 5, 1, 2)])[None]
    scores[0] = torch.arange(48.0)
    image = ConnectorTokens(
        torch.randn(1, 48, 4),
        cls_attention=ByLayer({0: first, 2: scores}, 4),
        tiles=Tiles(tile, 2, ((4, 4), (4, 8))),
    )
    (method,) = tokensieve.parse("hired(keep=18, alpha=0.7)")  # 12 of the whole image; salient: the first 4 of 16
    (decision,) = method(image)
    stayed = tile[0, decision.kept].bincount(minlength=3).tolist()
    assert stayed == [12, 5, 1]  # three of four salient patches lie in the first tile: 4.5 of 6, rounded up
    for number, count in enumerate(stayed):
        best = (tile[0] == number).nonzero().flatten()[-count:]  # the scores rise
        assert set(best.tolist()) <= set(decision.kept.tolist())


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
def test_hired_in_a_batch_of_different_mosaics(name):
    """Each row decides as it would alone."""
    samples = prompts.batch(name, "one-and-two")
    _, decisions = run(name, samples, "hired(keep=10)")
    for sample, row in zip(samples, decisions, strict=True):
        _, (alone,) = run(name, [sample], "hired(keep=10)")
        assert [r.kept.tolist() for r in row] == [r.kept.tolist() for r in alone]

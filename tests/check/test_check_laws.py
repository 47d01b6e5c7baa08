"""``Laws``: they hold for sound methods and engines, and each law fails when its property is broken."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch

import tokensieve
from tests.support import models, oracle, prompts
from tests.support.families import IMAGE
from tests.support.oracle import NOISE
from tokensieve import Method, Needs, Reduction, VisualTokens
from tokensieve.check import LAWS, Laws
from tokensieve.check.oracle import dropped_columns, hidden, merged
from tokensieve.engine import llm
from tokensieve.engine.connector import prefill
from tokensieve.engine.connector.sizes import bias_of
from tokensieve.engine.llm import LlmSieve
from tokensieve.evaluate import Sample, encode
from tokensieve.reference.benchmark import benchmark
from tokensieve.reference.vilt import ASKED

METHODS = (
    "fastervlm(keep=5)",
    "divprune(keep=0.3)",
    "trsm(keep=5)",
    "visionzip(keep=7, before_projector=False)",
    "fastv(layer=1, keep=5)",
    "uniform(keep=8) + fastv(layer=2, keep=3)",
    "uniform(keep='layers:8') + fastv(layer=2, keep='layers:8')",
    "divprune(keep='average:30%:gain:0.03')",
)
SOUND = (("llava-clip", "sdpa"), ("qwen3-vl", "eager"))


def build(family: str, model, **options) -> Laws:
    samples = [*prompts.batch(family, "ragged")[:2], *prompts.batch(family, "two-images")]
    return Laws(model, lambda numbers: prompts.collate(family, [samples[i] for i in numbers]), **options)


@cache
def laws(family: str, attention: str = "sdpa") -> Laws:
    return build(family, models.tiny_model(family, attention))


def verdicts(family: str, method) -> dict:
    return {verdict.law: verdict for verdict in laws(family).check(method)}


@cache
def checked(family: str, attention: str, method: str) -> tuple:
    """Return the verdicts on one method; a model that the check leaves changed fails every test of it."""
    model = laws(family, attention).model
    before = models.footprint(model)
    found = tuple(laws(family, attention).check(method))
    assert models.footprint(model) == before
    return found


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "attention"), SOUND)
def test_a_law_holds(family, attention, method, law):
    (verdict,) = (verdict for verdict in checked(family, attention, method) if verdict.law == law)
    assert verdict.status == "pass", verdict
    if law == "identity":
        assert verdict.deviation == 0.0
    if law in ("oracle", "batch", "continuation"):
        assert verdict.deviation <= NOISE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "attention"), SOUND)
def test_every_law_has_one_verdict_in_order(family, attention, method):
    found = checked(family, attention, method)
    assert [verdict.law for verdict in found] == list(LAWS)
    assert {verdict.method for verdict in found} == {" + ".join(map(str, tokensieve.parse(method)))}


@pytest.mark.parametrize(("family", "attention"), SOUND)
def test_the_noise_floor_is_rounding(family, attention):
    assert 0 < laws(family, attention).floor < 2e-5


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llava-clip", "sdpa"), ("llava-siglip", "eager"), ("qwen2.5-vl", "eager"), ("qwen3-vl", "sdpa")],
)
def test_hiding_tokens_is_the_language_model_fed_by_hand(family, attention, deviation):
    """Compare the oracle of ``check`` with the hand reference of the tests: two ways to leave tokens out."""
    model, samples = models.tiny_model(family, attention), prompts.batch(family, "mixed")
    before, g = models.footprint(model), torch.Generator().manual_seed(0)

    def decide(image) -> Reduction:
        kept = torch.randperm(image.tokens, generator=g)[:5].sort().values
        mixing = tokensieve.reduction.Mixing(torch.tensor([0, 0, 1, 2, 3, 4]), torch.tensor([0, *kept]), torch.rand(6))
        return Reduction(image.tokens, kept, mixing)

    decisions = [[decide(image) for image in s.images] for s in samples]
    inputs = prompts.collate(family, samples)
    gone = dropped_columns(inputs["input_ids"], IMAGE, decisions)
    with hidden(model, gone), merged(model, decisions):
        out = model.generate(**inputs, max_new_tokens=4, **prompts.GREEDY)
    for i, s in enumerate(samples):
        rows = [
            oracle.encode_image(model, family, image).mixed(r.matrix())
            for image, r in zip(s.images, decisions[i], strict=True)
        ]
        answer = out.sequences[i, -4:].tolist()
        by_hand = oracle.logits(model, family, s, [r.kept for r in decisions[i]], rows, answer[:-1])
        assert deviation("of hidden tokens from the hand reference", torch.stack(out.logits, 1)[i], by_hand) <= NOISE
    assert models.footprint(model) == before


def test_hiding_tokens_inside_needs_no_mask_of_the_caller(deviation):
    """Hide tokens without a mask argument: one unpadded prompt uses the kernel's causal mask, a batch has its own."""
    model, samples = models.tiny_model("llava-clip"), prompts.batch("llava-clip", "ragged")
    decisions = [[Reduction(image.tokens, torch.tensor([3, 7, 11])) for image in s.images] for s in samples]
    rows = []
    for chosen, reductions in ((samples, decisions), (samples[1:2], decisions[1:2])):
        inputs = prompts.collate("llava-clip", chosen)
        with hidden(model, dropped_columns(inputs["input_ids"], IMAGE, reductions), 1):
            rows.append(torch.stack(model.generate(**inputs, max_new_tokens=4, **prompts.GREEDY).logits, 1))
    assert deviation("of tokens hidden inside", rows[0][1], rows[1][0]) <= NOISE
    whole = torch.stack(model.generate(**inputs, max_new_tokens=4, **prompts.GREEDY).logits, 1)
    assert (rows[1] - whole).abs().max() > 0.1


def test_a_refusal_is_no_failure():
    found = verdicts("llava-siglip", "cls-knee")
    assert {verdict.status for verdict in found.values()} == {"refused"}
    assert all("this encoder has none" in verdict.reason for verdict in found.values())


def test_an_unknown_method_is_refused():
    with pytest.raises(tokensieve.Refusal, match="unknown method"):
        verdicts("llava-clip", "nonsuch")


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("visionzip(keep=7)", "before the projector"),
        ("downsample(keep=9)", "changes the image"),
        ("pyramiddrop(layers=(1, 2), counts=(9, 4))", "several layers"),
    ],
)
def test_a_skipped_law_has_a_reason(method, reason):
    found = verdicts("llava-clip", method)
    assert {law: found[law].status for law in LAWS} == dict.fromkeys(LAWS, "pass") | dict.fromkeys(
        ("oracle", "continuation"), "skipped"
    )
    assert reason in found["oracle"].reason


@pytest.mark.parametrize("method", ["glimpse-prune(weights='random', layer=2, keep=5)", "uniform(keep=9) + {}"])
def test_tokens_that_leave_earlier_caches_are_hidden_from_all_later_calls(method):
    found = verdicts("llava-clip", method.format("glimpse-prune(weights='random', layer=2, keep=5)"))
    assert {law: found[law].status for law in LAWS} == dict.fromkeys(LAWS, "pass"), found
    assert found["oracle"].deviation <= NOISE


def test_identity_of_a_method_without_budget_is_checked_after_detach():
    assert "no budget" in verdicts("llava-clip", "vtw(layer=1)")["identity"].reason


# -- each law fails when its property is broken -----------------------------------------------------------------------


@dataclass(frozen=True)
class Own(Method):
    """Keeps the first tokens; subclasses add a fault."""

    keep: int | float = 5

    def reduce(self, image: VisualTokens) -> Reduction:
        first = torch.arange(image.budget).expand(image.features.shape[0], -1)
        return image.keep(first)


def broken(method: Method) -> dict[str, str]:
    """Return the laws that fail, with their reasons."""
    found = verdicts("llava-clip", [method]).values()
    assert "refused" not in {verdict.status for verdict in found}, found
    return {verdict.law: verdict.reason for verdict in found if verdict.status == "FAIL"}


@pytest.fixture
def own(registry):
    return registry.register("own", paper="none", needs=Needs())


def test_a_sound_method_breaks_nothing(own):
    assert broken(own(Own)()) == {}


def test_identity_notices_a_method_that_drops_what_it_should_keep(own):
    class Greedy(Own):
        def __call__(self, image: VisualTokens) -> Reduction:
            return image.keep(torch.arange(image.total - 1).expand(image.features.shape[0], -1))

    assert broken(own(Greedy)()).keys() == {"identity"}


@pytest.mark.filterwarnings("ignore:module forward hook")
def test_identity_notices_what_is_left_behind(own, monkeypatch):
    trial = build("llava-clip", models.build("llava-clip"))  # a model of its own: the hooks stay on it
    monkeypatch.setattr(LlmSieve, "_remove", lambda sieve: None)
    found = {verdict.law: verdict.status for verdict in trial.check([own(Own)()])}
    assert found["identity"] == "FAIL"


def test_oracle_notices_wrong_positions(own, monkeypatch):
    position_ids = prefill.position_ids
    monkeypatch.setattr(prefill, "position_ids", lambda *args: position_ids(*args) * 2)
    assert "oracle" in broken(own(Own)())


def test_oracle_notices_wrong_rows(own, monkeypatch):
    apply = Reduction.apply

    def shifted(self, rows):
        return apply(self, rows if self.whole else rows.roll(1, -2))

    monkeypatch.setattr(Reduction, "apply", shifted)
    assert broken(own(Own)()).keys() <= {"oracle", "continuation"}
    assert "oracle" in broken(own(Own)())


def test_batch_notices_a_method_that_looks_at_its_neighbours(own):
    class Nosy(Own):
        def reduce(self, image: VisualTokens) -> Reduction:
            total = image.features.flatten(1).sum()  # of all images of the batch
            return image.keep((torch.arange(3) + int(total.abs() * 1e4) % 20).expand(image.features.shape[0], -1))

    assert "other tokens than its own run" in broken(own(Nosy)())["batch"]


def test_continuation_notices_what_only_later_turns_meet(own, monkeypatch):
    later = llm.translate_decode_inputs

    def shifted(*given):
        kwargs = later(*given)
        if kwargs["input_ids"].shape[1] > 1:
            kwargs["position_ids"] = kwargs["position_ids"] + 3
        return kwargs

    monkeypatch.setattr(llm, "translate_decode_inputs", shifted)
    assert broken(own(Own)()).keys() == {"continuation"}


def test_conservation_notices_a_false_record(own):
    class Liar(Reduction):
        @property
        def source(self):
            return torch.zeros(self.total, dtype=torch.long)

        def __getitem__(self, image):
            return Liar(self.total, self.anchors[image])

    class Lying(Own):
        def reduce(self, image: VisualTokens) -> Reduction:
            honest = super().reduce(image)
            return Liar(honest.total, honest.anchors)

    assert "listed as kept" in broken(own(Lying)())["conservation"]


def test_cache_notices_columns_that_stayed(own, monkeypatch):
    count = LlmSieve._count_tokens
    fewer = lambda self, *args: [[[n - 1 for n in layers] for layers in row] for row in count(self, *args)]  # noqa: E731
    monkeypatch.setattr(LlmSieve, "_count_tokens", fewer)
    assert "columns; " in broken(own(Own)())["cache"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(KeyError("gone"), "KeyError: 'gone'"), (ValueError("too many values"), "ValueError: too many values")],
)
def test_a_crash_fails_every_law(own, error, reason):
    class Crashing(Own):
        def reduce(self, image: VisualTokens) -> Reduction:
            raise error

    line = Crashing.reduce.__code__.co_firstlineno + 1
    assert broken(own(Crashing)()) == dict.fromkeys(LAWS, f"{reason} ({__file__}, line {line})")


def test_a_refusal_inside_a_method_is_a_refusal(own):
    class Refusing(Own):
        def reduce(self, image: VisualTokens) -> Reduction:
            raise tokensieve.Refusal("too few tokens")

    found = verdicts("llava-clip", [own(Refusing)()])
    assert {(verdict.status, verdict.reason) for verdict in found.values()} == {("refused", "too few tokens")}


# -- half precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fastervlm", "divprune", "trsm", "visionzip(before_projector=False)", "fastv"])
def test_bfloat16_on_the_bundled_model(method, bundled):
    """Identity exact, the oracle within measured rounding, and the same greedy tokens."""
    trial = bundled(torch.bfloat16)
    found = {verdict.law: verdict for verdict in trial.check(method, keep=36)}
    tie = "the first answers part at a tie"  # coarse numbers: there is no second turn to compare
    assert all(verdict.status == "pass" or verdict.reason == tie for verdict in found.values()), found
    assert found["identity"].deviation == 0.0
    assert found["oracle"].deviation <= 2 * trial.floor


def test_bfloat16_generates_the_tokens_of_the_oracle(bundled):
    """Answer questions of the bundled benchmark to the end."""
    trial = bundled(torch.bfloat16)
    model, processor, questions = trial.model, trial.processor, benchmark(scenes=4, types=ASKED)
    samples = [Sample(row.id, lambda row=row: row.image, row.question, ()) for row in questions]
    inputs = encode(processor, samples)
    for method in ("fastervlm(keep=36)", "trsm(keep=36)", "divprune(keep=36)"):
        with tokensieve.attach(model, method, processor=processor) as attached:
            reduced = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            decisions = attached.last
        with hidden(model, dropped_columns(inputs["input_ids"], trial.token, decisions)):
            oracle = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert len(reduced) > 10
        assert torch.equal(reduced, oracle), method


@pytest.fixture(scope="module")
def bundled():
    from functools import cache

    from tokensieve import reference as bundle
    from tokensieve.commands.check import prompts

    if not (bundle.path() / "model.safetensors").is_file():
        pytest.skip("no trained weights")

    @cache
    def build(dtype):
        model, processor = bundle.load()
        model.to(dtype)
        return Laws(model, prompts(processor, model), 3, processor)

    return build


@cache
def repaired(family: str, attention: str, method: str, repair: str) -> tuple:
    return tuple(build(family, models.tiny_model(family, attention), repair=repair).check(method))


@pytest.mark.parametrize("method", ["divprune(keep=0.3)", "fastv(layer=1, keep=5)", METHODS[-1]])
@pytest.mark.parametrize(("family", "attention"), SOUND)
def test_the_laws_of_repair_hold(family, attention, method):
    """The oracle of sizes shows copies of the kept tokens: prefill, decoding and a second turn, at each stage."""
    verdicts_of = {verdict.law: verdict for verdict in repaired(family, attention, method, "size")}
    assert {verdict.status for verdict in verdicts_of.values()} == {"pass"}, verdicts_of
    assert verdicts_of["identity"].deviation == 0.0
    assert max(verdicts_of[law].deviation for law in ("oracle", "batch", "continuation")) <= NOISE


@pytest.mark.parametrize("method", ["trsm(keep=5)", "fastv(layer=1, keep=5)", "divprune(keep=0.3)"])
@pytest.mark.parametrize(("family", "attention"), SOUND)
def test_with_reselect_a_second_turn_is_a_fresh_prompt(family, attention, method):
    checker = build(family, models.tiny_model(family, attention), reselect=True)
    (verdict,) = (verdict for verdict in checker.check(method) if verdict.law == "continuation")
    assert (verdict.status, verdict.deviation <= NOISE) == ("pass", True), verdict


def test_with_reselect_tokens_of_the_first_question_are_noticed(monkeypatch):
    monkeypatch.setattr(llm, "new_columns", lambda kwargs: 1)
    checker = build("llava-clip", models.tiny_model("llava-clip"), reselect=True)
    (verdict,) = (verdict for verdict in checker.check("trsm(keep=5)") if verdict.law == "continuation")
    assert verdict.status == "FAIL"


def test_no_oracle_has_the_bias_of_distance():
    verdicts_of = {verdict.law: verdict for verdict in repaired("llava-clip", "sdpa", "divprune(keep=0.3)", "restore")}
    assert [law for law in LAWS if verdicts_of[law].status == "skipped"] == ["oracle", "continuation"]
    assert "no other run has the bias of distance" in verdicts_of["oracle"].reason


def test_oracle_notices_wrong_sizes(monkeypatch):
    def doubled(*args):
        return 2 * bias_of(*args)

    monkeypatch.setattr(prefill, "bias_of", doubled)
    checker = build("llava-clip", models.tiny_model("llava-clip"), repair="size")
    verdicts_of = {verdict.law: verdict.status for verdict in checker.check("divprune(keep=0.3)")}
    assert (verdicts_of["oracle"], verdicts_of["batch"]) == ("FAIL", "pass")

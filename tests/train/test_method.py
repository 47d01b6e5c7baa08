"""Training of nets on the bundled model: what moves, what stays, what is learned, and what a resumed run gives."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

import tokensieve
from tests.cli.calling import run_many
from tests.support import models
from tokensieve import Refusal, parse
from tokensieve.engine.nets import folder_of, load_net, shape_of
from tokensieve.evaluate import Sample
from tokensieve.evaluate.prompt import encode
from tokensieve.loading import load_model
from tokensieve.methods.registry import find
from tokensieve.reference import load
from tokensieve.train.adapter.data import Collator, read_samples, records_digest
from tokensieve.train.adapter.loss import answer_logits
from tokensieve.train.method import Recipe, answers, run, train_method
from tokensieve.train.method.exits import Exits, agreement, collect, fit
from tokensieve.train.trainer import QuietTrainer

SPEC, FEW = "visionselector(keep=0.2)", "reference:train[:26]"
RECIPE = Recipe(epochs=2, batch_size=6, rate=1e-3, warmup=0.0)


@pytest.fixture
def small(monkeypatch):
    """Measure few questions."""
    monkeypatch.setattr(run, "SCORED", 2)


@pytest.fixture
def watched(monkeypatch):
    """Record the trainers that are made, and the model of each before its training."""
    made = []
    original = answers.MethodTrainer.__init__

    def init(self, recipe, sieve, **options):
        original(self, recipe, sieve, **options)
        made.append((self, {name: rows.clone() for name, rows in sieve.model.state_dict().items()}))

    monkeypatch.setattr(answers.MethodTrainer, "__init__", init)
    return made


def test_only_the_net_moves(tmp_path, small, watched):
    train_method(SPEC, "reference", FEW, tmp_path, recipe=RECIPE)
    ((trainer, before),) = watched
    assert trainer.args.save_steps == trainer.state.save_steps == 1, "a resumed run compares them, and would warn"
    after = trainer.vlm.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert all(p.grad is None for p in trainer.vlm.parameters())
    trained = load_file(tmp_path / "net.safetensors")
    with tokensieve.attach(trainer.vlm, SPEC, weights="random") as sieve:
        fresh = sieve.nets["connector"].state_dict()
    still = {name for name in trained if torch.allclose(trained[name], fresh[name], atol=1e-4)}
    assert still <= {"q_proj.bias"}, "a constant added to all scores changes nothing"
    about = json.loads((tmp_path / "method.json").read_text())
    assert about["model"] == {
        "type": "llava",
        "width": 128,
        "layers": 4,
        "patch_width": 128,
        "tower_width": 128,
        "heads": 4,
    }
    assert about["metrics"]["step"] == 5
    with tokensieve.attach(trainer.vlm, "visionselector", weights=str(tmp_path)) as sieve:
        assert torch.equal(sieve.nets["connector"].q_proj.weight, trained["q_proj.weight"])


def test_idpruner_trains_the_scorer_of_visionselector(llava, tmp_path, small):
    data, recipe = str(llava.parent / "train.jsonl"), Recipe(epochs=1, batch_size=6, rate=1e-2, warmup=0.0)
    nets = {}
    for name in ("idpruner", "visionselector"):
        about = train_method(f"{name}(keep=6)", str(llava), data, tmp_path / name, recipe=recipe)
        assert about["metrics"]["step"] >= 1
        nets[name] = load_file(tmp_path / name / "net.safetensors")
    assert all(torch.equal(rows, nets["visionselector"][name]) for name, rows in nets["idpruner"].items())
    fresh = load_net(parse("idpruner(weights='random')")[0], shape_of(load_model(str(llava))[0]))
    assert not torch.equal(fresh.k_proj.weight, nets["idpruner"]["k_proj.weight"])


def test_a_digest_tells_records_apart(tmp_path):
    picture = tmp_path / "0.png"
    picture.write_bytes(b"one")
    sample = Sample("1", picture, "what colour?", ("red",))
    digests = [records_digest([one]) for one in (sample, replace(sample, answers=("blue",)), replace(sample, id="2"))]
    picture.write_bytes(b"another")
    digests.append(records_digest([sample]))
    assert digests[0] == digests[2]
    assert len({*digests}) == 3


class Stop(TrainerCallback):
    def on_save(self, args, state, control, **_):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_a_budget_that_keeps_every_token_trains_nothing(tmp_path, small):
    with pytest.raises(
        Refusal, match=r"more tokens than visionselector\(keep=144\) keeps, so nothing is trained; lower the"
    ):
        train_method("visionselector(keep=144)", "reference", FEW, tmp_path, recipe=RECIPE)
    assert not (tmp_path / "net.safetensors").exists()
    assert not list(tmp_path.glob("checkpoint-*")), "a second call is refused, too"


def test_damaged_settings_are_refused(tmp_path, small):
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(Refusal, match=r"cannot read .*training\.json \(.*name another folder, or --no-resume"):
        train_method(SPEC, "reference", FEW, tmp_path, recipe=RECIPE)


def test_a_resumed_training_gives_the_same_net(tmp_path, small, monkeypatch):
    recipe = Recipe(**{**RECIPE.to_json(), "checkpoints": 0.25})
    train_method(SPEC, "reference", FEW, tmp_path / "whole", recipe=recipe)
    original = answers.MethodTrainer.__init__

    def stopping(self, *args, **options):
        original(self, *args, **options)
        self.add_callback(Stop())

    with monkeypatch.context() as patched:
        patched.setattr(answers.MethodTrainer, "__init__", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_method(SPEC, "reference", FEW, tmp_path / "cut", recipe=recipe)
    assert not (tmp_path / "cut" / "net.safetensors").exists()
    with monkeypatch.context() as patched:
        patched.setattr(run, "read_samples", lambda data: (read_samples(data)[0][:-1], 0))
        with pytest.raises(
            Refusal, match=r"holds another training: digest of the records was '\w+' and is now '\w+'; name"
        ):
            train_method(SPEC, "reference", FEW, tmp_path / "cut", recipe=recipe)
    with pytest.raises(Refusal, match=r"holds another training: checkpoints was 0\.25 and is now 0\.1; name"):
        train_method(SPEC, "reference", FEW, tmp_path / "cut", recipe=RECIPE)
    steps = []
    monkeypatch.setattr(
        answers.MethodTrainer, "training_step", lambda *args: steps.append(1) or QuietTrainer.training_step(*args)
    )
    about = train_method(SPEC, "reference", FEW, tmp_path / "cut", recipe=recipe)
    assert (about["metrics"]["step"], len(steps)) == (5, 1)
    whole, cut = (load_file(tmp_path / name / "net.safetensors") for name in ("whole", "cut"))
    for name, rows in whole.items():
        torch.testing.assert_close(cut[name], rows, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def bundled():
    return load()


def test_examples_for_gates_are_those_by_hand(bundled):
    model, processor = bundled
    (samples, _), stages = read_samples("reference:train[:5]"), parse("dyvte(tolerance='ratio')")
    recipe = Recipe(batch_size=3)
    examples = collect(model, processor, stages, samples, recipe)
    assert examples.states.shape == (5, 3, 2 * 128)
    inputs = Collator(processor, recipe.prompt)(samples[:1])
    labels = inputs["labels"]
    whole = answer_logits(model, inputs, parse("full"), processor)
    for layer in (1, 2, 3):
        early = answer_logits(model, inputs, parse("vtw", layer=layer), processor)
        losses = [nn.functional.cross_entropy(logits[0], labels[0]) for logits in (whole, early)]
        same = bool((whole.argmax(-1) == early.argmax(-1)).all())
        assert bool(examples.labels[0, layer - 1]) == (same and bool(losses[1] < 1.03 * losses[0]))
    # the states, from the hidden states of the unreduced model
    prompt = encode(processor, samples[:1])
    with torch.no_grad():
        hidden = model(**prompt, output_hidden_states=True).hidden_states
    end = int((prompt["input_ids"][0] == model.config.image_token_id).nonzero()[-1]) + 1
    for layer in (1, 2, 3):
        text = hidden[layer][0, end:]
        state = torch.cat([text[:-1].mean(0), text[-1]])
        torch.testing.assert_close(examples.states[0, layer - 1], state, atol=1e-4, rtol=1e-4)


def test_gates_learn_what_the_states_tell():
    torch.manual_seed(0)
    states = torch.randn(600, 2, 8)
    examples = Exits(states, (states[..., 0] > 0).long())
    gates = find("dyvte")(weights="random").make_net(tokensieve.methods.ModelShape("any", 4, 3), width=16)
    before = [gate.w2.weight.clone() for gate in gates]
    fit(gates, examples, Recipe(epochs=60, rate=1e-2))
    assert min(agreement(gates, examples)["gates_right"]) > 0.9
    assert not any(torch.equal(gate.w2.weight, rows) for gate, rows in zip(gates, before, strict=True))


def test_examples_are_kept_for_a_resumed_run(tmp_path):
    examples = Exits(torch.randn(4, 2, 8), torch.ones(4, 2, dtype=torch.int64))
    examples.save(tmp_path / "states.safetensors")
    kept = Exits.load(tmp_path / "states.safetensors")
    assert torch.equal(kept.states, examples.states)
    (tmp_path / "states.safetensors").write_bytes(b"half")
    assert Exits.load(tmp_path / "states.safetensors") is None


CALLS = {
    "not-trained": (("vtc-cls",), "a method with a net is trained"),
    "unknown": (("visionselectr",), "unknown method 'visionselectr'"),
    "rate": (("visionselector", "--rate", "0"), "rate must be larger than 0"),
    "data": (("visionselector", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
    "keep": (("dyvte", "--keep", "4"), "dyvte has no open parameter 'keep'"),
}


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """The outcomes of all command lines, and the folder of the trained gates."""
    folder = tmp_path_factory.mktemp("trained")
    calls = {name: ("train", *arguments, "--output", folder / name) for name, (arguments, _) in CALLS.items()}
    calls["gates"] = ("train", "dyvte", "--data", FEW, "--output", folder / "gates", "--epochs", "20", "--json")
    return run_many(calls, before="from tokensieve.train.method import run; run.SCORED = 2\n"), folder


def test_gates_from_the_command_line(called, bundled):
    outcomes, folder = called
    assert outcomes["gates"].code == 0, outcomes["gates"].err
    about = json.loads(outcomes["gates"].out)
    assert about["metrics"]["trained"]["tokens"] <= 144
    assert len(about["metrics"]["gates_right"]) == 3
    with tokensieve.attach(bundled[0], "dyvte", weights=str(folder / "gates")) as sieve:
        assert len(sieve.nets["decoder"]) == 3


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_trained_is_refused(called, name):
    outcomes, folder = called
    assert CALLS[name][1] in outcomes[name].refused()
    assert not (folder / name).exists()


@pytest.mark.parametrize("name", ["visionselector", "dyvte"])
def test_the_bundled_weights_are_small_and_fit_the_bundled_model(bundled, name):
    model, processor = bundled
    with torch.no_grad(), tokensieve.attach(model, name, processor=processor) as sieve:
        model(**encode(processor, read_samples("reference:train[:2]")[0]))
        assert all(images[0].total == 144 for images in sieve.last)
    folder = folder_of(parse(name)[0])
    assert (folder / "net.safetensors").stat().st_size < 2e6
    about = json.loads((folder / "method.json").read_text("utf-8"))
    assert about["metrics"]["trained"]["accuracy"] > about["metrics"]["untrained"]["accuracy"]
    with pytest.raises(Refusal, match="fit llava of width 128 with 4 LLM layers; this model is"):
        tokensieve.attach(models.tiny_model("llava-clip"), name)


def test_each_step_draws_one_of_several_budgets(tmp_path, small, watched, monkeypatch):
    """The factors sum to the step's budget; the net moves, and the model does not."""
    sums, original = [], answers.MethodTrainer.compute_loss

    def compute_loss(self, *args, **options):
        loss = original(self, *args, **options)
        sums.append({round(image.mixing.weight.sum().item()) for images in self.sieve.last for image in images})
        return loss

    monkeypatch.setattr(answers.MethodTrainer, "compute_loss", compute_loss)
    recipe = Recipe(batch_size=6, rate=1e-3, warmup=0.0, keeps=(0.5, 8, 0.1), seed=0)
    train_method(SPEC, "reference", FEW, tmp_path, recipe=recipe)
    assert all(len(step) == 1 for step in sums)
    assert {count for step in sums for count in step} == {72, 8, 14}
    ((trainer, before),) = watched
    assert trainer.sieve.methods[0].keep == 0.2
    assert all(torch.equal(before[name], rows) for name, rows in trainer.vlm.state_dict().items())
    net = trainer.sieve.nets["connector"]
    assert all(rows.abs().max() > 1e-3 for name, rows in net.named_parameters() if name != "q_proj.bias")  # cancels out


def test_several_budgets_are_refused_where_none_can_be_drawn(tmp_path):
    with pytest.raises(Refusal, match="dyvte is trained at one budget; several are for"):
        train_method("dyvte", "reference", FEW, tmp_path, recipe=Recipe(keeps=(0.5, 8)))
    with pytest.raises(Refusal, match="budgets that are drawn must be numbers; got 8, average:8"):
        Recipe(keeps=(8, tokensieve.budget.check_budget("average:8")))


def test_a_training_that_diverges_ends_in_one_line(tmp_path, small):
    with pytest.raises(Refusal, match="the training diverged: the loss is nan; give a lower --rate, and --no-resume"):
        train_method(SPEC, "reference", FEW, tmp_path, recipe=Recipe(**{**RECIPE.to_json(), "rate": 1e30}))
    assert not (tmp_path / "net.safetensors").exists()


def test_another_seed_is_named_before_the_records_that_it_draws(tmp_path, small):
    settings = {"data_digest": "a", "recipe": {"seed": 0}}
    run._start(tmp_path, settings, resume=True)
    with pytest.raises(Refusal, match="another training: seed was 0 and is now 1; name"):
        run._start(tmp_path, {"data_digest": "b", "recipe": {"seed": 1}}, resume=True)


def test_weights_are_not_read_in_a_training(tmp_path):
    with pytest.raises(Refusal, match="a training starts with an untrained net; leave weights='runs/x' out"):
        train_method("visionselector(weights='runs/x')", "reference", FEW, tmp_path)


def test_of_many_useless_records_five_are_named(tmp_path, caplog):
    lines = ['{"image": "0.png", "question": "?", "answer": "red"}', *['{"image": "0.png"}'] * 9]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    samples, unusable = read_samples(str(tmp_path / "data.jsonl"))
    assert (len(samples), unusable, len(caplog.messages)) == (1, 9, 5)
    assert caplog.messages[0].startswith("record skipped (9 in all): ")

"""Training of a net that finds the asked tokens: what moves, what the losses read, and which cells boxes touch."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tokensieve
from tests.golden.test_learned_golden import cases
from tokensieve import Refusal
from tokensieve.reference import load
from tokensieve.train.adapter.data import read_samples
from tokensieve.train.method import Recipe, places, run, train_method
from tokensieve.train.method.places import PlacesCollator, PlacesTrainer, covered, mask_loss

SPEC, FEW = "glimpse-prune(layer=2)", "reference:train[:26]"
TWO = "glimpse-prune(layer=2, levels=(0.9, 0.5))"


@pytest.fixture
def watched(monkeypatch):
    """Record the trainers that are made, and the model of each before its training."""
    made, original = [], PlacesTrainer.__init__

    def init(self, recipe, sieve, **options):
        original(self, recipe, sieve, **options)
        made.append((self, {name: rows.clone() for name, rows in sieve.model.state_dict().items()}))

    monkeypatch.setattr(PlacesTrainer, "__init__", init)
    monkeypatch.setattr(run, "SCORED", 2)
    return made


def test_only_the_net_moves(tmp_path, watched):
    train_method(TWO, "reference", FEW, tmp_path, recipe=Recipe(epochs=1, batch_size=6, rate=1e-3, warmup=0.0))
    ((trainer, before),) = watched
    after = trainer.vlm.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert all(weight.grad is None for weight in trainer.vlm.parameters())
    trained = load_file(tmp_path / "net.safetensors")
    with tokensieve.attach(trainer.vlm, TWO, weights="random") as sieve:
        fresh = sieve.nets["decoder"].state_dict()
    assert not {name for name in trained if torch.equal(trained[name], fresh[name])}, "weights without a gradient"
    metrics = json.loads((tmp_path / "method.json").read_text())["metrics"]
    assert all(loss > 0 for loss in metrics["losses"])
    with tokensieve.attach(trainer.vlm, TWO, weights=str(tmp_path)) as sieve:
        assert torch.equal(sieve.nets["decoder"].learnable_embeddings, trained["learnable_embeddings"])


def test_the_answer_is_read_behind_the_query():
    """The logits are those of a prompt to which the query's row and the answer were really appended."""
    model, processor = load()
    samples = read_samples(FEW)[0][:3]
    batch = PlacesCollator(processor, "{question}")(samples)
    prompts = {name: rows for name, rows in batch.items() if name not in ("labels", "boxes", "image_numbers")}
    labels = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    with torch.no_grad(), tokensieve.attach(model, SPEC, weights="random", processor=processor) as sieve:
        net = sieve.nets["decoder"].train()
        trainer = PlacesTrainer.__new__(PlacesTrainer)
        trainer.vlm = model
        cache = places.DynamicCache()
        hidden = model(**prompts, past_key_values=cache, use_cache=True, output_hidden_states=True).hidden_states
        logits = trainer._behind_query(net, prompts, cache, labels)
    decoder = model.get_decoder()
    for row, length in enumerate(prompts["attention_mask"].sum(-1).tolist()):
        rows = hidden[0][row, -length:]
        known = model.get_input_embeddings()(labels[row, :-1])
        rows = torch.cat([rows, torch.zeros(1, rows.shape[-1]), known])[None]
        # prompts are numbered by column, padding included
        columns = torch.arange(rows.shape[1])[None] + hidden[0].shape[1] - length
        mask = torch.full((rows.shape[1],) * 2, -1e30).triu(1)[None, None]
        with torch.no_grad():
            for number, layer in enumerate(decoder.layers):
                rows[:, length] += net.added(number, decoder.config.rms_norm_eps)[0]
                rope = decoder.rotary_emb(rows, columns)
                rows = layer(rows, attention_mask=mask, position_embeddings=rope)
            by_hand = model.get_output_embeddings()(decoder.norm(rows))[0, length:]
        torch.testing.assert_close(logits[row], by_hand, atol=1e-4, rtol=1e-4)


def test_data_without_boxes_are_refused(tmp_path):
    picture, records = tmp_path / "white.png", tmp_path / "records.jsonl"
    Image.new("RGB", (8, 8), "white").save(picture)
    records.write_text(json.dumps({"image": str(picture), "question": "Which colour?", "answer": "white"}) + "\n")
    with pytest.raises(Refusal, match=r"glimpse-prune learns from boxes, and .*has none"):
        train_method(SPEC, "reference", str(records), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_cells_that_boxes_touch():
    boxes = torch.tensor([[0.3, 0.0, 0.55, 0.2], [0.0, 0.8, 0.1, 1.0], [0.0, 0.0, 0.0, 0.0]])
    inside = covered(boxes, (4, 4)).view(4, 4).long().tolist()
    assert inside == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert not covered(boxes[2:], (4, 4)).any()


@pytest.mark.parametrize("case", cases("glimpse_vip"), ids=["c0", "c1", "c2"])
def test_the_loss_is_the_authors(case):
    _, inputs, outputs = case
    loss = mask_loss(outputs["logits"][0], inputs["gt"].float())
    torch.testing.assert_close(loss, outputs["loss"][0], atol=1e-5, rtol=1e-5)

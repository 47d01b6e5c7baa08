"""In-LLM methods against inputs and outputs of the authors' code: indices exactly, values to 3e-5."""

import torch

import tokensieve
from tests.golden.drawn import bells, fill
from tests.golden.small_llava import llava_around
from tests.golden.vectors import CLOSE, cases, load
from tests.support.families import BOS, IMAGE
from tokensieve import parse
from tokensieve.evaluate.calibrate import first_below, withdrawal_kl
from tokensieve.methods.dart import Dart, least_alike
from tokensieve.methods.raters import raters
from tokensieve.ops import attention_of_queries, density_peaks
from tokensieve.tokens import ConnectorTokens, DecoderTokens, DecoderUserText, UserText


def method(spec):
    (found,) = parse(spec)
    return found


def user_text(rows, **evidence):
    return DecoderUserText(rows, torch.ones(rows.shape[:2], dtype=torch.bool), **evidence)


def split(sequence, start, size):
    return sequence[:start], sequence[start : start + size], sequence[start + size :]


@cases("fastv")
def test_fastv(name):
    given, expected, hp = load("fastv", name)
    start, size = hp["sys_length"], hp["image_tokens"]
    before, image, after = split(given["hidden_states"][0], start, size)
    tokens = DecoderTokens(image[None], attention=given["attention"][..., start : start + size])
    decision = method(f"fastv(keep={hp['rank']})")(tokens)[0]
    columns = torch.arange(len(given["hidden_states"][0]))
    left, here, right = split(columns, start, size)
    assert torch.equal(torch.cat([left, here[decision.kept], right]), expected["kept_positions"])
    assert torch.equal(torch.cat([before, decision.apply(image), after]), expected["kept_hidden"][0])


def rotated(x, positions, base):
    size = x.shape[-1]
    angles = positions[:, None] / base ** (torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([f, f], -1) for f in (angles.cos(), angles.sin()))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


@cases("pyramiddrop")
def test_pyramiddrop(name):
    given, expected, hp = load("pyramiddrop", name)
    layers = tuple(range(1, len(hp["ratios"]) + 1))
    spec = method(f"pyramiddrop(layers={layers}, counts={tuple(hp['ratios'])})")
    for row, (start, entered, words) in enumerate(
        zip(hp["image_pos"], hp["image_tokens"], hp["prompt_len"], strict=True)
    ):
        length = int(given["attention_mask"][row].sum())
        sequence, places = given["features"][row, :length], torch.arange(length)
        size = entered
        for stage in range(len(layers)):
            normed = sequence * torch.rsqrt(sequence.square().mean(-1, keepdim=True) + hp["rms_eps"])
            normed = normed * given[f"norm_{stage}"]
            numbers = torch.arange(len(sequence)).float()  # contiguous positions
            q, k = (
                rotated(
                    (normed @ given[f"{w}_{stage}"].T).unflatten(-1, (hp["num_heads"], -1)).transpose(0, 1),
                    numbers,
                    hp["rope_base"],
                )
                for w in ("wq", "wk")
            )
            last = torch.tensor([[words + size - 1]])
            rows = attention_of_queries(q[None], k[None], q.shape[-1] ** -0.5, last, None)
            before, image, after = split(sequence, start, size)
            tokens = DecoderTokens(
                image[None],
                attention=rows[..., start : start + size],
                budget=spec.stage_budgets(entered, layers, 8)[stage],
            )
            decision = spec(tokens)[0]
            sequence = torch.cat([before, decision.apply(image), after])
            left, here, right = split(places, start, size)
            places, size = torch.cat([left, here[decision.kept], right]), decision.slots
            assert torch.equal(places[start : start + size], expected[f"kept_{stage}"][row])
            torch.testing.assert_close(sequence, expected[f"out_{stage}"][row, : len(sequence)], **CLOSE)


@cases("vtw")
def test_vtw_calibration(name):
    given, expected, hp = load("vtw", name)
    kl = withdrawal_kl(given["logits_full"][:, None], given["logits_withdrawn"])
    torch.testing.assert_close(kl, expected["kl"], **CLOSE)
    torch.testing.assert_close(kl.mean(0), expected["kl_mean"], **CLOSE)
    blocks = list(range(hp["first_layer"], hp["first_layer"] + kl.shape[1]))
    assert first_below(blocks, kl.mean(0).tolist(), hp["eta"]) == int(expected["k"])


@cases("sparsevlm")
def test_sparsevlm(name):
    given, expected, hp = load("sparsevlm", name)
    start, size = hp["image_start"], hp["image_tokens"]
    text = start + size
    embeds, hidden, attention = given["embeds"], given["hidden"], given["attention"]
    official = method(f"sparsevlm(counts={tuple(hp['keep_list'])}, appended=True, noise_seed={hp['rng_seed']})")
    tokens = DecoderTokens(
        hidden[:, start:text],
        user_text=user_text(hidden[:, text:], input_embeddings=embeds[:, text:]),
        attention=attention[:, :, text:, start:text],
        input_embeddings=embeds[:, start:text],
        budget=official.stage_budgets(size, (3, 7, 16), 32)[{2: 0, 6: 1, 15: 2}[hp["layer_idx"]]],
    )
    assert torch.equal(raters(tokens)[0].nonzero().flatten(), expected["rater_idx"])
    decision = official(tokens)[0]
    kept, clusters = int(expected["keep_mask"].sum()), expected["merged_tokens"].shape[1]
    assert decision.slots == kept + clusters
    source = decision.source
    whole = (source >= 0) & (source < kept)
    assert torch.equal(whole.to(torch.uint8), expected["keep_mask"][0])
    merged = (source >= kept).nonzero().flatten()
    assert torch.equal(merged, expected["merge_source"].sort().values)
    rows = decision.apply(hidden[0, start:text])
    torch.testing.assert_close(rows[kept:], expected["merged_tokens"][0], **CLOSE)
    sequence = torch.cat([hidden[0, :start], rows, hidden[0, text:]])
    torch.testing.assert_close(sequence, expected["output"][0], **CLOSE)
    # at their centres' places: the same rows in another order
    ours = method(f"sparsevlm(counts={tuple(hp['keep_list'])}, noise_seed={hp['rng_seed']})")(tokens)[0]
    rows = ours.apply(hidden[0, start:text])
    torch.testing.assert_close(rows.sum(0), sequence[start : start + len(rows)].sum(0), atol=1e-3, rtol=1e-4)


@cases("sparsevlm_dpcknn")
def test_density_peaks(name):
    given, expected, hp = load("sparsevlm_dpcknn", name)
    x, clusters = given["x"], hp["clusters"]
    _, cluster = density_peaks(x, clusters, clusters, 1e-6 * expected["density_noise"])
    of = torch.nn.functional.one_hot(cluster, clusters).float()
    merged = (of / of.sum(1, keepdim=True)).transpose(1, 2) @ x
    torch.testing.assert_close(merged, expected["merged"], **CLOSE)  # in the official order as well


@cases("sparsevlm_plus")
def test_sparsevlm_plus(name):
    given, expected, hp = load("sparsevlm_plus", name)
    start, size, depth = hp["image_start"], hp["image_tokens"], hp["head_dim"]
    text = start + size
    positions = given["position_ids"][0].float()
    ones = rotated(torch.ones(len(positions), depth), positions, 10000)
    torch.testing.assert_close(ones @ ones.T / depth**0.5, expected["rope_weights"], **CLOSE)
    by = torch.zeros(len(positions) - text)
    by[given["rater_idx"]] = 1
    # embeddings that make exactly the given words rate: their logit is 1, that of the others 0
    tokens = DecoderTokens(
        torch.zeros(1, size, 1),
        user_text=user_text(
            torch.zeros(1, len(by), 1), input_embeddings=by[None, :, None], rope_gain=ones[None, text:]
        ),
        attention=given["attention"][:, :, text:, start:text],
        input_embeddings=torch.ones(1, size, 1),
        rope_gain=ones[None, start:text],
    )
    decision = method(f"sparsevlm+(layers=(3,), counts=({hp['keep']},), heads=14)")(tokens)
    torch.testing.assert_close(decision.scores, expected["score"], **CLOSE)
    assert torch.equal(decision[0].kept, expected["kept_indices"])


@cases("sparsevlm_rank")
def test_sparsevlm_rank(name):
    given, expected, hp = load("sparsevlm_rank", name)
    start, size = hp["image_start"], hp["image_tokens"]
    text = start + size
    by = torch.zeros(given["attention"].shape[-1] - text)
    by[given["rater_idx"]] = 1
    tokens = DecoderTokens(
        torch.zeros(1, size, 1),
        user_text=user_text(torch.zeros(1, len(by), 1), input_embeddings=by[None, :, None]),
        attention=given["attention"][:, :, text:, start:text],
        input_embeddings=torch.ones(1, size, 1),
    )
    decision = method(f"sparsevlm-rank(scale={hp['scale']}, bias={float(hp['bias'])})")(tokens)
    torch.testing.assert_close(decision.scores, expected["score"], **CLOSE)
    assert torch.equal(decision[0].kept, expected["kept_indices"])


@cases("dart")
def test_dart(name):
    given, expected, hp = load("dart", name)
    start, size = hp["image_start"], hp["image_tokens"]
    text = start + size
    rows, keys = given["hidden_normed"], given["keys"].transpose(1, 2).flatten(2)
    budget = hp["max_num_trunction"] or int(size * (1 - hp["reduction_ratio"]))
    dart = Dart(keep=budget, visual_pivots=hp["pivot_image"], text_pivots=hp["pivot_text"], exact=False)
    tokens = DecoderTokens(
        rows[:, start:text],
        user_text=user_text(rows[:, text:], keys=keys[:, text:]),
        keys=keys[:, start:text],
        budget=budget,
    )
    norms = keys[0].abs().sum(-1)
    visual = norms[start:text].topk(hp["pivot_image"]).indices
    assert torch.equal((visual + start).sort().values, expected["pivot_image"].sort().values)
    # in the order in which the official code happened to visit its pivots, a set
    order = expected["pivot_iteration_order"]
    kept = least_alike(tokens.features, rows[:, order], visual[None], dart.shares(tokens, len(visual)))
    assert torch.equal(kept[0].sort().values + start, expected["kept_positions"])
    decision = dart(tokens)[0]
    assert decision.slots == len(expected["kept_positions"])
    assert set(visual.tolist()) <= set(decision.kept.tolist())


@cases("simignore")
def test_simignore(name):
    given, expected, hp = load("simignore", name)
    words = given["text_embeds"][None]
    tokens = ConnectorTokens(
        given["image_embeds"][None], user_text=UserText(words, torch.ones(words.shape[:2], dtype=torch.bool))
    )
    decision = method(f"simignore(keep={hp['k2']}, start={hp['i_index']}, step={hp['step']})")(tokens)[0]
    assert torch.equal(decision.kept, expected["kept_indices"].sort().values)
    assert torch.equal(
        decision.scores.sort(descending=True, stable=True).indices[: hp["k2"]], expected["selection_order"]
    )


@cases("illava_llm")
def test_illava(name):
    given, expected, hp = load("illava_llm", name)
    start, size, r = hp["image_start"], hp["image_tokens"], hp["r"]
    keep = size - (r if r > 1 else round(size * (1 - r)))
    before, image, after = split(given["hidden"][0], start, size)
    tokens = DecoderTokens(image[None], attention=given["attention"][..., start : start + size])
    decision = method(f"illava-llm(keep={keep})")(tokens)[0]
    left, here, right = split(torch.arange(len(given["hidden"][0])), start, size)
    assert torch.equal(torch.cat([left, here[decision.kept], right]), expected["kept_positions"])
    merged = (decision.counts > 1).nonzero().item()
    assert torch.equal((decision.source == merged).nonzero().flatten(), expected["merged_source"].sort().values)
    torch.testing.assert_close(
        torch.cat([before, decision.apply(image), after]), expected["output"][0], atol=3e-5, rtol=3e-5
    )


@cases("llavolta")
def test_pool_decoder(name):
    given, expected, hp = load("llavolta", name)
    size, positions = hp["visual_length"], given["position_ids"][0]
    pool = method(f"pool-decoder(stride={hp['stride']}, incomplete='drop')")
    for row, starts in enumerate(hp["image_starts"]):
        rows, numbers, at = [], [], 0
        for start in starts:
            image = given["hidden"][row, start : start + size]
            decision = pool(DecoderTokens(image[None]))[0]
            rows += [given["hidden"][row, at:start], decision.apply(image)]
            numbers += [positions[at:start], positions[start : start + size][decision.anchors]]
            at = start + size
        rows, numbers = [*rows, given["hidden"][row, at:]], [*numbers, positions[at:]]
        torch.testing.assert_close(torch.cat(rows), expected["output"][row], **CLOSE)
        assert torch.equal(torch.cat(numbers), expected["output_position_ids"][row])


# -- attached to a model ---------------------------------------------------------------------------------------------


@torch.no_grad()
def enters_layer(h, spec):
    """Attach ``spec`` to a small LLaVA with 576 visual tokens; return its decision, and the rows that enter a layer."""
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model, entered = llava_around({**config, "image_size": 48, "patch_size": 2}, layers=4), []
    fill(model.model.vision_tower, h["seed"], h["sharp"])
    fill(model.model.language_model, h["seed"] + 2, h["sharp"])
    ids = torch.tensor([[BOS, *[IMAGE] * h["tokens"], *range(7, 19)]])
    with tokensieve.attach(model, spec) as sieve:
        model.model.language_model.layers[h["layer"]].register_forward_pre_hook(
            lambda layer, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        model(input_ids=ids, pixel_values=bells(h["seed"] + 1, 1, 3, 48, 48))
    ((decision,),) = sieve.last
    return decision, entered[0][0]


@cases("sparsevlm_model_published")
def test_sparsevlm_attached(name):
    _, expected, h = load("sparsevlm_model_published", name)
    spec = f"sparsevlm(keep={h['keep']}, layers=({h['layer']},), appended=True, noise_seed={h['noise_seed']})"
    decision, rows = enters_layer(h, spec)
    kept = expected["kept_indices"].tolist()
    assert ((decision.source >= 0) & (decision.source < len(kept))).nonzero().flatten().tolist() == kept
    # behind [begin] and the kept tokens: the recycled ones in the official order, then the words
    torch.testing.assert_close(rows[1 + len(kept) :], expected["rows"], **CLOSE)


@cases("fastv_model_published")
def test_fastv_attached(name):
    _, expected, h = load("fastv_model_published", name)
    decision, rows = enters_layer(h, f"fastv(keep={h['keep']}, layer={h['layer']})")
    assert decision.kept.tolist() == expected["kept_indices"].tolist()
    assert len(rows) == 1 + h["keep"] + 12
    torch.testing.assert_close(rows[-12:], expected["rows"], **CLOSE)

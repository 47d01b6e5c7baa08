"""An engine with the bundled model answers as transformers does with the same method attached."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tokensieve
from tests.vllm.apart import run_apart
from tokensieve import reference
from tokensieve.ops import pixel_hash
from tokensieve.reference.benchmark import benchmark
from tokensieve.reference.vilt import ASKED
from tokensieve.vllm import checkpoint, engine_options

METHODS = (
    "vtc-cls(keep=64)",
    "fastervlm(keep=36)",
    "vispruner(keep=48)",
    "scope(keep=48)",
    "divprune(keep=48)",
    "trsm(keep=48)",
    "mmtok(keep=48)",
    "visionzip(keep=48)",
)
FURTHER = (
    "cdpruner(keep=48)",
    "hired(keep=40)",
    "holov(keep=48)",
    "random(keep=36)",
    "uniform(keep=36)",
    "pool(keep=0.25)",
)
"""Asked a quarter of the questions."""
CHAOTIC = {"vispruner": 0.1, "cdpruner": 0.05}
"""Methods in which near-ties decide, and the share of images that may keep other tokens. Scenes have one background:
noise of 1e-6 on the patch embeddings changes 5 decisions in 80 of vispruner and 1 in 140 of cdpruner."""
TOKENS = 4
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 16, "seed": 0}
Prompt = dict[str, Any]
Kept = dict[tuple[int, str, int, tuple[int, ...]], list[list[int]]]


# -- in a process of its own ------------------------------------------------------------------------------------------


def serve(
    engine: dict[str, Any],
    passes: Sequence[Sequence[Prompt]],
    tokens: int = TOKENS,
    adapters: Sequence[str] = (),
    all_tokens: bool = False,
) -> Any:
    """Run lists of prompts one after another on one engine.

    Returns:
        Per list the token ids, the cached tokens of each prompt, and the encode calls, each a list of (pixel hash,
        method, budget, word ids, kept tokens), and the numbers of rows that entered the LLM at once. Of a list with a
        prompt that is refused, the error. Further the number of preemptions.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: list[int] = []
    preempt = Scheduler._preempt_request
    Scheduler._preempt_request = lambda self, *a, **k: (preempted.append(1), preempt(self, *a, **k))[1]
    llm = LLM(**ENGINE | engine)
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    calls: list[Any] = []
    decide, embed = model._decide, model.embed_input_ids
    pieces: list[int] = []

    def recorded(images: Any, *args: Any, keys: Any) -> Any:
        decisions = decide(images, *args, keys=keys)
        names = [model.settings.methods[plan.method].info.name for plan in images]
        calls.append(
            [
                (pixels, name, plan.budget, text, decision.anchors.tolist())
                for (pixels, plan, text), name, decision in zip(keys, names, decisions, strict=True)
                if plan.rows < plan.span  # whole images are not decided about
            ]
        )
        return decisions

    def embedded(input_ids: Any, multimodal_embeddings: Any = None, **kwargs: Any) -> Any:
        pieces.extend(len(piece) for piece in multimodal_embeddings or ())
        return embed(input_ids, multimodal_embeddings, **kwargs)

    model._decide, model.embed_input_ids = recorded, embedded
    out = []
    sampling = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens if all_tokens else 0)
    for number, prompts in enumerate(passes):
        calls.clear()
        pieces.clear()
        adapter = adapters[number] if adapters else ""
        lora = LoRARequest("adapter", 1, adapter) if adapter else None
        try:
            outputs = llm.generate(list(prompts), sampling, use_tqdm=False, lora_request=lora)
        except ValueError as error:
            out.append({"error": f"{type(error).__name__}: {error}"})
            continue
        out.append(
            {
                "ids": [list(output.outputs[0].token_ids) for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
                "calls": list(calls),
                "pieces": list(pieces),
            }
        )
    return {"passes": out, "preempted": len(preempted)}


def kept_by(passes: Sequence[dict[str, Any]]) -> Kept:
    """Return the kept tokens of each image, method, budget and text, one list per time that it was encoded."""
    kept: Kept = {}
    for one in passes:
        for call in one["calls"]:
            for pixels, method, budget, text, anchors in call:
                kept.setdefault((pixels, method, budget, text), []).append(anchors)
    return kept


# -- under transformers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return reference.load()


class Asked:
    """Prompts to the bundled model: ``[(question, images)]``."""

    def __init__(self, processor: Any, rows: Sequence[tuple[str, Sequence[Any]]]) -> None:
        self.processor, self.rows = processor, list(rows)
        turns = [
            [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": question}]}]
            for question, images in self.rows
        ]
        self.texts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
        # as the text finder reads them in the prompt: a word after a space
        self.words = [tuple(processor.tokenizer(" " + q, add_special_tokens=False).input_ids) for q, _ in self.rows]

    def prompts(self, **options: Any) -> list[Prompt]:
        """Return them for vLLM, with these options of the request."""
        made = []
        for text, (_, images) in zip(self.texts, self.rows, strict=True):
            prompt: Prompt = {"prompt": text, "multi_modal_data": {"image": list(images)}}
            made.append(prompt | ({"mm_processor_kwargs": options} if options else {}))
        return made

    def answers(
        self, model: Any, spec: str, tokens: int = TOKENS, *, batch: int = 35, all_tokens: bool = False, **attached: Any
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Return the greedy token ids with a method attached, and the kept tokens per image `[prompt][image]`."""
        ids, kept = [], []
        for start in range(0, len(self.rows), batch):
            texts, rows = self.texts[start : start + batch], self.rows[start : start + batch]
            images = [list(images) for _, images in rows]
            inputs = self.processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
            with torch.inference_mode(), tokensieve.attach(model, spec, processor=self.processor, **attached) as sieve:
                fewest = {"min_new_tokens": tokens} if all_tokens else {}
                out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **fewest)
                kept += [[image.anchors.tolist() for image in sample] for sample in sieve.last]
            ids += [without_padding(row, self.processor) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
        return ids, kept

    def hashes(self) -> list[list[int]]:
        """Return the pixel hash of each image."""
        hashes = {}
        for _, images in self.rows:
            for image in images:
                if id(image) not in hashes:
                    pixels = self.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
                    hashes[id(image)] = int(pixel_hash(pixels[0]))
        return [[hashes[id(image)] for image in images] for _, images in self.rows]


def without_padding(ids: list[int], processor: Any) -> list[int]:
    """Cut an answer after its end token, where vLLM stops."""
    end = processor.tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids


def options(method: str, **more: Any) -> dict[str, Any]:
    return {"model": checkpoint("reference"), **engine_options("reference", method, **more)}


def name_of(spec: str) -> str:
    return spec.partition("(")[0]


def assert_kept(kept: Kept, asked: Asked, expected: Any, spec: str, may_differ: float = 0.0) -> None:
    """Compare the kept tokens of each image of each prompt, in every encode call about it.

    Args:
        may_differ: the share of images that may keep other tokens.
    """
    name, by_image = name_of(spec), {}
    for (pixels, method, _, text), calls in kept.items():
        if method == name:
            by_image.setdefault((pixels, text), []).extend(calls)
    assert by_image
    reads_text = any(text for _, text in by_image)
    seen, different = 0, []
    for hashes, words, of_prompt in zip(asked.hashes(), asked.words, expected, strict=True):
        for pixels, anchors in zip(hashes, of_prompt, strict=True):
            calls = by_image[pixels, words if reads_text else ()]
            assert all(call == calls[0] for call in calls), (spec, calls)
            if calls[0] != anchors:
                different.append((calls[0], anchors))
            seen += 1
    assert seen == sum(len(images) for _, images in asked.rows)
    print(f"{spec}: {len(different)} of {seen} images keep other tokens")
    assert len(different) <= may_differ * seen, (spec, len(different), seen, different[:2])


# -- answers ----------------------------------------------------------------------------------------------------------


def of_benchmark(processor: Any, scenes: int, first: int = 0) -> Asked:
    rows = benchmark(scenes=scenes, types=ASKED)[7 * first :]
    return Asked(processor, [(row.question, [row.image]) for row in rows])


@pytest.mark.slow
def test_560_answers_of_each_method_equal_those_of_transformers(loaded):
    model, processor = loaded
    questions, fewer = of_benchmark(processor, 80), of_benchmark(processor, 20)
    assert len(questions.rows) == 560
    asked = {**dict.fromkeys(("full", *METHODS), questions), **dict.fromkeys(FURTHER, fewer)}
    expected = {spec: of_spec.answers(model, spec) for spec, of_spec in asked.items()}
    requested = {"tokensieve_keep": 1.0}
    prompts = [
        of_spec.prompts(**(requested if spec == "full" else {"tokensieve_method": name_of(spec)}))
        for spec, of_spec in asked.items()
    ]
    first, *others = (*METHODS, *FURTHER)
    for caching in (True, False):
        engine = options(first, allowed=others) | {"enable_prefix_caching": caching, "block_size": 32}
        ran = run_apart(serve, engine, [*prompts, prompts[1]])["passes"]
        kept = kept_by(ran)
        for spec, one in zip((*asked, METHODS[0]), ran, strict=True):
            ids, anchors = expected[spec]
            assert one["ids"] == ids, spec
            if spec != "full":
                assert_kept(kept, asked[spec], anchors, spec, CHAOTIC.get(name_of(spec), 0.0))
        cached = [sum(count > 0 for count in one["cached"]) for one in ran]
        # the second pass comes from the cache; without one, nothing does
        assert cached[-1] == 560 if caching else not any(cached)
    assert expected["full"][0] != expected[first][0]  # methods change answers, so equality is no coincidence


def test_a_prompt_may_be_cut_preempted_and_encoded_again(loaded):
    """Few tokens a step cut images; few blocks of cache preempt requests; small encoder caches forget images."""
    model, processor = loaded
    rows = benchmark(scenes=12, types=ASKED)
    images = [row.image for row in rows[::7]]
    mixed = [(rows[7 * n + 1].question, images[n : n + 1 + n % 3]) for n in range(9)]
    asked = Asked(processor, mixed)
    again = Asked(processor, [(rows[7 * n + 3].question, shown) for n, (_, shown) in enumerate(mixed)])
    alone = [again.prompts()[n : n + 1] for n in range(9)]  # another batch shape each
    for spec, blocks in (("trsm(keep=36)", 9), ("vtc-cls(keep=36)", 200)):
        engine = options(spec) | {"max_num_batched_tokens": 32, "max_model_len": 224, "max_num_seqs": 4}
        engine |= {"num_gpu_blocks_override": blocks, "block_size": 32}
        ran = run_apart(serve, engine, [asked.prompts(), *alone, again.prompts()], 24, (), True)
        ids, kept = asked.answers(model, spec, 24, all_tokens=True)
        ids_again, kept_again = again.answers(model, spec, 24, all_tokens=True)
        first, *singly, last = ran["passes"]
        assert first["ids"] == ids
        assert [one["ids"][0] for one in singly] == ids_again
        assert last["ids"] == ids_again
        decided = kept_by(ran["passes"])
        assert_kept(decided, asked, kept, spec)
        assert_kept(decided, again, kept_again, spec)
        assert any(rows % 36 for rows in first["pieces"])  # part of an image in a step
        if blocks == 9:
            assert ran["preempted"] > 0
            continue
        # with room for prefixes, the first block of a prompt comes from the cache: it ends within the image
        assert all(one["cached"][0] >= 32 for one in singly)
        calls = [call for one in ran["passes"] for call in one["calls"]]
        shapes = {key: [len(call) for call in calls if any(image[:4] == key for image in call)] for key in decided}
        # the other end of that image was encoded again, for some of them in a batch of another shape
        assert sum(len(of_image) > 1 for of_image in shapes.values()) >= 3, shapes
        assert any(len(set(of_image)) > 1 for of_image in shapes.values()), shapes


def test_a_second_encoding_keeps_what_the_cached_prefix_holds():
    """Scores that differ in their last bits must not move a kept token, once it is in the prefix cache."""
    assert run_apart(decide_twice) == "the same"


def decide_twice() -> str:
    """Decide about an image, then about the same image whose features differ a little, beside another image."""
    from types import SimpleNamespace

    from tokensieve.engine.handoff import EncoderOutputs
    from tokensieve.models import TokenLayout
    from tokensieve.vllm.memory import Decisions
    from tokensieve.vllm.model import Reduced
    from tokensieve.vllm.plan import ImagePlan
    from tokensieve.vllm.settings import served_method

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=8))
    methods = (served_method("divprune(keep=5)"),)
    engine: Any = SimpleNamespace(
        config=config,
        family=SimpleNamespace(project=None),
        decisions=Decisions(),
        settings=SimpleNamespace(methods=methods),
        _user_text=None,
    )
    layout, plan = TokenLayout.grid_of(6, 6), ImagePlan(0, 5, 5, 36, (6, 6))
    features = torch.randn(36, 8, generator=torch.Generator().manual_seed(0)).half().float()
    features[18:] = features[:18]  # ties: which of two equal tokens is kept hangs on the last bits

    def decide(*images: torch.Tensor, keys: list[Any]) -> list[list[int]]:
        layouts = [layout] * len(images)
        outputs = EncoderOutputs(layouts, {}, [], [], [], 2, (), None)
        plans = [plan] * len(images)
        members = [range(number, number + 1) for number in range(len(images))]
        decisions = Reduced._decide(engine, plans, layouts, members, images, outputs, None, keys=keys)
        return [decision.anchors.tolist() for decision in decisions]

    noise = 1e-6 * torch.randn(36, 8, generator=torch.Generator().manual_seed(1))
    (first,) = decide(features, keys=["image"])
    _, again = decide(features.flip(0), features + noise, keys=["other", "image"])
    (forgotten,) = decide(features + noise, keys=["a third"])
    assert forgotten != first, "the noise is too small for this test"
    return "the same" if again == first else f"{first}, then {again}"


# -- one engine, many requests ----------------------------------------------------------------------------------------


def test_wrong_requests_are_refused_and_the_engine_lives_on(loaded):
    model, processor = loaded
    rows = benchmark(scenes=14, types=ASKED)
    asked = of_benchmark(processor, 1)
    one = asked.prompts()[0]
    images = [row.image for row in rows[::7]]
    crowded = Asked(processor, [(" ".join([rows[0].question] * 20), images)]).prompts()[0]
    embeddings = {"prompt": one["prompt"], "multi_modal_data": {"image": torch.zeros(1, 144, 128)}}
    wrong = {
        "keep must be": [one | {"mm_processor_kwargs": {"tokensieve_keep": keep}} for keep in WRONG_BUDGETS],
        "tokensieve_method must be one of": [
            one | {"mm_processor_kwargs": {"tokensieve_method": name}} for name in ("fastv", "", 7, ["trsm"], None)
        ],
        "unknown option": [one | {"mm_processor_kwargs": {"tokensieve_kep": 3}}],
        "position ids": [crowded],
        "ready image embeddings": [embeddings],
        "no words to go by": [
            {"prompt": "USER: <image>\n ASSISTANT:", "multi_modal_data": one["multi_modal_data"]}
            | {"mm_processor_kwargs": {"tokensieve_method": "trsm"}}
        ],
    }
    reasons = [reason for reason, prompts in wrong.items() for _ in prompts]
    refused = [[prompt] for prompts in wrong.values() for prompt in prompts]
    good = [
        asked.prompts(),
        asked.prompts(tokensieve_keep=20),
        asked.prompts(tokensieve_keep=0.5, tokensieve_method="trsm"),
        asked.prompts(tokensieve_keep=10**9),  # more than there are: all
    ]
    engine = options("vtc-cls(keep=36)", allowed=["trsm(keep=36)"]) | {
        "limit_mm_per_prompt": {"image": 14},
        "enable_mm_embeds": True,
    }
    ran = run_apart(serve, engine, [*refused, *good])["passes"]
    for reason, prompts, one in zip(reasons, refused, ran, strict=False):
        assert reason in one.get("error", "was served"), (prompts[0].get("mm_processor_kwargs"), one)
    specs = ("vtc-cls(keep=36)", "vtc-cls(keep=20)", "trsm(keep=0.5)", "full")
    served = ran[len(refused) :]
    kept = kept_by(served)
    for spec, one in zip(specs, served, strict=True):
        assert one["ids"] == asked.answers(model, spec)[0]
    assert {(name, budget) for _, name, budget, _ in kept} >= {("vtc-cls", 36), ("vtc-cls", 20), ("trsm", 72)}


WRONG_BUDGETS = ("x", "64", -1, 0, 0.0, 1e9, 1.5, float("nan"), float("inf"), True, None, [3], {"keep": 3})


def test_an_answer_may_go_on_behind_the_last_position_of_the_model(loaded):
    """The prompt has 2,044 position ids before the reduction, the model 2,048, and the answer 24 tokens."""
    model, processor = loaded
    rows = benchmark(scenes=13, types=ASKED)
    text = " ".join([rows[0].question] * 30)
    for words in range(len(text.split()), 0, -1):
        asked = Asked(processor, [(" ".join(text.split()[:words]), [row.image for row in rows[::7]])])
        length = len(processor(images=[[row.image for row in rows[::7]]], text=asked.texts)["input_ids"][0])
        if length <= 2044:
            break
    spec = "vtc-cls(keep=36)"
    engine = options(spec) | {"limit_mm_per_prompt": {"image": 13}}
    (ran,) = run_apart(serve, engine, [asked.prompts()], 24, (), True)["passes"]
    assert 2040 < length <= 2044
    assert ran["ids"] == asked.answers(model, spec, 24, all_tokens=True)[0]


# -- vLLM's own features ----------------------------------------------------------------------------------------------


def test_an_adapter_of_the_llm(loaded, tmp_path):
    from copy import deepcopy

    from safetensors.torch import save_file

    model, processor = loaded
    asked = of_benchmark(processor, 5)
    changed, weights, drawn = deepcopy(model), {}, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, layer in enumerate(changed.model.language_model.layers):
            for part in ("q_proj", "v_proj"):
                down, up = torch.randn(8, 128, generator=drawn) / 4, torch.randn(128, 8, generator=drawn) / 4
                name = f"base_model.model.model.language_model.layers.{number}.self_attn.{part}"
                weights |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
                getattr(layer.self_attn, part).weight += up @ down
    save_file(weights, tmp_path / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    for spec in ("vtc-cls(keep=48)",):
        engine = options(spec) | {"enable_lora": True, "max_lora_rank": 8}
        prompts = asked.prompts()
        ran = run_apart(serve, engine, [prompts, prompts, prompts], TOKENS, ("", str(tmp_path), ""))["passes"]
        plain, adapted = (asked.answers(of_model, spec)[0] for of_model in (model, changed))
        assert plain != adapted
        assert [one["ids"] for one in ran] == [plain, adapted, plain]


@pytest.mark.slow
def test_two_ranks_in_processes_of_their_own_decide_alike(loaded):
    """Tensor parallelism: vtc-cls averages heads, hired reads each head, visionzip joins the keys of all heads."""
    model, processor = loaded
    asked = of_benchmark(processor, 5)
    specs = ("vtc-cls(keep=48)", "hired(keep=48)", "visionzip(keep=48)", "trsm(keep=48)")
    engine = options(specs[0], allowed=specs[1:]) | {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
    }
    passes = [asked.prompts(tokensieve_method=name_of(spec)) for spec in specs]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    ids, ranks = run_apart(serve_ranks, engine, passes, env=env | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    assert len(ranks) == 2
    assert ranks[0] == ranks[1]
    decided = {}
    for pixels, name, budget, text, anchors in ranks[0]:
        decided.setdefault((pixels, name, budget, tuple(text)), []).append(anchors)
    for spec, of_spec in zip(specs, ids, strict=True):
        expected, kept = asked.answers(model, spec)
        assert of_spec == expected, spec
        assert_kept(decided, asked, kept, spec)


def serve_ranks(engine: dict[str, Any], passes: Sequence[Sequence[Prompt]]) -> Any:
    """Return the token ids of each list of prompts, and the decisions of each rank."""
    from vllm import LLM, SamplingParams

    llm = LLM(**ENGINE | engine)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS)
    ids = [
        [list(output.outputs[0].token_ids) for output in llm.generate(list(prompts), sampling, use_tqdm=False)]
        for prompts in passes
    ]
    return ids, llm.apply_model(decisions_of)


def decisions_of(model: Any) -> list[Any]:
    return [
        (pixels, model.settings.methods[plan.method].info.name, plan.budget, text, decision.anchors.tolist())
        for (pixels, plan, text), decision in model.decisions.items()
    ]


# -- engines that are refused -----------------------------------------------------------------------------------------

REFUSED = {
    "own pruning": ({"video_pruning_rate": 0.5}, "vLLM's own video pruning"),
    "captured encoder": ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder=False"),
    "compiled encoder": ({"compilation_config": {"compile_mm_encoder": True}}, "compile_mm_encoder=False"),
    "other images": ({"tensor_parallel_size": 2}, "mm_encoder_tp_mode='weights'"),
    "pipeline": ({"pipeline_parallel_size": 2}, "positions='contiguous'"),
    "drafter": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "positions='contiguous'",
    ),
}


def test_engines_that_would_run_past_the_reduction_are_refused():
    errors = run_apart(refusals, options("vtc-cls(keep=36)"), {name: more for name, (more, _) in REFUSED.items()})
    for name, (_, words) in REFUSED.items():
        assert words in errors[name], (name, errors[name])
    assert errors["none"] == ""


def refusals(engine: dict[str, Any], more: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return what :func:`check_engine` answers to the config that vLLM makes of these arguments."""
    from vllm.engine.arg_utils import EngineArgs

    from tokensieve.errors import Refusal
    from tokensieve.vllm.model import check_engine
    from tokensieve.vllm.settings import EngineSettings

    errors = {}
    for name, arguments in {"none": {}, **more}.items():
        config = EngineArgs(**engine, dtype="float32", max_model_len=512, **arguments).create_engine_config()
        if name == "other images":  # vLLM takes this mode back for models whose encoder cannot, such as this one
            config.model_config.multimodal_config.mm_encoder_tp_mode = "data"
        try:
            check_engine(config, EngineSettings.of_config(config.model_config.hf_config))
            errors[name] = ""
        except Refusal as error:
            errors[name] = str(error)
    return errors

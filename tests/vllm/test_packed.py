"""Pixtral towers: images of any size, packed, with row breaks between their tokens in the prompt."""

import pytest

from tests.vllm.checkpoints import Expected, engine_prompts, picture, save
from tests.vllm.engines import run_engine
from tokensieve.vllm import engine_options

PROMPTS = [
    ("IMG what is a b c", [picture(1, 112, 84)]),
    ("what IMG is one IMG d e", [picture(2, 98, 98), picture(3, 84, 126)]),
    ("IMG the colour of f", [picture(4, 140, 56)]),
    ("IMG shape", [picture(5, 56, 28)]),
]
METHODS = (
    "vtc-cls(keep=0.4)",
    "random(keep=5)",
    "uniform(keep=0.3)",
    "pool(keep=0.3)",
    "divprune(keep=6)",
    "trsm(keep=0.5)",
    "fopru(keep=0.4)",
    "visionzip(keep=6)",
    "prumerge+(keep=7)",
    "vispruner(keep=0.5)",
    "mmtok(keep=4)",
)
SAMPLING = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("family", ["pixtral", "mistral3"])
def test_answers_and_kept_tokens_equal_transformers(family, positions, tmp_path):
    folder = save(family, tmp_path / "model")
    options = engine_options(folder, METHODS[0], allowed=METHODS[1:], positions=positions)
    passes = [engine_prompts(family, PROMPTS, tokensieve_method=method.split("(")[0]) for method in METHODS]
    whole = engine_prompts(family, PROMPTS, tokensieve_keep=1.0)
    mixed = [requests[i] for requests in passes for i in range(len(PROMPTS))]  # all methods and sizes in one batch
    caching = {} if positions == "original" else {"enable_prefix_caching": False}
    out = run_engine(tmp_path, folder, *passes, whole, mixed, sampling=SAMPLING, **options, **caching)["passes"]
    expected = Expected(family, folder)
    all_answers = []
    for method, got in zip((*METHODS, "full"), out, strict=False):
        answers, kept = expected.answer(PROMPTS, method, positions=positions)
        assert got["ids"] == answers, method
        assert got["kept"] == kept, method
        all_answers += answers
    assert out[-1]["ids"] == all_answers[: -len(PROMPTS)]
    assert len(set(map(tuple, all_answers))) > len(all_answers) / 3  # they depend on what was kept

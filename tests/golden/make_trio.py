"""Make the vectors of TRIO: ``python -m tests.golden.make_trio CHECKOUT``.

CHECKOUT is a clone of github.com/ocy1/TRIO at ec85d99de311a7e1998fd9383b532ef1636ae807. Its function that prunes at a
layer is run alone, on a layer of a small LLaVA and its hidden states. The code has no licence; only numbers are stored.
"""

import sys
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from tests.golden.drawn import bells
from tests.golden.make_priortr import TOKENS, small_llava
from tests.golden.storing import commit, functions, store


def llava_with_head(h: dict):
    """Return the small LLaVA with a drawn output head, and its inputs."""
    model, inputs = small_llava(h)
    model.lm_head.weight.data.copy_(bells(h["seed"] + 3, *model.lm_head.weight.shape) / 4)
    return model, inputs


def cases(prune):
    for number, (layer, keep) in enumerate([(1, 92), (2, 54), (2, 300)]):
        h = {"seed": 4000 + number, "sharp": 0.5, "layer": layer, "keep": keep}
        model, inputs = llava_with_head(h)
        llm = model.model.language_model
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states[layer]

        def run(hidden_states, position_ids, llm=llm, layer=layer, **_):
            rotary = llm.rotary_emb(hidden_states, position_ids)
            return (llm.layers[layer](hidden_states, attention_mask=None, position_embeddings=rotary),)

        host = types.SimpleNamespace(
            config=types.SimpleNamespace(), layers={layer: run}, norm=llm.norm, lm_head=model.lm_head,
            parameters=llm.parameters, image_tokens=[TOKENS], image_token_list=[TOKENS, keep], image_token_posi=[1],
        )  # fmt: skip
        columns = torch.arange(states.shape[1])[None]  # the labels tell which columns stay
        *_, left = prune(host, 0, layer, states, columns, None, columns, None, None, None)
        rows = functional.normalize(states[0, 1 : 1 + TOKENS], dim=-1)
        print(h, "pairs at or above 0.8:", int((rows @ rows.T >= 0.8).sum() - TOKENS) // 2)
        kept = left[0, 1 : 1 + keep] - 1
        yield f"layer_{layer}_keep_{keep}", h, {"kept": kept.short()}


def main(checkout: Path) -> None:
    file = checkout / "llava/model/modeling_llama_x.py"
    code = functions(file, "layer_prune", F=functional, np=np, nullcontext=nullcontext)
    entry = {
        "method": "trio_model",
        "paper": "arXiv:2602.04657",
        "title": "TRIO: Token Reduction via Inference-Objective Guidance for Efficient Vision-Language Models",
        "repo": "ocy1/TRIO",
        "commit": commit(checkout),
        "source": ["llava/model/modeling_llama_x.py: layer_prune"],
        "deviations": ["the small LLaVA of make_trio.llava_with_head; one sample; labels hold the column numbers"],
    }
    store("trio", [entry], {"trio_model": list(cases(code.layer_prune))})


if __name__ == "__main__":
    main(Path(sys.argv[1]))

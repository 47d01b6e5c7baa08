"""Run one vLLM engine on a job in a file: ``python run_engine.py JOB``. Each engine of the tests is a process."""

import os
import pickle
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is in this process
os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from tokensieve import Refusal

    with open(sys.argv[1], "rb") as file:
        job = pickle.load(file)
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16, "seed": 0}
    llm = LLM(job["model"], **defaults | job["engine"])
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    encoded, decided, of_pass, positions = [], {}, {}, []
    if hasattr(model, "_decide"):
        decide = model._decide

        def recorded(images, *between, keys):
            decisions = decide(images, *between, keys=keys)
            encoded.append(len(images))
            kept = {key: decision.anchors.tolist() for key, decision in zip(keys, decisions, strict=True)}
            decided.update(kept)
            of_pass.update(kept)
            return decisions

        model._decide = recorded
    if job["positions"]:
        forward = model.forward

        def noted(*args, **kwargs):
            output = forward(*args, **kwargs)
            positions.append(kwargs["positions"].tolist())
            return output

        model.forward = noted
    passes = []
    for prompts, sampling, adapter in job["passes"]:
        encoded.clear(), of_pass.clear(), positions.clear()
        lora = LoRARequest("adapter", 1, adapter) if adapter else None
        try:
            outputs = llm.generate(prompts, SamplingParams(**sampling), use_tqdm=False, lora_request=lora)
        except Refusal as refusal:
            passes.append({"refused": str(refusal)})
            continue
        passes.append(
            {
                "ids": [list(output.outputs[0].token_ids) for output in outputs],
                "text": [output.outputs[0].text.strip() for output in outputs],
                "prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
                "cached_tokens": [output.num_cached_tokens for output in outputs],
                "encoded": list(encoded),  # images per encode call
                "kept": {(pixels, text): anchors for (pixels, _, text), anchors in of_pass.items()},
                "positions": list(positions),  # per step of the engine
            }
        )
    from tokensieve import tally

    kept = {(pixels, text): anchors for (pixels, _, text), anchors in decided.items()}
    with open(sys.argv[1] + ".out", "wb") as file:
        pickle.dump({"passes": passes, "kept": kept, "tally": tally.snapshot()}, file)


if __name__ == "__main__":  # vLLM's own processes import this file
    main()

"""Methods inside evaluation harnesses: lmms-eval, lm-eval and VLMEvalKit.

One module per harness holds its model, which only the harness imports. All share :mod:`.attached`: a method attached
for the whole run, errors that end the run, and the tokens before and after in the harness's record.
"""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """Return the manifest that lmms-eval reads through the entry point ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("tokensieve", chat_class_path="tokensieve.harness.lmms_eval_model.Tokensieve")

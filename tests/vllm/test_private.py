"""The names of vLLM's that the plug-in relies on, against the installed release."""

from tests.vllm.apart import run_apart
from tokensieve.vllm.private import NAMES, OF_FAMILY, Name, changed


def test_the_installed_vllm_has_every_name_that_the_plug_in_uses():
    lines = run_apart(changes)
    assert not lines, "vLLM changed:\n" + "\n".join(lines)


def changes() -> list[str]:
    from importlib import import_module

    from tokensieve.vllm.families import FAMILIES

    for family in FAMILIES:
        assert getattr(import_module(f"vllm.model_executor.models.{family.module}"), family.architecture)
    return changed([*NAMES, *(name for names in OF_FAMILY.values() for name in names)])


def test_what_changed_is_named_in_one_line_each():
    module, apply = "json.decoder:JSONDecoder", Name("json.decoder:JSONDecoder.decode", "reads", ("s", "_w"))
    assert changed([apply, Name(f"{module}.scan | {module}.decode", "reads"), Name(f"{module}.memo", "is filled")]) == [
        f"{module}.memo: has no memo (is filled)"
    ]
    assert changed([Name("json.nothing:JSON", "reads"), Name(f"{module}.decode", "reads", ("text",))]) == [
        "json.nothing:JSON: cannot be imported: No module named 'json.nothing' (reads)",
        f"{module}.decode: takes (s), expected (text) (reads)",
    ]


def test_an_engine_on_a_changed_vllm_is_refused_and_one_on_an_untested_release_warns():
    assert run_apart(check_others) == (
        "vLLM 9.0 is not the vLLM that the plug-in knows (tested: 0.30 to 0.32):\n"
        "vllm:nothing: has no nothing (a test)",
        "Tokensieve is not tested with vLLM 9.0 (tested: 0.30 to 0.32)",
    )


def check_others() -> tuple[str, str]:
    """Return the refusal if a name is missing, and the warning if none is."""
    import warnings
    from unittest.mock import patch

    from tokensieve.errors import Refusal
    from tokensieve.vllm import private

    message = ""
    with patch("vllm.__version__", "9.0"):
        with patch.object(private, "NAMES", (Name("vllm:nothing", "a test"),)):
            try:
                private.check("Some")
            except Refusal as error:
                message = str(error)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            private.check("Some")
    return message, str(caught[-1].message)

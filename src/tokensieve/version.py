"""The version of Tokensieve, and the releases of its libraries that its tests ran with."""

__version__ = "0.1.0"

TESTED = {"torch": ("2.13", "2.15"), "transformers": ("5.20", "5.23")}
"""The lowest and the highest tested release of each library. Others cause a warning; newer ones are not excluded."""

TESTED_VLLM = ("0.30", "0.32")
"""The same for vLLM, whose private names the plug-in uses; an engine on another release warns."""


def tested_range(library: str) -> str:
    """Return the tested releases of a library in words, such as "5.20 to 5.23"."""
    lowest, highest = TESTED[library]
    return lowest if lowest == highest else f"{lowest} to {highest}"

"""Convert checkpoints in LLaVA's original format: ``files.py`` finds and reads the weights, ``lora.py`` adds a LoRA to
its base, ``names.py`` renames them, ``settings.py`` makes the config and the processor, and ``build.py`` writes the
folder."""

from tokensieve.convert.build import Converted, convert_llava

__all__ = ["Converted", "convert_llava"]

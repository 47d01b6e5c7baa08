"""Load a model and its processor by name, with the options that real checkpoints need."""

from tokensieve.loading.model import device_of, devices_of, load_model, to_model
from tokensieve.loading.options import DEFAULTS, Dtype, LoadOptions, Quantize, without_folder
from tokensieve.loading.place import Place, find
from tokensieve.loading.processor import check_processor, load_processor

__all__ = [
    "DEFAULTS",
    "Dtype",
    "LoadOptions",
    "Place",
    "Quantize",
    "check_processor",
    "device_of",
    "devices_of",
    "find",
    "load_model",
    "load_processor",
    "to_model",
    "without_folder",
]

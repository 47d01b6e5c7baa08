"""A model and an image for every call."""

from pathlib import Path

import pytest
from PIL import Image

from tokensieve import reference


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a value of ``--model``: the bundled model, or one of its shape if there are no weights."""
    if (reference.path() / "model.safetensors").is_file():
        return "reference"
    from tokensieve.reference.model import build_model, build_processor

    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "photo.jpg"
    Image.radial_gradient("L").convert("RGB").resize((320, 240)).save(path)
    return path

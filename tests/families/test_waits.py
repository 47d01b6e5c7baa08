"""How often a prefill waits for its device because of a method, at a fixed budget: for what has to be known, once.

Three prompts with four images. What the host must know: how many placeholders each prompt has; the sizes of images,
where the model is given these on the device; which newlines stay, image by image, since that depends on the choice;
the words of the prompt, where they are read.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from tests.support import families

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this torch pretends no device"
)
NAMES = [name for name in families.FAMILIES if name != "lighton-ocr"]  # of what is discovered, more is checked
NEWLINES = [name for name in NAMES if name.startswith(("llava-next", "llava-onevision"))]
SIZES = [*NEWLINES, "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "glm4v", "mistral3", "pixtral"]
OTHER = {
    **dict.fromkeys(["llava-onevision", "llava-onevision-resampled"], 1),  # how many images each prompt has
    "internvl": 1,  # which tiles stand side by side
}


def allowed(name, kind):
    windows = (name, kind) == ("qwen2.5-vl", "attention")  # the order in which its tower runs them
    return 1 + (name in SIZES) + 4 * (name in NEWLINES) + OTHER.get(name, 0) + (kind == "text") + windows


def test_a_prefill_waits_only_for_sizes_and_words_that_it_needs():
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "src")))
    command = [sys.executable, str(Path(__file__).with_name("waits.py")), *NAMES]
    out = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    counted = {
        name: {k: n for k, n in row.items() if isinstance(n, int)} for name, row in json.loads(out.stdout).items()
    }
    assert counted == {name: {kind: allowed(name, kind) for kind in row} for name, row in counted.items()}
    assert sum(map(len, counted.values())) > 80

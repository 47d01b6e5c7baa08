"""Spec files: written by a search, read by ``attach`` and by the commands, with clear errors."""

import json
from pathlib import Path

import pytest
import torch

import tokensieve
from tests.cli.calling import run_many
from tests.tune.conftest import needs_weights
from tokensieve import Refusal
from tokensieve.evaluate.plan import Settings, plan
from tokensieve.evaluate.prompt import left_padded_batch
from tokensieve.methods.spec import expand, parse
from tokensieve.methods.spec_file import DEFAULTS, SpecFile, read_spec_file
from tokensieve.reference.model import build_model, build_processor

GOOD = {"tokensieve_spec": 1, "method": "downsample(keep=0.5) + divprune", "keep": 9, "positions": "contiguous"}


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str = "best.json", text: str | None = None, **changes: object) -> str:
        data = {key: value for key, value in (GOOD | changes).items() if value != "left out"}
        (tmp_path / name).write_text(json.dumps(data) if text is None else text)
        return str(tmp_path / name)

    return write


def test_the_spec_inside_is_parsed_with_its_budget(write) -> None:
    assert parse(write()) == parse("downsample(keep=0.5) + divprune(keep=9)")
    assert parse(write(keep=None, method="setok-cluster")) == parse("setok-cluster")
    (entry,) = plan([write(positions="original")], [0.5, 16], seeds=1, oracle=False)[1:]
    assert entry.runs[0].key == "downsample(keep=0.5) + divprune(keep=9)"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    options = {"positions": "contiguous", "separators": "none", "budget_scope": "sample", "repair": "size"}
    options |= {"reselect": True}
    file = SpecFile("vtc-cls", 0.25, options, {"drop": 0.01})
    (tmp_path / "a.json").write_text(json.dumps(file.to_json()))
    read = read_spec_file(tmp_path / "a.json")
    assert (read.method, read.keep, read.options, read.evidence) == ("vtc-cls", 0.25, options, {"drop": 0.01})
    assert read.name == "a.json"


def test_attach_takes_the_file_with_its_options(write) -> None:
    from PIL import Image

    model, processor = build_model().eval(), build_processor()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    inputs = left_padded_batch(processor, [[Image.radial_gradient("L").convert("RGB")]], ["what is it?"])
    logits = {}
    for name, method, options in (
        ("file", write(method="divprune"), {}),
        ("same option", write(method="divprune"), {"positions": "contiguous"}),
        ("spec", "divprune(keep=9)", {"positions": "contiguous"}),
        ("other positions", "divprune(keep=9)", {}),
    ):
        with tokensieve.attach(model, method, processor=processor, **options) as sieve, torch.inference_mode():
            logits[name] = model(**inputs).logits
            assert sieve.last[0][0].slots == 9
    assert torch.equal(logits["file"], logits["spec"])
    assert torch.equal(logits["file"], logits["same option"])
    assert not torch.equal(logits["file"], logits["other positions"])


WRONG = {
    "version": ({"tokensieve_spec": 2}, "has version 2; this Tokensieve reads version 1"),
    "no version": ({"tokensieve_spec": "left out"}, "is not a spec file of `tokensieve tune`"),
    "no method": ({"method": "left out"}, "method must be a spec such as 'vtc-cls'; got None"),
    "a file in a file": ({"method": "other.json"}, "method must be a spec such as 'vtc-cls'"),
    "unknown key": ({"keeps": 4}, "unknown key 'keeps'"),
    "positions": ({"positions": "new"}, "positions must be one of 'original', 'contiguous'; got 'new'"),
    "separators": ({"separators": ["none"]}, "separators must be one of 'kept-lines', 'none'"),
    "budget": ({"keep": 1.5}, "best.json: keep must be a whole number of tokens >= 1, or a share in (0, 1]; got 1.5"),
    "unknown method": ({"method": "vtc-clz"}, "unknown method 'vtc-clz'; did you mean vtc-cls"),
    "budget given twice": ({"method": "divprune(keep=4)"}, "has no open parameter 'keep'; the spec gives it"),
    "no JSON": ({"text": "{"}, "best.json is not JSON"),
    "a list": ({"text": "[1]"}, "is not a spec file"),
    "evidence": ({"evidence": 3}, "evidence must be an object; got 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused(write, name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(Refusal) as error:
        parse(write(**changes))
    assert message in str(error.value)


def test_a_missing_file_and_conflicts_are_refused(write, tmp_path: Path) -> None:
    model = build_model().eval()
    with pytest.raises(Refusal, match=r"there is no spec file .*nowhere.json; `tokensieve tune` writes one"):
        tokensieve.attach(model, str(tmp_path / "nowhere.json"))
    with pytest.raises(Refusal, match="gives all parameters; got keep"):
        tokensieve.attach(model, write(), keep=4)
    with pytest.raises(Refusal, match=r"best.json says budget_scope='image'; got budget_scope='sample'"):
        tokensieve.attach(model, write(), budget_scope="sample")
    with pytest.raises(Refusal, match="cannot read the spec file"):
        parse(str(_folder(tmp_path)))
    with pytest.raises(Refusal, match=r"best.json says positions='contiguous', which cannot be set here"):
        plan([write()], [0.5], seeds=1, oracle=False)


def _folder(parent: Path) -> Path:
    (parent / "folder.json").mkdir()
    return parent / "folder.json"


def test_options_hold_for_all_specs_of_a_list(write) -> None:
    options = {"positions": "original", "separators": "kept-lines", "budget_scope": "image", "repair": None}
    specs, merged = expand(["pool", write()], **options)
    assert specs == ["pool", "downsample(keep=0.5) + divprune(keep=9)"]
    assert merged == options | {"positions": "contiguous"}
    assert Settings(**merged).attach_options() == merged
    with pytest.raises(Refusal, match=r"best.json and other.json differ in their options"):
        expand([write(), write("other.json", positions="original")], **options)
    assert expand(["pool"], **options) == (["pool"], options)


@needs_weights
def test_the_commands_take_the_file_of_a_search(best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = SpecFile(**{key: json.loads(best.read_text())[key] for key in ("method", "keep")})
    (method,) = map(str, parse(spec.method, **spec.parameters))
    none = tmp_path / "none.json"
    none.write_text(json.dumps(SpecFile("vtc-cls", 36, {**DEFAULTS, "separators": "none"}).to_json()))
    few = ["--limit", "7", "--no-measure", "--no-report", "--max-new-tokens", "4"]
    outcomes = run_many(
        {
            "ask": ["ask", "--method", best, "--json"],
            "compare": ["compare", "--methods", f"{best}, uniform", "--keep", "16", *few, "--output", "c", "--json"],
            "bench": ["bench", "--method", best, "--repeats", "1", "--json"],
            "check": ["check", "--method", str(none), "--json"],
            "ask keep": ["ask", "--method", best, "--keep", "9"],
            "ask positions": ["ask", "--method", best, "--positions", "contiguous"],
            "serve": ["serve", "reference", "--method", "nowhere.json"],
            "batch": ["batch", "--data", "reference", "--methods", "nowhere.json", "--output", "b"],
        }
    )
    assert json.loads(outcomes["ask"].out)["method"] == method
    assert [row["method"] for row in json.loads(outcomes["compare"].out)][:2] == ["full", method]
    assert [row["method"] for row in json.loads(outcomes["bench"].out)] == ["full", method]
    assert json.loads(outcomes["check"].out)["separators"] == "none"
    assert "has no open parameter 'keep'; the spec gives it" in outcomes["ask keep"].refused()
    assert "says positions='original'; got positions='contiguous'" in outcomes["ask positions"].refused()
    for name in ("serve", "batch"):
        assert "there is no spec file nowhere.json" in outcomes[name].refused()

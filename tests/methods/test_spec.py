"""The spec grammar and the registry: reading, printing, errors."""

import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tokensieve
from tests.support.methods import connector_specs
from tokensieve import Method, Refusal, parse, register
from tokensieve.commands.arguments import _key_values, split_budgets


@pytest.fixture
def shape(registry):
    """A method with every kind of literal as a parameter."""

    @register("shape", paper="none")
    @dataclass(frozen=True)
    class TokenLayout(Method):
        """For these tests."""

        keep: int | float = 4
        sizes: tuple = ()
        text: str = ""
        flag: bool = False
        weights: tuple | None = None

        def reduce(self, image):
            raise NotImplementedError

    @register("shape+", paper="none")
    @dataclass(frozen=True)
    class ShapePlus(TokenLayout):
        """Its name ends in a plus sign."""

    return TokenLayout, ShapePlus


@pytest.mark.parametrize("spec", connector_specs())
def test_print_and_parse(spec):
    stages = parse(spec)
    assert " + ".join(map(str, stages)) == " + ".join(str(m) for m in parse(" + ".join(map(str, stages))))
    assert parse(" + ".join(map(str, stages))) == stages


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ("", {}),
        ("()", {}),
        ("( keep = 3 )", {"keep": 3}),
        ("(keep=0.5,)", {"keep": 0.5}),
        ("(sizes=(1, (2, 3)), keep=2)", {"sizes": (1, (2, 3)), "keep": 2}),
        ("(text='a) + b(', flag=True)", {"text": "a) + b(", "flag": True}),
        ('(text="it\'s")', {"text": "it's"}),
        ("(weights=(0.5, -1e-3, None))", {"weights": (0.5, -1e-3, None)}),
        ("(text='é+(')", {"text": "é+("}),
    ],
)
@pytest.mark.parametrize("plus", [False, True])
def test_arguments(shape, arguments, fields, plus):
    name = "shape+" if plus else "shape"
    (method,) = parse(name + arguments)
    assert method == shape[plus](**fields)
    assert parse(str(method)) == [method]
    assert parse(f"{name}{arguments} + uniform + {name}{arguments}") == [method, *parse("uniform"), method]


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("shape", ["shape"]),
        ("shape+", ["shape+"]),
        (" shape+ ", ["shape+"]),
        ("shape++uniform", ["shape+", "uniform"]),
        ("shape+ + uniform", ["shape+", "uniform"]),
        ("shape + uniform", ["shape", "uniform"]),
        ("shape+uniform", ["shape", "uniform"]),
        ("shape+(keep=2)+uniform", ["shape+", "uniform"]),
        ("uniform+shape+", ["uniform", "shape+"]),
        ("shape(keep=2)+shape+", ["shape", "shape+"]),
    ],
)
def test_names_that_end_in_a_plus(shape, spec, names):
    assert [m.info.name for m in parse(spec)] == names


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vtc-cl", "unknown method 'vtc-cl'; did you mean vtc-cls"),
        ("xyzzy", "unknown method 'xyzzy'; known: "),
        ("vtc-cls(kep=3)", "vtc-cls has no parameter 'kep'; did you mean keep?"),
        ("full(keep=3)", "full has no parameter 'keep'; known: none"),
        ("vtc-cls(3)", "arguments are key=literal pairs in parentheses"),
        ("vtc-cls(**{'keep': 3})", "arguments are key=literal pairs in parentheses"),
        ("vtc-cls(keep=x)", "arguments are key=literal pairs in parentheses"),
        ("vtc-cls(keep=__import__('os'))", "arguments are key=literal pairs in parentheses"),
        ("vtc-cls(keep=3, keep=4)", "arguments are key=literal pairs in parentheses"),
        ("vtc-cls(keep=3", "arguments are key=literal pairs in parentheses"),
        ("", "a method name is missing at ''"),
        (" + vtc-cls", "a method name is missing at '+ vtc-cls'"),
        ("vtc-cls(keep=3) +", "a method name is missing at ''"),
        ("vtc-cls uniform", "expected '+' at 'uniform'"),
        ("vtc-cls(keep=3))", "expected '+' at ')'"),
        ("vtc-cls(keep=0)", "keep must be a whole number of tokens >= 1"),
        ("twigvlm(average=0.0)", "average must be a whole number of tokens >= 1"),
        ("pyramiddrop(layers=(1, 2), counts=(9, 0))", "each of counts must be a whole number of tokens >= 1"),
        ("vtc-cls(over_layers='all')", "over_layers must be one of 'sum', 'mean', 'max', 'min'; got 'all'"),
    ],
)
def test_errors_name_the_mistake_and_the_nearest_valid_names(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(spec)


def test_open_parameters():
    assert parse("downsample + vtc-cls(keep=3)", keep=9) == parse("downsample(keep=9) + vtc-cls(keep=3)")
    with pytest.raises(ValueError, match="has no open parameter 'keep'"):
        parse("vtc-cls(keep=3)", keep=4)
    with pytest.raises(ValueError, match="no open parameter 'first_layr'; did you mean first_layer"):
        parse("vtc-cls", first_layr=4)


# -- registry -------------------------------------------------------------------------------------------------------

FILE = """
from dataclasses import dataclass
import tokensieve
from tokensieve.methods.vtc_cls import VtcCls

@tokensieve.register({name!r}, paper="none")
@dataclass(frozen=True)
class Mine(tokensieve.Method):
    '''Mine.'''
    keep: int = 4
    kind: "Undefined" = "a"

    def reduce(self, image):
        return None

class Silent(VtcCls):
    pass
"""


def written(path, text):
    path.write_text(text)
    return path


def test_a_file_of_methods(tmp_path, registry):
    file = written(tmp_path / "my.methods-1.py", FILE.format(name="mine"))
    (method,) = parse(f"{file}:Mine(keep=3)")
    assert (method.keep, method.kind, str(method)) == (3, "a", "mine(keep=3)")
    assert parse(f"uniform + {file}:Mine")[1] == type(method)(), "the same class, loaded once"
    assert parse("mine(keep=3)") == [method]
    assert "mine" in [info.name for info in tokensieve.list_methods()]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (FILE.format(name="mine"), "Mne", "has no method class 'Mne'; did you mean Mine"),
        (FILE.format(name="mine"), "Silent", "is not registered: decorate it with @tokensieve.register"),
        (
            FILE.format(name="vtc-cls"),
            "Mine",
            "the method name 'vtc-cls' is taken by tokensieve.methods.vtc_cls.VtcCls",
        ),
        ("x = 1", "Mine", "has no method class 'Mine'; known: none"),
        (None, "Mine", "no such method file"),
    ],
)
def test_files_that_do_not_give_a_method(tmp_path, registry, text, name, message):
    file = tmp_path / "mine.py"
    if text is not None:
        written(file, text)
    for _ in range(2):  # the second time as well
        with pytest.raises(Refusal, match=re.escape(message)):
            parse(f"{file}:{name}")


@pytest.mark.parametrize("name", ["~no-such-user/mine.py", "loop.py", "n" * 300 + ".py", "folder.py"])
def test_names_that_are_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.py").symlink_to("loop.py")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(Refusal, match=f"no such method file: {name}"):
        parse(f"{name}:Mine")


HARD = st.text(alphabet="ak=ep(),+ .:/~\\'\"[]{}0159-py\n\0vtw-é\ud800*", max_size=30)


@settings(max_examples=300, deadline=None, database=None)
@example("{[]: 1})")
@example("'\ud800')")
@example("'\0')")
@example("-" * 5000 + "1)")
@example("(" * 5000 + ")" * 5000)
@example("9" * 5000 + ")")
@given(HARD)
def test_any_text_is_a_method_or_a_refusal(text):
    for start in ("", "vtc-cls(keep=", "~", "full("):
        with suppress(Refusal):
            assert all(isinstance(method, Method) for method in parse(start + text))
    with suppress(Refusal):
        split_budgets(text)
    with suppress(Refusal):
        _key_values("--processor", [f"size={text}"])


@pytest.mark.parametrize(
    ("text", "error"),
    [("import no_such_module", ModuleNotFoundError), ("def broken(:", SyntaxError), ("1 / 0", ZeroDivisionError)],
)
def test_a_bug_in_a_file_keeps_its_traceback(tmp_path, registry, text, error):
    file = written(tmp_path / "mine.py", text)
    for _ in range(2):  # the second time as well
        with pytest.raises(error):
            parse(f"{file}:Mine")


def test_a_file_that_was_repaired_loads(tmp_path, registry):
    file = written(tmp_path / "mine.py", FILE.format(name="mine") + "\n1 / 0")
    with pytest.raises(ZeroDivisionError):
        parse(f"{file}:Mine")
    written(file, FILE.format(name="mine"))
    assert parse(f"{file}:Mine")[0].keep == 4


def test_two_files_cannot_share_a_name(tmp_path, registry):
    first, second = (written(tmp_path / f"{n}.py", FILE.format(name="mine")) for n in "ab")
    parse(f"{first}:Mine")
    with pytest.raises(ValueError, match="the method name 'mine' is taken by"):
        parse(f"{second}:Mine")


def test_only_method_dataclasses_can_be_registered(registry):
    with pytest.raises(TypeError, match="Plain must be a dataclass derived from"):

        @register("plain", paper="none")
        class Plain:
            pass


@pytest.fixture
def installed(monkeypatch, registry):
    """Installs distributions that offer entry points."""

    def install(**plugins):
        found = [SimpleNamespace(name=name, value=f"pkg:{name}", load=load) for name, load in plugins.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: found if group == "tokensieve.methods" else [])
        registry._load.cache_clear()

    yield install
    monkeypatch.undo()
    registry._load.cache_clear()


def test_an_installed_plugin(installed):
    def load():
        @register("installed", paper="none")
        @dataclass(frozen=True)
        class Installed(Method):
            """From another distribution."""

            def reduce(self, image):
                raise NotImplementedError

        return Installed

    installed(mine=load)
    assert parse("installed")[0].info.title == "From another distribution."


def test_a_broken_plugin_is_named_once_and_left_out(installed):
    def load():
        raise ImportError("no such\nthing")

    installed(mine=load)
    said = "the method plug-in 'mine' (pkg:mine) is left out: ImportError: no such thing"
    with pytest.warns(UserWarning, match=f"^{re.escape(said)}$"):
        assert "vtc-cls" in [info.name for info in tokensieve.list_methods()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse("vtc-cls")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("fastv(layer='x')", "layer must be a number; got 'x'"),
        ("fastv(layer=None)", "layer must be a number; got None"),
        ("fastv(layer=True)", "layer must be a number; got True"),
        ("vtc-cls(first_layer=1.5)", "first_layer must be a whole number; got 1.5"),
        ("random(seed='x')", "seed must be a whole number; got 'x'"),
        ("cdpruner(over_batch=3)", "over_batch must be True or False; got 3"),
        ("pyramiddrop(layers=1)", "layers must be a tuple, each item a number; got 1"),
        ("pyramiddrop(layers=(1, 'a'))", "layers must be a tuple, each item a number; got (1, 'a')"),
        ("prumerge+(top=0.5)", "top must be a whole number or None; got 0.5"),
        ("holov(windows=0)", "windows must be at least 1; got 0"),
        ("window-fastv(windows=0)", "windows must be at least 1; got 0"),
        ("prumerge+(neighbours=-1)", "neighbours must be at least 0; got -1"),
        ("setok-cluster(fallback=0)", "fallback must be at least 1; got 0"),
        ("dart(text_pivots=-2)", "text_pivots must be at least 0; got -2"),
        ("dart(text_pivots=0, visual_pivots=0)", "cannot both be 0"),
        ("topv(steps=0)", "steps must be at least 1; got 0"),
        ("topv(recovered=-1.0)", "recovered must be a share in [0, 1]; got -1.0"),
        ("fastvid(context=5.0)", "context must be a share in [0, 1]; got 5.0"),
        ("fastvid(own=-0.1)", "own must be a share in [0, 1]; got -0.1"),
        ("hired(alpha=1.5)", "alpha must be a share in [0, 1]; got 1.5"),
        ("holitom(own=2)", "own must be a share in [0, 1]; got 2"),
        ("prunevid(merged=1.5)", "merged must be a share in [0, 1]; got 1.5"),
        ("dycoke(drop=1.1)", "drop must be a share in [0, 1]; got 1.1"),
        ("sparsevlm(recycle=-1.0)", "recycle must be a share in [0, 1]; got -1.0"),
        ("prunevid(neighbours=-2)", "neighbours must be at least 1; got -2"),
        ("sparsevlm+(heads=0)", "heads must be a whole number of heads >= 1, or a share in (0, 1]; got 0"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_when_the_spec_is_read(spec, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(spec)


def test_whole_numbers_are_numbers_and_lists_are_tuples():
    assert parse("hired(alpha=1)")[0].alpha == 1
    assert list(parse("pyramiddrop(layers=[1, 2])")[0].layers) == [1, 2]

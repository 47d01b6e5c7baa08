"""Attaching a method warns of an untested release of transformers."""

import importlib.metadata
import warnings

import pytest

import tokensieve
from tests.support import models
from tokensieve.models import versions


def attach():
    tokensieve.attach(models.tiny_model("llava-clip"), "uniform", keep=9).detach()


@pytest.fixture
def installed(monkeypatch):
    return lambda version: monkeypatch.setattr(versions, "version", lambda name: version)


@pytest.mark.parametrize("version", ["5.22.0", "5.24.1", "6.0.0"])
def test_a_version_outside_of_the_range_is_named(version, installed):
    installed(version)
    with pytest.warns(UserWarning, match=rf"transformers {version} is not .*5\.23.*tokensieve check") as found:
        attach()
    assert found[0].filename == __file__


@pytest.mark.parametrize("version", ["5.23.0", "5.23.4"])
def test_one_inside_is_not(version, installed):
    installed(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach()


def test_a_checkout_that_is_not_installed_states_no_range(installed, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    installed("6.0.0")
    monkeypatch.setattr(versions, "requires", missing)
    monkeypatch.setattr(versions, "tested_range", versions.tested_range.__wrapped__)  # without its cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach()

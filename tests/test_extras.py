"""Packages that are optional: what a user reads where one is missing, and what is not taken for missing."""

import sys
from importlib.metadata import packages_distributions

import pytest

from perceptual_at._extras import INSTALLED_AS, extra


def test_a_missing_package_is_named_as_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = r"^digits: scikit-learn is needed for its images .* `pip install scikit-learn`"
    with pytest.raises(ImportError, match=message):
        extra("digits", "sklearn.datasets", why="for its images")


@pytest.mark.parametrize(
    "failure", ["import package_that_is_not_there", "from json import name_that_is_not_there", "1/0"]
)
def test_a_package_that_breaks_on_import_is_not_called_missing(tmp_path, monkeypatch, failure):
    (tmp_path / "broken_package.py").write_text(failure)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ImportError, ZeroDivisionError)) as caught:
        extra("f", "broken_package", why="here")
    assert "is not installed" not in str(caught.value)
    sys.modules.pop("broken_package", None)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), INSTALLED_AS.items())
def test_what_is_imported_under_another_name_is_installed_under_it(module, name):
    assert name.lower() in {found.lower() for found in packages_distributions()[module]}

"""Versions against declared ranges."""

from importlib import metadata

import pytest

from uft_ds.doctor.versions import check_flash_attention, check_nf4, check_packages, check_python

INSTALLED = {"torch": "2.13.0+cpu", "peft": "0.20.0", "rich": "14.1"}


def version_of(name: str) -> str:
    try:
        return INSTALLED[name]
    except KeyError:
        raise metadata.PackageNotFoundError(name) from None


def test_each_package_outside_its_range_is_named_with_the_command() -> None:
    """Of five, two fit (a local build counts as its version), one is old, one is missing; extras are not asked for."""
    declared = ["torch<2.14,>=2.10", "peft<0.22,>=0.21", "rich>=13", "typer>=0.15", 'wandb>=0.19; extra == "wandb"']
    fitting, old, missing = check_packages(declared, version_of)
    assert (fitting.state, fitting.found) == ("ok", "2 of 4 as declared")
    assert (old.name, old.state, old.found) == ("peft", "problem", "0.20.0, expected <0.22,>=0.21")
    assert old.remedy == "pip install 'peft<0.22,>=0.21'"
    assert (missing.name, missing.found) == ("typer", "not installed")


def test_this_environment_is_measured_by_its_own_metadata() -> None:
    """What tests run with is what the package asks for."""
    findings = check_packages()
    assert [finding.state for finding in findings] == ["ok"], findings
    assert int(findings[0].found.split(" of ")[0]) >= 15


def test_an_old_python_is_a_problem() -> None:
    """3.10 where 3.11 is asked for; this one is not."""
    assert check_python(">=3.11", "3.10.2").state == "problem"
    assert check_python().state == "ok"


def test_flash_attention_matters_on_gpus_alone() -> None:
    """Missing: fine on CPUs, on GPUs a note with the extra that brings it."""
    assert check_flash_attention(False, is_installed=False).state == "ok"
    note = check_flash_attention(True, is_installed=False)
    assert (note.state, note.remedy) == ("note", "pip install --no-build-isolation 'flash-attn>=2.7'")


def test_bitsandbytes_is_asked_for_by_nf4_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, it has its version; not installed, nothing is wrong; too old, it says how to get another."""
    assert check_nf4(False).found.endswith("used by model.quantization: nf4")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert check_nf4(False).state == "ok"
    monkeypatch.setattr("uft_ds.streams.nf4.LEAST_VERSION", "999")
    old = check_nf4(False)
    assert old.state == "problem"
    assert "needs bitsandbytes 999" in old.found
    assert "bitsandbytes" in old.remedy

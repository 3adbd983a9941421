"""The constraints file of `make test-lowest`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lowest_versions", ROOT / "scripts" / "lowest_versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project(*dependencies: str) -> str:
    return f"[project]\ndependencies = {list(dependencies)!r}\n"


def test_each_dependency_is_held_at_its_lower_bound(script: ModuleType) -> None:
    """Whatever its upper bound; torch is installed before, its builds differ by machine."""
    versions = script.lowest_versions(project("torch>=2.10,<2.14", "peft>=0.21,<0.22", "huggingface-hub>=1.3"))
    assert versions == {"torch": "2.10", "peft": "0.21", "huggingface-hub": "1.3"}
    assert script.constraints(versions) == "peft==0.21\nhuggingface-hub==1.3\n"


@pytest.mark.parametrize("requirement", ["peft", "peft<1", "peft==0.21", "peft>0.21"])
def test_a_dependency_without_a_lower_bound_is_refused(script: ModuleType, requirement: str) -> None:
    """It would be tested with its newest version, as `make test` does."""
    with pytest.raises(ValueError, match=f"{requirement!r} has no lower bound"):
        script.lowest_versions(project("torch>=2.10", requirement))


def test_every_dependency_of_the_package_has_one(script: ModuleType) -> None:
    """The versions that hold an accepted NaN gradient back, 0.19.8 of DeepSpeed, are the oldest."""
    versions = script.lowest_versions((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert versions["deepspeed"] == "0.19.8"
    assert len(versions) >= 19

"""Compare Python and the dependencies with the version ranges that the package's own metadata declares."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from uft_ds.doctor.finding import Finding
from uft_ds.errors import CheckFailed, UserError
from uft_ds.host.packages import PACKAGE, install_command


def check_python(required: str | None = None, found: str | None = None) -> Finding:
    """Compare this interpreter with `requires-python`."""
    found = found or platform.python_version()
    required = required if required is not None else _declared_python()
    if SpecifierSet(required).contains(found, prereleases=True):
        return Finding("Python", "ok", found)
    return Finding(
        "Python",
        "problem",
        f"{found}, expected {required}",
        "make a virtual environment with another Python: make install",
    )


def check_packages(
    requirements: Iterable[str] | None = None, version_of: Callable[[str], str] = metadata.version
) -> list[Finding]:
    """Compare each dependency with its range: one finding for all that fit, and one for each that does not.

    Args:
        requirements: requirement strings as in pyproject.toml; by default those of the installed package.
    """
    if requirements is None:
        try:
            requirements = metadata.requires(PACKAGE) or []
        except metadata.PackageNotFoundError:
            found = f"{PACKAGE} is not installed, so nothing says which versions it needs"
            return [Finding("packages", "problem", found, "pip install . in the checkout")]
    wanted = [Requirement(text) for text in requirements]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    problems = [finding for one in wanted if (finding := _out_of_range(one, version_of)) is not None]
    fitting = f"{len(wanted) - len(problems)} of {len(wanted)} as declared"
    return [Finding("packages", "ok", fitting), *problems]


def check_flash_attention(has_gpus: bool, *, is_installed: bool | None = None) -> Finding:
    """Say whether flash-attention is there: only models of families that the tests do not cover gain by it."""
    if is_installed is None:
        is_installed = importlib.util.find_spec("flash_attn") is not None
    if not has_gpus:
        return Finding("flash-attn", "ok", "not used on CPUs")
    if not is_installed:
        found = "not installed: models whose packed attention no test covers take a mask of tokens x tokens"
        return Finding("flash-attn", "note", found, install_command("gpu"))
    return Finding("flash-attn", "ok", f"{metadata.version('flash-attn')}, used by model.attention: flash_attention_2")


def check_nf4(has_gpus: bool) -> Finding:
    """Say whether `model.quantization: nf4` can be used: bitsandbytes is there, and a GPU computes as the host does."""
    name = "bitsandbytes"
    if importlib.util.find_spec(name) is None:
        return Finding(name, "ok", "not installed; only model.quantization: nf4 needs it")
    import torch

    from uft_ds.streams.nf4 import check_bitsandbytes, check_device

    try:
        check_bitsandbytes()
        if has_gpus:
            weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
            check_device(weight, torch.device("cuda"))
    except (UserError, CheckFailed) as error:
        return Finding(name, "problem", str(error), install_command("nf4"))
    return Finding(name, "ok", f"{metadata.version(name)}, used by model.quantization: nf4")


def _out_of_range(wanted: Requirement, version_of: Callable[[str], str]) -> Finding | None:
    remedy = f"pip install '{wanted.name}{wanted.specifier}'"
    try:
        version = version_of(wanted.name)
    except metadata.PackageNotFoundError:
        return Finding(wanted.name, "problem", "not installed", remedy)
    # A local build such as 2.13.0+cpu counts as the version before the plus.
    if wanted.specifier.contains(version.partition("+")[0], prereleases=True):
        return None
    return Finding(wanted.name, "problem", f"{version}, expected {wanted.specifier}", remedy)


def _declared_python() -> str:
    try:
        return metadata.metadata(PACKAGE)["Requires-Python"] or ""
    except (metadata.PackageNotFoundError, KeyError):
        return ""

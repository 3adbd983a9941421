"""How to install what a feature needs."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement

PACKAGE = "uft-ds"

_NEED_TORCH_TO_BUILD = ("flash-attn",)


def install_command(extra: str) -> str:
    """The command that installs the requirements of one of this package's extras, each by its own name.

    Not `uft-ds[extra]`: a package index may not have this package, or another one of that name.
    """
    try:
        wanted = [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        wanted = []
    of_extra = [one for one in wanted if one.marker is not None and one.marker.evaluate({"extra": extra})]
    if not of_extra:  # not installed, or installed before the extra was added
        return f"pip install '.[{extra}]' in the checkout"
    names = " ".join(f"'{one.name}{_extras(one)}{one.specifier}'" for one in of_extra)
    isolation = " --no-build-isolation" if any(one.name in _NEED_TORCH_TO_BUILD for one in of_extra) else ""
    return f"pip install{isolation} {names}"


def _extras(one: Requirement) -> str:
    return f"[{','.join(sorted(one.extras))}]" if one.extras else ""

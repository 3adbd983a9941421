"""Check the caches of models, data and reference log-probs, which are kept between runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from uft_ds.doctor.disk import nearest
from uft_ds.doctor.finding import Finding
from uft_ds.errors import UserError
from uft_ds.host.files import user_cache
from uft_ds.host.hub import NO_NETWORK, is_offline


def check_caches(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check that our cache and Hugging Face's cache can be written."""
    try:
        own = user_cache()
    except UserError as error:
        return [Finding("cache", "problem", str(error), "set XDG_CACHE_HOME")]
    hub = Path(environ["HF_HOME"]) if "HF_HOME" in environ else own.parent / "huggingface"
    return [
        _writable("cache", own, "set XDG_CACHE_HOME, or reference.cache_dir and data.cache_dir in recipes"),
        _writable("hub's cache", hub.expanduser(), "set HF_HOME to a folder that can be written"),
    ]


def check_hub(environ: Mapping[str, str] = os.environ) -> Finding:
    """Report whether HF_HUB_OFFLINE is set: then a name that is not cached is an error at once, without a wait."""
    if is_offline(environ):
        found = "HF_HUB_OFFLINE is set: nothing is fetched"
        return Finding("hub", "note", found, "give models and data as folders, or unset it once to fetch them")
    return Finding("hub", "ok", "names in recipes are fetched", NO_NETWORK)


def _writable(name: str, folder: Path, remedy: str) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)):
            pass
    except OSError as error:
        return Finding(name, "problem", f"{folder} cannot be written ({error.strerror})", remedy)
    return Finding(name, "ok", str(folder))

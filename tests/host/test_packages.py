"""What to install is named so that it can be had: by the name of the other package."""

from importlib import metadata

import pytest

from uft_ds.host.packages import install_command


def test_the_requirements_of_an_extra_are_named() -> None:
    """As the package declares them; this package's own name may be another one's on an index."""
    assert install_command("wandb") == "pip install 'wandb<1,>=0.19'"
    assert install_command("gpu") == "pip install --no-build-isolation 'flash-attn>=2.7'"  # its setup imports torch


def test_a_checkout_that_is_not_installed_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing says what an extra needs."""

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert install_command("wandb") == "pip install '.[wandb]' in the checkout"


def test_what_a_requirement_brings_along_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extras of the other package; and a package that was installed before the extra was added has none of it."""
    requires = ["lm-eval[math,hf]<0.5,>=0.4.13; extra == 'eval'", "torch>=2"]
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    assert install_command("eval") == "pip install 'lm-eval[hf,math]<0.5,>=0.4.13'"
    assert install_command("other") == "pip install '.[other]' in the checkout"

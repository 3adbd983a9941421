"""What all sections of a recipe share: the strict model, and the types of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

INT32 = 2**31
"""Above every whole number that makes sense here, and far below what overflows an index of torch or NumPy."""
FLOAT32 = 3.4e38
"""About the largest float32: torch refuses to calculate with a larger number when the ranks already run."""
Positive = Annotated[int, Field(gt=0, lt=INT32)]
PositiveFloat = Annotated[float, Field(gt=0, le=FLOAT32, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=FLOAT32, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(ge=-FLOAT32, le=FLOAT32, allow_inf_nan=False)]
UnitInterval = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the recipe: immutable, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def _location(path: str) -> str:
    """The path with its home folder. An empty text would be the working directory, or count as nothing given."""
    if not path.strip():
        raise PydanticCustomError(
            "empty", "an empty text, expected a path or a name; null, or no such key, gives its default"
        )
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        user = path.removeprefix("~").partition("/")[0]
        expected = f"a user's home folder after ~, but there is no user {user!r}" if user else "a home folder for ~"
        raise PydanticCustomError(
            "home", "{expected}; write ./~ for a folder of that name", {"expected": expected}
        ) from None


Location = Annotated[str, AfterValidator(_location)]
"""A local path, in which `~` is the home folder, or a hub name."""

"""Where the real rows lie that benchmarks read.

Not a benchmark itself.
"""

from __future__ import annotations

import os
from pathlib import Path


def real_rows_folder() -> Path:
    """The folder that UFT_TEST_DATA names, by default beside the project; it need not be there."""
    return Path(os.environ.get("UFT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

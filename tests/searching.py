"""How many examples a property is tried with: a few in every run of the tests, many in a search.

pytest tests/recipe/test_any_recipe.py --hypothesis-profile=search --hypothesis-show-statistics
"""

import hypothesis


def examples(usual: int, searching: int) -> int:
    """The profile `search` draws other examples each time; the usual one always the same."""
    is_search = not hypothesis.settings.default.derandomize
    return searching if is_search else usual

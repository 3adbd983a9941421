"""The format `prompts`: prompts without an answer, which the policy answers while it is trained."""

from __future__ import annotations

from uft_ds.data.example import Message
from uft_ds.data.formats.columns import reads
from uft_ds.data.formats.fields import Row, present
from uft_ds.data.formats.turns import Item, answered, prompt_turns, question_turns, row_tools

STAND_IN = "A"
"""The text that stands where the policy's answer will be. Nothing trains on it: it shows where the prompt's tokens end,
by the same rules as for any other answer."""


@reads("prompt", "messages", "tools")
def prompts(row: Row, *, score: float | None) -> list[Item]:
    """Prompts that the policy answers during the run, for a source with `answers` and `score_by`.

        `prompt`        text, or turns that end with the user's turn (or a tool's)
        `messages`      turns that end with the user's turn (or a tool's)

    `tools` may list JSON schemas. All other columns are given to the scorer as `meta`: a right answer, tests, a rubric.
    """
    given = present(row)
    if ("prompt" in given) == ("messages" in given):
        found = "both" if "prompt" in given else "neither"
        raise ValueError(f"expected either 'prompt' or 'messages', found {found}")
    turns = prompt_turns(row["prompt"], "prompt") if "prompt" in given else question_turns(row["messages"], "messages")
    return [answered(turns, Message("assistant", STAND_IN), 0.0, "score", row_tools(row))]

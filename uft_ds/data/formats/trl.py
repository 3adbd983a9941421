"""The format `trl`: TRL's data set types, recognised by their columns."""

from __future__ import annotations

from typing import Any

from uft_ds.data.formats.feedback import kto
from uft_ds.data.formats.fields import Row, checked_text, default_score, present
from uft_ds.data.formats.turns import (
    Item,
    Tools,
    all_supervised,
    answer_turns,
    check_turns,
    conversation,
    dialogue_pair,
    one_answer,
    pair,
    prompt_turns,
    row_tools,
)


def trl(row: Row, *, score: float | None) -> list[Item]:
    """The types of TRL that hold supervised turns, recognised by their columns; null means absent.

        `messages`                              instruction, every assistant turn supervised
        `prompt`, `completion`                  instruction, the assistant turns of the completion
        `prompt`, `completion`, `label`         binary
        `prompt`, `chosen`, `rejected`          pair
        `chosen`, `rejected`                    pair, the prompt is the common beginning of both

    `prompt`, `completion`, `chosen` and `rejected` are text or turns. Text becomes a user or an assistant turn, while
    TRL would join it without a chat template. `tools` may list JSON schemas, as a list or as JSON text.
    """
    given = present(row)
    tools = row_tools(row)
    kinds = given & {"messages", "completion"} | ({"chosen"} if given & {"chosen", "rejected"} else set())
    if len(kinds) > 1:
        raise ValueError(f"expected one of 'messages', 'completion' and 'chosen', found {' and '.join(sorted(kinds))}")
    if "chosen" in kinds:
        return [_preference(row, tools)]
    if "completion" in kinds:
        return kto(row, score=score) if "label" in given else [_completion(row, score, tools)]
    if "messages" in kinds:
        if "label" in given:
            raise ValueError("'label' with 'messages' is not a type of TRL; use the format 'kto'")
        return [all_supervised(conversation(row["messages"]), default_score(score), tools)]
    if "text" in given:
        raise ValueError("'text' does not say what is prompt and what is response; expected 'prompt' and 'completion'")
    raise ValueError(
        "expected 'messages', 'prompt' and 'completion', or 'chosen' and 'rejected'; "
        f"found {', '.join(sorted(given))[:80] or 'nothing'}"
    )


def _completion(row: Row, score: float | None, tools: Tools) -> Item:
    prompt = prompt_turns(row.get("prompt"), "prompt")
    turns = (*prompt, *answer_turns(row["completion"], "completion"))
    check_turns(turns)
    return all_supervised(turns, default_score(score), tools, context=len(prompt))


def _preference(row: Row, tools: Tools) -> Item:
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise ValueError("'chosen' and 'rejected': expected both as text or both as turns, found one of each")
    # As TRL does: if the answers are turns that include the prompt, a `prompt` given as text is ignored.
    if prompt is None or (isinstance(chosen, list) and not isinstance(prompt, list)):
        if isinstance(chosen, list):
            return dialogue_pair(conversation(chosen, "chosen"), conversation(rejected, "rejected"), tools=tools)
        prompt, chosen, rejected = _split_texts(chosen, rejected)
    better = one_answer(answer_turns(chosen, "chosen"), "chosen")
    worse = one_answer(answer_turns(rejected, "rejected"), "rejected")
    return pair(prompt_turns(prompt, "prompt"), better, worse, tools=tools)


def _split_texts(chosen: Any, rejected: Any) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts with a common beginning, cut as TRL's `extract_prompt` cuts it.

    The cut is before a space, if the common beginning ends with one, and one character early if one text is the
    beginning of the other.
    """
    shorter = min(len(checked_text(chosen, "chosen")), len(checked_text(rejected, "rejected")))
    end = next((index for index in range(shorter) if chosen[index] != rejected[index]), shorter)
    if end == shorter or (end > 0 and chosen[end - 1] == " "):
        end -= 1
    if not chosen[:end].strip():
        raise ValueError("'chosen' and 'rejected' have no beginning in common; expected one, or 'prompt'")
    return chosen[:end], chosen[end:], rejected[end:]

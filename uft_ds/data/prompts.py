"""Sequences that begin with the same prompt, which are forwarded with one copy of it.

A prompt is all tokens before a sequence's first response. Prompts are compared by their tokens, wherever they are from.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from uft_ds.data.example import Sequence


def by_prompt(sequences: Seq[Sequence]) -> list[list[int]]:
    """Indices of sequences with the same prompt, in the order of the first of each; one without responses is alone."""
    groups: dict[bytes | int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        key = sequence.token_ids_T[: sequence.prompt_tokens].tobytes() if sequence.responses else i
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def tokens_of(sequences: Seq[Sequence], groups: Seq[Seq[int]] = ()) -> int:
    """The number of tokens of sequences; the prompt of each group, of those of `by_prompt`, counts once."""
    tokens = sum(sequence.num_tokens for sequence in sequences)
    return tokens - sum((len(of) - 1) * sequences[of[0]].prompt_tokens for of in groups)

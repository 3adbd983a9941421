"""What the preview shows: exactly the mask, also where a long text is cut."""

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pools import plan
from rich.console import Console
from sources import rules, write_rows
from tiny import build_tiny_tokenizer
from toy import toy_sequences
from typer.testing import CliRunner

from uft_ds.commands.data import app as data_commands
from uft_ds.data.example import Example, Message, Sequence, keep_first
from uft_ds.data.mixture import Portion
from uft_ds.data.sources import PreparedData, PreparedSource, SourceSettings, Tolerance, prepare_source
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer, tokenize
from uft_ds.host.terminal import as_typed
from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import changed, settings_of
from uft_ds.run.prepare import data_report
from uft_ds.run.preview import (
    CLOSE,
    OPEN,
    PROMPT,
    SUPERVISED,
    device_notes,
    rendered,
    rendered_rows,
    show_data,
    steps_line,
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def conversation(chat: ChatTokenizer, *contents: str) -> Sequence:
    turns = (Message("assistant", c, 0.5) if i % 2 else Message("user", c) for i, c in enumerate(contents))
    (sequence,) = tokenize(Example(tuple(turns), "score"), chat, max_length=100_000, merge=True).sequences
    return replace(sequence, responses=tuple(replace(r, origin="f.jsonl:3") for r in sequence.responses))


def test_marks_and_colours_are_the_mask(chat: ChatTokenizer) -> None:
    """What stands between the marks, and what is green, is what is supervised: text and end of turn, of every turn."""
    text = rendered(conversation(chat, "q1", "a1", "q2", "a2"), chat, full=True)
    shown = text.plain
    assert shown.startswith("f.jsonl:3: ")
    assert "supervised; score 0.5, score 0.5" in shown
    marked = [part.split(CLOSE)[0] for part in shown.split(OPEN)[1:]]
    assert marked == ["a1<|im_end|>", "a2<|im_end|>"]
    green = [shown[span.start : span.end] for span in text.spans if span.style == SUPERVISED]
    assert green == [f"{OPEN}{part}{CLOSE}" for part in marked]
    dim = [shown[span.start : span.end] for span in text.spans if span.style == PROMPT]
    assert dim[0] == "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"


def test_a_long_text_is_cut_and_says_so(chat: ChatTokenizer) -> None:
    """Of a long answer both ends are shown, with the number of tokens between; --full shows all of it."""
    sequence = conversation(chat, "q", "x" * 1000 + "end")
    assert "[... 804 tokens ...]" in rendered(sequence, chat, full=False).plain
    assert "xend<|im_end|>" + CLOSE in rendered(sequence, chat, full=False).plain
    assert "x" * 1000 in rendered(sequence, chat, full=True).plain


def test_a_row_does_not_control_the_terminal(chat: ChatTokenizer) -> None:
    """Its control characters are shown, in the whole text and in a cut one."""
    sequence = conversation(chat, "\x1b[2J" + "q" * 1000, "a\x1b]0;title\x07" + "x" * 1000 + "\x1b[31m")
    for full in (True, False):
        shown = rendered(sequence, chat, full=full).plain
        assert "\x1b" not in shown
        assert "␛[31m" in shown


def test_any_sequence_is_shown(chat: ChatTokenizer) -> None:
    """Tokens that are no text do not break it."""
    for sequence in toy_sequences(20):
        assert rendered(sequence, chat, full=False).plain.count(OPEN) == len(sequence.responses)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (6, "1 step: 6 responses"),
        (11, "2 steps, of 8 and 3 responses; the first has 8 responses"),
        (16, "2 steps of at least 8 responses; the first"),
        (19, "3 steps of at least 8 responses, the last of 3; the first"),
    ],
)
def test_a_short_last_step_is_told(count: int, said: str) -> None:
    """The sizes of the steps add up to the number of responses in all."""
    single = tuple(keep_first(sequence, 1) for sequence in toy_sequences(count))
    assert steps_line(plan(single), 8).plain.startswith(said)


@pytest.fixture
def data(tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> PreparedData:
    """Of twelve long answers one fits; of twenty scored ones three rows are bad."""
    monkeypatch.chdir(tmp_path)
    long = [{"prompt": "q", "response": "a" if i == 4 else "a" * 200} for i in range(12)]
    scored = [{"prompt": f"q{i}", "response": "" if i in (2, 5, 8) else "a", "score": i / 20} for i in range(20)]

    def prepared(name: str, rows: list[dict[str, Any]], portion: Portion) -> PreparedSource:
        path = write_rows(Path(f"a-folder-with-a-long-name-for-a-narrow-terminal/{name}.jsonl"), rows)
        source = SourceSettings(str(path), None, rules(max_length=100), portion=portion)
        tolerance = Tolerance(quarantine=True, max_quarantined=0.5)
        return prepare_source(source, chat, tmp_path / "cache", seed=0, tolerance=tolerance)

    return PreparedData(
        (prepared("long", long, Portion(passes=12)), prepared("scored", scored, Portion(passes=0.5))), ()
    )


def settings_for(data: PreparedData, examples_per_step: int = 1) -> Settings:
    train, held_out = (
        [{"format": "jsonl", "path": f"{part}{number}"} for number in range(len(sources))]
        for part, sources in (("train", data.train), ("held_out", data.held_out))
    )
    tree: dict[str, Any] = {
        "name": "x",
        "model": {"base": "b"},
        "data": {"sources": train, "held_out": held_out},
        "output": "o",
    }
    tree["train"] = {"examples_per_step": examples_per_step}
    return settings_of(recipe_from_tree(tree, "x"))


def printed(data: PreparedData, width: int, settings: Settings | None = None, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    show_data(settings or settings_for(data), data, console, **options)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tables_say_what_is_taken_and_left_out(data: PreparedData) -> None:
    """Counts, passes, places of the first rows, reasons of bad ones, where all of them are, and what stands out."""
    shown = printed(data, width=400)
    long, scored = (source.label for source in data.train)
    rows = [line.split() for line in shown.split("\n")]
    tokens = [str(source.selection.num_tokens) for source in data.train]
    assert ["train", "instruction", "1", tokens[0], "12", "(12", "x)", "11", long] in rows
    assert ["train", "score", "17", tokens[1], "8.5", "(0.5", "x)", "3", scored] in rows
    assert [[f"{long}:1"], [f"{long}:2"], [f"{long}:3"]] == [
        row for row in rows if row and row[0].startswith(f"{long}:")
    ]
    assert f"{scored}:3: 'response' is empty" in shown
    assert as_typed(str(data.train[1].quarantine_file)) in shown
    assert f"note: {long}: 11 of 12 responses are left out" in shown
    assert f"note: {long}: an epoch goes 12 times through its responses" in shown
    assert f"note: {scored}" not in shown


def test_paths_are_shown_as_they_were_typed(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run has absolute ones, which a terminal breaks in the middle; names within a folder stay."""
    monkeypatch.chdir("/")  # below the working directory, paths are shortened anyway
    typed = settings_for(data).data
    typed = replace(typed, sources=tuple(source.settings for source in data.train))

    def absolute(source: PreparedSource) -> PreparedSource:
        path = str(tmp_path / source.settings.path)
        store = source.selection.store.renamed(path, (path,))
        return replace(
            source,
            settings=replace(source.settings, path=path),
            selection=replace(source.selection, store=store),
        )

    located = PreparedData(tuple(map(absolute, data.train)), ())
    long = data.train[0].label
    assert f"{tmp_path}/{long}:1" in printed(located, 400)
    shown = printed(located, 400, typed=typed)
    assert str(tmp_path / long) not in shown
    assert f"      {long}:1\n" in shown
    assert f"note: {long}: 11 of 12" in shown


def test_what_a_share_leaves_and_a_small_epoch_are_noted(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Ten rows with a share of 0.2 beside eight of another source: two are taken. Ten are less than a step of 64."""

    def prepared(name: str, count: int, portion: Portion) -> PreparedSource:
        rows = [{"prompt": f"{name}{i}", "response": "a"} for i in range(count)]
        source = SourceSettings(str(write_rows(tmp_path / f"{name}.jsonl", rows)), None, rules(), portion=portion)
        return prepare_source(source, chat, tmp_path / "cache", seed=0, tolerance=Tolerance())

    data = PreparedData((prepared("some", 10, Portion(share=((0.0, 0.2),))), prepared("all", 8, Portion())), ())
    some = data.train[0].label
    shown = printed(data, 400)
    assert f"note: {some}: share takes 2 of its 10 responses in an epoch; the others are not used in it" in shown
    assert "fewer than" not in shown
    assert (
        "note: an epoch holds 10 responses, fewer than the 64 of a step (train.examples_per_step): the run is one "
        "smaller step"
    ) in printed(data, 400, settings_for(data, 64))
    repeated = changed(settings_for(data, 64), {"train.steps": 3})
    assert "a step goes 6.4 times through the data" in printed(data, 400, repeated)


def test_columns_that_are_not_read_are_noted(data: PreparedData, tmp_path: Path, chat: ChatTokenizer) -> None:
    """By name, with the number of rows; nothing is said where all are read."""
    assert "does not read" not in printed(data, width=400)
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}] * 3
    path = write_rows(tmp_path / "more.jsonl", [row | {"source": "s"} for row in rows] + [{**rows[0], "source": None}])
    source = SourceSettings(str(path), None, rules(format="ultrachat"))
    more = prepare_source(source, chat, tmp_path / "cache", seed=0, tolerance=Tolerance())
    data = PreparedData((more,), ())
    assert "columns that format ultrachat does not read: source (3 rows)" in printed(data, 400)
    assert [row["columns_not_read"] for row in data_report(data)["train"]] == [{"source": 3}]


@pytest.mark.parametrize("split_pairs", [True, False])
def test_the_sides_of_a_pair_are_named(tmp_path: Path, chat: ChatTokenizer, split_pairs: bool) -> None:
    """Split or kept: which answer is the better one stands behind the place."""
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    source = SourceSettings(str(path), None, rules(split_pairs=split_pairs))
    prepared = prepare_source(source, chat, tmp_path / "cache", seed=0, tolerance=Tolerance())
    shown = [text.plain for text in rendered_rows(prepared, chat, count=5, seed=0, full=True)]
    assert [(f"{path}:1 (chosen): " in text, f"{OPEN}good" in text) for text in shown] == [(True, True), (False, False)]
    assert f"{path}:1 (rejected): " in shown[1]


def test_the_items_of_a_row_without_pairs_keep_their_numbers(tmp_path: Path, chat: ChatTokenizer) -> None:
    """The completions of one instruction are no pair, whatever `pairs` says."""
    completions = [{"response": f"a{score}", "overall_score": score} for score in (2, 9)]
    path = write_rows(tmp_path / "uf.jsonl", [{"instruction": "q", "completions": completions}])
    source = SourceSettings(str(path), None, rules(format="ultrafeedback", split_pairs=True))
    prepared = prepare_source(source, chat, tmp_path / "cache", seed=0, tolerance=Tolerance())
    shown = [text.plain for text in rendered_rows(prepared, chat, count=5, seed=0, full=True)]
    assert [text.startswith(f"{path}:1, item {number}: ") for number, text in enumerate(shown, start=1)] == [True, True]


def test_a_score_under_meta_is_noted(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Of rows that have none beside the response; not of scored ones, and not of words that are no score."""
    found: list[dict[str, Any]] = [
        *({"prompt": f"q{i}", "response": "a", "meta": {"reward": 0.5, "rank": "first", "id": 7}} for i in range(3)),
        {"prompt": "q", "response": "a", "score": 0.5, "meta": {"reward": 0.5}},
    ]
    path = write_rows(tmp_path / "meta.jsonl", found)
    source = SourceSettings(str(path), None, rules(mixed_kinds=True, score=0.75))
    data = PreparedData((prepare_source(source, chat, tmp_path / "cache", seed=0, tolerance=Tolerance()),), ())
    shown = printed(data, 400)
    assert (
        f"note: {path}: not read: meta.reward (3 rows); these rows train as answers of score 0.75. If it is their "
        "score, it belongs beside 'response'"
    ) in shown
    assert "columns that format" not in shown
    assert [row["columns_not_read"] for row in data_report(data)["train"]] == [{"meta.reward": 3}]


def test_pictures_that_are_left_out_are_noted(tmp_path: Path, chat: ChatTokenizer) -> None:
    """The text that is trained speaks of them; other columns may be left out without a word."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a", "images": ["a.png"], "context": "c"}])
    source = SourceSettings(str(path), None, rules(columns=(("context", None), ("images", None))))
    prepared = prepare_source(source, chat, tmp_path / "cache", seed=0, tolerance=Tolerance())
    shown = printed(PreparedData((prepared,), ()), 400)
    assert f"note: {path}: columns leaves out images: only text is trained, and it lacks what it speaks of" in shown


def test_mixed_kinds_and_a_scale_are_shown(tmp_path: Path, chat: ChatTokenizer) -> None:
    """How many responses each kind has; which scores were found, and what becomes of them."""
    rows: list[dict[str, Any]] = [
        *({"prompt": f"q{i}", "response": "a"} for i in range(3)),
        *({"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(2)),
        *({"prompt": f"q{i}", "response": "a", "score": i} for i in range(2, 9)),
    ]
    path = write_rows(tmp_path / "mixed.jsonl", rows)
    source = SourceSettings(str(path), None, rules(mixed_kinds=True, score_range=(1.0, 10.0)))
    data = PreparedData((prepare_source(source, chat, tmp_path / "cache", seed=0, tolerance=Tolerance()),), ())
    shown = printed(data, 400)
    assert [line.split() for line in shown.split("\n") if "pair" in line] == [["pair", "4"]]
    assert "instruction 3" in shown
    assert "score 7" in shown
    assert f"note: {path}: scores from 2 to 8 found; score_range maps 1 to 0 and 10 to 1" in shown
    (row,) = data_report(data)["train"]
    assert row["responses_of_kind"] == {"instruction": 3, "score": 7, "pair": 4}
    assert (row["score_range"], row["scores_found"]) == ((1.0, 10.0), [2.0, 8.0])


def test_a_cut_conversation_counts_what_is_kept(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Four turns, of which an example count keeps three: three responses of the kind, not four."""
    turns = [{"role": role, "content": "a"} for _ in range(4) for role in ("user", "assistant")]
    path = write_rows(tmp_path / "long.jsonl", [{"messages": turns}])
    source = SourceSettings(str(path), None, rules(), examples=3)
    prepared = prepare_source(source, chat, tmp_path / "cache", seed=0, tolerance=Tolerance())
    assert prepared.selection.responses_of_kind == {"instruction": 3}


@pytest.mark.parametrize("width", [72, 80])
def test_a_narrow_terminal_cuts_nothing(data: PreparedData, width: int) -> None:
    """Not a letter is missing, for the end of a place is the line's number; and no place is broken."""
    long = data.train[0].label
    assert f"      {long}:1\n      {long}:2\n      {long}:3\n" in printed(data, width)
    assert f"\nnote: {long}: 11 of 12 responses are left out\n" in printed(data, 40)
    assert sum(line.endswith(long) for line in printed(data, width).split("\n")) == 2  # in the table, and above places
    narrow, wide = (Counter(printed(data, columns)) for columns in (width, 400))
    for layout in " \n─":
        del narrow[layout], wide[layout]
    assert narrow == wide


def test_nothing_left_out_shows_no_table(tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No empty table, no notes."""
    monkeypatch.chdir(tmp_path)
    path = write_rows(Path("rows.jsonl"), [{"prompt": "q", "response": "a"}])
    source = prepare_source(
        SourceSettings(str(path), None, rules()), chat, tmp_path / "cache", seed=0, tolerance=Tolerance()
    )
    shown = printed(PreparedData((source,), (source,)), 100)
    assert "left out, or changed" not in shown
    assert "note" not in shown
    assert [line.split()[0] for line in shown.split("\n") if ".jsonl" in line] == ["train", "held"]


def test_a_revision_beside_a_local_folder_is_noted(data: PreparedData, tmp_path: Path) -> None:
    """It is the hub's; nothing is said where the base is a name of the hub, or no revision is given."""
    hub = changed(settings_for(data), {"model.revision": "v2"})
    local = changed(hub, {"model.base": str(tmp_path)})
    assert "note: model.revision: v2 given, but" in printed(data, 400, local)
    assert "model.revision" not in printed(data, 400, hub)
    assert "model.revision" not in printed(data, 400, changed(local, {"model.revision": None}))


@pytest.mark.parametrize("option", ["--seed", "--rows"])
def test_a_negative_number_is_refused_by_its_option(option: str) -> None:
    """Before the recipe is read."""
    found = CliRunner().invoke(data_commands, ["preview", "no-such-recipe", option, "-1"])
    assert found.exit_code == 2
    assert f"Invalid value for '{option}'" in found.output


def test_a_slow_type_is_noted(data: PreparedData) -> None:
    """bfloat16 without a GPU, and only there."""
    settings = settings_for(data)
    (note,) = device_notes(settings, has_gpu=False)
    assert note.plain.startswith("note: model.dtype: bfloat16 on a CPU")
    assert not list(device_notes(settings, has_gpu=True))
    assert not list(device_notes(changed(settings, {"model.dtype": "float32"}), has_gpu=False))

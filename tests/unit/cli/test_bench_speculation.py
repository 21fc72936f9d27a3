"""`edgekv bench engine --speculate`: its prompts, its arithmetic, and a short run of the demo model with its draft."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from edgekv.cli.app import app
from edgekv.cli.bench_prompts import BadPrompts, demo_chats, read_chats
from edgekv.cli.bench_speculation import OutputsDiffer, check_same
from edgekv.cli.speculation_rows import row
from edgekv.cli.speculation_view import show_speculation
from edgekv.config.settings import MAX_PROPOSED
from edgekv.core.sequence import SequenceSpec
from edgekv.demo import draft_path
from edgekv.engine.measure_speculation import Way
from edgekv.engine.step_sums import StepKind, StepSums, Turn
from edgekv.errors import ModelError

run = CliRunner().invoke
SHORT = ["--batch", "2", "--repeat", "1", "--max-tokens", "12", "--seed", "7"]


def bench(*options: str) -> Result:
    return run(app, ["bench", "engine", "demo", "--speculate", *SHORT, *options])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "When do I sow peas?"}]
    lines = ["Tell me about carrots.", json.dumps(chat), "Who are you?"]
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture(scope="module")
def result(prompts: Path) -> dict[str, Any]:
    done = bench("--prompts", str(prompts), "--fixed", "2", "--warm-up", "0", "--profile", "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---- a short run


def test_every_way_says_the_same_and_says_how_fast(result: dict[str, Any]) -> None:
    assert (result["model"], result["draft"], result["draft_tokens"]) == ("demo", "demo", 8)
    assert (result["prompts"], result["max_tokens"], result["rounds"], result["warm_up"]) == (3, 12, 1, 0)
    rows = result["speculation"]
    temperatures = {0.0, 0.8}
    assert [(each["temperature"], each["way"]) for each in rows] == [
        (temperature, way) for temperature in sorted(temperatures) for way in ("plain", "automatic", "fixed 2")
    ]
    for temperature in temperatures:
        plain, *others = [each for each in rows if each["temperature"] == temperature]
        assert (plain["ratio"], plain["acceptance"], plain["proposed_a_step"]) == (1.0, None, 0.0)
        assert 0 < plain["tokens"] <= 36
        assert {each["tokens"] for each in others} == {plain["tokens"]}
        assert all(sum(each["shares"].values()) == pytest.approx(1, abs=1e-3) for each in rows)
        assert plain["shares"]["draft"] == 0


def test_a_fixed_number_is_always_proposed_and_its_steps_are_fewer(result: dict[str, Any]) -> None:
    plain, _, fixed = result["speculation"][:3]
    assert 1.5 < fixed["proposed_a_step"] <= 2
    assert fixed["tokens_a_step"] > 1.5
    assert 0 < fixed["acceptance"] <= 1
    assert 0 < fixed["first_accepted"] <= 1
    assert fixed["shares"]["draft"] > 0
    assert fixed["steps"]["verify"]["steps"] < plain["steps"]["plain"]["steps"]
    assert "plain" not in fixed["steps"] or fixed["steps"]["plain"]["steps"] <= 2
    assert fixed["steps"]["draft"]["steps"] > fixed["steps"]["verify"]["steps"]


def test_a_profile_says_what_a_step_of_each_kind_is_made_of(result: dict[str, Any]) -> None:
    fixed = result["speculation"][2]
    for step in fixed["steps"].values():
        names = ("proposing", "kernels", "preparing", "sampling", "deciding", "planning", "reporting", "rest")
        assert sum(step[f"{name}_ms"] for name in names) == pytest.approx(step["ms"], abs=1e-3)
        assert step["kernels_ms"] > 0
    assert fixed["steps"]["verify"]["deciding_ms"] > 0
    if not result["kernels"].startswith("torch"):
        assert {"draft", "verify", "prompt"} <= fixed["profile"].keys()
        for kind, spent in fixed["profile"].items():
            assert "attend" in spent
            assert 0 < sum(spent.values()) <= fixed["steps"][kind]["kernels_ms"] + 1e-3
        assert fixed["profile"]["draft"].keys() != fixed["profile"]["verify"].keys()


def test_a_person_gets_tables_of_the_demo_models_own_prompts() -> None:
    done = bench("--draft", "ngram", "--max-tokens", "2", "--warm-up", "0")
    assert done.exit_code == 0, done.output
    assert "draft ngram" in done.stdout
    assert f"{len(demo_chats(quoting=True))} prompts" in done.stdout
    assert "greedy, batch 2" in done.stdout
    assert "temperature 0.8, batch 2" in done.stdout
    assert "every answer was the same" in done.stdout
    assert "1 round counts, after 0 of warm-up" in done.stdout
    assert "in the kernels" not in done.stdout


@pytest.mark.parametrize("is_detailed", [False, True])
def test_a_terminal_of_80_columns_is_wide_enough(
    result: dict[str, Any], is_detailed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = [shown_as(each, is_detailed) for each in result["speculation"]]
    widest, width, console = {**result, "speculation": wide, "rounds": 2}, 80, Console(width=80, highlight=False)
    monkeypatch.setattr("edgekv.cli.speculation_view.stdout", lambda: console)
    with console.capture() as capture:
        show_speculation(widest)
    lines = capture.get().splitlines()
    assert "…" not in capture.get()
    assert max(map(len, lines)) <= width
    assert sum("234,567.8" in line for line in lines) == len(wide)
    assert sum("4.34, 3.12-5.56" in line for line in lines) == len(wide) - 2, "plain ones have nothing to compare"
    assert any(line.split() == ["automatic", "11.25", "82%", "40%", "41%", "12%", "17%"] for line in lines)
    assert ("in the kernels, ms a step" in capture.get()) == is_detailed
    assert any(line.startswith("fixed N ") for line in lines)
    assert any("; 2 rounds count" in line for line in lines)


def shown_as(row: dict[str, Any], is_detailed: bool) -> dict[str, Any]:
    """A row with figures as long as they may get."""
    shares = {"draft": 0.4, "model": 0.41, "sampling": 0.12, "rest": 0.17}
    shown = {
        **row, "batch": 16, "tok_s": 234_567.8, "ratio": 4.34, "paired_ratio": {"p10": 3.12, "p50": 4.34, "p90": 5.56},
        "tokens_a_step": 12.25, "proposed_a_step": 11.25, "acceptance": 0.82, "shares": shares, "others_cores": 12.5,
    }  # fmt: skip
    if is_detailed:
        step, kinds = next(iter(row["steps"].values())), [kind.value for kind in StepKind]
        shown["steps"] = {kind: {**step, "steps": 123_456, "ms": 1234.567} for kind in kinds}
        shown["profile"] = {kind: {"linear 18944x3584 Q4_K": 123.4567} for kind in kinds}
    else:
        shown.pop("profile", None)
    return shown


def test_an_answer_that_speculation_changed_is_an_error(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Way.answer

    def changed(self: Way, specs: Sequence[SequenceSpec]) -> Turn:
        turn = answer(self, specs)
        if self.name == "automatic":
            turn.said[1][3] += 1
        return turn

    monkeypatch.setattr(Way, "answer", changed)
    done = bench("--prompts", str(prompts), "--draft", "ngram", "--warm-up", "0")
    assert done.exit_code == 1
    assert isinstance(done.exception, OutputsDiffer)
    assert "to prompt 1, from token 3 on, automatic says" in str(done.exception)


# ---- what is compared


def test_the_first_token_that_differs_is_named() -> None:
    check_same({0: [1, 2], 1: [3]}, {1: [3], 0: [1, 2]}, "automatic")
    with pytest.raises(OutputsDiffer, match=r"prompt 1, from token 1 on, fixed 2 says \[9\] and not \[4, 5\]"):
        check_same({0: [1], 1: [3, 4, 5]}, {0: [1], 1: [3, 9]}, "fixed 2")
    with pytest.raises(OutputsDiffer, match=r"prompt 0, from token 2 on, fixed 2 says \[\] and not \[3\]"):
        check_same({0: [1, 2, 3]}, {0: [1, 2]}, "fixed 2")
    with pytest.raises(OutputsDiffer, match="prompt 1, from token 0"):
        check_same({0: [1]}, {0: [1], 1: [2]}, "fixed 2")


def turn(*, seconds: float, verified: bool) -> Turn:
    """Twelve tokens of two sequences: two in the prompt's step, ten after it, one or two a step for each of them."""
    made = Turn()
    made.of(StepKind.PROMPT).add(StepSums(steps=1, sequences=2, rows=30, tokens=2, total_s=0.2 * seconds))
    if not verified:
        plain = StepSums(steps=5, sequences=10, rows=10, tokens=10, total_s=0.8 * seconds, forward_s=0.6 * seconds)
        made.of(StepKind.PLAIN).add(plain)
        return made
    made.of(StepKind.VERIFY).add(
        StepSums(
            steps=2, sequences=4, rows=16, proposed=12, tokens=9,
            total_s=0.7 * seconds, propose_s=0.3 * seconds, forward_s=0.2 * seconds, sample_s=0.1 * seconds,
        )
    )  # fmt: skip
    made.of(StepKind.PLAIN).add(StepSums(steps=1, sequences=1, rows=1, tokens=1, total_s=0.1 * seconds))
    made.of(StepKind.DRAFT).add(StepSums(steps=6, sequences=12, rows=12, total_s=0.25 * seconds))
    made.verifications, made.proposed, made.accepted, made.first_right = 4, 10, 5, 3
    return made


def test_rounds_become_medians_and_turns_become_pairs() -> None:
    plain = [
        [turn(seconds=seconds, verified=False) for seconds in pair] for pair in ((1.0, 2.0), (3.0, 3.0), (6.0, 6.0))
    ]
    ours = [[turn(seconds=seconds, verified=True) for seconds in pair] for pair in ((0.5, 1.0), (2.0, 2.0), (3.0, 2.0))]
    found = row(ours, plain)
    assert found["samples_tok_s"] == [16.0, 6.0, 4.8]
    assert found["tok_s"] == 6.0
    assert found["ratio"] == 1.5  # 6 against 24 tokens in 6 seconds
    assert found["paired_ratio"] == {"p10": 1.5, "p50": 2.0, "p90": 2.5}
    assert found["tokens"] == 72


def test_a_row_says_what_became_of_proposals_and_where_the_time_went() -> None:
    found = row([[turn(seconds=1.0, verified=True)]], [[turn(seconds=1.0, verified=False)]])
    assert (found["acceptance"], found["first_accepted"]) == (0.5, 0.75)
    # Of five turns of a sequence in steps without a prompt.
    assert (found["tokens_a_step"], found["proposed_a_step"]) == (2.0, 2.4)
    assert found["sequences_a_step"] == pytest.approx(5 / 3, abs=1e-3)
    # What the draft model did is within the steps that it did it for.
    assert found["shares"] == {"draft": 0.3, "model": 0.2, "sampling": 0.1, "rest": 0.4}
    assert found["steps"]["verify"]["ms"] == 350.0
    assert found["steps"]["verify"]["rest_ms"] == 50.0
    assert found["steps"]["draft"]["rows"] == 2.0


# ---- what is asked


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--draft", "off"], "somebody who drafts"),
        (["--max-tokens", "100000"], "are more than the model's"),
        (["--fixed", "0"], "--fixed takes numbers from 1 to 16 with commas between, not '0'"),
        (["--fixed", f"4,{MAX_PROPOSED + 1}"], "--fixed takes numbers from 1 to 16 with commas between, not '4,17'"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: list[str], told: str) -> None:
    done = bench(*options)
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.replace("│", "").split())


def test_a_draft_that_is_not_there_is_told_with_what_could_be_measured() -> None:
    refused = bench("--draft", "nope").exception
    assert isinstance(refused, ModelError)
    assert str(refused).endswith("or 'demo', 'ngram'")


def test_another_model_needs_a_draft_and_prompts_of_its_own() -> None:
    model = ["bench", "engine", str(draft_path()), "--speculate"]
    assert "somebody who drafts" in run(app, model, env={"COLUMNS": "300"}).stderr
    done = run(app, [*model, "--draft", "ngram"], env={"COLUMNS": "300"})
    assert done.exit_code == 2
    assert "--prompts FILE" in done.stderr


@pytest.mark.parametrize("option", [["--draft", "ngram"], ["--prompts", "x"], ["--fixed", "2"]])
def test_options_of_speculation_are_refused_without_it(option: list[str]) -> None:
    done = run(app, ["bench", "engine", "demo", *option])
    assert done.exit_code == 2
    assert "--speculate" in done.stderr


def test_only_n_grams_are_asked_to_quote() -> None:
    plain, quoting = demo_chats(quoting=False), demo_chats(quoting=True)
    assert quoting[: len(plain)] == plain
    assert any("Repeat this text" in chat[0]["content"] for chat in quoting[len(plain) :])
    assert not any("Repeat this text" in chat[0]["content"] for chat in plain)


def test_a_file_of_prompts_may_hold_texts_and_chats(tmp_path: Path, prompts: Path) -> None:
    carrots, peas, who = read_chats(prompts)
    assert carrots == [{"role": "user", "content": "Tell me about carrots."}]
    assert [message["role"] for message in peas] == ["system", "user"]
    assert who[0]["content"] == "Who are you?"
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": peas}))
    assert read_chats(path) == [peas]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no prompts"),
        ("ask\n[1, 2", ":2: a line that begins with \\[ is JSON"),
        ('{"prompt": 1}', ':1: give a list of messages, or an object with "messages"'),
        ("[1]", ":1: give a list of messages"),
        ("[]", ":1: give a list of messages"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(BadPrompts, match=told):
        read_chats(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadPrompts, match="nowhere"):
        read_chats(tmp_path / "nowhere")

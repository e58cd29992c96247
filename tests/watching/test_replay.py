"""What a comparison of steps that were done again finds, and the sentence that says it."""

from __future__ import annotations

import pytest

from stepguard.watching.outcome import Outcome
from stepguard.watching.replay import Replay
from stepguard.watching.replay_report import outcome_of
from stepguard.watching.trace import Fork, Item, Record, Start

FIRST = Start(0)


def loss(step: int, value: float = 0.5, epochs: int = 0, is_inside: bool = True) -> Record:
    return Record("numbers", step, epochs, {"loss": value}, is_inside)


def digests(step: int, **values: int) -> Record:
    named = {"image": "batch[0]", "label": "batch[1]", "state": "state model"}
    return Record("digests", step, 0, {named.get(name, name): value for name, value in values.items()})


def whole_step(step: int, value: float = 0.5, **others: int) -> list[Record]:
    return [digests(step, **{"random": 1, "image": 2, "label": 3, **others}), loss(step, value)]


def compare(
    before: list[Item], now: list[Record], *, at: Start, source: str = "", is_whole: bool = True
) -> Outcome | None:
    replay = Replay(before, at, is_whole=is_whole)
    replay.source = source
    for record in now:
        if not replay.is_over:
            replay.see(record)
    replay.end()
    return outcome_of(replay)


def resumed(step: int, **others: int) -> Start:
    return Start(step, is_resumed=True, **others)


# --- the same ---


def test_the_same_numbers_are_the_same_bit_for_bit() -> None:
    before = [FIRST, *(loss(step) for step in range(2990))]
    found = compare(before, [loss(step) for step in range(2921, 3100)], at=resumed(2921))
    assert found == Outcome(
        2921, 2989, "same", 69, None, None, "steps 2921 to 2989 were done again: bit for bit the same (loss)"
    )


def test_one_step_is_one_step() -> None:
    found = compare([FIRST, loss(4), loss(5)], [loss(5), loss(6)], at=resumed(5))
    assert found is not None
    assert found.message == "step 5 was done again: bit for bit the same (loss)"


def test_what_was_compared_is_named() -> None:
    before = [FIRST, *whole_step(1, state=7), *whole_step(2)]
    found = compare(before, [*whole_step(1, state=7), *whole_step(2), *whole_step(3)], at=resumed(1))
    assert found is not None
    assert found.message.endswith("bit for bit the same (batches, random states, state, loss)")


def test_a_program_that_reports_rarely_is_told_how_much_was_compared() -> None:
    before = [FIRST, *(loss(step) for step in range(0, 500, 100))]
    found = compare(before, [loss(300), loss(400), loss(500)], at=resumed(250))
    assert found is not None
    assert (found.outcome, found.compared, found.to_step) == ("same", 2, 400)
    assert "2 of them could be compared" in found.message


def test_a_last_step_that_the_kill_has_cut_short_is_compared_as_far_as_it_went() -> None:
    before: list[Item] = [FIRST, *whole_step(1), digests(2, random=1, image=2, label=3)]
    found = compare(before, [*whole_step(1), *whole_step(2), *whole_step(3)], at=resumed(1))
    assert found is not None
    assert (found.outcome, found.to_step) == ("same", 2)


def test_a_session_that_ends_before_it_came_so_far_says_how_far_it_came() -> None:
    before = [FIRST, *(loss(step) for step in range(100))]
    found = compare(before, [loss(step) for step in range(50, 60)], at=resumed(50))
    assert found is not None
    assert (found.outcome, found.to_step) == ("same", 59)
    assert "the first time, the run came to step 99" in found.message


def test_a_step_that_is_done_a_third_time_is_compared_with_the_second() -> None:
    before = [FIRST, loss(1, 1.0), loss(2, 1.0), resumed(1), loss(1, 2.0)]
    found = compare(before, [loss(1, 2.0), loss(2, 1.0), loss(3)], at=resumed(1))
    assert found is not None
    assert found.outcome == "same"


# --- nothing to say ---


@pytest.mark.parametrize(
    ("before", "now", "at"),
    [
        ([], [loss(0), loss(1)], resumed(0)),
        ([FIRST, loss(0), loss(1)], [loss(2), loss(3)], resumed(2)),
        ([FIRST, loss(0), loss(1)], [loss(0, 9.0), loss(1, 9.0), loss(2)], Start(0)),
        ([FIRST, loss(0), loss(1), Fork(0, 0)], [loss(0, 9.0), loss(2)], resumed(0)),
        # What was reported after the last step of a run that had ended well.
        ([FIRST, loss(4), loss(5, 1.0, is_inside=False)], [loss(5, 2.0), loss(6)], resumed(5)),
        # The session ends before it reports anything that was reported before.
        ([FIRST, loss(4), loss(9)], [], resumed(4)),
    ],
    ids=["no trace", "nothing lost", "a fresh start", "given up", "a run that had ended", "stopped at once"],
)
def test_where_no_step_is_done_again_nothing_is_said(before: list[Item], now: list[Record], at: Start) -> None:
    assert compare(before, now, at=at) is None


def test_a_changed_program_is_told_that_nothing_can_be_compared() -> None:
    found = compare([FIRST, loss(1), loss(2)], [Record("numbers", 1, 0, {"error": 1.0}), loss(3)], at=resumed(1))
    assert found is not None
    assert (found.outcome, found.compared) == ("unknown", 0)
    assert found.message == (
        "steps 1 to 2 were done again and cannot be compared: nothing was recorded again under the same name; the "
        "first time there were loss"
    )


def test_another_number_of_processes_is_not_compared() -> None:
    before = [Start(0, processes=2), loss(1), loss(2)]
    found = compare(before, [loss(1, 9.0), loss(2, 9.0), loss(3)], at=resumed(1, processes=3))
    assert found is not None
    assert found.outcome == "unknown"
    assert "another number of processes trains now" in found.message


def test_steps_that_the_trace_has_lost_are_said() -> None:
    before = [loss(step) for step in range(500, 600)]
    found = compare(before, [loss(step) for step in range(100, 601)], at=resumed(100), is_whole=False)
    assert found is not None
    assert (found.outcome, found.compared) == ("same", 100)
    assert "100 of them could be compared; those before step 500 are no longer in the trace" in found.message


# --- different ---


def different(now: list[Record], before: list[Item] | None = None, at: int = 2) -> Outcome:
    usual = [FIRST, *(record for step in range(4) for record in whole_step(step, state=7))]
    found = compare(usual if before is None else before, now, at=resumed(at), source="steps(Loader)")
    assert found is not None
    assert found.outcome == "differs"
    return found


def test_another_batch_is_another_order_of_the_data() -> None:
    found = different([*whole_step(2), *whole_step(3, 0.7, image=8, label=9)])
    assert (found.differs_at, found.cause, found.compared) == (3, "data", 2)
    assert found.message.startswith(
        "step 2 was done again bit for bit; step 3 is not what it was: random state the same, batch[0] of "
        "steps(Loader) differs, batch[1] of steps(Loader) differs, loss 0.500000 then, 0.700000 now: the data order is "
        "not restored: "
    )


def test_another_part_of_the_batch_is_an_augmentation() -> None:
    found = different([*whole_step(2, image=8), *whole_step(3)])
    assert (found.differs_at, found.cause) == (2, "data")
    assert "batch[1] the same" in found.message
    assert "an augmentation draws random numbers that are not saved" in found.message


def test_another_random_state_is_the_cause_also_of_another_batch() -> None:
    found = different([*whole_step(2, 0.7, random=9, image=8, label=9), *whole_step(3)])
    assert (found.differs_at, found.cause) == (2, "random state")
    assert "before step 2, something has drawn" in found.message


def test_numbers_alone_are_the_computation() -> None:
    found = different([*whole_step(2), *whole_step(3, 0.5000001), *whole_step(4)])
    assert (found.differs_at, found.cause) == (3, "computation")
    assert (
        "step 3 is not what it was: random state the same, batch the same, loss 0.5000000 then, 0.5000001 now: the "
        "computation is not deterministic, or depends on something that is not saved"
    ) in found.message


def test_numbers_that_differ_at_once_are_rather_of_a_state_that_is_not_saved() -> None:
    found = different([*whole_step(2, 0.6), *whole_step(3)])
    assert found.cause == "computation"
    assert "the computation depends on something that is not saved, or is not deterministic" in found.message


def test_another_state_at_the_beginning_of_a_step_is_named_by_its_part() -> None:
    found = different([*whole_step(2, state=8), *whole_step(3)])
    assert (found.cause, found.differs_at) == ("state", 2)
    assert "state model differs" in found.message


def test_without_digests_the_cause_is_not_guessed() -> None:
    found = different([loss(2), loss(3, 0.7), loss(4)], [FIRST, loss(1), loss(2), loss(3)])
    assert (found.cause, found.differs_at) == (None, 3)
    assert 'Watching(trace="batches")' in found.message


def test_hyperparameters_that_changed_are_named_with_both_values() -> None:
    def settings(step: int, rate: float) -> Record:
        return Record("settings", step, 0, {"optimizer.lr": rate, "optimizer.momentum": 0.9})

    # The first time they were recorded before the checkpoint.
    before = [FIRST, settings(0, 0.1), *whole_step(1), *whole_step(2)]
    found = different([*whole_step(1), settings(1, 0.2), *whole_step(2, 0.7)], before, at=1)
    assert (found.cause, found.differs_at) == ("hyperparameters", 1)
    assert "optimizer.lr 0.100000 then, 0.200000 now: the program sets other hyperparameters" in found.message


def test_hyperparameters_that_follow_a_schedule_are_those_of_their_step() -> None:
    def settings(step: int, rate: float) -> Record:
        return Record("settings", step, 0, {"optimizer.lr": rate})

    before = [FIRST, settings(0, 0.1), *whole_step(0), *whole_step(1), settings(2, 0.2), *whole_step(2)]
    same = compare(before, [settings(1, 0.1), *whole_step(1), settings(2, 0.2), *whole_step(2)], at=resumed(1))
    assert same is not None
    assert same.outcome == "same"
    found = different([settings(1, 0.1), *whole_step(1), *whole_step(2)], before, at=1)
    assert (found.cause, found.differs_at) == ("hyperparameters", 2)


@pytest.mark.parametrize("name", ["secs", "step_time", "images/sec", "tokens_per_second", "gpu memory", "it/s", "eta"])
def test_numbers_that_are_measured_by_name_are_no_difference(name: str) -> None:
    def timed(step: int, secs: float) -> Record:
        return Record("numbers", step, 0, {"loss": 0.5, name: secs})

    found = compare([FIRST, timed(1, 0.1), timed(2, 0.2)], [timed(1, 0.3), timed(2, 0.3), timed(3, 0.1)], at=resumed(1))
    assert found is not None
    assert found.outcome == "same"
    assert found.message.endswith(f"not compared, because their names say that they are measured: {name}")


@pytest.mark.parametrize("name", ["loss", "beta", "learning_rate", "min_loss", "classes", "grad/norm", "timestep"])
def test_no_other_name_says_that(name: str) -> None:
    before = [FIRST, Record("numbers", 1, 0, {name: 1.0}), loss(2)]
    found = compare(before, [Record("numbers", 1, 0, {name: 2.0}), loss(3)], at=resumed(1))
    assert found is not None
    assert found.outcome == "differs"


def test_many_differences_are_counted() -> None:
    before = [FIRST, Record("numbers", 1, 0, {f"loss/{number}": 0.0 for number in range(9)})]
    found = different([Record("numbers", 1, 0, {f"loss/{number}": 1.0 for number in range(9)}), loss(2)], before, at=1)
    assert "loss/2 0.00000 then, 1.00000 now, and 6 more differ" in found.message

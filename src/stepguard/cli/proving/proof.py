"""The ladder of a proof: two undisturbed runs, then one run for each kind of fault, each compared with the first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepguard.cli.proving import causes, lanes
from stepguard.cli.proving.beginning import Beginning
from stepguard.cli.proving.causes import Cause
from stepguard.cli.proving.comparing import Comparison, compare_runs, last_state
from stepguard.cli.proving.faults import Pace, Rung, plan
from stepguard.cli.proving.lanes import Work
from stepguard.cli.proving.own_files import OwnFiles
from stepguard.cli.proving.program import OutOfTimeError, Program
from stepguard.cli.proving.runs import ProgramFailedError, Run, is_at_end, last_stop
from stepguard.cli.proving.scratch import Place, Scratch
from stepguard.cli.text import output
from stepguard.watching import heartbeat, ledger
from stepguard.words import duration, listed, printable

PROVEN, DIFFERENT, NOT_DETERMINISTIC, NOT_TRIED = "proven", "different", "not deterministic", "not tried"
"""The verdicts."""

UNDISTURBED, AGAIN = "undisturbed", "again"
"""The kinds of the runs without faults: the first, and the one that begins with its early checkpoint."""

# The checkpoints that a trial adds are a tenth of the steps apart; all runs begin with the first after a twentieth.
_SHARES, _BEGINS = 10, 20
_ONE_PROCESS = "one process trains, and no other can be left alone"
# The first run, its beginning, and one whose difference is kept; besides the one of each lane.
_LOGDIRS_AT_ONCE = 3


class NotTriedError(Exception):
    """The program cannot be proven as it is. ``lines`` are the last ones that it has printed."""

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.lines = list(lines)


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asks for: the last step, the kinds of faults, the seed, ``save_every``, ``None`` to choose, and how
    many runs there are at a time.
    """

    steps: int
    kinds: Sequence[str]
    seed: int
    save_every: int | None = None
    is_deterministic: bool = False
    jobs: int = 1

    @property
    def spacing(self) -> int:
        """The steps between the checkpoints that the trial adds."""
        return self.save_every or max(1, self.steps // _SHARES)


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the verdict: a run, how it compares with the first, and why it differs."""

    kind: str
    run: Run
    comparison: Comparison | None = None
    cause: Cause | None = None

    @property
    def is_same(self) -> bool:
        """Whether it is the same run as the first."""
        return self.comparison is None or self.comparison.is_same

    @property
    def is_tried(self) -> bool:
        """Whether at least one of its faults was done, and the other run has traced what it did."""
        if self.comparison is not None and self.comparison.untraced:
            return False
        if self.kind == "disk":
            return not self.run.missed
        return self.kind in (UNDISTURBED, AGAIN) or bool(self.run.restarts)


@dataclass(slots=True)
class Verdict:
    """The outcome so far: what each run was, and what else is worth knowing."""

    verdict: str
    results: list[Result] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    # The largest share of a step's time, and of the whole time, that the training waited for snapshots.
    longest_stall_secs: float = 0.0
    stall_share: float = 0.0
    begins_at: int = 0


class Proof:
    """Proves one program. ``show(result, begins_at)`` gets each result, ``tell(what, start, step)`` the progress, and
    ``say(line)`` what is known beforehand. ``verdict`` has what was found, also if :meth:`prove` raises.
    """

    def __init__(
        self,
        program: Program,
        scratch: Scratch,
        options: Options,
        *,
        show: Callable[[Result, int], object],
        tell: Callable[[str, int, int | None], object],
        say: Callable[[str], object],
    ) -> None:
        self._program = program
        self._scratch = scratch
        self._options = options
        self._show = show
        self._tell = tell
        self._say = say
        self.verdict = Verdict(PROVEN)
        self._own_files = OwnFiles()
        self._given: set[str] = set()
        # The logdir that every later run begins with a copy of.
        self._copied: Path | None = None

    def prove(self) -> Verdict:
        """Run the ladder.

        Raises:
            NotTriedError: the program cannot be proven as it is; the message says why. If a difference was found
                before, a remark of the verdict says so instead.
            OSError: the program cannot be started.
        """
        try:
            self._climb_all()
        except (NotTriedError, OSError) as error:
            if self.verdict.verdict not in (DIFFERENT, NOT_DETERMINISTIC):
                raise
            # What was found stays found.
            self.verdict.remarks.append(f"the rest could not be tried: {error}")
        finally:
            self._remark_on_own_files()
        return self.verdict

    def _climb_all(self) -> None:
        first = self._first_run()
        if not self._begin_again(first):
            return
        rungs = plan(self._options.kinds, self._pace(first), self._options.seed)
        if not rungs:
            raise NotTriedError(f"{', '.join(self._options.kinds)}: {_ONE_PROCESS}")
        if "process" in self._options.kinds and not any(one.kind == "process" for one in rungs):
            self.verdict.remarks.append(f"the fault process was left out: {_ONE_PROCESS}")
        with lanes.open_lanes(self._options.jobs if self._pace(first).processes == 1 else 1) as lane:
            waiting = [(rung, self._start(lane, rung)) for rung in rungs]
            for rung, run_ in waiting:
                self._climb(rung, first, run_())

    # --- the undisturbed runs ---

    def _first_run(self) -> Run:
        place = self._place("first")
        beginning = Beginning(place.logdir, self._scratch.root / "beginning", max(1, self._options.steps // _BEGINS))

        def look(start: int, step: int | None) -> None:
            beginning.look()
            if self._own_files.is_empty:
                self._list_own_files(place)
            self._tell(UNDISTURBED, start, step)

        first = self._run(Work(self._program, place), UNDISTURBED, look)
        self._check(first)
        beginning.take_kept(first.step or 0)
        if beginning.step is not None:
            self._copied, self.verdict.begins_at = beginning.target, beginning.step
        else:
            first = self._run_from_a_short_one(first, beginning.at_least)
        self._note_costs(first)
        self._add(Result(UNDISTURBED, first))
        self._say_what_follows(first)
        return first

    def _run_from_a_short_one(self, first: Run, step: int) -> Run:
        """The first run again, from a checkpoint of its own: it was over before an early one was written."""
        short = self._run(Work(self._program, self._place("short", stop_at=step)), UNDISTURBED, self._teller("short"))
        if not short.step or short.step >= (first.step or 0) or last_state(short) is None:
            return first
        self._copied, self.verdict.begins_at = short.place.logdir, short.step
        first.place.remove()
        return self._run(Work(self._program, self._place("from-short")), UNDISTURBED, self._teller(UNDISTURBED))

    def _say_what_follows(self, first: Run) -> None:
        size = max(1, first.place.size())
        most = (_LOGDIRS_AT_ONCE + self._options.jobs) * size
        free = self._scratch.free_bytes()
        if free < most:
            raise NotTriedError(
                f"{self._scratch.root}: expected room for {output.size(most)}, found {output.size(free)}; name another "
                f"place with --scratch"
            )
        rungs = plan(self._options.kinds, self._pace(first), self._options.seed)
        starts = 1 + sum(len(one.faults) + (one.kind != "disk") for one in rungs)
        self._say(
            f"{starts} more starts, about {duration(first.secs * starts / self._options.jobs)}, at most "
            f"{output.size(most)} in {printable(str(self._scratch.root))}"
        )

    def _begin_again(self, first: Run) -> bool:
        """Begin one run with the checkpoint of all, undisturbed; whether it is the same run as the first.

        If it is not, one more tells whether it is the computation that differs from run to run.
        """
        again = self._run(Work(self._program, self._place("again")), AGAIN, self._teller(AGAIN))
        found = self._compare(first, again)
        if found.is_same:
            self._add(Result(AGAIN, again, found))
            again.place.remove()
            return True
        if again.problem is None:
            once_more = self._run(Work(self._program, self._place("once-more")), AGAIN, self._teller(AGAIN))
            between = self._compare(again, once_more)
            if not between.is_same:
                self.verdict.verdict = NOT_DETERMINISTIC
                self._add(Result(AGAIN, once_more, between, causes.of_two_undisturbed(between)))
                return False
        self._add(Result(AGAIN, again, found, causes.of_a_disturbed_run(found)))
        return False

    def _compare(self, one: Run, other: Run) -> Comparison:
        return compare_runs(one, other, self.verdict.begins_at)

    def _check(self, first: Run) -> None:
        """Raise NotTriedError if the first run does not show what the others could be compared with."""
        if (why := _unfit(first.place)) is not None:
            raise NotTriedError(why, first.lines)
        if not first.step:
            raise NotTriedError(
                "the program has done no step that is counted (is its global step None, or its work done?)", first.lines
            )
        if last_state(first) is None:
            raise NotTriedError(f"no checkpoint of step {first.step}, its last, was saved", first.lines)

    def _pace(self, first: Run) -> Pace:
        events = ledger.read(first.place.logdir)
        writes = [one["secs"] for one in events if one["event"] == "checkpoint" and one.get("secs")]
        beats = heartbeat.read(first.place.logdir)
        steps = max(1, (first.step or 1) - self.verdict.begins_at)
        return Pace(
            self.verdict.begins_at,
            first.step or 1,
            _training_secs(events) / steps,
            statistics.median(writes) if writes else 0.0,
            len(beats),
        )

    def _note_costs(self, first: Run) -> None:
        events = ledger.read(first.place.logdir)
        stalls = [one["stall_secs"] for one in events if one["event"] == "checkpoint" and one.get("stall_secs")]
        self.verdict.longest_stall_secs = max(stalls, default=0.0)
        self.verdict.stall_share = sum(stalls) / max(1e-9, _training_secs(events))

    # --- the faults ---

    def _start(self, lane: lanes.Lane, rung: Rung) -> Callable[[], Run]:
        """Start the run of a rung in a lane. Returns the function that waits for it."""
        work = Work(self._program, self._place(rung.kind), rung.faults)
        end = lane(work, self._teller(rung.kind))
        return lambda: self._ended(end, work.place, rung.kind)

    def _climb(self, rung: Rung, first: Run, done: Run) -> None:
        found = self._compare(first, done)
        cause = None if found.is_same else causes.of_a_disturbed_run(found)
        self._add(Result(rung.kind, done, found, cause))
        if found.is_same:
            done.place.remove()

    # --- one run ---

    def _place(self, name: str, stop_at: int | None = None) -> Place:
        return self._scratch.place(
            name,
            stop_at=stop_at or self._options.steps,
            save_every=self._options.spacing,
            is_deterministic=self._options.is_deterministic,
            copy=self._copied,
        )

    def _teller(self, kind: str) -> Callable[[int, int | None], object]:
        return lambda start, step: self._tell(kind, start, step)

    def _run(self, work: Work, kind: str, tell: Callable[[int, int | None], object]) -> Run:
        return self._ended(lambda: work(tell), work.place, kind)

    def _ended(self, end: Callable[[], Run], place: Place, kind: str) -> Run:
        try:
            done = end()
        except ProgramFailedError as error:
            if kind == UNDISTURBED:
                raise self._failed(error, place, kind) from error
            # A start that goes on from a checkpoint fails, and the one that began anew did not: that is a finding.
            done = Run(place, problem=str(error), lines=error.lines)
        except OutOfTimeError as error:
            raise self._late(place, kind) from error
        self._note(place)
        return done

    def _failed(self, error: ProgramFailedError, place: Place, kind: str) -> NotTriedError:
        writes = [one.path for one in place.notes() if one.kind == "write"]
        if writes:
            return NotTriedError(
                f"the program itself writes into its logdir ({printable(str(writes[0]))}), which a proof must not "
                f"change: have it write to another place for the proof"
            )
        if (why := _unfit(place)) is not None:
            return NotTriedError(why, error.lines)
        return NotTriedError(f"{kind}: {error}", error.lines)

    def _late(self, place: Place, kind: str) -> NotTriedError:
        stop = last_stop(place, 0.0)
        if is_at_end(stop, None):
            return NotTriedError(
                f"{kind}: the program went on after its last step, {stop.get('step')}, until the time was over: does "
                f"its loop end when sv.should_stop() is true?"
            )
        return NotTriedError(f"{kind}: the time was over (--time-limit-secs)")

    def _list_own_files(self, place: Place) -> None:
        notes = [one for one in place.notes() if one.kind == "supervisor"]
        self._own_files.list_new(one.path for one in notes if one.path is not None)

    def _remark_on_own_files(self) -> None:
        changed = self._own_files.changed()
        if changed:
            more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
            self.verdict.remarks.append(
                f"files in the program's own logdir have changed meanwhile ({printable(changed[0])}{more}): unless "
                f"another run writes there, the program has done it in a way that a trial cannot stop"
            )

    def _note(self, place: Place) -> None:
        """Remark on what the notes of a run show besides."""
        self._list_own_files(place)
        notes = place.notes()
        self._given |= {one.path for one in notes if one.kind == "supervisor" and one.path is not None}
        remarks = []
        if len(self._given) > 1 and self.verdict.results:
            remarks.append(
                "the program gives another logdir at each start: outside of a proof, a restart finds nothing to resume"
            )
        reads = [one.path for one in notes if one.kind == "read" and one.path is not None]
        if reads:
            remarks.append(
                f"the program reads its own logdir ({printable(reads[0])}): what it reads there is the real run's"
            )
        self.verdict.remarks += [one for one in remarks if one not in self.verdict.remarks]

    def _add(self, result: Result) -> None:
        self.verdict.results.append(result)
        if not result.is_same and self.verdict.verdict != NOT_DETERMINISTIC:
            self.verdict.verdict = DIFFERENT
        elif not result.is_tried and self.verdict.verdict == PROVEN:
            self.verdict.verdict = NOT_TRIED
        self._show(result, self.verdict.begins_at)


def _unfit(place: Place) -> str | None:
    """Why a program whose Supervisors have noted themselves in ``place`` cannot be proven; ``None`` if it can."""
    notes = [one for one in place.notes() if one.kind == "supervisor"]
    given = sorted({one.path for one in notes if one.path is not None})
    if not notes:
        return "the program has made no Supervisor of Stepguard (or one that does not know of proofs)"
    if not given:
        return "the program gives its Supervisor no logdir, so nothing is saved: give it one"
    if len(given) > 1:
        return (
            f"the program has Supervisors with {len(given)} logdirs ({listed(map(printable, given))}), and a proof "
            f"follows one: prove the parts one by one"
        )
    if not any(one.saves for one in notes):
        return "the Supervisor saves nothing (save_model_secs=0): there is nothing to resume from"
    return None


def _training_secs(events: Sequence[dict[str, object]]) -> float:
    """From the beginning of the training of the last start to its end."""
    begun = [one["time"] for one in events if one["event"] in ("fresh", "restore")]
    ended = [one["time"] for one in events if one["event"] == "stop"]
    if not begun or not ended:
        return 0.0
    return max(0.0, float(str(ended[-1])) - float(str(begun[-1])))

"""What checkpoints cost a training loop, and whether each holds one step.

One thread trains; a checkpoint is due every second. Every variable holds the number of steps done: a checkpoint is
torn when its variables differ from each other or from its global step. All checkpoints are kept, and every one is read
back. Every run is a fresh process; the kinds take turns. Each process first measures what the reach values refer to:
a copy of the state in fresh memory, and a plain write and fsync of the same bytes.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import NAMES, disable_eager_execution, median, print_machine, print_table, quantile, run_child, write_result

KINDS = ("bare", "tf", "mts", "ours")
TENSOR_MB = 10
MB = 1 << 20
LARGE = 1000


class Model:
    """Variables of ``mb`` megabytes together, and a step that multiplies matrices and adds one to each."""

    def __init__(self, mb: int, products: int, max_to_keep: int = 0) -> None:
        import tensorflow as tf

        v1 = tf.compat.v1
        self.global_step = v1.train.get_or_create_global_step()
        size = TENSOR_MB * MB // 4
        count = max(1, mb // TENSOR_MB)
        one = v1.get_variable(
            "one",
            [size],
            initializer=v1.ones_initializer(),
            use_resource=True,
            trainable=False,
            collections=[v1.GraphKeys.LOCAL_VARIABLES],
        )
        self.variables = [
            v1.get_variable(f"weights_{number}", [size], initializer=v1.zeros_initializer(), use_resource=True)
            for number in range(count)
        ]
        seed = v1.random_normal([256, 256], seed=1)
        _, product = tf.while_loop(
            lambda number, _: number < products,
            lambda number, matrix: (number + 1, tf.tanh(tf.matmul(matrix, seed))),
            (tf.constant(0), seed),
            parallel_iterations=1,
        )
        with tf.control_dependencies([product]):
            minus_one = tf.constant(-1.0)
            updates = [
                tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=minus_one, delta=one)
                for variable in self.variables
            ]
        with tf.control_dependencies(updates):
            self.train = v1.assign_add(self.global_step, 1).op
        self.reads = [variable.read_value() for variable in self.variables]
        self.saver = v1.train.Saver(max_to_keep=max_to_keep)


class Saves(logging.Handler):
    """When checkpoints were being written: of ours from its log, of the others by timing their saver."""

    def __init__(self) -> None:
        super().__init__()
        self.intervals: list[tuple[float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of ``saved step %s to %s in %.2f s``."""
        if str(record.msg).startswith("saved step") and isinstance(record.args, tuple):
            now = time.perf_counter()
            self.intervals.append((now - float(record.args[-1]), now))  # type: ignore[arg-type]

    def listen(self) -> None:
        """Hear what ours logs."""
        logger = logging.getLogger("stepguard")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def watch(self, saver: Any) -> None:
        """Time every save of TensorFlow's own."""
        save = saver.save

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return save(*args, **kwargs)
            finally:
                self.intervals.append((began, time.perf_counter()))

        saver.save = timed


@contextlib.contextmanager
def opened(kind: str, model: Model, logdir: str, save_secs: float, saves: Saves, config: Any) -> Any:
    """A training session of one kind."""
    import tensorflow as tf

    import stepguard.tensorflow

    v1 = tf.compat.v1
    if kind == "bare":
        with v1.Session(config=config) as session:
            session.run([v1.global_variables_initializer(), v1.local_variables_initializer()])
            yield session
    elif kind == "mts":
        saves.watch(model.saver)
        scaffold = v1.train.Scaffold(saver=model.saver)
        with v1.train.MonitoredTrainingSession(
            checkpoint_dir=logdir,
            scaffold=scaffold,
            save_checkpoint_secs=save_secs,
            save_summaries_steps=None,
            save_summaries_secs=None,
            log_step_count_steps=None,
            config=config,
        ) as session:
            yield session
    else:
        if kind == "tf":
            saves.watch(model.saver)
            supervisor_class = v1.train.Supervisor
        else:
            saves.listen()
            supervisor_class = stepguard.tensorflow.Supervisor
        supervisor = supervisor_class(
            logdir=logdir, saver=model.saver, save_model_secs=save_secs, save_summaries_secs=0, summary_op=None
        )
        with supervisor.managed_session(config=config) as session:
            yield session


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One run of one kind: the time of every step, when checkpoints were written, and what is in them."""
    import tensorflow as tf

    disable_eager_execution()
    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=options.intra_op_threads)
    saves = Saves()
    logdir = tempfile.mkdtemp(prefix="checkpointing-", dir=options.dir)
    try:
        with tf.Graph().as_default():
            model = Model(options.mb, options.products)
            with opened(options.kind, model, logdir, options.save_secs, saves, config) as session:
                memory = PeakMemory()
                marks = run_steps(session, model, options)
                peak = memory.stop()
        result = summary_of_steps(marks, saves.intervals)
        # Pages that are still on their way to the disk would slow the reading down, and whatever comes after it.
        os.sync()
        result |= read_back(logdir, len(model.variables))
        result |= {"peak_mb": peak, "save_secs": [end - start for start, end in saves.intervals]}
        return result
    finally:
        shutil.rmtree(logdir, ignore_errors=True)


def run_steps(session: Any, model: Model, options: argparse.Namespace) -> list[float]:
    """Train for so many seconds; when each step began, and the last one ended."""
    run, fetches = session.run, model.train
    for _ in range(5):
        run(fetches)
    marks = [time.perf_counter()]
    while marks[-1] - marks[0] < options.secs:
        run(fetches)
        marks.append(time.perf_counter())
    return marks


class PeakMemory:
    """The largest resident size of this process, in megabytes, looked at every few milliseconds."""

    def __init__(self) -> None:
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._stop.wait(0.01):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self._peak = max(self._peak, pages * page)

    def stop(self) -> float:
        """Stop looking."""
        self._stop.set()
        self._thread.join()
        return self._peak / MB


def summary_of_steps(marks: list[float], intervals: list[tuple[float, float]]) -> dict[str, Any]:
    """Milliseconds of all steps, and of those during which a checkpoint was being written."""
    steps = [1e3 * (end - start) for start, end in itertools.pairwise(marks)]
    during = set()
    for start, end in intervals:
        first = max(0, bisect.bisect_right(marks, start) - 1)
        during.update(range(first, min(len(steps), bisect.bisect_left(marks, end))))
    return {
        "steps": steps,
        "during": [steps[number] for number in sorted(during)],
        "otherwise": [step for number, step in enumerate(steps) if number not in during],
        "secs": marks[-1] - marks[0],
    }


def read_back(logdir: str, count: int) -> dict[str, Any]:
    """Read every checkpoint: how many there are, and how many hold more than one step."""
    import tensorflow as tf

    checkpoints = torn = 0
    for name in sorted(os.listdir(logdir)):
        match = re.fullmatch(r"(model\.ckpt-(\d+))\.index", name)
        if match is None:
            continue
        checkpoints += 1
        reader = tf.train.load_checkpoint(os.path.join(logdir, match.group(1)))
        step = int(reader.get_tensor("global_step"))
        held = {step, int(match.group(2))}
        for number in range(count):
            values = reader.get_tensor(f"weights_{number}")
            held |= {float(values.min()), float(values.max())}
        torn += len(held) != 1
    return {"checkpoints": checkpoints, "torn": torn}


def reference(options: argparse.Namespace) -> dict[str, Any]:
    """What the reach values refer to, and what can only be measured while nothing trains: durable write and restore.

    Every file is removed before the next is measured: else some would be written to memory that the system has to
    find first, and others to what was just given back.
    """
    import tensorflow as tf

    import stepguard
    import stepguard.tensorflow

    disable_eager_execution()
    saves = Saves()
    saves.listen()
    logdir = Path(tempfile.mkdtemp(prefix="checkpointing-", dir=options.dir))
    found: dict[str, list[float]] = {}
    try:
        with tf.Graph().as_default():
            model = Model(options.mb, 1, max_to_keep=1)
            supervisor = stepguard.tensorflow.Supervisor(
                logdir=str(logdir / "ours"),
                saver=model.saver,
                save_model_secs=0,
                saving=stepguard.Saving(save_model_steps=1),
                save_summaries_secs=0,
                summary_op=None,
            )
            session = supervisor.prepare_or_wait_for_session()
            state = session.run(model.reads)

            def tf_durable() -> float:
                began = time.perf_counter()
                path = model.saver.save(session, str(logdir / "theirs"), write_meta_graph=False, write_state=False)
                found.setdefault("tf_save", []).append(time.perf_counter() - began)
                sync_files(path)
                took = time.perf_counter() - began
                remove_files(path)
                return took

            def ours_durable() -> float:
                # Its own saving, by its own service: the time that it logs, from the snapshot to the commit.
                done = len(saves.intervals)
                session.run(model.train)
                # Until the one before it is removed, which comes last, the next would be skipped.
                while len(saves.intervals) == done or len(list((logdir / "ours").glob("*.index"))) > 1:
                    time.sleep(0.01)
                time.sleep(0.05)
                return saves.intervals[-1][1] - saves.intervals[-1][0]

            def restore(manager: Any) -> float:
                began = time.perf_counter()
                restored, is_restored = manager.recover_session("", model.saver, str(logdir / "ours"))
                took = time.perf_counter() - began
                restored.close()
                if not is_restored:
                    raise AssertionError(f"nothing restored from {logdir}")
                return took

            writes = {
                "copy": lambda: fresh_copy(state),
                "plain_write": lambda: plain_write(logdir / "plain", state),
                "tf_durable": tf_durable,
                "ours_durable": ours_durable,
            }
            take_turns(writes, options.repeats, found)
            supervisor.stop()
            session.close()
            theirs, ours = tf.compat.v1.train.SessionManager(), stepguard.tensorflow.SessionManager()
            restores = {"tf_restore": lambda: restore(theirs), "ours_restore": lambda: restore(ours)}
            take_turns(restores, options.repeats, found)
    finally:
        shutil.rmtree(logdir, ignore_errors=True)
    return dict(found)


def take_turns(measures: dict[str, Any], repeats: int, found: dict[str, list[float]]) -> None:
    """Measure each ``repeats`` times in changing order, after once to warm up."""
    for number in range(-1, repeats):
        names = list(measures)
        for name in names if number % 2 else names[::-1]:
            os.sync()
            seconds = measures[name]()
            if number >= 0:
                found.setdefault(name, []).append(seconds)


def fresh_copy(arrays: list[Any]) -> float:
    """Seconds to copy arrays into memory that was not used before, with its page faults."""
    import numpy as np

    began = time.perf_counter()
    copies = []
    for array in arrays:
        copies.append(np.empty_like(array))
        np.copyto(copies[-1], array)
    return time.perf_counter() - began


def plain_write(path: Path, arrays: list[Any]) -> float:
    """Seconds to write the same bytes to one file, and to fsync it."""
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for array in arrays:
            view = memoryview(array).cast("B")
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    path.unlink()
    return took


def sync_files(prefix: str) -> None:
    """What TensorFlow leaves to the operating system."""
    for path in Path(prefix).parent.glob(Path(prefix).name + ".*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def remove_files(prefix: str) -> None:
    """Remove a checkpoint."""
    for path in Path(prefix).parent.glob(Path(prefix).name + ".*"):
        path.unlink()


def calibrate(options: argparse.Namespace) -> dict[str, Any]:
    """How many matrix products make a step as long as asked for."""
    import tensorflow as tf

    disable_eager_execution()
    v1 = tf.compat.v1
    took = {}
    for products in (1, 41):
        with tf.Graph().as_default():
            model = Model(options.mb, products)
            config = v1.ConfigProto(intra_op_parallelism_threads=options.intra_op_threads)
            with v1.Session(config=config) as session:
                session.run([v1.global_variables_initializer(), v1.local_variables_initializer()])
                took[products] = []
                for _ in range(40):
                    began = time.perf_counter()
                    session.run(model.train)
                    took[products].append(time.perf_counter() - began)
    one = median(took[1])
    each = max(1e-5, (median(took[41]) - one) / 40)
    return {"products": max(1, round((options.step_ms / 1e3 - one) / each))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=200, help="megabytes of variables; the issue also asks for 1000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--secs", type=float, default=15.0, help="how long each trains")
    parser.add_argument("--save-secs", type=float, default=1.0, help="seconds between checkpoints")
    parser.add_argument("--step-ms", type=float, default=25.0, help="about how long a step takes")
    parser.add_argument("--intra-op-threads", type=int, default=0, help="for training; 0: TensorFlow's choice")
    parser.add_argument("--repeats", type=int, default=9, help="of what is measured without training")
    parser.add_argument("--dir", default=None, help="where to write; by default the usual place for temporary files")
    parser.add_argument("--kind", choices=(*KINDS, "reference", "calibrate"), help=argparse.SUPPRESS)
    parser.add_argument("--products", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        measure = {"reference": reference, "calibrate": calibrate}.get(options.kind, train)
        write_result(options.out, measure(options))
        return
    print_machine()
    arguments: list[object] = ["--mb", options.mb, "--secs", options.secs, "--save-secs", options.save_secs]
    arguments += ["--step-ms", options.step_ms, "--intra-op-threads", options.intra_op_threads]
    arguments += ["--repeats", options.repeats]
    if options.dir:
        arguments += ["--dir", options.dir]
    products = run_child(__file__, ["--kind", "calibrate", *arguments])["products"]
    arguments += ["--products", products]
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (*KINDS, "reference")}
    for number in range(options.rounds):
        for kind in ("reference", *(KINDS if number % 2 == 0 else KINDS[::-1])):
            runs[kind].append(run_child(__file__, ["--kind", kind, *arguments]))
    report(runs, options)


def report(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Print what was measured, and how far it is from the reach values."""

    def over_rounds(kind: str, what: Any) -> float:
        return median([value for one in runs[kind] if (value := what(one)) == value])

    references = {
        name: [seconds for one in runs["reference"] for seconds in one[name]] for name in runs["reference"][0]
    }
    copy_ms = 1e3 * median(references["copy"])
    print(
        f"{options.mb} MB of variables, a checkpoint every {options.save_secs:g} s for {options.secs:g} s, "
        f"medians of {options.rounds} rounds, in ms\n"
    )
    bare_peak = over_rounds("bare", lambda one: one["peak_mb"])
    rows = []
    for kind in KINDS:
        during = over_rounds(kind, lambda one: median(one["during"]))
        otherwise = over_rounds(kind, lambda one: median(one["otherwise"]))
        longest = over_rounds(kind, lambda one: max(one["steps"]))
        rows.append(
            [
                NAMES[kind],
                over_rounds(kind, lambda one: median(one["steps"])),
                over_rounds(kind, lambda one: quantile(one["steps"], 0.99)),
                longest,
                max(max(one["steps"]) for one in runs[kind]),
                over_rounds(kind, lambda one: len(one["steps"]) / one["secs"]),
                otherwise,
                during,
                during / otherwise,
                sum(one["checkpoints"] for one in runs[kind]),
                sum(one["torn"] for one in runs[kind]),
                (over_rounds(kind, lambda one: one["peak_mb"]) - bare_peak) / options.mb,
            ]
        )
    print_table(
        [
            "",
            "median step",
            "99th percentile",
            "longest",
            "longest of all",
            "steps/s",
            "median, not writing",
            "median, writing",
            "writing / not",
            "checkpoints",
            "torn",
            "extra memory / state",
        ],
        rows,
    )
    longest, normal, ratio, extra = rows[-1][3], rows[-1][6], rows[-1][8], rows[-1][11]
    speed = median(
        [w / d for one in runs["reference"] for w, d in zip(one["plain_write"], one["ours_durable"], strict=True)]
    )
    tf_speed = median(
        [w / d for one in runs["reference"] for w, d in zip(one["plain_write"], one["tf_durable"], strict=True)]
    )
    restore = median(
        [o / t for one in runs["reference"] for o, t in zip(one["ours_restore"], one["tf_restore"], strict=True)]
    )
    print("Without training, in ms\n")
    labels = {
        "copy": "a copy of the state in fresh memory",
        "plain_write": "plain write and fsync of the same bytes",
        "tf_save": "TensorFlow's Saver.save, not durable",
        "tf_durable": "the same, then fsync",
        "ours_durable": "stepguard: from the snapshot to the commit",
        "tf_restore": "TensorFlow's SessionManager: a session, restored unverified",
        "ours_restore": "stepguard's: a session, restored verified",
    }
    print_table(
        ["", "median", "fastest", "slowest"],
        [
            [label, 1e3 * median(references[name]), 1e3 * min(references[name]), 1e3 * max(references[name])]
            for name, label in labels.items()
        ],
    )
    print("Against the reach\n")
    print_table(
        ["", "reached", "reach"],
        [
            ["longest step, less a normal one, in fresh copies", (longest - normal) / copy_ms, "<= 3"],
            ["median step while writing / otherwise", ratio, "<= 1.25"],
            ["extra memory / state", extra, "<= 1.2"],
            ["speed of a durable write / plain write and fsync", speed, ">= 0.8"],
            ["  the same of TensorFlow's save and fsync", tf_speed, ""],
            ["verified restore / TensorFlow's unverified", restore, "<= 1.3"],
            ["torn checkpoints", rows[-1][10], "0"],
        ],
    )


if __name__ == "__main__":
    main()

"""Where Stepguard is meant to differ from TensorFlow's Supervisor. Nothing else may differ.

Each departure has a test of the same name in ``test_departures.py`` that shows both sides. ``docs/`` says the same to
users.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Departure:
    """One difference: what each side does, and why ours does not do the same."""

    reason: str
    tensorflow: str
    stepguard: str


DEPARTURES: dict[str, Departure] = {
    "live_model_is_kept": Departure(
        "the page: a restarted task checks whether the model is initialised, and if so proceeds with it",
        "restores the newest checkpoint over what live parameter servers hold",
        "proceeds with the live model",
    ),
    "global_step_of_rank_one": Departure(
        "the page: global_step may be of rank 1, size 1",
        "TypeError with NumPy 2",
        "counts",
    ),
    "global_step_that_is_a_resource_variable": Departure(
        "the page: the default is the op named 'global_step', if it exists",
        "takes the variable's handle for the step, and goes without a step",
        "finds the variable",
    ),
    "standard_services_without_logdir": Departure(
        "the page: start_standard_services raises ValueError without a logdir",
        "logs a warning and returns None",
        "ValueError; a managed_session without a logdir works on both",
    ),
    "summary_of_a_wrong_type": Departure(
        "the page: summary_computed raises TypeError for what is neither a Summary nor a string",
        "AttributeError",
        "TypeError",
    ),
    "summary_op_that_is_an_operation": Departure(
        "the page: summary_op is an Operation that returns a Summary",
        "computes nothing for it, and fails when it is written",
        "takes its one output; one without such an output is a TypeError at construction",
    ),
    "services_in_plain_tensorflow_2": Departure(
        "programs of plain TensorFlow 2 are to run inside `with tf.Graph().as_default()`",
        "its service threads are in eager mode, and end the run with a ValueError or TypeError",
        "the services work",
    ),
    "checkpoint_of_one_step": Departure(
        "a checkpoint that mixes steps is a state that training never had",
        "saves in the middle of a step",
        "saves between two steps",
    ),
    "final_checkpoint": Departure(
        "the steps since the last timed checkpoint would be lost",
        "saves nothing at a clean end",
        "saves the last step, and records it before STOP",
    ),
    "no_checkpoint_before_the_first_tick": Departure(
        "a session shorter than its first tick leaves nothing behind (the final checkpoint, seen from the other end)",
        "may leave no checkpoint at all",
        "always leaves one",
    ),
    "damaged_checkpoint": Departure(
        "damage to the newest checkpoint should cost a step back, not the run",
        "the restore fails, and so does the run",
        "resumes from the checkpoint before",
    ),
    "checkpoint_of_another_shape": Departure(
        "a checkpoint that does not fit the graph is an error to name, not a model to train",
        "a resource variable silently takes the shape that the checkpoint has",
        "an error that names the variable, and both shapes",
    ),
    "missing_state_file": Departure(
        "the checkpoints are there, only the file that names them is not",
        "starts again at step 0 without a word",
        "resumes from the newest checkpoint",
    ),
    "worker_starts_soon": Departure(
        "a worker has nothing else to do than to notice that the chief is ready",
        "looks once in recovery_wait_secs",
        "looks at least once a second; recovery_wait_secs is the upper bound",
    ),
    "error_made_but_not_raised": Departure(
        "request_stop(ValueError()) is an error to report, wherever it is called",
        "TypeError from request_stop, and no stop",
        "stops, and raises the error at the end",
    ),
    "later_errors": Departure(
        "no error is lost",
        "the errors after the first vanish",
        "they are attached to the first as notes",
    ),
    "missed_ticks": Departure(
        "work on a timer that was late once is not to be done several times at once",
        "calls in a burst until it has caught up",
        "skips the ticks that were missed",
    ),
    "join_of_a_finished_thread": Departure(
        "a thread that has ended is not to be waited for",
        "notices after up to a second",
        "notices at once",
    ),
    "error_while_preparing": Departure(
        "the program needs the error that happened",
        'OutOfRangeError turns into RuntimeError("generator didn\'t yield")',
        "raised as itself",
    ),
    "stop_iteration_in_a_service": Departure(
        "the page: an exception from a service is raised again when the block exits",
        "turns into RuntimeError('generator raised StopIteration')",
        "raised as itself",
    ),
    "interrupts_go_on": Departure(
        "KeyboardInterrupt, SystemExit and GeneratorExit are for whoever started the thread, too",
        "stop_on_exception takes them like any error, and the code after the block runs on",
        "they are reported, and go on",
    ),
    "unchanged_state_is_not_saved_again": Departure(
        "a checkpoint of the state that the newest checkpoint holds costs time and room and is worth nothing",
        "a run that resumes saves at once what it has just restored",
        "saves when something has changed",
    ),
    "checkpoint_path": Departure(
        "the page of TensorBoard's session log: the path of the checkpoint",
        "records save_path, which is the name of no file, with a step read after the save",
        "records the prefix that was written, with its step",
    ),
    "two_event_files_in_one_second": Departure(
        "events are not to be lost",
        "the second session overwrites the event file of the first",
        "both are kept",
    ),
    "first_rate": Departure(
        "a rate is written when one was measured",
        "begins each start with a global_step/sec of 0, and a start shorter than save_summaries_secs has only that",
        "begins it after the first save_summaries_secs; a shorter start gets one rate at its end",
    ),
    "event_file_of_a_new_supervisor": Departure(
        "a name of its own for each event file (the departure above) makes TensorFlow open the file at once",
        "the event file appears with the first record",
        "it appears when the Supervisor is made",
    ),
    "operations_for_iterators": Departure(
        "the state is copied at a step boundary: iterators are serialised, large tensors copied, by the graph itself",
        "adds none",
        "adds a SerializeTensor for each saveable iterator, and a DeepCopy for each tensor of 64 KB or more",
    ),
    "ctrl_c": Departure(
        "a person who stops a run wants to go on with it later",
        "KeyboardInterrupt reaches the program, nothing is saved",
        "a last checkpoint, then KeyboardInterrupt reaches the program",
    ),
    "wrong_types": Departure(
        "an error should come where the mistake is",
        "most arguments of a wrong type fail in the session, some never",
        "fail at construction with TypeError or ValueError; what nothing asks for in this process is warned of",
    ),
    "basenames_that_could_not_be_restored": Departure(
        "a checkpoint that is saved is to be found and restored",
        "a checkpoint_basename with *, ?, [ or \\ is saved by, and the restart fails or begins anew",
        "fails at construction with ValueError; so does one that begins with a dot, as files do that are not complete",
    ),
    "logdirs_that_look_like_a_pattern": Departure(
        "a directory such as lr=[0.1,0.2] is one that people make",
        "saves there, and the restart fails",
        "restores, in a local session",
    ),
    "our_files": Departure(
        "a checkpoint exists when its manifest does; one live process is the chief of a logdir",
        "no such files",
        "model.ckpt-N.manifest.json beside each checkpoint, .stepguard.lock, run.jsonl, heartbeats/, traces/",
    ),
}

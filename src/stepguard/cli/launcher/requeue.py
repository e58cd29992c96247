"""Puts the Slurm job of a preempted run back into the queue, by ``scontrol requeue``.

``scontrol show job`` tells what the environment does not: whether the job may be requeued at all, and whether it was
cancelled. A job that cannot be requeued is refused before the program starts, and not after hours of training.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_TRIES = 3
_WAIT_SECS = 2.0
_ANSWER_SECS = 30.0
_FIELD = re.compile(r"(?:^|\s)(\w+)=(\S*)")


class RequeueRefusedError(Exception):
    """The job cannot be requeued; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """The job that this process is in.

    Args:
        name: as ``scontrol`` wants it. A task of an array needs both of its numbers: the last task has the same
            ``SLURM_JOB_ID`` as the whole array.
        is_first: whether this is the process that speaks for the job, and not one of several that ``srun`` has started.
        restarts: how often the job was requeued before.
    """

    name: str
    is_first: bool
    restarts: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> SlurmJob:
        """The job by its variables.

        Raises:
            RequeueRefusedError: this process is in no job.
        """
        job = environment.get("SLURM_JOB_ID", "")
        if not job:
            raise RequeueRefusedError(
                "--requeue slurm: expected a Slurm job, found no SLURM_JOB_ID; submit this command by sbatch, or leave "
                "--requeue out"
            )
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        restarts = environment.get("SLURM_RESTART_COUNT", "")
        return cls(
            f"{array}_{task}" if array and task else job,
            environment.get("SLURM_PROCID", "0") == "0",
            int(restarts) if restarts.isascii() and restarts.isdigit() else 0,
        )

    def check(self, say: Callable[[str], object]) -> None:
        """Refuse before the start what cannot be requeued. A controller that does not answer is passed over.

        Raises:
            RequeueRefusedError: there is no ``scontrol``, or Slurm would not requeue the job.
        """
        try:
            known = self._known()
        except subprocess.SubprocessError as error:
            say(f"scontrol does not tell whether job {self.name} can be requeued: {_reason(error)}")
            return
        if known.get("BatchFlag") == "0":
            raise RequeueRefusedError(
                f"job {self.name} cannot be requeued: expected a batch job, found one of salloc or srun; submit it by "
                f"sbatch"
            )
        if known.get("Requeue") == "0":
            raise RequeueRefusedError(
                f"job {self.name} cannot be requeued (Requeue=0, by JobRequeue=0 in slurm.conf or by --no-requeue); "
                f"submit it with `sbatch --requeue`"
            )

    def requeue(self, most: int, sleep: Callable[[float], object] = time.sleep) -> None:
        """Put the job back into the queue. Slurm then ends what still runs of it, and starts it again from its top.

        Raises:
            RequeueRefusedError: it was requeued ``most`` times before, it was cancelled, or ``scontrol`` fails.
        """
        if self.restarts >= most:
            raise RequeueRefusedError(
                f"job {self.name} was requeued {self.restarts} times, and --max-requeues allows {most}; submit it again"
            )
        for number in range(_TRIES):
            try:
                if self._known().get("JobState") == "CANCELLED":
                    raise RequeueRefusedError(f"job {self.name} was cancelled: it is not requeued")
                _scontrol("requeue", self.name)
                return
            except subprocess.SubprocessError as error:
                if number == _TRIES - 1:
                    raise RequeueRefusedError(
                        f"job {self.name} could not be requeued: {_reason(error)}; submit it again"
                    ) from error
                sleep(_WAIT_SECS)

    def _known(self) -> dict[str, str]:
        return dict(_FIELD.findall(_scontrol("--oneliner", "show", "job", self.name)))


def _scontrol(*arguments: str) -> str:
    try:
        ended = subprocess.run(
            ["scontrol", *arguments],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWER_SECS,
            # Ctrl-C is for the program.
            start_new_session=True,
        )
    except OSError as error:
        raise RequeueRefusedError(
            f"--requeue slurm: scontrol could not be started: {error.strerror or error}; run it where Slurm's commands "
            f"are installed, or leave --requeue out"
        ) from error
    return ended.stdout


def _reason(error: subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line.strip() for line in (error.stderr or error.stdout or "").splitlines() if line.strip()]
        return lines[-1] if lines else f"scontrol ended with exit code {error.returncode}"
    return f"scontrol gave no answer in {_ANSWER_SECS:g} s"

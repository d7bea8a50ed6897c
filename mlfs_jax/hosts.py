"""Several processes, one for each host, that train one model: who they are, who writes, what happens when one dies.

Every process runs the same program and holds its share of every sharded array. Process 0 alone writes into the run
folder, which all of them see. Whatever decides which program runs next must be decided alike in all of them, or they
wait for each other for ever: what is read from the disk is compared (:func:`same_everywhere`) or told
(:func:`decided`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mlfs_jax.errors import ConfigError, HostsError, MLFSError, first_line

T = TypeVar("T")

LOST = 3
"""Exit code of a process that stopped because another one of its job was gone."""

_INSIDE = "MLFS_INSIDE"
"""Set in the process that :func:`supervise` starts: the id of its parent."""

_SAID = 2000
"""Bytes of the sentence that process 0 tells the others."""

_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Where SLURM (srun) and Open MPI say how many processes they have started."""


@dataclass(frozen=True)
class Hosts:
    """How the processes of one job find each other.

    Attributes:
        coordinator: host:port of process 0, as the others reach it; "auto": as the cluster says (jax knows TPU pods,
            SLURM, Open MPI, Kubernetes); "none": alone, whatever the cluster says. The default is auto where SLURM,
            Open MPI or a TPU pod has started several processes.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        wait: seconds until all of them must have started.
        heartbeat: seconds without a sign of life after which a process counts as dead and the others stop.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    wait: int = 300
    heartbeat: int = 60

    def __post_init__(self):
        given = (self.num_processes, self.process_id)
        if self.coordinator in (None, "auto", "none"):
            if given != (None, None):
                raise ConfigError(f"coordinator = {self.coordinator!r}: num_processes and process_id need host:port.")
        elif None in given or not re.fullmatch(r".+:\d+", self.coordinator):
            raise ConfigError(
                f"coordinator = {self.coordinator!r}, num_processes = {given[0]}, process_id = {given[1]}: expected "
                "host:port of process 0, how many processes there are, and which one this is."
            )
        elif not 0 <= self.process_id < self.num_processes:
            raise ConfigError(f"process_id = {self.process_id}: expected 0 to {self.num_processes - 1}.")
        if self.wait < 1 or self.heartbeat < 1:
            raise ConfigError(f"wait = {self.wait}, heartbeat = {self.heartbeat}: expected at least 1 second.")

    def several(self, environ: Mapping[str, str] = os.environ) -> bool:
        """Whether this process is one of several."""
        if self.coordinator is not None:
            return self.coordinator != "none"
        started = any(environ.get(name, "1") not in ("", "0", "1") for name in _COUNTS)
        return started or "," in environ.get("TPU_WORKER_HOSTNAMES", "")

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Join the others; before anything touches a device. One that fails inside leaves without waiting for them."""
        _die_with_parent()
        try:
            jax.distributed.initialize(
                None if self.coordinator == "auto" else self.coordinator,
                self.num_processes,
                self.process_id,
                cluster_detection_method="deactivate" if self.process_id is not None else None,
                initialization_timeout=self.wait,
                heartbeat_timeout_seconds=self.heartbeat,
                shutdown_timeout_seconds=self.heartbeat,
            )
        except (ValueError, RuntimeError, OSError) as e:
            raise HostsError(
                f"the processes of this job did not find each other ({first_line(e)}): give --coordinator host:port, "
                "--num-processes and --process-id, and start all of them."
            ) from e
        try:
            yield
        except BaseException as e:
            lost, codes = _loss_in(e), {KeyboardInterrupt: 130, MLFSError: 2}
            code = next((code for kind, code in codes.items() if isinstance(e, kind)), 1)
            atexit.register(_leave, LOST if lost else code)
            if lost:
                raise HostsError(f"the processes of this job lost each other ({first_line(lost)}). {_AGAIN}") from e
            raise


def _loss_in(error: BaseException | None) -> BaseException | None:
    """The failed collective that an error comes of: jax's own, or one inside what a library made of it (a save)."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" not in str(error):
        error = error.__cause__ or error.__context__
    return error


_AGAIN = "Start the same command in all of them again: the run continues from its last checkpoint."


def several() -> bool:
    """Whether this process is one of several; asks no device."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_writer() -> bool:
    """Whether this process is the one that writes."""
    return not several() or jax.process_index() == 0


def by_writer(work: Callable[[], T]) -> T | None:
    """Let process 0 do this while the others wait; its result there, None in the others.

    Raises:
        HostsError: in the other processes, and says what process 0 raised; there it is the exception itself.
    """
    if not several():
        return work()
    result, error = None, None
    if is_writer():
        try:
            result = work()
        except Exception as e:
            error = e
    said = np.zeros(_SAID, np.uint8)
    if error is not None:
        sentence = (str(error) or type(error).__name__).encode()[:_SAID]
        said[: len(sentence)] = np.frombuffer(sentence, np.uint8)
    heard = bytes(np.asarray(multihost_utils.broadcast_one_to_all(said))).rstrip(b"\0").decode(errors="replace")
    if error is not None:
        raise error
    if heard:
        raise HostsError(f"process 0: {heard}")
    return result


def decided(yes: bool) -> bool:
    """What process 0 says, in all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(yes))) if several() else yes


def same_everywhere(what: str, value: Any) -> None:
    """Raises HostsError when the processes hold different values (equal ``repr`` is equal)."""
    if several():
        mine = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.int32)
        all_of_them = multihost_utils.process_allgather(mine)
        if (all_of_them != all_of_them[0]).any():
            raise HostsError(
                f"{what} is not the same in all processes (here, in process {jax.process_index()}: {value}): they need "
                "one folder that all of them see, and the same command."
            )


def to_host(x: Any) -> np.ndarray:
    """An array, however sharded, as numpy; with several processes all of them call this."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def reached_stop(step: int) -> bool:
    """Whether some process was sent a SIGTERM and this is the step at which all of them stop."""
    return several() and multihost_utils.reached_preemption_sync_point(step)


# -- what ends a process --------------------------------------------------------------------------------------------


def inside() -> bool:
    """Whether :func:`supervise` has started this process."""
    return _INSIDE in os.environ


def run_job(hosts: Hosts, module: str, args: Sequence[str], work: Callable[[], object]) -> int:
    """Do ``work`` in every process of a job, each under :func:`supervise`; alone where it is the only one.

    Args:
        module: with ``args``, this command once more: ``python -m module args``.

    Returns the exit code.
    """
    if hosts.several() and not inside():
        return supervise([sys.executable, "-m", module, *args])
    with hosts.joined() if hosts.several() else contextlib.nullcontext():
        work()
    return 0


def supervise(command: Sequence[str]) -> int:
    """Run a command in a process of its own, and say in words what ended it; returns its exit code.

    When another process of the job dies, jax ends this one by an abort out of C++, with a stack trace: nothing in the
    same process can make a message of that. Signals are passed on; without the supervisor the process does not live on.
    """
    # a session of its own: Ctrl-C in a terminal reaches it once, by way of us
    child = subprocess.Popen(
        command, env=os.environ | {_INSIDE: str(os.getpid())}, stderr=subprocess.PIPE, start_new_session=True
    )
    before = {
        number: signal.signal(number, lambda number, _: child.send_signal(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    withheld: list[str] = []
    relay = threading.Thread(target=_relay, args=(child.stderr, withheld), daemon=True)
    relay.start()
    try:
        code = child.wait()
        relay.join(timeout=10)  # something that the process started may still hold its end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    text = "".join(withheld)
    if code in (-signal.SIGABRT, LOST) and "JAX distributed service detected fatal errors" in text:
        print(f"error: {_what_happened(text)}", file=sys.stderr)
        return LOST
    sys.stderr.write(text)
    if code < 0:
        print(f"error: the process was ended by {signal.Signals(-code).name}. {_AGAIN}", file=sys.stderr)
        return 128 - code
    return code


def _relay(stream: Any, withheld: list[str]) -> None:
    """Pass on what a process says; from the first complaint of jax's coordination on, keep it."""
    for raw in stream:
        line = raw.decode(errors="replace")
        if withheld or re.match(
            r"[WEF]\d{4} .*(coordination_service|preemption_sync|pjrt/distributed|client\.h)", line
        ):
            withheld.append(line)
        else:
            sys.stderr.write(line)
            sys.stderr.flush()


def _what_happened(text: str) -> str:
    if "/RegisterTask" in text:
        return "not all processes of this job came: are all of them started, and do they reach process 0? (--wait)"
    found = re.search(r"stopped sending heartbeats\):\s*((?:\d+\s+)+)", text)
    if found is None:
        return f"process 0 of this job is gone (if it could, it said why), so this process has stopped, too. {_AGAIN}"
    ids = sorted({int(i) for i in found.group(1).split()})
    which = f"process {ids[0]}" if len(ids) == 1 else f"processes {', '.join(map(str, ids))}"
    return (
        f"{which} of this job stopped answering (killed, out of memory, or its host is down), so this process has "
        f"stopped, too. {_AGAIN}"
    )


def _die_with_parent() -> None:
    """Have Linux kill this process when its supervisor is killed; elsewhere it lives on."""
    if inside():
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != int(os.environ[_INSIDE]):
            os._exit(1)


def _leave(code: int) -> None:
    """End the process without the barrier at which jax would wait for processes that wait for this one."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)

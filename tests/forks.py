"""Runs commands in forks of the test process, so that nothing is imported again."""

import logging
import os
import signal
import socket
import sys
import traceback

import matplotlib.figure  # noqa: F401 (imported once, before any fork)

from lightning_softprompt.cli.app import main

TIMEOUT = 120  # seconds


def fork_command(argv, log, environment=()):
    """Starts a command in a fork of this process; returns its process id and the path of its standard error."""
    if process := os.fork():
        return process, log
    signal.alarm(TIMEOUT)  # no process outlives the tests
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.getLogger("lightning_softprompt").addHandler(
        logging.StreamHandler(sys.stderr)
    )  # pytest captures the root logger
    code = 99
    try:
        code = main(argv)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for(command):
    """Waits until a command of `fork_command` ends; returns its exit code and its standard error."""
    process, log = command
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), log.read_text()


def torchrun_environments(count):
    """Returns the environment of each process, as torchrun sets it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "run"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]

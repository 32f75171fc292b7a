"""Commands in processes of their own, for which nothing has to be imported anew."""

import logging
import os
import signal
import socket
import sys
import traceback

import matplotlib.figure  # noqa: F401 (processes that are forked have it then)

from lightning_softprompt.cli.app import main

LONGEST = 120  # seconds


def forked(argv, told, environment=()):
    """The number of a process that runs a command, and the file of what it says. Nothing has to be imported anew."""
    if number := os.fork():
        return number, told
    signal.alarm(LONGEST)  # none outlives the tests, whatever it waits for
    os.environ.update(environment)
    os.dup2(os.open(told, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.getLogger("lightning_softprompt").addHandler(logging.StreamHandler(sys.stderr))  # pytest has the root's
    code = 99
    try:
        code = main(argv)
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(process):
    """Its exit code, and what it said."""
    number, told = process
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    return code, told.read_text()


def as_of_torchrun(count):
    """The environment of each of several processes, which find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "run"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]

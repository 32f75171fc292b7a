"""Shared by the fuzzing tests: reproducible examples, and an audit of what reading a file makes Python do."""

import os
import sys
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TOUCHES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
           "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "shutil.rmtree",
           "shutil.copyfile", "ctypes.dlopen")  # fmt: skip
WATCHED: list[list[str]] = []


def fuzz(examples):
    """Return settings with the same examples each time, few enough for every run of the suite."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=checks)


def _hook(event, arguments):
    # Python caches what it imports, and jsonargparse once starts another Python to read its path.
    if not WATCHED or "__pycache__" in str(arguments[:1]) or "json.dumps(sys.path)" in str(arguments):
        return
    writes = False
    if event == "open":
        _, mode, flags = arguments
        write_flags = (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        writes = bool(write_flags or set(mode or "") & set("wax+"))
    if writes or event in TOUCHES:
        WATCHED[-1].append(f"{event}{arguments}")


sys.addaudithook(_hook)


@contextmanager
def nothing_happens():
    """Raise an error after the block if it wrote a file or started a process."""
    WATCHED.append([])
    try:
        yield
    finally:
        seen = WATCHED.pop()
    if seen:
        raise AssertionError(f"the block had side effects: {seen}")


NUMBERS = st.integers(-3, 2**70) | st.floats()
TEXTS = st.text(max_size=6) | st.just("negative")
VALUES = st.recursive(  # of a row or a setting, as JSON can contain them
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)

"""Whether processes that a test knows of are still there."""

import psutil


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended, waited for or not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""One writer of a file at a time, among all processes of a machine."""

from __future__ import annotations

import sys
from typing import IO, Any

if sys.platform == "win32":
    import msvcrt
    import os

    _FAR = 2**40  # beyond any content, which stays readable for others

    def lock(file: IO[Any]) -> bool:
        """Lock an open file until it is closed or its process ends, however it ends; False if it is locked already."""
        place = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        os.lseek(file.fileno(), _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        finally:
            os.lseek(file.fileno(), place, os.SEEK_SET)
        return True

else:
    import fcntl

    def lock(file: IO[Any]) -> bool:
        """Lock an open file until it is closed or its process ends, however it ends; False if it is locked already."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

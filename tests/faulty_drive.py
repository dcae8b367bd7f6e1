"""A drive that has faults: a folder mounted again through FUSE, whose reads fail as they are told.

    with faulty_drive(folder) as drive:
        drive.plan(seed=1, short=0.01, slow=0.01, fail=0.01)
        ...  # read drive.path, by whatever system call, a ring's too
        counts = drive.plan()

`fail`: EIO, and then not again at the same place; so for all kinds, else a fault could repeat until
it is for good. `broken`: (file, offset, length) where every read fails. Only reads of expert shards
are touched. The file system is served by a process of its own (this file, run): a caller that holds
Python's lock while it reads must not wait for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SLOW_S = 0.1
THREADS = 12
LARGEST = 1 << 20
KINDS = ("short", "slow", "fail")

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, INIT = 1, 2, 3, 14, 15, 17, 18, 26
FLUSH, OPENDIR, READDIR, RELEASEDIR, INTERRUPT, DESTROY = 25, 27, 28, 29, 36, 38
FORGET_MANY = 42
ASYNC_READ, ASYNC_DIRECT, MANY_PAGES = 1 << 0, 1 << 15, 1 << 22
OPEN_DIRECT = 1  # reads go to us one by one, and may be short
ROOT = 1
DETACH = 2
LIBC = ctypes.CDLL(None, use_errno=True)


class Faults:
    """Which reads are to go wrong."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counted = dict.fromkeys(("reads", "broken", *KINDS), 0)
        self.plan({})

    def plan(self, wanted: dict[str, Any]) -> dict[str, int]:
        """Begin anew; counts of the plan before."""
        with self.lock:
            before = self.counted
            self.rng = random.Random(wanted.get("seed", 0))
            self.rates = [wanted.get(kind, 0.0) for kind in KINDS]
            self.broken = wanted.get("broken")
            self.counted = dict.fromkeys(("reads", "broken", *KINDS), 0)
            self.recent: set[tuple[str, int]] = set()
            return before

    def next(self, name: str, offset: int, size: int) -> str:
        """The kind of fault that this read has; "" for none."""
        with self.lock:
            self.counted["reads"] += 1
            kind, place = "", (name, offset)
            if place in self.recent:
                self.recent.remove(place)
            else:
                kind = self.rng.choices((*KINDS, ""), (*self.rates, 1 - sum(self.rates)))[0]
            if self.broken and self.broken[0] == name:
                begin, end = self.broken[1], self.broken[1] + self.broken[2]
                kind = "broken" if offset < end and offset + size > begin else kind
            if kind:
                self.counted[kind] += 1
            if kind in KINDS:
                self.recent.add(place)
            return kind

    def short(self, size: int) -> int:
        with self.lock:
            return self.rng.randrange(1, size)


class Server:
    """Answers the kernel's requests (linux/fuse.h, protocol 7.31) for one flat folder."""

    def __init__(self, fd: int, folder: Path, faults: Faults) -> None:
        self.fd, self.folder, self.faults = fd, folder, faults
        self.names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
        self.files = [os.open(folder / name, os.O_RDONLY) for name in self.names]

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self.fd, LARGEST + 8192)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return  # unmounted
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                raise
            _, what, number, node = struct.unpack_from("<IIQQ", request)
            if what in (FORGET, FORGET_MANY, INTERRUPT, DESTROY):
                continue
            try:
                answer, code = self.answer(what, node, request[40:]), 0
            except OSError as error:
                answer, code = b"", -(error.errno or errno.EIO)
            head = struct.pack("<IiQ", 16 + len(answer), code, number)
            with contextlib.suppress(FileNotFoundError):  # whoever asked has been interrupted
                os.write(self.fd, head + answer)

    def answer(self, what: int, node: int, body: bytes) -> bytes:
        if what == INIT:
            _, _, ahead, flags = struct.unpack_from("<4I", body)
            flags &= ASYNC_READ | ASYNC_DIRECT | MANY_PAGES
            sizes = (7, 31, ahead, flags, THREADS, THREADS, LARGEST, 1, LARGEST >> 12, 0)
            return struct.pack("<4I2H2I2H", *sizes) + bytes(32)
        if what == LOOKUP:
            name = body.rstrip(b"\0").decode()
            if name not in self.names:
                raise FileNotFoundError(errno.ENOENT, name)
            child = self.names.index(name) + 2
            return struct.pack("<4Q2I", child, 0, 60, 60, 0, 0) + self.attributes(child)
        if what == GETATTR:
            return struct.pack("<Q2I", 60, 0, 0) + self.attributes(node)
        if what == STATFS:
            return (
                struct.pack("<5Q", 0, 0, 0, 0, 0)
                + struct.pack("<4I", 4096, 255, 4096, 0)
                + bytes(24)
            )
        if what in (OPEN, OPENDIR):
            direct = node != ROOT and self.names[node - 2].startswith("experts-")
            return struct.pack("<Q2I", 0, OPEN_DIRECT if direct else 0, 0)
        if what in (FLUSH, RELEASE, RELEASEDIR):
            return b""
        if what in (READ, READDIR):
            _, offset, size = struct.unpack_from("<QQI", body)
            return self.list(offset, size) if what == READDIR else self.read(node, offset, size)
        raise OSError(errno.ENOSYS, "not answered")

    def attributes(self, node: int) -> bytes:
        found = os.fstat(self.files[node - 2]) if node != ROOT else self.folder.stat()
        times = [int(t) for t in (found.st_atime, found.st_mtime, found.st_ctime)]
        ids = (found.st_mode, found.st_nlink, found.st_uid, found.st_gid, 0, 4096, 0)
        return struct.pack("<6Q10I", node, found.st_size, found.st_blocks, *times, 0, 0, 0, *ids)

    def list(self, offset: int, size: int) -> bytes:
        listed = b""
        for place, name in list(enumerate(self.names))[offset:]:
            raw = name.encode()
            entry = struct.pack("<QQ2I", place + 2, place + 1, len(raw), 8) + raw
            entry += bytes(-len(entry) % 8)
            if len(listed) + len(entry) > size:
                break
            listed += entry
        return listed

    def read(self, node: int, offset: int, size: int) -> bytes:
        name = self.names[node - 2]
        kind = self.faults.next(name, offset, size) if name.startswith("experts-") else ""
        if kind in ("fail", "broken"):
            raise OSError(errno.EIO, "as planned")
        if kind == "slow":
            time.sleep(SLOW_S)
        data = os.pread(self.files[node - 2], size, offset)
        return data[: self.faults.short(len(data))] if kind == "short" and len(data) > 1 else data


def main(folder: str, mount: str) -> None:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    told = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if LIBC.mount(b"zipmoe-test", mount.encode(), b"fuse", 1, told.encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    faults = Faults()
    server = Server(fd, Path(folder), faults)
    for _ in range(THREADS):
        threading.Thread(target=server.serve, daemon=True).start()
    tell = functools.partial(print, flush=True)
    tell("ready")
    for line in sys.stdin:
        tell(json.dumps(faults.plan(json.loads(line))))


class Drive:
    """The mounted folder and its faults."""

    def __init__(self, path: Path, process: Any) -> None:
        self.path, self._process = path, process

    def plan(self, **wanted: Any) -> dict[str, int]:
        """Let reads go wrong like that from now on; without arguments, no more.

        Returns how many reads there were under the plan before, and how many of each fault.
        """
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def faulty_drive(folder: Path):
    """Mount; raises OSError where that is not allowed."""
    with tempfile.TemporaryDirectory() as mount:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder), mount],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            if process.stdout.readline() != "ready\n":
                raise OSError(process.communicate()[1].splitlines()[-1])
            yield Drive(Path(mount), process)
        finally:
            LIBC.umount2(mount.encode(), DETACH)
            process.kill()
            process.communicate()


if __name__ == "__main__":
    main(*sys.argv[1:])

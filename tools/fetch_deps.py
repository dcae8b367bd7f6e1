"""Put the sources of zstd, lz4 and xxhash into .deps, for machines without their packages.

Their Python packages carry the C sources, so pip fetches them from the index it is set up for: no
root, no other host. Archives are pinned by SHA-256; CMakeLists.txt compiles what it finds in .deps.

    python tools/fetch_deps.py [FOLDER]
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# package version -> (SHA-256 of its source archive, folder in it, files)
ARCHIVES = {
    "zstandard==0.25.0": (
        "7713e1179d162cf5c7906da876ec2ccb9c3a9dcbdffef0cc7f70c3667a205f0b",
        "zstd",
        ("zstd.c", "zstd.h", "zstd_errors.h"),
    ),
    "lz4==4.4.5": (
        "5f0b9e53c1e82e88c10d7c180069363980136b9d7a8306c4dca4f760d60c39f0",
        "lz4libs",
        ("lz4.c", "lz4.h", "lz4hc.c", "lz4hc.h"),
    ),
    "xxhash==3.6.0": (
        "f0162a78b13a0d7617b2845b90c763339d1f1d82bb04a4b07f4ab535cc5e05d6",
        "deps/xxhash",
        ("xxhash.h",),
    ),
}


def download(requirement: str, folder: Path) -> Path:
    """Fetch the source archive of `requirement` by pip into `folder` and return its path."""
    name = requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
    subprocess.run([*command, "--no-binary", name, "--dest", str(folder), requirement], check=True)
    return next(folder.glob(f"{name}-*.tar.gz"))


def extract(archive: Path, inner: str, names: tuple[str, ...], target: Path) -> None:
    """Copy the files `names` of the archive's folder `inner` to `target`."""
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as tar:
        for name in names:
            member = tar.extractfile(f"{root}/{inner}/{name}")
            if member is None:
                raise SystemExit(f"{archive.name} has no {inner}/{name}")
            (target / name).write_bytes(member.read())


def main() -> None:
    """Fetch, check and unpack every archive; the marker file is written last."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ".deps")
    target.mkdir(parents=True, exist_ok=True)
    (target / "complete").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for requirement, (sha256, inner, names) in ARCHIVES.items():
            archive = download(requirement, Path(scratch))
            found = hashlib.sha256(archive.read_bytes()).hexdigest()
            if found != sha256:
                raise SystemExit(f"{archive.name} has SHA-256 {found}, not {sha256}: not used")
            extract(archive, inner, names, target)
            print(f"{requirement}: {', '.join(names)} in {target}")
    (target / "complete").write_text("".join(f"{requirement}\n" for requirement in ARCHIVES))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Compiles the files of SIMD kernels for 64-bit Arm: Highway's NEON and SVE targets.

    tools/check_neon.py [FILE ...]

Without FILE it takes every source of ours that Highway compiles once per instruction set. Nothing
is linked or run: the check is that each target has the operations that the kernels use.
Exit status: 0 all compile, 1 one does not, 77 no cross compiler or no Highway.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPILER = "aarch64-linux-gnu-g++"
SOURCE_DIRS = ("src", "index", "dataplane")
HIGHWAY = pathlib.Path("/usr/include/hwy")
FLAGS = ["-std=c++23", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror"]


def kernel_files():
    """The sources that include Highway's foreach_target.h, from the root, sorted."""
    found = []
    for directory in SOURCE_DIRS:
        for path in (ROOT / directory).rglob("*.cc"):
            if "<hwy/foreach_target.h>" in path.read_text(encoding="utf-8"):
                found.append(str(path.relative_to(ROOT)))
    return sorted(found)


def compiles(file, include_dir, target_file):
    """Whether the file compiles; the compiler's own words go to standard error."""
    command = [COMPILER, *FLAGS, "-I.", "-isystem", include_dir, "-c", file, "-o", target_file]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        return False
    # A file whose kernels were all left out would compile as well.
    return b"N_NEON" in pathlib.Path(target_file).read_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE")
    files = parser.parse_args().files or kernel_files()
    if shutil.which(COMPILER) is None:
        print(f"skipped: no {COMPILER}; Debian has it in the package g++-aarch64-linux-gnu")
        return 77
    if not HIGHWAY.is_dir():
        print(f"skipped: no {HIGHWAY}; Debian has it in the package libhwy-dev")
        return 77
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        # Highway's headers alone: the C library's beside them are those of this machine.
        os.symlink(HIGHWAY, os.path.join(scratch, "hwy"))
        for file in files:
            good = compiles(file, scratch, os.path.join(scratch, "kernels.o"))
            print(f"{'ok' if good else 'FAILED'}  {file}")
            failed += not good
    if not files:
        print("no file to compile; the check looks in the wrong place")
    return 1 if failed or not files else 0


if __name__ == "__main__":
    sys.exit(main())

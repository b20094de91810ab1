"""``python launch/hostfile.py HOSTFILE [--ssh]``: find what is wrong with a hostfile before anything is
started.

DeepSpeed's own check names the line but not the remedy, looks at the first host only, and finds a missing
Python or too few accelerators when the other nodes are already waiting.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LINE = re.compile(r"(?P<host>[A-Za-z0-9][\w.:@-]*)\s+slots=(?P<slots>\d+)")
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
PROBE = (
    "import torch, deepspeed, hift_ds; found = torch.accelerator.is_available(); "
    "print(torch.accelerator.device_count() if found else 0)"
)


class HostfileError(Exception):
    """One line: what is wrong and what to write instead."""


def read_hostfile(path: Path) -> dict[str, int]:
    """{host: slots}, in order.

    Raises:
        HostfileError: no such file, a malformed line, a host twice, no slots, no hosts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HostfileError(f"cannot read hostfile {str(path)!r}: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = LINE.fullmatch(text)
        if match is None:
            raise HostfileError(f"{path}, line {number}: expected 'NAME slots=N', got {text!r}")
        host, slots = match["host"], int(match["slots"])
        if host in hosts:
            raise HostfileError(f"{path}, line {number}: {host} is given twice; add its slots up in one line")
        if slots < 1:
            raise HostfileError(f"{path}, line {number}: {host} has slots=0; remove the line to leave it out")
        hosts[host] = slots
    if not hosts:
        raise HostfileError(f"{path}: names no host; expected lines 'NAME slots=N' (see launch/hostfile.example)")
    return hosts


def probe(host: str, slots: int, python: str) -> str | None:
    """What keeps ``host`` from taking part, found over ssh; None if nothing does."""
    command = [*SSH, host, python, "-c", f'"{PROBE}"']
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{host}: ssh failed ({error})"
    if done.returncode == 255:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return f"{host}: not reachable by ssh without a password: {reason}"
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"{host}: {python} cannot import torch, deepspeed and hift_ds there: {reason}"
    found = int(done.stdout.split()[-1])
    if 0 < found < slots:
        return f"{host}: slots={slots}, but {found} accelerators found there"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hostfile", type=Path)
    parser.add_argument("--ssh", action="store_true", help="also ask every host for its Python and its accelerators")
    parser.add_argument("--python", default=sys.executable, help="the Python to look for there (default: this one)")
    args = parser.parse_args(argv)
    try:
        hosts = read_hostfile(args.hostfile)
    except HostfileError as error:
        print(f"hostfile: {error}", file=sys.stderr)
        return 2
    problems: list[str] = []
    if args.ssh:
        with ThreadPoolExecutor(max_workers=16) as pool:
            found = pool.map(lambda item: probe(item[0], item[1], args.python), hosts.items())
            problems = [problem for problem in found if problem]
    for problem in problems:
        print(f"hostfile: {problem}", file=sys.stderr)
    if not problems:
        listed = ", ".join(f"{host} x {slots}" for host, slots in hosts.items())
        print(f"{len(hosts)} nodes, {sum(hosts.values())} slots: {listed}")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

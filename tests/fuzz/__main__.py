"""Try odd inputs and judge each: `python -m tests.fuzz --cases 5000 --seed 0`.

A case is made by its area, the seed and its number alone; `--area yaml --case 17 --seed 0` runs it again and prints it.
The exit code is 1 if any case ends in a traceback, a hang, a wrong result or an error that does not name the thing.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.cases import AREAS, SHARES
from tests.fuzz.judge import KINDS, Verdict, judged
from tests.fuzz.mutations import clear


def run_case(area: str, number: int, seed: int) -> tuple[str, Verdict]:
    """What the case tries, and how it ended."""
    folder = Path(tempfile.mkdtemp(prefix="moe-vision-fuzz-"))
    try:
        case = AREAS[area](folder, random.Random(f"{seed} {area} {number}"))
        return case.what, judged(case.work, case.names)
    finally:
        clear(folder)


def numbered(count: int) -> Iterator[tuple[str, int]]:
    """Areas and numbers of so many cases, by the areas' shares."""
    order = [area for area, share in SHARES.items() for _ in range(share)]
    random.Random(0).shuffle(order)
    counts: Counter[str] = Counter()
    for area in itertools.islice(itertools.cycle(order), count):
        yield area, counts[area]
        counts[area] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--area", choices=list(AREAS))
    parser.add_argument("--case", type=int)
    arguments = parser.parse_args()
    if arguments.case is not None:
        what, verdict = run_case(arguments.area, arguments.case, arguments.seed)
        print(f"{what}\n{verdict.kind}: {verdict.text}".encode("utf-8", "backslashreplace").decode())
        return 0 if verdict.good else 1
    found: dict[str, Counter[str]] = {area: Counter() for area in AREAS}
    started = time.monotonic()
    for area, number in numbered(arguments.cases):
        if arguments.area not in (None, area):
            continue
        what, verdict = run_case(area, number, arguments.seed)
        found[area][verdict.kind] += 1
        if not verdict.good:
            again = f"--area {area} --case {number} --seed {arguments.seed}"
            line = f"{again}: {verdict.kind}: {verdict.text} | {what[:200]!r}"
            print(line.encode("utf-8", "backslashreplace").decode(), flush=True)
    print(f"{'area':10} " + " ".join(f"{kind:>9}" for kind in KINDS))
    for area, counts in found.items():
        print(f"{area:10} " + " ".join(f"{counts[kind]:9}" for kind in KINDS))
    print(f"{sum(sum(counts.values()) for counts in found.values())} cases in {time.monotonic() - started:.0f} s")
    return int(any(counts[kind] for counts in found.values() for kind in KINDS[2:]))


if __name__ == "__main__":
    sys.exit(main())

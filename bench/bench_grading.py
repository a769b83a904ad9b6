"""Answers graded per second: `exact`, and `math` on answers that need sympy and on a mixture.

    python bench/bench_grading.py [--workers 2] [--out bench/results/FILE.json] [--reliability FILE]

Every grade is checked first: a wrong one means no number. The last line is one JSON document. --reliability counts
the rates that two cores promise (C7 of docs/reliability.md) into a file as `make reliability` writes it.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from timing import Report

from fastrl.rewards import Exact, Math
from support.promises import record

PROMISED = {"math, mixed": 250, "math, sympy": 50}  # answers/s
TAIL = "The steps above lead to the answer. " * 50  # about 2 KB, as a completion has


def cases(name: str, n: int) -> tuple[list[str], list[str], list[float]]:
    """-> completions, answers, expected rewards."""
    if name == "exact":
        rows = [(f"{i % 7} {i % 11} {i % 13}", str(i % 13 if i % 2 else 99), float(i % 2)) for i in range(n)]
    else:
        easy = [(f"{TAIL}\\boxed{{{i}}}", str(i if i % 2 else i + 1), float(i % 2)) for i in range(n)]
        hard = [
            (f"{TAIL}\\boxed{{x^2+{2 * i}x+{i * i}}}", f"(x+{i if i % 2 else i + 1})^2", float(i % 2)) for i in range(n)
        ]
        rows = hard if name == "math, sympy" else [hard[i] if i % 5 == 0 else easy[i] for i in range(n)]
    return tuple(map(list, zip(*rows, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="")
    parser.add_argument("--reliability", type=Path)
    args = parser.parse_args()
    report = Report("grading", args.out, workers=args.workers)
    with Math(workers=args.workers) as math, Exact() as exact:
        for name, verifier, n in (("exact", exact, 256), ("math, mixed", math, 500), ("math, sympy", math, 200)):
            texts, answers, expected = cases(name, n)
            got = [grade.reward for grade in verifier.grade(texts, answers)]  # starts the processes, too
            assert got == expected, f"{name}: wrong grades, no timing"
            seconds = []
            for _ in range(args.repeats):
                start = time.perf_counter()
                verifier.grade(texts, answers)
                seconds.append(time.perf_counter() - start)
            rate = n / statistics.median(seconds)
            report.add({"what": name, "answers": n, "answers_per_s": rate, "all_s": seconds})
    report.finish()
    if args.reliability:
        kept = [row["answers_per_s"] >= PROMISED[row["what"]] for row in report.rows if row["what"] in PROMISED]
        seconds = sum(sum(row["all_s"]) for row in report.rows)
        counts = {"run": len(kept), "passed": sum(kept), "command": "python bench/bench_grading.py", "seconds": seconds}
        record(args.reliability, {"C7": counts})


if __name__ == "__main__":
    main()

"""python -m soak [--seed N] [--seeds COUNT] [--seconds S] [--folder DIR]"""

import argparse
import sys
import tempfile
from pathlib import Path

from conftest import redis_binary
from swift_s3 import SwiftServer, swift_python

from soak.run import Soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description="Faults over a whole fleet, and what they broke.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="so many, from --seed on")
    parser.add_argument("--seconds", type=float, default=75, help="of load and faults for each")
    parser.add_argument("--folder", type=Path, help="keep the logs there")
    options = parser.parse_args()
    binary = redis_binary()
    if binary is None:
        parser.error("redis-server or valkey-server is missing")
    cache = Path(__file__).resolve().parents[2] / ".pytest_cache" / "d" / "swift"
    failed = 0
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        logs = (options.folder or Path(folder)).resolve()
        logs.mkdir(parents=True, exist_ok=True)
        with SwiftServer(swift_python(cache), logs) as swift:
            for seed in range(options.seed, options.seed + options.seeds):
                own = logs / f"seed-{seed}"
                own.mkdir()
                verdict = Soak(seed, options.seconds, binary, swift, own).run()
                print(verdict, flush=True)
                failed += bool(verdict.wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

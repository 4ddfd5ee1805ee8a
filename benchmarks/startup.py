"""Start-up times: importing the package, `--help`, and `show` on the micro and the Eagle-X5 config.

Each command runs in a process of its own, `--rounds` times; the median counts. `import torch` in the same run says
what the machine itself takes. Run: python benchmarks/startup.py
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs" / "model"
COMMANDS = {
    "python, nothing": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import torch and a transformers model class": ["-c", "import torch; from transformers import CLIPVisionModel"],
    "import moe_vision": ["-c", "import moe_vision"],
    "moe-vision --help": ["-m", "moe_vision", "--help"],
    "moe-vision show micro.yaml": ["-m", "moe_vision", "show", str(CONFIGS / "micro.yaml")],
    "moe-vision show eagle-x5.yaml": ["-m", "moe_vision", "show", str(CONFIGS / "eagle-x5.yaml")],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each command; the median counts")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), help="these commands")
    options = parser.parse_args()
    times = {
        name: statistics.median(seconds(COMMANDS[name]) for _ in range(options.rounds))
        for name in dict.fromkeys(["import torch", *options.only])
    }
    reference = times["import torch"]
    print(f"{'command':48} {'seconds':>8} {'of import torch':>16}")
    for name, value in times.items():
        print(f"{name:48} {value:8.2f} {value / reference:15.2f}x")


if __name__ == "__main__":
    main()

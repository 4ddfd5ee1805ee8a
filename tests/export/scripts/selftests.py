"""The self-test of an export on several folders: `selftests SELFTEST FOLDER FIXTURE [FOLDER FIXTURE …]`, in pairs.

SELFTEST: path of moe_vision/export/selftest.py, which cannot be imported here. Prints what it found for each folder.
"""

import json
import runpy
import sys
from pathlib import Path

check = runpy.run_path(sys.argv[1])["check"]
paths = [Path(path) for path in sys.argv[2:]]
print(json.dumps([check(folder, fixture) for folder, fixture in zip(paths[::2], paths[1::2], strict=True)]))

"""`workloads train` as one file, for `ray submit CLUSTER.yaml scripts/train.py -- --task ...`.

`ray submit` copies only this file to the head, so the package must be there already (file_mounts
or pip install); run from a checkout it finds the package beside itself.
"""

import sys
from pathlib import Path

# A checkout that is not installed; harmless where the file lies alone in a home folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from workloads.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])

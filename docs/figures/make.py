"""Make every picture of the documentation.

python docs/figures/make.py
"""

import os
import subprocess
import sys
from pathlib import Path

SHARED = {"make", "style", "toy"}


def main() -> None:
    """Run the scripts of this folder one after the other."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    for script in sorted(Path(__file__).parent.glob("*.py")):
        if script.stem not in SHARED:
            subprocess.run([sys.executable, str(script)], env=environment, check=True)


if __name__ == "__main__":
    main()

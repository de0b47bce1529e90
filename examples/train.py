"""Train any method of the papers, from a clone: the same as `perceptual-at train`.

python examples/train.py rpat --root data --download --out runs/rpat
"""

import sys

from perceptual_at.commands.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])

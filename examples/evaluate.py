"""Evaluate any model under any threat, from a clone: the same as `perceptual-at evaluate`.

python examples/evaluate.py --model my_package.models:build --checkpoint model.pt --root data --attacks pgd20 aa
"""

import sys

from perceptual_at.commands.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])

"""The command line `perceptual-at`: an application on the public API, which imports nothing private of the rest.

    perceptual-at train rpat --root data --download --out runs/rpat
    python -m perceptual_at train --help

`main` finds the command: `train`, `evaluate`, `compare` and `table` are a module each, and `endings` turns what goes
wrong into one line. What they are made of lies in rooms, whose arrows go down only:

    options       what words mean: every option, the papers' settings by name, what goes together and what does not
    ingredients   images, networks, threats and attacks by their names
    training      what `train` is made of: a run and its state, its batches, what a step minimises, what a method keeps
    evaluating    what the others are made of: wishes, targets, results, records that processes share
"""

"""The command line `perceptual-at`: an application on the public API, which imports nothing private of the rest.

    perceptual-at train rpat --root data --download --out runs/rpat
    python -m perceptual_at train --help

`main` dispatches and turns what goes wrong into one line. `settings` holds every option, `recipes` the papers'
settings by name, `steps` what one step minimises, `train` the run around it.
"""

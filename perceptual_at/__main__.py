"""`python -m perceptual_at`: the command line."""

from perceptual_at.commands.main import main

if __name__ == "__main__":
    main()

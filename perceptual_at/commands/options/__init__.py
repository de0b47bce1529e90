"""What the words of a command line mean: every option, recipes, what goes together and what does not."""

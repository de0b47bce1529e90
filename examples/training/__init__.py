"""The parts of train.py: settings and recipes, what they build, the state that survives a kill, the report."""

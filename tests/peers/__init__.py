"""What users of other libraries rely on, as lists that `tests/test_peers_behaviours.py` runs."""

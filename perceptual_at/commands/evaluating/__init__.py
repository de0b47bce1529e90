"""What `evaluate`, `compare` and `table` are made of: wishes, targets, results, shared records."""

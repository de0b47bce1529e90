"""What `train` and `evaluate` both need: images, networks, threats and attacks by their names."""

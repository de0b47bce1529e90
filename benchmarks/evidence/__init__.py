"""The parts of cifar10_evidence.py: arms and hypotheses, images, training, measurements, the record, its statistics."""

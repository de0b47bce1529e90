"""What `train` is made of: a run and its state, its images, its steps, what its method keeps."""

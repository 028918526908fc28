"""Forward passes and loss terms of one kind of training."""

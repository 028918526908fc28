"""What train.py is told from, one subject a file."""

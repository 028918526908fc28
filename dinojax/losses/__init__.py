"""Loss terms as pure functions, one loss a file."""

"""Hot operations with several implementations, equal in value."""

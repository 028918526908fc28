"""What a run would need on devices that are not here; nothing is trained, no array is made."""

"""From image sources to uint8 batches on the host, and colour on the device."""

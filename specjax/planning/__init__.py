"""What a run will need, before it is paid for: bytes, operations and time, from shapes alone."""

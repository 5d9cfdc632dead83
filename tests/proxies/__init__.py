"""What stands at the far end of a TCP connection, or in the middle of one, and misbehaves as it is told to."""

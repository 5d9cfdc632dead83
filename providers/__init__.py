"""Where a call can go, and how each place speaks."""

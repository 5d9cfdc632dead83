"""One request's trip, and what is kept of it."""

"""The pages: keys with their usage, and one key's page."""

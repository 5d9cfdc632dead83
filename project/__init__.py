"""Puts the parts together. Nobody imports it."""

"""Limits, holds and health, each behind one port."""

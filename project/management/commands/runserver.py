"""Django's development server as Daphne has it, which speaks ASGI.

Daphne is no installed app: every process would load it, and Twisted with it, which is a third of what it takes to start."""

from daphne.management.commands.runserver import Command

__all__ = ["Command"]

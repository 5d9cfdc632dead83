#!/usr/bin/env python
"""Runs Sluice's commands: `serve`, `issue_key`, `usage` and the others that `manage.py help` lists."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()

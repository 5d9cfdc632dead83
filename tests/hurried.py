"""`manage.py` in a hurry: what a server looks at every few seconds it looks at several times a second, for tests that wait for it.

What is shown with it is that something happens, not how soon: tests of the promised times run the server as it is.
"""

from __future__ import annotations

import os
import sys

EVERY_SECONDS = 0.1
RENEW_EVERY_SECONDS = 0.5  # to look for what is due costs more than the other two


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    import django

    django.setup()
    from django.core.management import execute_from_command_line

    from project import runtime
    from proxy import snapshot

    snapshot.LOOK_EVERY_SECONDS = runtime.CUT_EVERY_SECONDS = EVERY_SECONDS
    runtime.TOKENS_EVERY_SECONDS = RENEW_EVERY_SECONDS
    execute_from_command_line(["manage.py", *sys.argv[1:]])


if __name__ == "__main__":
    main()

"""Mails to operators, each once: whoever sees that something is wrong says so as often as it likes.

tell("credential.needs_reauth", "credential 7", "An upstream account has to sign in again", "…")
"""

from __future__ import annotations

import logging
import smtplib
from collections.abc import Sequence
from datetime import timedelta

from django.core.mail import EmailMessage
from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from accounts.models import Notice, User

log = logging.getLogger(__name__)

# What has not been seen for so long is over: seen again, it is news again.
OVER_AFTER = timedelta(minutes=15)
# A mail that could not be sent is tried again then; so is one whose sender has died.
RETRY_AFTER = timedelta(minutes=5)


def tell(event: str, subject: str, title: str, text: str, *, to: Sequence[str] | None = None, once: bool = False) -> bool:
    """Mail this to the operators, or to those given, unless they know. Whether a mail went out.

    It counts as known while it is said again at least every 15 minutes; with `once`, for ever. Processes may say the same at the same
    time. Never raises for a mail that cannot be sent: that is logged, and tried again when it is said again. Raises DatabaseError."""
    if not _claim(event, subject[:200], once=once):
        return False
    receivers = list(to) if to is not None else operators()
    if not receivers:
        log.error("%s: %s Nobody was told: no operator has an e-mail address.", title, text)
        return False
    log.warning("%s (%s): mailed to %s people", title, subject, len(receivers))
    try:
        EmailMessage(f"[Sluice] {title}", text, to=receivers[:1], bcc=receivers[1:]).send()
    except (OSError, smtplib.SMTPException) as problem:
        log.error("%s (%s): the mail could not be sent: %s", title, subject, problem)
        return False
    Notice.objects.filter(event=event, subject=subject[:200]).update(mailed_at=timezone.now())
    return True


def operators() -> list[str]:
    return list(User.objects.filter(is_superuser=True, is_active=True).order_by("pk").values_list("email", flat=True))


@transaction.atomic
def _claim(event: str, subject: str, *, once: bool) -> bool:
    """True for exactly one of those who see it."""
    now = timezone.now()
    _, made = Notice.objects.get_or_create(event=event, subject=subject, defaults={"seen_at": now, "tried_at": now})
    if made:
        return True
    this = Notice.objects.filter(event=event, subject=subject)
    unsent = Q(mailed_at=None, tried_at__lt=now - RETRY_AFTER)
    due = unsent if once else unsent | Q(seen_at__lt=now - OVER_AFTER)
    claimed = this.filter(due).update(seen_at=now, tried_at=now, mailed_at=None)
    if not claimed:
        this.update(seen_at=now)
    return bool(claimed)

"""Tells operators what only they can mend: a line in the log at once, and a mail."""

from __future__ import annotations

import logging
import threading

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.mail import EmailMessage
from django.urls import reverse

from providers.models import Credential

log = logging.getLogger(__name__)


def needs_sign_in(credential: Credential, reason: str) -> None:
    """Returns at once; a mail server that does not answer holds nobody up."""
    link = settings.PUBLIC_URL + reverse("admin:providers_credential_sign_in", args=[credential.pk])
    log.error("Credential %s (%s) has to be signed in again: %s %s", credential.pk, credential.label, reason, link)
    people = get_user_model()._default_manager.filter(is_superuser=True, is_active=True)
    addresses = [address for address in people.values_list("email", flat=True) if address]
    if not addresses:
        return
    subject = f"Sluice: {credential.label} has to be signed in again"
    text = f"The upstream account {credential.label} ({credential.kind}) is out of use.\n\n{reason}\n\nSign it in again: {link}\n"
    mail = EmailMessage(subject, text, to=addresses)
    threading.Thread(target=_send, args=[mail], name="sluice-mail", daemon=True).start()


def _send(mail: EmailMessage) -> None:
    try:
        mail.send()
    except OSError as problem:  # smtplib's errors are such, too
        log.warning("The mail about it could not be sent: %s", problem)

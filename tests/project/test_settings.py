"""What Django is told, where its own default would not do."""

from __future__ import annotations

import pytest
from django.core.signing import BadSignature, get_cookie_signer
from django.http import HttpResponse
from django.test import RequestFactory


def test_a_cookie_signed_the_old_way_is_not_believed() -> None:
    """Django's releases of 2026 sign name and salt apart, and take the old way for a while unless told otherwise."""
    request = RequestFactory().get("/")
    response = HttpResponse()
    response.set_signed_cookie("place", "here", salt="one")
    request.COOKIES["place"] = response.cookies["place"].value
    assert request.get_signed_cookie("place", salt="one") == "here"

    request.COOKIES["place"] = get_cookie_signer(salt="place" + "one").sign("here")
    with pytest.raises(BadSignature):
        request.get_signed_cookie("place", salt="one")

"""The content security policy of each page: strict everywhere, a little less so where a library cannot do without.

The operators' admin evaluates the expressions in its own templates and styles elements in place; it still takes no script
from elsewhere, no inline script, and sends nothing away. The page of the API draws its icons from inline styles.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from csp.middleware import CSPMiddleware, PolicyParts
from django.http import HttpRequest, HttpResponseBase

RELAXED: dict[str, dict[str, list[str]]] = {
    "/admin/": {"script-src": ["'unsafe-eval'"], "style-src": ["'unsafe-inline'"]},
    "/api/docs": {"style-src": ["'unsafe-inline'"]},
}


class ContentPolicyMiddleware(CSPMiddleware):
    def get_policy_parts(self, request: HttpRequest, response: HttpResponseBase, report_only: bool = False) -> PolicyParts:
        parts = super().get_policy_parts(request, response, report_only)
        for prefix, more in RELAXED.items():
            if request.path_info.startswith(prefix):
                update: Any = {**(parts.update or {}), **more}
                return replace(parts, update=update)
        return parts

"""Request ids are UUIDv7, and carry the moment of the request."""

import time
import uuid

from proxy.call import milliseconds_of, new_request_id


def test_a_request_id_is_a_uuid_of_version_7_and_knows_when_it_was_made():
    before = time.time_ns() // 1_000_000
    ids = [new_request_id() for _ in range(1000)]
    after = time.time_ns() // 1_000_000
    assert len(set(ids)) == 1000
    for text in ids:
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
        assert before <= milliseconds_of(text) == parsed.int >> 80 <= after

"""Objects that are written only if nobody else has written them meanwhile."""

import pytest

from safepatch_jax.runtime.conditional import ABSENT, Conditional
from tests import bucket as buckets

pytestmark = buckets.needed


def test_an_object_is_written_in_the_place_of_the_version_that_was_read(bucket_either):
    ours, theirs = (Conditional(bucket_either, "object") for _ in range(2))
    assert ours.read() == (b"", ABSENT)
    first = ours.write(b"one", ABSENT)
    assert first and theirs.read() == (b"one", first)
    assert theirs.write(b"two", ABSENT) == ""
    second = theirs.write(b"two", first)
    assert second not in ("", first) and ours.write(b"three", first) == ""
    ours.delete(first)
    assert ours.read() == (b"two", second)
    theirs.delete(second)
    assert ours.write(b"three", second) == "" and ours.read() == (b"", ABSENT)
    assert ours.write(b"three", ABSENT) and theirs.read()[0] == b"three"


def test_no_permission_says_what_to_do(bucket_server):
    with bucket_server.faults(denied=True):
        with pytest.raises(ValueError, match="Cannot lock gs://bucket/x: no permission") as info:
            Conditional("gs://bucket/x", "object").read()
    assert "objectAdmin" in str(info.value) and "\n" not in str(info.value)

"""The product's settings over a folder that is made for this run and removed after it."""

import atexit
import os
import shutil
import tempfile

_folder = tempfile.mkdtemp(prefix="sluice-tests-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
for _name in ("DATABASE_URL", "REDIS_URL", "SECRET_KEY", "KEYRING", "EGRESS_ALLOW", "PUBLIC_URL", "ALLOWED_HOSTS"):
    os.environ.pop(_name, None)
os.environ["DATA_DIR"] = _folder
if _database := os.environ.get("TEST_DATABASE_URL"):  # the same tests over another database: tests/proxy/test_on_postgres.py
    os.environ |= {"DATABASE_URL": _database, "SECRET_KEY": "tests" * 20, "KEYRING": "rings" * 20}
os.environ["EMAIL_URL"] = "memorymail://"

from project.settings import *  # noqa: E402, F403

# Real hashing costs a quarter of a second a password; what is hashed is the same.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
ALLOWED_HOSTS = ["*"]
# Each test client reads the settings anew, and would look through all static files.
WHITENOISE_AUTOREFRESH = True

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
os.environ["EMAIL_URL"] = "memorymail://"

from project.settings import *  # noqa: E402, F403

# Real hashing costs a quarter of a second a password; what is hashed is the same.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
ALLOWED_HOSTS = ["*"]

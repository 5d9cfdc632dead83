#!/bin/sh
# Before anything serves: the database is brought to the shape of this release, and what a first start needs is made. May run again.
set -eu
cd "$(dirname "$0")/.."
python manage.py migrate --no-input
python manage.py bootstrap
